"""The tables of a shape in the layout of cuda/half_pyramid.cuh, as tensors for the CPU and the GPU.

Ranks are exact: words are uint64 patterns in int64 tensors, and the first ranks of 32 coordinates take two of them.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from compress.ops.half_pyramid.shape import MOST_LEVELS, HalfShape, composition_counts, first_ranks

LARGEST_WORD = 2**64 - 1
DIRECT_RANKS = 2**20
"""The most compositions of 8 that one table holds, of 4 bytes each: more would not stay in a cache."""


@dataclass(frozen=True)
class HalfTables:
    """words int64, quads int16 (uint16 patterns), quad_starts int32 [K + 2]: see `HalfTables` of the header.

    `stride` is the length of a row of first ranks. `octets` int32 [ranks] is the composition of every rank, byte b of
    it m_b | m_{b+4} << 4; empty where D > 8 or there are too many. With more than 16 levels quads are int32, with the
    fifth bits of all m from bit 16 on, and there are no octets.
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
    parts = {d: [*counts[d], *_filled(first[d], stride)] for d in (4, 8, 16) if d < shape.dim}
    top = [*_filled([first[shape.dim][shape.pulses]], stride)]
    numbers = [*itertools.chain(*parts.values()), *top]
    words = [value & LARGEST_WORD for value in numbers] + [value >> 64 for value in top]
    if shape.dim == 32 and deep(shape):
        words += [value >> 64 for value in parts[16]]
    starts = np.cumsum([0, *counts[4]])
    quads = _quads(shape)
    patterns = quads.astype(np.uint32).view(np.int32) if deep(shape) else quads.astype(np.uint16).view(np.int16)
    return HalfTables(
        stride,
        torch.from_numpy(np.array(words, dtype=np.uint64).view(np.int64)),
        torch.from_numpy(patterns),
        torch.from_numpy(starts.astype(np.int32)),
        torch.from_numpy(_octets(shape, quads, starts)),
    )


def deep(shape: HalfShape) -> bool:
    """Whether an m takes more than a nibble."""
    return len(shape.levels) > MOST_LEVELS


def _filled(rows: Sequence[tuple[int, ...]], stride: int) -> Iterator[int]:
    for row in rows:
        yield from row
        yield from itertools.repeat(2**128 - 1, stride - len(row))


def _quads(shape: HalfShape) -> NDArray[np.int64]:
    """All compositions into four parts, by sum and rank: among those of a sum the first pair's sum ascends, then the
    first part, then the third."""
    m = np.indices((shape.limit + 1,) * 4).reshape(4, -1)
    m = m[:, m.sum(0) <= shape.pulses]
    m = m[:, np.lexsort((m[2], m[0], m[0] + m[1], m.sum(0)))]
    places = np.arange(4)[:, None]
    quads: NDArray[np.int64] = ((m & 15) << 4 * places | m >> 4 << 16 + places).sum(0)
    return quads


def _octets(shape: HalfShape, quads: NDArray[np.int64], starts: NDArray[np.int64]) -> NDArray[np.int32]:
    """All pairs of quads, in the order of their ranks."""
    if shape.dim != 8 or shape.ranks > DIRECT_RANKS or deep(shape):
        return np.empty(0, dtype=np.int32)
    places = np.arange(4)
    spread = ((quads[:, None] >> 4 * places & 15) << 8 * places).sum(1)
    halves = [spread[a:b] for a, b in itertools.pairwise(starts)]
    pairs = [(halves[j][:, None] | halves[shape.pulses - j] << 4).ravel() for j in range(shape.pulses + 1)]
    return np.concatenate(pairs).astype(np.uint32).view(np.int32)
