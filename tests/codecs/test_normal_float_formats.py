"""A decoder of NF4, FP4 and int8 written from docs/formats.md alone, in plain Python."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from compress.codecs import CodecSpec, codec

FORMATS = Path(__file__).parents[2] / "docs" / "formats.md"


def fl32(value: float) -> float:
    number: float = struct.unpack("<f", struct.pack("<f", value))[0]
    return number


def values_of(name: str) -> list[float]:
    """The hexadecimal table on the page."""
    text = FORMATS.read_text(encoding="utf-8").split("### `nf4` and `fp4`")[1]
    block = re.findall(r"```\n(.*?)```", text, re.DOTALL)[0]
    rows = re.search(rf"{name} ([0-9a-f \n]+)", block)
    assert rows is not None
    words = re.findall(r"[0-9a-f]{8}", rows[1])
    values = [struct.unpack(">f", bytes.fromhex(word))[0] for word in words]
    return values if len(values) == 16 else [*values, *(-value for value in values)]


def dynamic_map() -> list[float]:
    values = [0.0] * 256
    values[255] = 1.0
    u = fl32(0.1)
    for e in range(7):
        h = fl32(fl32(1 - u) / 2**e)
        x = [fl32(u + i * h) if 2 * i <= 2**e else fl32(1 - (2**e - i) * h) for i in range(2**e + 1)]
        for i in range(2**e):
            value = fl32(fl32(10.0 ** (e - 6)) * fl32(fl32(x[i] + x[i + 1]) / 2))
            values[127 + 2**e + i], values[127 - 2**e - i] = value, -value
    return values


def decode(description: Mapping[str, Any], rows: int, columns: int, payload: bytes) -> list[list[float]]:
    count = rows * columns
    if description["codec"] == "int8":
        scales = struct.unpack(f"<{rows}f", payload[: 4 * rows])
        codes = struct.unpack(f"<{count}b", payload[4 * rows :])
        steps = [fl32(a * fl32(1 / 127)) for a in scales]
        return [[fl32(codes[r * columns + k] * steps[r]) for k in range(columns)] for r in range(rows)]
    block, double = description["options"]["block"], description["options"]["double"]
    blocks = -(-count // block)
    if double:
        tops = -(-blocks // 256)
        t = struct.unpack(f"<{tops}f", payload[: 4 * tops])
        (m,) = struct.unpack("<f", payload[4 * tops : 4 * tops + 4])
        codes, d = payload[4 * tops + 4 :], dynamic_map()
        scales = tuple(fl32(fl32(d[codes[i]] * t[i // 256]) + m) for i in range(blocks))
        codes = codes[blocks:]
    else:
        scales, codes = struct.unpack(f"<{blocks}f", payload[: 4 * blocks]), payload[4 * blocks :]
    v = values_of(description["codec"])
    weight = []
    for index in range(count):
        c = codes[index // 2] & 15 if index % 2 else codes[index // 2] >> 4
        weight.append(fl32(v[c] * scales[index // block]))
    return [weight[r * columns : (r + 1) * columns] for r in range(rows)]


@pytest.mark.parametrize("shape", [(5, 45), (20, 512)], ids=str)
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("nf4", {}),
        ("fp4", {"block": 32}),
        ("nf4", {"block": 32, "double": True}),
        ("fp4", {"double": True}),
        ("int8", {}),
    ],
    ids=str,
)
def test_a_decoder_written_from_the_text(name: str, options: dict[str, object], shape: tuple[int, int]) -> None:
    rounder = codec(name, **options)
    weight = torch.randn(*shape, generator=torch.Generator().manual_seed(0)) ** 3
    weight[3] = 0
    matrix = rounder.quantize(weight, rounder.spec(rounder.widths()[0]))
    raw = matrix.payload().view(torch.uint8).numpy().tobytes()
    assert torch.equal(torch.tensor(decode(matrix.spec.to_dict(), *shape, raw)), matrix.dequantize())


def test_the_worked_example() -> None:
    text = FORMATS.read_text(encoding="utf-8").split("#### A worked example of NF4")[1]
    weight = torch.tensor([[float(value) for value in re.findall(r"\n    ([-\d. ]+)\n", text)[0].split()]])
    description = json.loads(re.findall(r"`(\{.*\})`", text)[0])
    payload = bytes.fromhex(re.findall(r"```\n([0-9a-f ]+)\n```", text)[0])
    spec = CodecSpec.from_dict(description)
    matrix = codec("nf4", **spec.options).quantize(weight, spec)
    assert matrix.payload().view(torch.uint8).numpy().tobytes() == payload
    codes = [int(value) for value in re.findall(r"c = ([\d ]+)\n", text)[0].split()]
    assert [code for byte in payload[4:] for code in (byte >> 4, byte & 15)][: len(codes)] == codes
    assert decode(description, 1, 7, payload) == matrix.dequantize().tolist()
