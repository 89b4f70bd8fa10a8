"""Rank and unrank are inverse bijections onto [0, N), in the documented order."""

from __future__ import annotations

import random
from types import ModuleType

import pytest
import torch

from compress import ops
from compress.errors import CodecError
from compress.ops import codebook_size
from compress.ops.words import from_words

WHOLE = [(1, 4, 4), (2, 5, 5), (3, 6, 2), (4, 7, 7), (5, 6, 6), (8, 5, 1), (8, 6, 6), (6, 12, 2)]
LARGE = [(16, 28, 28), (16, 30, 7), (16, 53, 53), (16, 12, 2), (8, 100, 100), (32, 20, 7), (64, 13, 13), (3, 300, 127)]
WIDE = [
    (16, 58, 58, 64),
    (64, 64, 1, 64),
    (65, 65, 1, 65),
    (16, 60, 60, 65),
    (32, 80, 80, 116),
    (24, 216, 127, 128),
    (64, 111, 111, 205),
    (64, 199, 127, 256),
    (128, 129, 2, 287),
    (128, 225, 127, 416),
    (128, 600, 127, 592),
]


def words_of(values: list[int], words: int) -> torch.Tensor:
    """Python integers as int64 words, the least significant first."""
    rows = [[value >> 64 * w & 2**64 - 1 for w in range(words)] for value in values]
    numbers = torch.tensor([[word - 2**64 if word >= 2**63 else word for word in row] for row in rows])
    return numbers[:, 0] if words == 1 else numbers


def order(y: torch.Tensor) -> list[tuple[int, ...]]:
    """Sort keys of the documented order: 0, +1, -1, +2, -2, ... per coordinate."""
    return [tuple(2 * abs(v) - (v > 0) for v in word) for word in y.tolist()]


@pytest.mark.parametrize(("dim", "pulses", "limit"), WHOLE)
def test_whole_codebooks(kernels: ModuleType, dim: int, pulses: int, limit: int) -> None:
    size = codebook_size(dim, pulses, limit)
    index = torch.arange(size)
    y = kernels.pyramid_unrank(index, dim, pulses, limit)
    assert torch.unique(y, dim=0).shape[0] == size
    assert (y.abs().sum(-1, dtype=torch.int64) == pulses).all() and int(y.abs().max()) <= limit
    assert torch.equal(kernels.pyramid_rank(y, pulses, limit), index)
    assert order(y) == sorted(order(y))


@pytest.mark.parametrize(("dim", "pulses", "limit"), LARGE)
def test_random_indices_of_large_codebooks(kernels: ModuleType, dim: int, pulses: int, limit: int) -> None:
    size = codebook_size(dim, pulses, limit)
    draw = random.Random(dim * pulses)
    chosen = [0, 1, size // 2, size - 2, size - 1] + [draw.randrange(size) for _ in range(3000)]
    index = torch.tensor(chosen)
    y = kernels.pyramid_unrank(index, dim, pulses, limit)
    assert torch.equal(kernels.pyramid_rank(y, pulses, limit), index)


@pytest.mark.parametrize(("dim", "pulses", "limit", "bits"), WIDE)
def test_random_indices_of_many_words(kernels: ModuleType, dim: int, pulses: int, limit: int, bits: int) -> None:
    size = codebook_size(dim, pulses, limit)
    assert (size - 1).bit_length() == bits
    draw = random.Random(dim * pulses)
    chosen = [0, 1, size // 2, size - 2, size - 1] + [draw.randrange(size) for _ in range(60)]
    words = -(-bits // 64)
    index = words_of(chosen, words)
    y = kernels.pyramid_unrank(index, dim, pulses, limit)
    assert (y.abs().sum(-1, dtype=torch.int64) == pulses).all() and int(y.abs().max()) <= limit
    again = kernels.pyramid_rank(y, pulses, limit)
    assert again.shape == index.shape and torch.equal(again, index)
    by_index = [key for _, key in sorted(zip(chosen, order(y), strict=True))]
    assert by_index == sorted(order(y))


def test_backends_rank_alike(native: None) -> None:
    """Vectors of random shape, not only those of random index: D = 128, K = 225, seven words."""
    x = torch.randn(300, 128, generator=torch.Generator().manual_seed(0)).square()
    y, _ = ops.pyramid_encode(x, torch.ones(300), torch.tensor([0.3]), 225, 127)
    index = ops.pyramid_rank(y, 225, 127)
    assert index.shape == (300, 7) and torch.equal(index, ops.reference.pyramid_rank(y, 225, 127))
    assert torch.equal(ops.pyramid_unrank(index, 128, 225, 127), y)


def test_no_vectors(kernels: ModuleType) -> None:
    for pulses, shape in ((5, (0,)), (225, (0, 7))):
        y = torch.zeros(0, 128, dtype=torch.int8)
        index = kernels.pyramid_rank(y, pulses, 127)
        assert index.shape == shape
        assert kernels.pyramid_unrank(index, 128, pulses, 127).shape == (0, 128)


def test_without_a_bound_all_vectors_count() -> None:
    y = ops.pyramid_unrank(torch.arange(codebook_size(4, 5, 5)), 4, 5)
    assert torch.equal(y, ops.pyramid_unrank(torch.arange(codebook_size(4, 5, 5)), 4, 5, 5))
    assert torch.equal(ops.pyramid_rank(y, 5), torch.arange(y.shape[0]))


def test_wrong_vectors_and_indices_are_refused(kernels: ModuleType) -> None:
    for word in ([1, 2, 0, 0], [0, 0, 0, 5], [4, 0, 0, -1]):
        with pytest.raises(CodecError, match="does not have 5 pulses, at most 3"):
            kernels.pyramid_rank(torch.tensor([word], dtype=torch.int8), 5, 3)
    for index in (-1, codebook_size(4, 5, 3)):
        with pytest.raises(CodecError, match="outside its codebook"):
            kernels.pyramid_unrank(torch.tensor([0, index]), 4, 5, 3)


def test_wrong_vectors_and_indices_of_many_words_are_refused(kernels: ModuleType) -> None:
    for word in ([127, 98] + [0] * 126, [0] * 127 + [-125]):
        with pytest.raises(CodecError, match="does not have 225 pulses, at most 126"):
            kernels.pyramid_rank(torch.tensor([word], dtype=torch.int8), 225, 126)
    size = codebook_size(128, 225, 126)
    for index in (size, size + 1, 2**448 - 1):
        with pytest.raises(CodecError, match="outside its codebook"):
            kernels.pyramid_unrank(words_of([0, index], 7), 128, 225, 126)
    assert from_words(words_of([size - 1, 3], 7)) == [size - 1, 3]
    kernels.pyramid_unrank(words_of([size - 1], 7), 128, 225, 126)


def test_numbers_of_other_sizes_are_refused() -> None:
    for index in (torch.zeros(3, dtype=torch.int64), torch.zeros(3, 6, dtype=torch.int64)):
        with pytest.raises(CodecError, match="pyramid_unrank takes"):
            ops.pyramid_unrank(index, 128, 225)
