"""Mutations of an artifact that know its structure: most bytes of one that is changed at random are only a wrong hash.

Each takes a source of random numbers and a folder, changes the folder, and says what it did. After them the checksums
are made anew most of the time, as whoever made such a file on purpose would have done.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from compress.storage import ARTIFACT_MARK, file_entry

Mutation = Callable[[random.Random, Path], str]
Step = str | int

NUMBERS = (0, 1, -1, 2, 7, 8, 16, 31, 52, 63, 64, 127, 255, 2**16, 2**31, 2**32, 2**40, 2**62, 2**63, 2**64, 10**30)
ODD = (*NUMBERS, 0.5, -0.0, 1e308, True, False, None, "", "0", [], {}, [0], ["x"], {"x": 1})
TEXTS = (
    "", ".", "..", "/", "../x", "/etc/passwd", "a/b", "a\\b", "a\x00b", "a\nb", "\x1b[2J", "\ud800", "é" * 40,
    "x" * 5000, "none", "input", "output", "both", "pyramid", "half_pyramid", "integer", "pvq", "nf4", "int8", "beta",
    "F32", "I8", "BF16", "U8", "F8_E4M3", "model.safetensors", "lm_head", "model.embed_tokens",
    "model.layers.0.mlp.up_proj",
)  # fmt: skip
RAW = ("NaN", "-Infinity", "1e999", "9" * 5000, "[" * 3000, '{"a":' * 3000, "[]," * 2000 + "[]", "tru", "")
BROKEN = (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError)
"""What reading a file raises that an earlier mutation broke."""
FLOATS = (
    b"\x00\x00\xc0\x7f",
    b"\x00\x00\x80\x7f",
    b"\x00\x00\x80\xff",
    b"\x00\x00\x80\xbf",
    b"\xff\xff\x7f\x7f",
    b"\x01\0\0\0",
)


LARGEST = 1 << 26
"""Bytes of a file that is read to be mutated, or summed."""


def mutate(draw: random.Random, folder: Path) -> list[str]:
    """One to three mutations of `folder`, and in most cases the checksums of what came of it."""
    done = [draw.choice(MUTATIONS)(draw, folder) for _ in range(draw.choice((1, 1, 1, 2, 3)))]
    if draw.random() < 0.8 and reseal(folder):
        done.append("checksums made anew")
    return done


def reseal(folder: Path) -> bool:
    """Give each file that `compress.json` lists its size and hash; whether there is such a list."""
    path = folder / ARTIFACT_MARK
    try:
        seal = json.loads(path.read_bytes())
        names = [name for name in seal["files"] if (folder / name) in files(folder, "**/*")]
        seal["files"] = {name: file_entry(folder / name) for name in names}
        path.write_text(json.dumps(seal))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return False
    return True


def files(folder: Path, pattern: str = "*") -> list[Path]:
    """Those that are small: a mutation may have made one look as large as a file can be."""
    found = (path for path in folder.glob(pattern) if path.is_file() and not path.is_symlink())
    return sorted(path for path in found if path.stat().st_size <= LARGEST)


def some_file(draw: random.Random, folder: Path, pattern: str = "*") -> Path | None:
    found = files(folder, pattern)
    return draw.choice(found) if found else None


# bytes


def change_bytes(draw: random.Random, folder: Path) -> str:
    """Flip, cut, repeat, blank or append bytes of any file."""
    path = some_file(draw, folder)
    if path is None or not (data := bytearray(path.read_bytes())):
        return "nothing"
    at = draw.randrange(min(len(data), draw.choice((8, 200, 4000, len(data)))))
    length = draw.choice((1, 2, 8, 100))
    kind = draw.choice(("flip", "cut", "drop", "repeat", "blank", "append", "random"))
    if kind == "flip":
        data[at] ^= 1 << draw.randrange(8)
    elif kind == "cut":
        del data[at:]
    elif kind == "drop":
        del data[at : at + length]
    elif kind == "repeat":
        data[at:at] = data[at : at + length]
    elif kind == "blank":
        data[at : at + length] = bytes([draw.choice((0, 255, 32))]) * len(data[at : at + length])
    elif kind == "append":
        data += draw.randbytes(length)
    else:
        data[at : at + length] = draw.randbytes(len(data[at : at + length]))
    path.write_bytes(data)
    return f"{kind} {path.name} at {at}"


# safetensors


def split(path: Path) -> tuple[Any, bytes]:
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def join(path: Path, text: bytes, data: bytes, length: int | None = None) -> None:
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)


def spelled(value: Any) -> bytes:
    return json.dumps(value).encode("utf-8", "surrogatepass")


def change_header(draw: random.Random, folder: Path) -> str:
    """Change the header's table as any JSON; or an entry's shape, dtype and range so that they still fit."""
    path = some_file(draw, folder, "*.safetensors")
    try:
        table, data = split(path) if path is not None else ({}, b"")
        names = [name for name in table if name != "__metadata__"]
        if path is None or not names:
            return "nothing"
        name, other = draw.choice(names), draw.choice(names)
        kind = draw.choice(("any", "any", "length", "shape", "swap", "rename", "alias", "dtype", "twice", "flood"))
        if kind == "any":
            what, text = changed_text(draw, table)
            join(path, text, data)
            return f"header of {path.name}: {what}"
        length, text = None, None
        if kind == "length":
            length = draw.choice([number for number in NUMBERS if 0 <= number < 2**64])
        elif kind == "shape":
            shape = table[name]["shape"]
            table[name]["shape"] = draw.choice(
                ([*shape, 1], [1, *shape], shape[::-1], [*shape, 0], [draw.choice(NUMBERS), *shape[1:]], [])
            )
        elif kind == "swap":
            table[name], table[other] = table[other], table[name]
        elif kind == "rename":
            table[draw.choice(TEXTS)] = table.pop(name)
        elif kind == "alias":
            table[name] = table[other]
        elif kind == "dtype":
            same = {"I8": ("U8", "BOOL", "F8_E4M3", "F8_E5M2"), "BF16": ("F16", "I16", "U16"), "F32": ("I32", "U32")}
            table[name]["dtype"] = draw.choice(same.get(table[name]["dtype"], ("F32",)))
        elif kind == "twice":
            text = spelled(table)[:-1] + b"," + spelled({name: table[other]})[1:]
        else:
            empty = {"dtype": "I8", "shape": [0], "data_offsets": [len(data), len(data)]}
            table |= {f"e{index}": empty for index in range(draw.choice((1, 100, 3000)))}
        join(path, spelled(table) if text is None else text, data, length)
    except BROKEN:
        return "nothing"
    return f"header of {path.name}: {kind} {name}"


def change_payload(draw: random.Random, folder: Path) -> str:
    """Change the bytes of one tensor: all of them, or a number where scales lie."""
    path = some_file(draw, folder, "*.safetensors")
    try:
        table, data = split(path) if path is not None else ({}, b"")
        names = [name for name in table if name != "__metadata__" and table[name]["dtype"] == "I8"]
        if path is None or not names:
            return "nothing"
        name = draw.choice(names)
        begin, end = table[name]["data_offsets"]
        payload = bytearray(data[begin:end])
        kind = draw.choice(("head", "tail", "any", "fill", "random"))
        if kind == "fill":
            payload = bytearray([draw.choice((0, 1, 127, 128, 255))]) * len(payload)
        elif kind == "random":
            payload = bytearray(draw.randbytes(len(payload)))
        else:
            near = {"head": 0, "tail": max(len(payload) - 4, 0), "any": 4 * draw.randrange(max(len(payload) // 4, 1))}
            payload[near[kind] : near[kind] + 4] = draw.choice(FLOATS)[: len(payload) - near[kind]]
        join(path, spelled(table), data[:begin] + bytes(payload) + data[end:])
    except BROKEN:
        return "nothing"
    return f"payload {name}: {kind}"


# JSON


def places(value: Any, so_far: tuple[Step, ...] = ()) -> Iterator[tuple[Step, ...]]:
    """The way to every value inside a value."""
    steps: list[tuple[Step, Any]] = []
    if isinstance(value, dict):
        steps = list(value.items())
    elif isinstance(value, list):
        steps = list(enumerate(value))
    for step, inner in steps:
        yield (*so_far, step)
        yield from places(inner, (*so_far, step))


def changed_text(draw: random.Random, value: Any, below: tuple[Step, ...] = ()) -> tuple[str, bytes]:
    """The JSON text of `value` with one thing in it changed, below the given place."""
    ways = [way for way in places(value) if way[: len(below)] == below and len(way) > len(below)]
    if not ways:
        return "nothing", spelled(value)
    *parents, last = way = draw.choice(ways)
    inside = value
    for step in parents:
        inside = inside[step]
    mark = "\x07mark\x07"
    kind = draw.choice(("odd", "odd", "text", "number", "near", "drop", "twice", "raw", "add", "key"))
    raw = None
    if kind == "odd":
        inside[last] = draw.choice(ODD)
    elif kind == "text":
        inside[last] = draw.choice(TEXTS)
    elif kind == "number":
        inside[last] = draw.choice(NUMBERS)
    elif kind == "near" and isinstance(inside[last], int | float):
        inside[last] += draw.choice((-1, 1, 8, -8))
    elif kind == "drop":
        del inside[last]
    elif kind == "raw":
        raw, inside[last] = draw.choice(RAW), mark
    elif kind == "twice" and isinstance(inside, dict):
        raw = f"{json.dumps(inside[last])}, {json.dumps(last)}: {json.dumps(draw.choice(ODD))}"
        inside[last] = mark
    elif isinstance(inside, dict):
        inside[draw.choice(TEXTS)] = inside.pop(last) if kind == "key" else draw.choice(ODD)
    text = spelled(value)
    if raw is not None:
        text = text.replace(spelled(mark), raw.encode(), 1)
    return f"{kind} at {'/'.join(map(str, way))[:80]}", text


def change_json(pattern: str, *below: Step) -> Mutation:
    """A mutation of a JSON file, or of what is below one place in it."""

    def change(draw: random.Random, folder: Path) -> str:
        path = some_file(draw, folder, pattern)
        if path is None:
            return "nothing"
        try:
            what, text = changed_text(draw, json.loads(path.read_bytes()), below)
        except (ValueError, RecursionError):
            return "nothing"
        path.write_bytes(text)
        return f"{path.name}: {what}"

    return change


# files


def change_files(draw: random.Random, folder: Path) -> str:
    """Remove, exchange, link, empty or add files."""
    path, other = some_file(draw, folder), some_file(draw, folder)
    if path is None or other is None:
        return "nothing"
    kind = draw.choice(("remove", "exchange", "copy", "folder", "link", "loop", "empty", "pickle", "index"))
    if kind == "exchange":
        first, second = path.read_bytes(), other.read_bytes()
        path.write_bytes(second)
        other.write_bytes(first)
    elif kind == "copy":
        (folder / draw.choice(("model.safetensors", "config.json", "extra.json", "extra.py"))).write_bytes(
            path.read_bytes()
        )
    elif kind == "pickle":
        (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    elif kind == "index":
        weight_map = {"model.norm.weight": draw.choice((*TEXTS, path.name))}
        (folder / "model.safetensors.index.json").write_bytes(spelled({"weight_map": weight_map}))
    else:
        path.unlink()
        if kind == "folder":
            path.mkdir()
        elif kind == "link":
            path.symlink_to(draw.choice(("/dev/zero", "/nowhere", "/etc/hostname", other)))
        elif kind == "loop":
            path.symlink_to(path)
        elif kind == "empty":
            path.touch()
    return f"{kind} {path.name}"


MUTATIONS: tuple[Mutation, ...] = (
    change_bytes,
    change_header,
    change_header,
    change_header,
    change_payload,
    change_payload,
    change_json("config.json"),
    change_json("config.json", "quantization_config"),
    change_json("config.json", "quantization_config"),
    change_json("config.json", "quantization_config", "default"),
    change_json("config.json", "quantization_config", "default"),
    change_json("*.index.json"),
    change_json("compress.json"),
    change_json("report.json"),
    change_files,
)
