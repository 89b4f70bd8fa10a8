"""Counts of pyramids against enumeration, closed forms and published values."""

from __future__ import annotations

import itertools
import math

import pytest

from compress.errors import CodecError
from compress.ops.tables import codebook_size, count_table, counts, offset_table


@pytest.mark.parametrize("dim", [1, 2, 3, 4])
@pytest.mark.parametrize("limit", [1, 2, 3, 7])
def test_counts_equal_enumeration(dim: int, limit: int) -> None:
    found: dict[int, int] = {}
    for y in itertools.product(range(-limit, limit + 1), repeat=dim):
        total = sum(map(abs, y))
        found[total] = found.get(total, 0) + 1
    table = counts(dim, dim * limit + 1, limit)
    assert list(table[dim]) == [found.get(k, 0) for k in range(dim * limit + 2)]


@pytest.mark.parametrize(("dim", "pulses"), [(4, 7), (8, 23), (16, 28), (16, 58), (32, 22), (128, 12)])
def test_unbounded_counts_equal_fischers_sum(dim: int, pulses: int) -> None:
    closed = sum(2**i * math.comb(dim, i) * math.comb(pulses - 1, i - 1) for i in range(1, min(dim, pulses) + 1))
    assert codebook_size(dim, pulses, pulses) == closed


@pytest.mark.parametrize(
    ("dim", "pulses", "bits"), [(16, 12, 31.74), (16, 27, 47.60), (16, 28, 48.35), (16, 58, 63.74), (8, 36, 31.92)]
)
def test_index_bits_equal_published_values(dim: int, pulses: int, bits: float) -> None:
    assert math.log2(codebook_size(dim, pulses, pulses)) == pytest.approx(bits, abs=0.01)


def test_offsets_end_at_the_count_of_each_pyramid() -> None:
    dim, pulses, limit = 6, 11, 4
    assert offset_table(dim, pulses, limit)[1:, :, -1].equal(count_table(dim, pulses, limit)[1:])


def test_a_codebook_of_2_to_the_63_is_refused() -> None:
    assert codebook_size(16, 53, 53) < 2**63 <= codebook_size(16, 60, 60)
    with pytest.raises(CodecError, match="fewer than 2\\^63"):
        count_table(16, 60, 60)


def test_an_empty_codebook_is_refused() -> None:
    with pytest.raises(CodecError, match="empty"):
        count_table(4, 9, 2)
