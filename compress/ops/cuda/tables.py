"""A shape's constants and tables for the kernels of half-integer pyramids, laid out for copies of 16 bytes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from compress.ops.cuda.compile import Macros
from compress.ops.half_pyramid.shape import HalfShape
from compress.ops.half_pyramid.tables import half_tables

ODD = 0xFF00FF00
"""Operand of the byte permutation that spreads signs, see cuda/half_octets.cuh."""
LEVEL_WORDS = 4
WIDEST_DIRECT = 31
"""Bits of a rest that the kernels of a direct table can hold."""


@dataclass(frozen=True)
class DeviceTables:
    """The tables on a device. `gains` are float32 bits; `pairs` float16, twice each, divided by `unit` = 2^k."""

    octets: Tensor
    words: Tensor
    quads: Tensor
    starts: Tensor
    lookups: Tensor
    gains: Tensor
    unit_gains: Tensor
    pairs: Tensor
    unit: float


def _padded(values: Tensor, multiple: int, least: int = 0) -> Tensor:
    count = -(-max(values.numel(), least) // multiple) * multiple
    return torch.nn.functional.pad(values, (0, count - values.numel()))


def digit_count(shape: HalfShape) -> int:
    return len(shape.gains) * (2 if shape.coset else 1)


def direct_words(shape: HalfShape, width: int) -> int:
    """Entries of the direct table: one for every rank that the rest's bits can name, so that none is out of bounds.

    0 where there can be none: D > 8, or a rest too wide.
    """
    rest = width - shape.dim
    if shape.dim != 8 or rest > WIDEST_DIRECT:
        return 0
    ranks = ((1 << rest) - 1) // digit_count(shape) + 1
    return (ranks + 3) // 4 * 4


@lru_cache(maxsize=32)
def device_tables(shape: HalfShape, width: int, direct: bool, device: torch.device) -> DeviceTables:
    """The tables of a shape; `octets` holds the direct table where it is asked for."""
    host = half_tables(shape)
    octets = _padded(host.octets, 4, direct_words(shape, width)) if direct else host.octets[:0]
    levels = np.zeros(4 * LEVEL_WORDS, dtype=np.uint8)
    levels[: len(shape.levels)] = shape.levels
    halves = np.ascontiguousarray(levels[:8].astype(np.float16).view(np.uint8).reshape(8, 2).T)
    lookups = np.concatenate([levels.view(np.uint32), np.array([ODD], dtype=np.uint32), halves.view(np.uint32).ravel()])
    gains = np.array(shape.gains, dtype=np.float32)
    unit = math.ldexp(1.0, math.frexp(float(gains.max()))[1])
    pairs = (gains / unit).astype(np.float16).view(np.uint16).astype(np.uint32)
    return DeviceTables(
        octets.to(device),
        _padded(host.words, 2).to(device),
        _padded(host.quads, 8).to(device),
        _padded(host.quad_starts, 4).to(device),
        torch.from_numpy(lookups.view(np.int32)).to(device),
        torch.from_numpy(gains).to(device),
        torch.from_numpy((gains / np.float32(unit)).astype(np.float32)).to(device),
        torch.from_numpy((pairs | pairs << 16).view(np.int32)).to(device),
        unit,
    )


def shape_macros(shape: HalfShape) -> Macros:
    """What every source takes of a shape."""
    return (
        ("HALF_DIM", shape.dim),
        ("HALF_PULSES", shape.pulses),
        ("HALF_LIMIT", shape.limit),
        ("HALF_GAINS", len(shape.gains)),
        ("HALF_SHIFT", shape.shift),
        ("HALF_LOWEST", shape.levels[0]),
        ("HALF_CODES_LOW", shape.codes & (2**64 - 1)),
        ("HALF_CODES_HIGH", shape.codes >> 64),
    )


@dataclass(frozen=True)
class Layout:
    """How a kernel reads a packed matrix: the macros, and the bytes of shared memory that its tables take."""

    macros: Macros
    shared_bytes: int
    direct: bool


@lru_cache(maxsize=256)
def layout_of(shape: HalfShape, width: int, whole: bool, spare: int) -> Layout:
    """`whole`: every row begins at a multiple of 8 groups of 8. `spare`: shared memory that tables may take.

    A table of all compositions where it fits, else the tables of halves in shared memory, else in global memory.
    """
    host = half_tables(shape)
    digit_bytes = -(-8 * (digit_count(shape) + 1) // 16) * 16
    entries = direct_words(shape, width)
    direct = 0 < shape.ranks <= entries and host.octets.numel() > 0 and digit_bytes + 4 * entries <= spare
    words, quads = _padded(host.words, 2).numel(), _padded(host.quads, 8).numel()
    starts = _padded(host.quad_starts, 4).numel()
    halves = 8 * words + 2 * quads + 4 * starts
    shared = not direct and digit_bytes + halves <= spare
    macros = (
        *shape_macros(shape),
        ("HALF_REST", width - shape.dim),
        ("HALF_STRIDE", host.stride),
        ("HALF_DIRECT", int(direct)),
        ("HALF_WHOLE", int(direct and whole)),
        ("HALF_SHARED", int(shared)),
        ("HALF_TABLE", entries if direct else 0),
        ("HALF_WORDS", words),
        ("HALF_QUADS", quads),
    )
    tables = 4 * entries if direct else halves if shared else 0
    return Layout(macros, digit_bytes + tables, direct)
