"""Bit packing against Python's integers of any size."""

from __future__ import annotations

import random
from types import ModuleType

import pytest
import torch

from compress import ops
from compress.errors import CodecError


def signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value


@pytest.mark.parametrize("width", [1, 2, 3, 7, 8, 13, 24, 31, 32, 33, 40, 47, 52, 56, 57, 61, 63, 64])
@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 1000])
def test_packing_equals_a_big_integer(kernels: ModuleType, width: int, count: int) -> None:
    draw = random.Random(width * 1000 + count)
    values = [draw.getrandbits(width) for _ in range(count)]
    packed = kernels.pack_bits(torch.tensor([signed(v) for v in values], dtype=torch.int64), width)
    number = sum(value << (i * width) for i, value in enumerate(values))
    assert bytes(packed.tolist()) == number.to_bytes((count * width + 7) // 8, "little")
    assert kernels.unpack_bits(packed, width, count).tolist() == [signed(v) for v in values]


def test_long_streams_in_both_backends(native: None) -> None:
    draw = torch.Generator().manual_seed(0)
    for width in random.Random(0).sample(range(1, 65), 6):
        values = torch.randint(-(2**63), 2**63 - 1, (150_001,), generator=draw)
        packed = ops.pack_bits(values, width)
        assert torch.equal(packed, ops.reference.pack_bits(values, width))
        back = ops.unpack_bits(packed, width, values.numel())
        assert torch.equal(back, ops.reference.unpack_bits(packed, width, values.numel()))
        assert torch.equal(back, values & ((1 << width) - 1 if width < 64 else -1))


@pytest.mark.parametrize("width", [65, 72, 100, 127, 128, 129, 205, 416, 1000, 1024])
@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 61])
def test_packing_of_many_words_equals_a_big_integer(kernels: ModuleType, width: int, count: int) -> None:
    draw = random.Random(width * 1000 + count)
    words = -(-width // 64)
    given = [[draw.getrandbits(64) for _ in range(words)] for _ in range(count)]
    values = [sum(word << 64 * w for w, word in enumerate(row)) & (1 << width) - 1 for row in given]
    tensor = torch.tensor([[signed(word) for word in row] for row in given], dtype=torch.int64).view(count, words)
    packed = kernels.pack_bits(tensor, width)
    number = sum(value << (i * width) for i, value in enumerate(values))
    assert bytes(packed.tolist()) == number.to_bytes((count * width + 7) // 8, "little")
    back = kernels.unpack_bits(packed, width, count)
    assert back.shape == (count, words)
    assert [[word % 2**64 for word in row] for row in back.tolist()] == [
        [value >> 64 * w & 2**64 - 1 for w in range(words)] for value in values
    ]


@pytest.mark.parametrize("width", [0, 1025, -1])
def test_impossible_widths_are_refused(width: int) -> None:
    with pytest.raises(CodecError, match="1 to 1024"):
        ops.pack_bits(torch.zeros(3, dtype=torch.int64), width)


def test_numbers_of_other_sizes_are_refused() -> None:
    for shape, width in (((3,), 65), ((3, 2), 64), ((3, 2), 129), ((3, 1), 5)):
        with pytest.raises(CodecError, match="pack_bits takes"):
            ops.pack_bits(torch.zeros(shape, dtype=torch.int64), width)


def test_a_short_stream_is_refused() -> None:
    with pytest.raises(CodecError, match="need 7 bytes; the stream has 6"):
        ops.unpack_bits(torch.zeros(6, dtype=torch.uint8), 52, 1)
