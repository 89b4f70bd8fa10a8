"""Ways to break a good folder. Each is a function of the folder `here`, in which the good things lie."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from compress.storage import ARTIFACT_MARK, seal

Make = Callable[[Path], object]
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


def folder(good: str, *changes: Make) -> Make:
    """A copy of the good folder called `good`, called `broken`, after `changes` of it."""

    def make(here: Path) -> None:
        shutil.copytree((here / good).resolve(), here / "broken")
        for change in changes:
            change(here / "broken")

    return make


def file(name: str, payload: bytes | str) -> Make:
    """A file with this content; its folder is made."""

    def make(here: Path) -> None:
        path = here / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(payload if isinstance(payload, bytes) else payload.encode())

    return make


def gone(pattern: str) -> Make:
    def make(here: Path) -> None:
        paths = list(here.glob(pattern))
        assert paths, pattern
        for path in paths:
            path.unlink()

    return make


def fields(path: str, *keys: str, **values: Any) -> Make:
    """The JSON file `path` with fields set, inside the tables `keys`; those set to `...` are removed."""

    def change(data: dict[str, Any]) -> None:
        for key in keys:
            data = data[key]
        for name, value in values.items():
            if value is ...:
                del data[name]
            else:
                data[name] = value

    return edited(path, change)


def edited(path: str, change: Callable[[Any], object]) -> Make:
    """The JSON file `path` after `change` of its value."""

    def make(here: Path) -> None:
        data = json.loads((here / path).read_bytes())
        change(data)
        (here / path).write_text(json.dumps(data))

    return make


def replaced(path: str, old: str, new: str) -> Make:
    def make(here: Path) -> None:
        text = (here / path).read_text()
        assert old in text, f"{old} is not in {path}"
        (here / path).write_text(text.replace(old, new, 1))

    return make


def cut(path: str, keep: Callable[[int], int]) -> Make:
    """The file `path`, of whose so many bytes so many are kept."""

    def make(here: Path) -> None:
        data = (here / path).read_bytes()
        (here / path).write_bytes(data[: keep(len(data))])

    return make


def flipped(path: str, place: Callable[[int], int]) -> Make:
    def make(here: Path) -> None:
        data = bytearray((here / path).read_bytes())
        data[place(len(data))] ^= 1
        (here / path).write_bytes(data)

    return make


Table = dict[str, Any]


def header(change: Callable[[Table], object], path: str = WEIGHTS) -> Make:
    """The safetensors file after `change` of the table in its header; the data stay."""

    def make(here: Path) -> None:
        table, data = read_shard(here / path)
        change(table)
        write_shard(here / path, table, data)

    return make


def header_text(change: Callable[[bytes], bytes], length: int | None = None, path: str = WEIGHTS) -> Make:
    """The safetensors file with another text in its header, and possibly a length that is not the text's."""

    def make(here: Path) -> None:
        table, data = read_shard(here / path)
        text = change(json.dumps(table).encode())
        (here / path).write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)

    return make


def read_shard(path: Path) -> tuple[Table, bytes]:
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def write_shard(path: Path, table: Table, data: bytes) -> None:
    text = json.dumps(table).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def tensor(name: str, **values: Any) -> Make:
    """The entry of one tensor in the header, with other values."""
    return header(lambda table: table[name].update(values))


def in_shards(here: Path) -> None:
    """The same tensors in two files with an index."""
    table, data = read_shard(here / WEIGHTS)
    metadata = table.pop("__metadata__", {})
    names = sorted(table, key=lambda name: table[name]["data_offsets"])
    parts = {
        "model-00001-of-00002.safetensors": names[: len(names) // 2],
        "model-00002-of-00002.safetensors": names[len(names) // 2 :],
    }
    weight_map = {}
    for shard, own in parts.items():
        begin, end = table[own[0]]["data_offsets"][0], table[own[-1]]["data_offsets"][1]
        rows = {
            name: {**table[name], "data_offsets": [place - begin for place in table[name]["data_offsets"]]}
            for name in own
        }
        write_shard(here / shard, {"__metadata__": metadata, **rows}, data[begin:end])
        weight_map |= dict.fromkeys(own, shard)
    (here / WEIGHTS).unlink()
    (here / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def shard_named(shard: str) -> tuple[Make, ...]:
    """Two shards, and an index that says the first tensor to be in `shard`."""

    def rename(index: Table) -> None:
        index["weight_map"][min(index["weight_map"])] = shard

    return in_shards, edited(INDEX, rename)


def linked(name: str, target: str) -> Make:
    return lambda here: (here / name).symlink_to(target)


def several(*makes: Make) -> Make:
    def make(here: Path) -> None:
        for each in makes:
            each(here)

    return make


def scale_of(name: str, scale: bytes) -> Make:
    """The first bytes of the tensor `name`, where a payload has its scale."""

    def make(here: Path) -> None:
        table, data = read_shard(here / WEIGHTS)
        begin = table[name]["data_offsets"][0]
        write_shard(here / WEIGHTS, table, data[:begin] + scale + data[begin + len(scale) :])

    return make


def resealed(here: Path) -> None:
    """Checksums of what is there now, as whoever changed it on purpose would make them."""
    (here / ARTIFACT_MARK).unlink()
    seal(here)
