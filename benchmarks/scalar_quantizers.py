"""The scalar quantizers that the codecs are compared with, each in a few lines of its own.

All take weights and return (what they become, bits per weight with everything that is stored).
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor

CLIPS = torch.linspace(0.3, 1.0, 36)
Mode = Literal["absmax", "min-max", "best clip"]
MODES: tuple[Mode, ...] = get_args(Mode)
HALF = 16
"""Bits of a group's scale."""


def round_to_nearest(weight: Tensor, bits: int, group: int, mode: Mode) -> tuple[Tensor, float]:
    """Integers of b bits times a float16 scale per group.

    absmax: -2^(b-1) .. 2^(b-1) - 1 with the scale max|w| / (2^(b-1) - 1). min-max: 0 .. 2^b - 1 minus a zero point of b
    bits, with the scale (max w - min w) / (2^b - 1). best clip: the same with both ends times that factor in 0.3 to 1,
    in steps of 0.02, that has the least squared error in the group.
    """
    x = weight.reshape(-1, group)
    top = 2**bits - 1
    if mode == "absmax":
        scale = (x.abs().amax(1, keepdim=True) / (top // 2)).half().float()
        after = torch.round(x / scale).clamp_(-(top + 1) // 2, top // 2) * scale
        return after.reshape(weight.shape), bits + HALF / group
    low, high = x.amin(1, keepdim=True).clamp_max(0), x.amax(1, keepdim=True).clamp_min(0)
    best, least = x, torch.full_like(low, math.inf)
    for factor in CLIPS.tolist() if mode == "best clip" else [1.0]:
        scale = ((high - low) * (factor / top)).half().float()
        zero = torch.round(-low * factor / scale)
        after = ((torch.round(x / scale) + zero).clamp_(0, top) - zero) * scale
        error = (after - x).square().sum(1, keepdim=True)
        best, least = torch.where(error < least, after, best), torch.minimum(error, least)
    return best.reshape(weight.shape), bits + (HALF + bits) / group


def normal_float() -> Tensor:
    """The sixteen values of NF4 (Dettmers et al. 2023): quantiles of N(0, 1), seven below 0 and eight above, the outer
    ones half-way between 1 - 1/30 and 1 - 1/32, all divided by the largest."""
    outer = 1 - (1 / 30 + 1 / 32) / 2
    upper = torch.special.ndtri(torch.linspace(outer, 0.5, 9, dtype=torch.float64)[:-1])
    lower = -torch.special.ndtri(torch.linspace(outer, 0.5, 8, dtype=torch.float64)[:-1])
    values = torch.cat([lower, torch.zeros(1, dtype=torch.float64), upper]).sort().values
    return (values / values[-1]).float()


def nf4(weight: Tensor, block: int = 64) -> tuple[Tensor, float]:
    """The nearest value of NF4 times max|w| of the block, a float32 (4.5 bits; with nested 8-bit scales 4.127)."""
    x = weight.reshape(-1, block)
    scale, values = x.abs().amax(1, keepdim=True), normal_float()
    nearest = values[torch.bucketize(x / scale, (values[1:] + values[:-1]) / 2)]
    return (nearest * scale).reshape(weight.shape), 4 + 32 / block


def lloyd_max(bits: int) -> tuple[Tensor, float]:
    """Levels float64 [2^bits] of the best scalar quantizer of N(0, 1), and its mean squared error.

    With phi and Phi the density and distribution of N(0, 1), a cell (a, b) has the mean
    (phi(a) - phi(b)) / (Phi(b) - Phi(a)); levels are means of their cells, so the error is 1 - E[level^2].
    """
    places = (torch.arange(2**bits, dtype=torch.float64) + 0.5) / 2**bits
    levels = torch.special.ndtri(places)
    while True:
        ends = torch.cat(
            [levels.new_tensor([-math.inf]), (levels[1:] + levels[:-1]) / 2, levels.new_tensor([math.inf])]
        )
        mass = torch.special.ndtr(ends).diff()
        means = -(torch.exp(-ends.square() / 2) / math.sqrt(2 * math.pi)).diff() / mass
        if float((means - levels).abs().max()) < 1e-12:
            return levels, 1 - float((mass * levels.square()).sum())
        levels = means
