"""Counts of pyramids against enumeration, closed forms and published values."""

from __future__ import annotations

import itertools
import math

import pytest

from compress.errors import CodecError
from compress.ops.tables import codebook_size, count_table, counts, fits_int64, index_bits, offset_table, word_table
from compress.ops.words import from_words, to_words


@pytest.mark.parametrize("dim", [1, 2, 3, 4])
@pytest.mark.parametrize("limit", [1, 2, 3, 7])
def test_counts_equal_enumeration(dim: int, limit: int) -> None:
    found: dict[int, int] = {}
    for y in itertools.product(range(-limit, limit + 1), repeat=dim):
        total = sum(map(abs, y))
        found[total] = found.get(total, 0) + 1
    table = counts(dim, dim * limit + 1, limit)
    assert list(table[dim]) == [found.get(k, 0) for k in range(dim * limit + 2)]


@pytest.mark.parametrize(("dim", "pulses"), [(4, 7), (8, 23), (16, 28), (16, 58), (32, 22), (128, 12), (128, 225)])
def test_unbounded_counts_equal_fischers_sum(dim: int, pulses: int) -> None:
    closed = sum(2**i * math.comb(dim, i) * math.comb(pulses - 1, i - 1) for i in range(1, min(dim, pulses) + 1))
    assert codebook_size(dim, pulses, pulses) == closed


# fmt: off
PUBLISHED = {
    4: [(29, 15.99)],
    8: [(6, 14.72), (16, 23.85), (36, 31.92), (80, 39.96), (177, 47.98)],
    16: [(4, 15.43), (7, 22.80), (12, 31.74), (18, 39.40), (27, 47.60), (28, 48.35), (40, 55.82), (58, 63.74)],
    24: [(5, 21.03), (9, 31.90), (12, 38.45), (17, 47.39), (18, 48.95), (23, 55.92), (30, 63.86), (82, 95.98),
         (216, 127.94)],
    32: [(7, 29.73), (10, 38.29), (14, 47.91), (17, 54.12), (22, 63.07), (50, 95.62), (105, 127.80)],
    64: [(14, 61.72), (26, 94.06), (43, 127.66), (115, 207.41), (199, 255.86)],
    128: [(28, 126.20), (59, 207.15), (84, 255.57), (225, 415.75)],
}
# fmt: on


@pytest.mark.parametrize("dim", PUBLISHED)
def test_index_bits_equal_published_values(dim: int) -> None:
    """Dimension -> (K, log2 N(D, K)) of unbounded pyramids."""
    for pulses, bits in PUBLISHED[dim]:
        assert math.log2(codebook_size(dim, pulses, pulses)) == pytest.approx(bits, abs=0.011)
        assert index_bits(dim, pulses, pulses) == math.ceil(bits)


@pytest.mark.parametrize(("dim", "pulses"), [(3, 5), (16, 60), (40, 31), (128, 225)])
def test_counts_have_the_symmetry_of_u(dim: int, pulses: int) -> None:
    """U(D, K) = sum_{k<K} N(D-1, k) = U(K, D) and N(D, K) = U(D, K) + U(D, K+1), the identities behind libopus."""

    def u(d: int, k: int) -> int:
        return sum(counts(d - 1, k - 1, k)[d - 1])

    assert u(dim, pulses) == u(pulses, dim)
    assert codebook_size(dim, pulses, pulses) == u(dim, pulses) + u(dim, pulses + 1)


def test_offsets_end_at_the_count_of_each_pyramid() -> None:
    dim, pulses, limit = 6, 11, 4
    assert offset_table(dim, pulses, limit)[1:, :, -1].equal(count_table(dim, pulses, limit)[1:])


def test_words_hold_the_counts() -> None:
    table = word_table(16, 60, 60)
    assert table.shape == (17, 61, 2)
    assert from_words(table.view(-1, 2)) == [value for row in counts(16, 60, 60) for value in row]
    assert not fits_int64(16, 60, 60) and fits_int64(16, 53, 53)


def test_counts_beyond_the_words_of_an_index_are_cut() -> None:
    """N(8, 12) of at most 2 exceeds 2^18, N(8, 16) is 2^8; an index of one word never meets the former."""
    values = counts(70, 140, 2)
    table = word_table(70, 140, 2)
    assert table.shape[2] == 2 and max(max(row) for row in values) > 2**128
    assert from_words(table.view(-1, 2)) == [min(value, 2**128 - 1) for row in values for value in row]


def test_words_round_trip() -> None:
    for words in (1, 2, 7):
        values = [0, 1, 2**63, 2 ** (64 * words) - 1, 3 ** (40 * words) % 2 ** (64 * words)]
        assert from_words(to_words(values, words)) == values
    assert to_words([], 3).shape == (0, 3) and to_words([2**64 - 1], 1).tolist() == [-1]


def test_impossible_codebooks_are_refused() -> None:
    with pytest.raises(CodecError, match="empty"):
        index_bits(4, 9, 2)
    with pytest.raises(CodecError, match="up to 1024"):
        index_bits(256, 1500, 127)
    assert index_bits(128, 128, 1) == 128
