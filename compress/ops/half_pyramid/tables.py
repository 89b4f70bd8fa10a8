"""The tables of a shape in the layout of cuda/half_pyramid.cuh, as tensors for the CPU and the GPU.

Ranks are exact: words are uint64 patterns in int64 tensors, and the first ranks of 32 coordinates take two of them.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from compress.ops.half_pyramid.reference import unrank_compositions
from compress.ops.half_pyramid.shape import HalfShape, composition_counts, first_ranks

LARGEST_WORD = 2**64 - 1
DIRECT_RANKS = 2**20
"""The most compositions of 8 that one table holds, of 4 bytes each: more would not stay in a cache."""


@dataclass(frozen=True)
class HalfTables:
    """words int64, quads int16 (uint16 patterns), quad_starts int32 [K + 2]: see `HalfTables` of the header.

    `stride` is the length of a row of first ranks. `octets` int32 [ranks] is the composition of every rank, byte b of
    it m_b | m_{b+4} << 4; empty where D > 8 or there are too many.
    """

    stride: int
    words: Tensor
    quads: Tensor
    quad_starts: Tensor
    octets: Tensor


@lru_cache(maxsize=32)
def half_tables(shape: HalfShape) -> HalfTables:
    stride = 1 << (shape.pulses + 1).bit_length()
    counts = composition_counts(shape.dim, shape.pulses, shape.limit)
    first = first_ranks(shape.dim, shape.pulses, shape.limit)
    words: list[int] = []
    for d in (4, 8, 16):
        if d < shape.dim:
            words.extend(counts[d])
            for row in first[d]:
                words.extend(row + (LARGEST_WORD,) * (stride - len(row)))
    top = first[shape.dim][shape.pulses]
    top += (2**128 - 1,) * (stride - len(top))
    words.extend(value & LARGEST_WORD for value in top)
    words.extend(value >> 64 for value in top)
    starts = np.cumsum([0, *counts[4]])
    sums = np.repeat(np.arange(shape.pulses + 1), counts[4])
    ranks = np.arange(starts[-1]) - starts[sums]
    quads = _nibbles(unrank_compositions(ranks.astype(object), sums, 4, shape.limit))
    return HalfTables(
        stride,
        torch.from_numpy(np.array(words, dtype=np.uint64).view(np.int64)),
        torch.from_numpy(quads.astype(np.uint16).view(np.int16)),
        torch.from_numpy(starts.astype(np.int32)),
        torch.from_numpy(_octets(shape, quads, starts)),
    )


def _nibbles(m: NDArray[np.int64]) -> NDArray[np.int64]:
    nibbles: NDArray[np.int64] = (m << 4 * np.arange(m.shape[1])).sum(1)
    return nibbles


def _octets(shape: HalfShape, quads: NDArray[np.int64], starts: NDArray[np.int64]) -> NDArray[np.int32]:
    """All pairs of quads, in the order of their ranks."""
    if shape.dim != 8 or shape.ranks > DIRECT_RANKS:
        return np.empty(0, dtype=np.int32)
    places = np.arange(4)
    spread = ((quads[:, None] >> 4 * places & 15) << 8 * places).sum(1)
    halves = [spread[a:b] for a, b in itertools.pairwise(starts)]
    pairs = [(halves[j][:, None] | halves[shape.pulses - j] << 4).ravel() for j in range(shape.pulses + 1)]
    return np.concatenate(pairs).astype(np.uint32).view(np.int32)
