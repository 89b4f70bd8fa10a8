"""The operations on half-integer pyramids in plain torch and exact integers: the definition of every backend.

Ranks of 32 coordinates have up to 120 bits, so they are computed as arrays of Python's integers.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from compress.errors import CodecError
from compress.ops import search
from compress.ops.bits import pack_bits, unpack_bits
from compress.ops.half_pyramid.shape import HalfShape, composition_counts, first_ranks, plane_widths

Integers = NDArray[np.object_]


def encode(x: Tensor, scale: Tensor, shape: HalfShape) -> tuple[Tensor, Tensor, Tensor]:
    """v int8 [G, D], gain and coset int64 [G] of x float32 [G, D] under scales [G]; see `compress.ops.search`."""
    gains = torch.tensor(shape.gains, dtype=torch.float32, device=x.device)
    return search.encode(x, scale, gains, shape.levels, shape.shift, shape.pulses)


def rank_compositions(m: NDArray[np.int64], limit: int) -> Integers:
    """rank(m) of each row of m [G, d]; all rows have the same sum or not: each is ranked among those of its own."""
    groups, dim = m.shape
    if dim == 1:
        return np.zeros(groups, dtype=object)
    half = dim // 2
    sums = m.sum(1)
    most = int(sums.max()) if groups else 0
    counts = np.array(composition_counts(half, most, limit)[half], dtype=object)
    left_sums = m[:, :half].sum(1)
    table = first_ranks(dim, most, limit)[dim]
    first = np.array([table[k][j] for k, j in zip(sums.tolist(), left_sums.tolist(), strict=True)], dtype=object)
    left, right = rank_compositions(m[:, :half], limit), rank_compositions(m[:, half:], limit)
    return first + left * counts[sums - left_sums] + right


def unrank_compositions(rank: Integers, sums: NDArray[np.int64], dim: int, limit: int) -> NDArray[np.int64]:
    """m [G, dim] with sum `sums` and the given ranks; the inverse of `rank_compositions`."""
    groups = rank.shape[0]
    if dim == 1:
        return sums[:, None].copy()
    half = dim // 2
    most = int(sums.max()) if groups else 0
    counts = np.array(composition_counts(half, most, limit)[half], dtype=object)
    table = first_ranks(dim, most, limit)[dim]
    left_sums = np.zeros(groups, dtype=np.int64)
    first = np.zeros(groups, dtype=object)
    for k in np.unique(sums):
        chosen = sums == k
        row = np.array(table[k][: k + 1], dtype=object)
        place = np.searchsorted(row, rank[chosen], side="right") - 1
        left_sums[chosen], first[chosen] = place, row[place]
    rest = rank - first
    divisor = np.maximum(counts[sums - left_sums], 1)
    left = unrank_compositions(rest // divisor, left_sums, half, limit)
    right = unrank_compositions(rest % divisor, sums - left_sums, half, limit)
    return np.concatenate([left, right], 1)


def pack(values: Tensor, gain: Tensor, coset: Tensor, shape: HalfShape, width: int) -> list[Tensor]:
    """Signs and planes of groups v int8 [G, D], gain int64 [G], coset int64 [G] (0 or 1, 0 without one).

    Signs uint8 [G D / 8]: bit i % 8 of byte i // 8 is 1 where weight i is negative before the shift. Then the planes of
    the rest, `plane_widths(width - D)`, each a bit stream of `compress.ops.pack_bits`. Raises `CodecError` for values
    that are none of the shape's.
    """
    groups = values.shape[0]
    bare = values.to(torch.int64) - torch.where(coset == 0, shape.shift, -shape.shift).unsqueeze(-1)
    place = torch.full((128,), -1, dtype=torch.int64)
    place[torch.tensor(shape.levels)] = torch.arange(len(shape.levels))
    m = place[bare.abs().clamp_max(127)]
    if groups and (bool((m < 0).any()) or bool((m.sum(1) != shape.pulses).any())):
        raise CodecError(f"A group to pack is none of {shape.dim} coordinates and {shape.pulses} pulses.")
    rank = rank_compositions(m.numpy(), shape.limit)
    rest = rank * len(shape.gains) + gain.numpy().astype(object)
    if shape.coset:
        rest = rest * 2 + coset.numpy().astype(object)
    planes = [pack_bits((bare < 0).to(torch.int64).flatten(), 1)]
    for bits in plane_widths(width - shape.dim):
        part = (rest & ((1 << bits) - 1)).astype(np.uint64).view(np.int64)
        planes.append(pack_bits(torch.from_numpy(part), bits))
        rest = rest >> bits
    return planes


def unpack_parts(
    planes: list[Tensor], groups: int, shape: HalfShape, width: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of each group the composition m and the signs (1 where negative) [G, D], gain and coset [G], all int64.

    Raises `CodecError` for a rest that no group has.
    """
    rest, place = np.zeros(groups, dtype=object), 0
    for plane, bits in zip(planes[1:], plane_widths(width - shape.dim), strict=True):
        part = unpack_bits(plane, bits, groups).numpy().view(np.uint64).astype(object)
        rest, place = rest + part * (1 << place), place + bits
    if groups and max(rest) >= shape.codes:
        raise CodecError(f"A code lies outside its codebook of {shape.codes}.", remedy="The codes are damaged.")
    coset = rest & 1 if shape.coset else rest * 0
    rest = rest >> 1 if shape.coset else rest
    gain, rank = rest % len(shape.gains), np.asarray(rest // len(shape.gains), dtype=object)
    sums = np.full(groups, shape.pulses, dtype=np.int64)
    m = unrank_compositions(rank, sums, shape.dim, shape.limit)
    negative = unpack_bits(planes[0], 1, groups * shape.dim).view(groups, shape.dim)
    gain_index, coset_index = (torch.from_numpy(each.astype(np.int64)) for each in (gain, coset))
    return torch.from_numpy(m), negative, gain_index, coset_index


def unpack(planes: list[Tensor], groups: int, shape: HalfShape, width: int) -> tuple[Tensor, Tensor]:
    """Values v int8 [G, D] and gain int64 [G] of signs and planes; the inverse of `pack`."""
    m, negative, gain, coset = unpack_parts(planes, groups, shape, width)
    return group_values(m, negative, coset, shape), gain


def group_values(m: Tensor, negative: Tensor, coset: Tensor, shape: HalfShape) -> Tensor:
    """v int8 [G, D] of the parts of groups."""
    levels = torch.tensor(shape.levels)[m]
    shift = torch.where(coset == 0, shape.shift, -shape.shift).unsqueeze(-1)
    return (torch.where(negative == 1, -levels, levels) + shift).to(torch.int8)


def decode(
    planes: list[Tensor], scales: Tensor, columns: int, shape: HalfShape, width: int, dtype: torch.dtype
) -> Tensor:
    """W [o, columns] = fl32(fl32(r S) v), rounded to `dtype`, for row scales r float32 [o]."""
    rows, groups = scales.numel(), -(-columns // shape.dim)
    values, gain = unpack(planes, rows * groups, shape, width)
    gains = torch.tensor(shape.gains, dtype=torch.float32)
    containers = scales.unsqueeze(-1) * gains[gain].view(rows, groups)
    weight = values.view(rows, groups, shape.dim) * containers.unsqueeze(-1)
    return weight.view(rows, groups * shape.dim)[:, :columns].to(dtype).contiguous()


def linear(x: Tensor, planes: list[Tensor], scales: Tensor, shape: HalfShape, width: int, activations: str) -> Tensor:
    """x W^T [R, o] in float32 arithmetic, in x's dtype; with "int8" activations x is rounded row by row first."""
    return product(x, decode(planes, scales, x.shape[1], shape, width, torch.float32), activations)


def product(x: Tensor, weight: Tensor, activations: str) -> Tensor:
    """x W^T of a decoded weight float32 [o, n], as `linear`."""
    rows = x.float()
    if activations == "int8":
        step = rows.abs().amax(1, keepdim=True) / 127 if x.shape[1] else torch.zeros(x.shape[0], 1, device=x.device)
        rows = torch.round(rows / torch.where(step > 0, step, 1)) * step
    return (rows @ weight.T).to(x.dtype)
