"""Rank and unrank are inverse bijections onto [0, N), in the documented order."""

from __future__ import annotations

import random
from types import ModuleType

import pytest
import torch

from compress import ops
from compress.errors import CodecError
from compress.ops import codebook_size

WHOLE = [(1, 4, 4), (2, 5, 5), (3, 6, 2), (4, 7, 7), (5, 6, 6), (8, 5, 1), (8, 6, 6), (6, 12, 2)]
LARGE = [(16, 28, 28), (16, 30, 7), (16, 53, 53), (16, 12, 2), (8, 100, 100), (32, 20, 7), (64, 13, 13), (3, 300, 127)]


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
