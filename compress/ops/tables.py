"""How many integer pyramids there are, which is all that ranking them needs.

The pyramid P(D, K, m) holds the integer vectors y of D coordinates with sum |y_i| = K and every |y_i| <= m. Fixing the
first coordinate to +-j leaves a vector of P(D - 1, K - j, m), hence

    N(d, k) = N(d-1, k) + 2 sum_{j=1..m} N(d-1, k-j),       N(0, 0) = 1,  N(0, k > 0) = 0,

and subtracting the same line for k - 1 leaves four terms:

    N(d, k) = N(d, k-1) + N(d-1, k) + N(d-1, k-1) - 2 N(d-1, k-1-m).

Without a bound (m >= K) the last term vanishes and this is the recurrence of Fischer (1986). Counting only the vectors
within the bound matters: a Gaussian source hardly ever uses the tall spikes of the pyramid, and their share of the
codebook (a third at D = 16, K = 28, m = 7) is better spent on finer shapes or more gains.

Counts are exact Python integers of any size. An index has ceil(log2 N) bits and is held in 64-bit words
(`compress.ops.words`); codebooks of up to 2^1024 vectors are ranked, which is every one of up to 128 coordinates of at
most 127.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from compress.errors import CodecError
from compress.ops.words import MOST_WORDS, WORD, to_words, word_count

LARGEST = 2**63 - 1


@lru_cache(maxsize=4)
def counts(dim: int, pulses: int, limit: int) -> tuple[tuple[int, ...], ...]:
    """N(d, k) for d = 0..dim and k = 0..pulses, as exact integers: `counts(...)[d][k]`."""
    rows = [tuple(int(k == 0) for k in range(pulses + 1))]
    for _ in range(dim):
        above = rows[-1]
        row: list[int] = []
        for k in range(pulses + 1):
            value = above[k]
            if k > 0:
                value += row[k - 1] + above[k - 1]
            if k > limit:
                value -= 2 * above[k - 1 - limit]
            row.append(value)
        rows.append(tuple(row))
    return tuple(rows)


def codebook_size(dim: int, pulses: int, limit: int) -> int:
    """N(dim, pulses): the number of vectors in P(dim, pulses, limit), an exact integer of any size."""
    return counts(dim, pulses, limit)[dim][pulses]


def index_bits(dim: int, pulses: int, limit: int) -> int:
    """ceil(log2 N): the bits of an index into P(dim, pulses, limit).

    Raises `CodecError` when there is no such vector, or more than 2^1024.
    """
    size = codebook_size(dim, pulses, limit)
    name = f"The pyramid of {dim} coordinates, {pulses} pulses and at most {limit} on one"
    if size == 0:
        raise CodecError(f"{name} is empty.", remedy=f"Ask for at most {dim * limit} pulses.")
    bits = (size - 1).bit_length()
    if bits > WORD * MOST_WORDS:
        raise CodecError(
            f"{name} has indices of {bits} bits; there are those of up to {WORD * MOST_WORDS}.",
            remedy="Ask for fewer pulses.",
        )
    return bits


@lru_cache(maxsize=64)
def index_words(dim: int, pulses: int, limit: int) -> int:
    """The 64-bit words of an index into P(dim, pulses, limit). Errors as `index_bits`."""
    return word_count(index_bits(dim, pulses, limit))


@lru_cache(maxsize=4)
def word_table(dim: int, pulses: int, limit: int) -> Tensor:
    """N(d, k) in words: int64 [dim + 1, pulses + 1, W], for the compiled kernels. Errors as `index_bits`.

    An entry that no vector of this pyramid reaches may need more words; it is cut to all ones.
    """
    words = index_words(dim, pulses, limit)
    most = (1 << WORD * words) - 1
    entries = [min(value, most) for row in counts(dim, pulses, limit) for value in row]
    return to_words(entries, words).view(dim + 1, pulses + 1, words)


def fits_int64(dim: int, pulses: int, limit: int) -> bool:
    """Whether signed 64-bit integers hold all indices, so that torch can compute with them."""
    return codebook_size(dim, pulses, limit) <= LARGEST


@lru_cache(maxsize=64)
def count_table(dim: int, pulses: int, limit: int) -> Tensor:
    """N(d, k) as int64 [dim + 1, pulses + 1] of a pyramid for which `fits_int64`.

    An entry that no vector of this pyramid reaches may be larger than that; it is cut to 2^63 - 1.
    """
    return torch.tensor([[min(value, LARGEST) for value in row] for row in counts(dim, pulses, limit)])


@lru_cache(maxsize=64)
def offset_table(dim: int, pulses: int, limit: int) -> Tensor:
    """Vectors of P(d, k, limit) whose first magnitude is below m: int64 [dim + 1, pulses + 1, limit + 2].

    offset(d, k, 0) = 0,  offset(d, k, m + 1) = offset(d, k, m) + (1 if m = 0 else 2) N(d-1, k-m). Row d = 0 is unused.
    """
    table = counts(dim, pulses, limit)
    planes = [[[0] * (limit + 2)] * (pulses + 1)]
    for d in range(1, dim + 1):
        plane = []
        for k in range(pulses + 1):
            row = [0]
            for m in range(limit + 1):
                words = table[d - 1][k - m] if m <= k else 0
                row.append(min(row[-1] + (words if m == 0 else 2 * words), LARGEST))
            plane.append(row)
        planes.append(plane)
    return torch.tensor(planes)
