"""docs/formats.md is enough to read a payload: a decoder written from its text alone, in plain Python."""

from __future__ import annotations

import json
import re
import struct
from functools import lru_cache
from pathlib import Path

import pytest
import torch

from compress.codecs import CodecSpec, codec

ROOT = Path(__file__).resolve().parents[2]


def fl32(value: float) -> float:
    """The nearest float32. A product of two float32 is exact in float64, so this rounds it once."""
    return float(struct.unpack("<f", struct.pack("<f", value))[0])


@lru_cache(maxsize=100_000)
def count(d: int, k: int, m: int) -> int:
    if k < 0 or d == 0:
        return int(d == 0 and k == 0)
    return count(d - 1, k, m) + 2 * sum(count(d - 1, k - j, m) for j in range(1, m + 1))


def vector(index: int, dim: int, k: int, m: int) -> list[int]:
    y = []
    for i in range(1, dim + 1):
        a = count(dim - i, k, m)
        if index < a:
            y.append(0)
            continue
        index -= a
        u = 1
        while index >= 2 * count(dim - i, k - u, m):
            index -= 2 * count(dim - i, k - u, m)
            u += 1
        negative = index >= count(dim - i, k - u, m)
        index -= count(dim - i, k - u, m) if negative else 0
        y.append(-u if negative else u)
        k -= u
    return y


def decode(description: dict[str, object], rows: int, columns: int, payload: bytes) -> list[list[float]]:
    dim, width, options = int(description["dim"]), int(description["width"]), description["options"]
    tables = json.loads((ROOT / "compress/codecs/pyramid/levels.json").read_text())["tables"]
    chosen = [t for t in tables if (t["version"], t["dim"], t["max"]) == (options["table"], dim, options["max"])]
    line = chosen[0]["widths"][str(width)]
    groups = (columns + dim - 1) // dim
    assert len(payload) == 4 + rows + (rows * groups * width + 7) // 8
    scale = struct.unpack("<f", payload[:4])[0]
    stream = int.from_bytes(payload[4 + rows :], "little")
    weight = []
    for r in range(rows):
        q = payload[4 + r]
        row_scale = fl32(scale * fl32(2.0 ** (-(255 - q) / 16))) if q else 0.0
        row: list[float] = []
        for g in range(groups):
            code = stream >> ((r * groups + g) * width) & ((1 << width) - 1)
            container = fl32(row_scale * fl32(line["levels"][code % len(line["levels"])]))
            y = vector(code // len(line["levels"]), dim, line["pulses"], line["limit"])
            row += [fl32(container * pulses) for pulses in y]
        weight.append(row[:columns])
    return weight


@pytest.mark.parametrize(("largest", "width"), [(7, 24), (7, 52), (7, 59), (127, 61), (127, 64)])
def test_a_decoder_written_from_the_text_reads_payloads(largest: int, width: int) -> None:
    pyramid = codec("pyramid", max=largest)
    weight = torch.randn(5, 45, generator=torch.Generator().manual_seed(width))
    weight[3] = 0
    matrix = pyramid.quantize(weight, pyramid.spec(width))
    raw = matrix.payload().view(torch.uint8).numpy().tobytes()
    assert torch.equal(torch.tensor(decode(matrix.spec.to_dict(), 5, 45, raw)), matrix.dequantize())


def test_the_worked_example() -> None:
    text = (ROOT / "docs/formats.md").read_text().split("### A worked example")[1]
    weight = torch.tensor([[float(v) for v in re.findall(r"\n    ([-\d ]+)\n", text)[0].split()]])
    description = json.loads(re.findall(r"`(\{.*\})`", text)[0])
    payload = bytes.fromhex(re.findall(r"```\n([0-9a-f ]+)\n```", text)[0])
    matrix = codec("pyramid").quantize(weight, CodecSpec.from_dict(description))
    assert matrix.payload().view(torch.uint8).numpy().tobytes() == payload
    y = [int(v) for v in re.findall(r"y = ([-\d ]+)\n", text)[0].split()]
    assert matrix.integers()[0].tolist() == [y]
    assert decode(description, 1, 16, payload) == matrix.dequantize().tolist()


@lru_cache(maxsize=100_000)
def compositions(d: int, k: int, most: int) -> int:
    if d == 1:
        return int(k <= most)
    half = d // 2
    return sum(compositions(half, j, most) * compositions(half, k - j, most) for j in range(k + 1))


def composition(rank: int, d: int, k: int, most: int) -> list[int]:
    if d == 1:
        return [k]
    half, first = d // 2, 0
    while (words := compositions(half, first, most) * compositions(half, k - first, most)) <= rank:
        rank -= words
        first += 1
    left, right = divmod(rank, compositions(half, k - first, most))
    return composition(left, half, first, most) + composition(right, half, k - first, most)


def decode_half(description: dict[str, object], rows: int, columns: int, payload: bytes) -> list[list[float]]:
    dim, width, options = int(description["dim"]), int(description["width"]), description["options"]
    tables = json.loads((ROOT / "compress/codecs/half_pyramid/tables.json").read_text())["tables"]
    key = (options["table"], dim, options["coset"], options["levels"])
    chosen = [t for t in tables if (t["version"], t["dim"], t["coset"], t["levels"]) == key]
    line = chosen[0]["widths"][str(width)]
    levels, gains, most = line["levels"], line["gains"], len(line["levels"]) - 1
    groups, bits = (columns + dim - 1) // dim, width - dim
    widths = [64] * (bits // 64) + [int(p) for p in (32, 16, 8, 4, 2, 1) if bits % 64 & int(p)]
    scale, streams, start = struct.unpack("<f", payload[:4])[0], [], 4 + rows
    for p in [dim, *widths]:
        end = start + (rows * groups * p + 7) // 8
        streams.append(int.from_bytes(payload[start:end], "little"))
        start = end
    assert start == len(payload)
    weight = []
    for r in range(rows):
        q = payload[4 + r]
        row_scale = fl32(scale * fl32(2.0 ** (-(255 - q) / 16))) if q else 0.0
        row: list[float] = []
        for g in range(r * groups, (r + 1) * groups):
            rest, place = 0, 0
            for stream, p in zip(streams[1:], widths, strict=True):
                rest |= (stream >> g * p & (1 << p) - 1) << place
                place += p
            side = 1
            if line["shift"]:
                side, rest = (-1 if rest % 2 else 1), rest // 2
            container = fl32(row_scale * fl32(gains[rest % len(gains)]))
            m = composition(rest // len(gains), dim, line["pulses"], most)
            signs = [-1 if streams[0] >> (g * dim + i) & 1 else 1 for i in range(dim)]
            values = [sign * levels[k] + side * line["shift"] for sign, k in zip(signs, m, strict=True)]
            row += [fl32(container * value) for value in values]
        weight.append(row[:columns])
    return weight


@pytest.mark.parametrize(
    ("options", "rate"),
    [({}, 1.5), ({}, 3.25), ({}, 5), ({"dim": 16}, 3.25), ({"dim": 16, "coset": False}, 2.125),
     ({"dim": 32, "levels": "uniform"}, 3.0), ({"dim": 32}, 5)],
)  # fmt: skip
def test_a_decoder_written_from_the_text_reads_half_pyramids(options: dict[str, object], rate: float) -> None:
    rounder = codec("half_pyramid", **options)
    weight = torch.randn(5, 45, generator=torch.Generator().manual_seed(int(8 * rate)))
    weight[3] = 0
    matrix = rounder.quantize(weight, rounder.spec(rounder.widths(rate)[0]))
    raw = matrix.payload().view(torch.uint8).numpy().tobytes()
    assert torch.equal(torch.tensor(decode_half(matrix.spec.to_dict(), 5, 45, raw)), matrix.dequantize())


def test_the_worked_example_of_a_half_pyramid() -> None:
    text = (ROOT / "docs/formats.md").read_text().split("#### A worked example")[1]
    weight = torch.tensor([[float(v) for v in re.findall(r"\n    ([-\d. ]+)\n", text)[0].split()]])
    description = json.loads(re.findall(r"`(\{.*\})`", text)[0])
    payload = bytes.fromhex(re.findall(r"```\n([0-9a-f ]+)\n```", text)[0])
    matrix = codec("half_pyramid").quantize(weight, CodecSpec.from_dict(description))
    assert matrix.payload().view(torch.uint8).numpy().tobytes() == payload
    values = [int(v) for v in re.findall(r"v = .* = ([-\d ]+)\n", text)[0].split()]
    assert matrix.integers()[0].tolist() == [values]
    assert decode_half(description, 1, 8, payload) == matrix.dequantize().tolist()


def decode_integers(description: dict[str, object], rows: int, columns: int, payload: bytes) -> list[list[float]]:
    width, options = int(description["width"]), description["options"]
    size = min(options["group"] or columns, columns)
    groups, fixed = (columns + size - 1) // size, options["symmetric"] or width == 8
    scales = struct.unpack(f"<{rows * groups}e", payload[: 2 * rows * groups])
    start = 2 * rows * groups
    points = 0 if fixed else (rows * groups * width + 7) // 8
    zeros = int.from_bytes(payload[start : start + points], "little")
    codes = int.from_bytes(payload[start + points :], "little")
    assert len(payload) == start + points + (rows * columns * width + 7) // 8
    weight, mask = [], (1 << width) - 1
    for r in range(rows):
        row = []
        for c in range(columns):
            group = r * groups + c // size
            z = 1 << width - 1 if fixed else zeros >> group * width & mask
            row.append(fl32(scales[group] * ((codes >> (r * columns + c) * width & mask) - z)))
        weight.append(row)
    return weight


@pytest.mark.parametrize("width", range(2, 9))
@pytest.mark.parametrize("options", [{}, {"group": 8, "symmetric": True}, {"group": 0}, {"group": 13}], ids=str)
def test_a_decoder_written_from_the_text_reads_group_integers(options: dict[str, object], width: int) -> None:
    rounder = codec("integer", **options)
    weight = torch.randn(5, 45, generator=torch.Generator().manual_seed(width))
    weight[3] = 0
    matrix = rounder.quantize(weight, rounder.spec(width))
    raw = matrix.payload().view(torch.uint8).numpy().tobytes()
    assert torch.equal(torch.tensor(decode_integers(matrix.spec.to_dict(), 5, 45, raw)), matrix.dequantize())


def test_the_worked_example_of_group_integers() -> None:
    text = (ROOT / "docs/formats.md").read_text().split("#### A worked example of group integers")[1]
    weight = torch.tensor([[float(v) for v in re.findall(r"\n    ([-\d. ]+)\n", text)[0].split()]])
    description = json.loads(re.findall(r"`(\{.*\})`", text)[0])
    payload = bytes.fromhex(re.findall(r"```\n([0-9a-f ]+)\n```", text)[0])
    spec = CodecSpec.from_dict(description)
    matrix = codec("integer", **spec.options).quantize(weight, spec)
    assert matrix.payload().view(torch.uint8).numpy().tobytes() == payload
    integers = [int(v) for v in re.findall(r"q - z = ([-\d ]+)\n", text)[0].split()]
    assert matrix.integers()[0][:, :12].tolist() == [integers]
    assert decode_integers(description, 1, 12, payload) == matrix.dequantize().tolist()
