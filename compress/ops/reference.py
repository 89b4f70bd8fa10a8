"""The operations in plain torch: the definition that the native backend repeats bit for bit.

**The encoder's problem.** For a gain level l, finding the integer y with sum |y_i| = K and |y_i| <= m that is nearest
to a = |x| / scale in the metric ||a - l y||^2 is separable and convex: every vector reached from the optimum for one
sum by the cheapest single step is the optimum for the next sum. So round, then repair the sum one pulse at a time.
Shifting all coordinates by a common theta before rounding is the Lagrangian of the sum and keeps that property, while
it leaves only a few steps to do. Trying every level and keeping the best is the joint optimum over (gain, y).

**The arithmetic** is float32 with every operation rounded on its own (no fused multiply-add), in this order:

    a_i   = min(|x_i| / scale, 2^20)                q_i = a_i * (1 / l)
    theta = (sum q - K) * (1 / D)                   y_i = trunc(min(max(q_i - theta, 0), m) + 1/2)
    while sum y != K: the step whose sign * (q_i - y_i) is largest, sign = +1 while pulses are missing, else -1,
                      among y_i < m (sign +1) or y_i > 0 (sign -1); the lowest index on a tie
    error = sum (a_i - l * y_i)^2                   the level of least error; the lowest level on a tie

Sums of floats are taken as a tree: D is padded with zeros to a power of two and the upper half is added to the lower
half until one number is left. A scale of 0 gives the first vector of the codebook and gain 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compress.errors import CodecError
from compress.ops.tables import codebook_size, count_table, offset_table

LARGEST_RATIO = float(2**20)
CHUNK_ELEMENTS = 2**20
"""Coordinates handled at once; the encoder keeps about ten float32 tensors of this size (40 MB)."""


def tree_sum(values: Tensor) -> Tensor:
    """Sum over the last axis (a power of two long) by halves: the order every backend uses."""
    while values.shape[-1] > 1:
        half = values.shape[-1] // 2
        values = values[..., :half] + values[..., half:]
    return values[..., 0]


def project(q: Tensor, capacity: Tensor, dim: int, pulses: int) -> Tensor:
    """The integer y >= 0 (as float32) nearest to q [G, P] with sum y = pulses and y_i <= capacity_i [P]."""
    theta = (tree_sum(q) - pulses) * torch.ones_like(capacity[0]).div(dim)
    y = torch.trunc(torch.minimum((q - theta.unsqueeze(-1)).clamp_min(0), capacity) + 0.5)
    missing = pulses - y.sum(-1)
    for sign in (1.0, -1.0):
        active = (missing * sign > 0).nonzero().squeeze(-1)
        while active.numel():
            held = y[active]
            allowed = held < capacity if sign > 0 else held > 0
            merit = torch.where(allowed, (q[active] - held) * sign, -torch.inf)
            y[active, merit.argmax(-1)] += sign
            missing[active] -= sign
            active = active[missing[active] * sign > 0]
    return y


def first_codeword(dim: int, pulses: int, limit: int) -> list[int]:
    """The vector of index 0: the last coordinates carry as much as they may."""
    word = [0] * dim
    left = pulses
    for i in reversed(range(dim)):
        word[i] = min(left, limit)
        left -= word[i]
    return word


def _encode_chunk(x: Tensor, scale: Tensor, levels: Tensor, pulses: int, limit: int) -> tuple[Tensor, Tensor]:
    groups, dim = x.shape
    padded = 1 << (dim - 1).bit_length()
    ratio = torch.where(scale > 0, scale, 1).unsqueeze(-1)
    a = torch.nn.functional.pad(x.abs().div(ratio).clamp_max(LARGEST_RATIO), (0, padded - dim))
    capacity = torch.zeros(padded, device=x.device)
    capacity[:dim] = float(limit)
    best = torch.full((groups,), torch.inf, device=x.device)
    word = torch.zeros_like(a)
    gain = torch.zeros(groups, dtype=torch.int64, device=x.device)
    inverse = torch.ones_like(levels) / levels
    for j in range(levels.numel()):
        y = project(a * inverse[j], capacity, dim, pulses)
        residual = a - levels[j] * y
        error = tree_sum(residual * residual)
        better = error < best if j else torch.ones_like(error, dtype=torch.bool)
        best = torch.where(better, error, best)
        word = torch.where(better.unsqueeze(-1), y, word)
        gain.masked_fill_(better, j)
    signed = torch.where(x < 0, -word[:, :dim], word[:, :dim]).to(torch.int8)
    empty = scale == 0
    gain.masked_fill_(empty, 0)
    first = torch.tensor(first_codeword(dim, pulses, limit), dtype=torch.int8, device=x.device)
    return torch.where(empty.unsqueeze(-1), first, signed), gain


def pyramid_encode(x: Tensor, scale: Tensor, levels: Tensor, pulses: int, limit: int) -> tuple[Tensor, Tensor]:
    """argmin over (j, y) of ||x - scale levels_j y||^2: y int8 [G, D] and j int64 [G]. See the module's text."""
    groups, dim = x.shape
    y = torch.empty((groups, dim), dtype=torch.int8, device=x.device)
    gain = torch.empty(groups, dtype=torch.int64, device=x.device)
    step = max(1, CHUNK_ELEMENTS // dim)
    for start in range(0, groups, step):
        part = slice(start, start + step)
        y[part], gain[part] = _encode_chunk(x[part], scale[part], levels, pulses, limit)
    return y, gain


def pyramid_rank(y: Tensor, pulses: int, limit: int) -> Tensor:
    """Index of each y int8 [G, D] in its codebook, int64 [G], in the order 0, +1, -1, +2, -2, ... per coordinate."""
    groups, dim = y.shape
    words = count_table(dim, pulses, limit).to(y.device)
    offsets = offset_table(dim, pulses, limit).to(y.device)
    magnitude = y.to(torch.int64).abs()
    if groups and bool(((magnitude.sum(-1) != pulses) | (magnitude.amax(-1) > limit)).any()):
        raise CodecError(f"A vector to rank does not have {pulses} pulses, at most {limit} on one coordinate.")
    index = torch.zeros(groups, dtype=torch.int64, device=y.device)
    left = torch.full_like(index, pulses)
    for i in range(dim):
        d, m = dim - i, magnitude[:, i]
        index += offsets[d][left, m]
        left -= m
        index += torch.where(y[:, i] < 0, words[d - 1][left], 0)
    return index


def pyramid_unrank(index: Tensor, dim: int, pulses: int, limit: int) -> Tensor:
    """The vector y int8 [G, dim] of each index int64 [G]; the inverse of `pyramid_rank`."""
    words = count_table(dim, pulses, limit).to(index.device)
    offsets = offset_table(dim, pulses, limit).to(index.device)
    size = codebook_size(dim, pulses, limit)
    if index.numel() and bool(((index < 0) | (index >= size)).any()):
        raise CodecError(f"An index lies outside its codebook of {size} vectors.", remedy="The codes are damaged.")
    y = torch.empty((index.numel(), dim), dtype=torch.int8, device=index.device)
    rest = index.clone()
    left = torch.full_like(index, pulses)
    for i in range(dim):
        d = dim - i
        m = torch.searchsorted(offsets[d][left], rest.unsqueeze(-1), right=True).squeeze(-1) - 1
        rest -= offsets[d][left, m]
        left -= m
        positive = words[d - 1][left]
        negative = (m > 0) & (rest >= positive)
        rest -= torch.where(negative, positive, 0)
        y[:, i] = torch.where(negative, -m, m)
    return y


def pack_bits(values: Tensor, width: int) -> Tensor:
    """The low `width` bits of int64 [G] as a little-endian bit stream, uint8 [ceil(G width / 8)].

    Bit b of value g is bit (g width + b) of the stream; bit n of the stream is bit n % 8 of byte n // 8. The last byte
    is filled with zeros.
    """
    out = torch.empty(packed_bytes(values.numel(), width), dtype=torch.uint8, device=values.device)
    shifts = torch.arange(width, device=values.device)
    weights = (1 << torch.arange(8, device=values.device)).to(torch.uint8)
    step = max(8, CHUNK_ELEMENTS // width // 8 * 8)
    for start in range(0, values.numel(), step):
        bits = ((values[start : start + step, None] >> shifts) & 1).to(torch.uint8).flatten()
        bits = torch.nn.functional.pad(bits, (0, -bits.numel() % 8)).view(-1, 8)
        first = start * width // 8
        out[first : first + bits.shape[0]] = (bits * weights).sum(-1, dtype=torch.uint8)
    return out


def unpack_bits(packed: Tensor, width: int, count: int) -> Tensor:
    """The first `count` values of a stream made by `pack_bits`, as int64 patterns [count]."""
    out = torch.empty(count, dtype=torch.int64, device=packed.device)
    shifts = torch.arange(width, device=packed.device)
    places = torch.arange(8, dtype=torch.uint8, device=packed.device)
    step = max(8, CHUNK_ELEMENTS // width // 8 * 8)
    for start in range(0, count, step):
        here = min(step, count - start)
        first = start * width // 8
        piece = packed[first : first + packed_bytes(here, width)]
        bits = ((piece[:, None] >> places) & 1).flatten()[: here * width].view(here, width)
        out[start : start + here] = (bits.to(torch.int64) << shifts).sum(-1)
    return out


def packed_bytes(count: int, width: int) -> int:
    """Bytes of a bit stream of `count` values: ceil(count width / 8)."""
    return (count * width + 7) // 8
