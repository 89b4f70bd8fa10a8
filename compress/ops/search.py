"""The encoder of all pyramids in plain torch: the definition that the compiled backends repeat bit for bit.

A group x of D weights under a row scale r becomes c v with c = r S_j and small integers v_i = s_i t[m_i] + e d: levels
t (0, 1, 2, ... in the integer pyramid; 1, 3, 5, ... or trained ones in the half-integer pyramid), 0 <= m_i <= M,
sum m_i = K, and a shift e d of the whole group, e = +-1, where there is a coset. The encoder finds

    argmin over (j, e, m) of ||x - c v||^2.

**Why single steps find it.** With q_i = |x_i / (r S_j) - e d| the sign of v_i is that of what it stands for, and
sum (q_i - t[m_i])^2 under sum m = K remains. One more pulse on coordinate i gains

    up_i(m) = c1[m] q_i - c0[m],     c1[m] = 2 (t[m+1] - t[m]),    c0[m] = t[m+1]^2 - t[m]^2.

Where the steps of t do not grow and those of t^2 do not shrink, up_i falls with m whatever q_i >= 0 is: the problem
is separable and convex, so m is optimal when no pulse gains by moving from one coordinate to another. Trying every gain
and both cosets makes the choice jointly optimal.

**The arithmetic** is float32, every operation rounded on its own, sums from i = 0 upwards:

    a_i = clamp(x_i / r, +-2^20)      v = a_i (1 / S_j) - e d      q_i = min(|v|, 2^14)
    guess     g_i = q_i slope - offset,   theta = (sum g - K) (1 / D) - 1/2,   m_i = trunc(clamp(g_i - theta, 0, M))
    repair    while sum m != K: the best single step (largest up or down), the lowest i on a tie
    move      while the best up and the best down together gain: both
    error     sum (|v| - t[m_i])^2 times S_j^2;  the first candidate of least error, j ascending, e = +1 before -1

slope = 1 / p and offset = t[0] / p with p = (t[b] - t[0]) / b, b = min(4, M), p = 1 for M = 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

LARGEST_RATIO = float(2**20)
LARGEST_STEP = float(2**14)
CHUNK_ELEMENTS = 2**20
"""Coordinates handled at once; the search keeps about ten float32 tensors of this size (40 MB)."""


@dataclass(frozen=True)
class _Levels:
    """t, c1 and c0 as float32, and the coefficients of the guess."""

    level: Tensor
    rise: Tensor
    cost: Tensor
    slope: float
    offset: float
    uniform: bool

    @classmethod
    def of(cls, levels: Sequence[int], device: torch.device) -> _Levels:
        level = torch.tensor(levels, dtype=torch.float32, device=device)
        anchor = min(4, len(levels) - 1)
        pitch = (level[anchor] - level[0]) / anchor if anchor else torch.ones((), device=device)
        step, square = level.diff(), level.square().diff()
        uniform = len(levels) < 3 or bool((step == step[0]).all())
        pad = torch.zeros(1, device=device)
        one = torch.ones((), device=device)
        return cls(
            level,
            torch.cat([2 * step, pad]),
            torch.cat([square, pad]),
            float(one / pitch),
            float(level[0] / pitch),
            uniform,
        )

    def up(self, q: Tensor, m: Tensor) -> Tensor:
        """What the pulse from m to m + 1 gains; any number where m is no such place."""
        place = m.to(torch.int64).clamp(0, self.level.numel() - 1)
        return q * self.rise[place] - self.cost[place]


def ordered_sum(values: Tensor) -> Tensor:
    """Sum over the last axis, from its first element to its last."""
    total = torch.zeros_like(values[..., 0])
    for i in range(values.shape[-1]):
        total = total + values[..., i]
    return total


def spread_pulses(q: Tensor, levels: _Levels, pulses: int) -> Tensor:
    """The best m >= 0, float32 [G, D], of each q [G, D]: sum m = pulses."""
    dim, most = q.shape[1], float(levels.level.numel() - 1)
    guess = q * levels.slope - levels.offset
    inverse = torch.ones((), device=q.device) / dim
    theta = (ordered_sum(guess) - float(pulses)) * inverse - 0.5
    m = torch.trunc((guess - theta.unsqueeze(-1)).clamp(0.0, most))
    missing = pulses - m.sum(-1)
    for sign in (1.0, -1.0):
        active = (missing * sign > 0).nonzero().squeeze(-1)
        while active.numel():
            m[active, _merits(q[active], m[active], levels, sign).argmax(-1)] += sign
            missing[active] -= sign
            active = active[missing[active] * sign > 0]
    active = torch.arange(0 if levels.uniform else q.shape[0], device=q.device)
    while active.numel():
        best_up, to = _merits(q[active], m[active], levels, 1.0).max(-1)
        best_down, source = _merits(q[active], m[active], levels, -1.0).max(-1)
        gains = best_up + best_down > 0
        active, to, source = active[gains], to[gains], source[gains]
        m[active, to] += 1.0
        m[active, source] -= 1.0
    return m


def _merits(q: Tensor, m: Tensor, levels: _Levels, sign: float) -> Tensor:
    """What a step of `sign` gains at each coordinate; -inf where there is no room for it."""
    if sign > 0:
        return torch.where(m < levels.level.numel() - 1, levels.up(q, m), -torch.inf)
    return torch.where(m > 0, -levels.up(q, m - 1), -torch.inf)


def encode(
    x: Tensor, scale: Tensor, gains: Tensor, levels: Sequence[int], shift: int, pulses: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Values int8 [G, D], gain int64 [G] and coset int64 [G] (1: e = -1) of x float32 [G, D] under scales [G] >= 0."""
    groups, dim = x.shape
    values = torch.empty((groups, dim), dtype=torch.int8, device=x.device)
    gain = torch.empty(groups, dtype=torch.int64, device=x.device)
    coset = torch.empty_like(gain)
    table = _Levels.of(levels, x.device)
    step = max(1, CHUNK_ELEMENTS // dim)
    for start in range(0, groups, step):
        part = slice(start, start + step)
        values[part], gain[part], coset[part] = _encode_chunk(x[part], scale[part], gains, table, shift, pulses)
    empty = scale == 0
    first = torch.tensor(first_group(dim, levels, shift, pulses), dtype=torch.int8, device=x.device)
    gain.masked_fill_(empty, 0)
    coset.masked_fill_(empty, 0)
    return torch.where(empty.unsqueeze(-1), first, values), gain, coset


def _encode_chunk(
    x: Tensor, scale: Tensor, gains: Tensor, levels: _Levels, shift: int, pulses: int
) -> tuple[Tensor, Tensor, Tensor]:
    groups = x.shape[0]
    a = (x / torch.where(scale > 0, scale, 1).unsqueeze(-1)).clamp(-LARGEST_RATIO, LARGEST_RATIO)
    best = torch.full((groups,), torch.inf, device=x.device)
    values = torch.zeros_like(a)
    gain = torch.zeros(groups, dtype=torch.int64, device=x.device)
    coset = torch.zeros_like(gain)
    inverse = torch.ones_like(gains) / gains
    for j in range(gains.numel()):
        for e in range(2 if shift else 1):
            offset = float(-shift if e else shift)
            v = a * inverse[j] - offset
            word = levels.level[spread_pulses(v.abs().clamp_max(LARGEST_STEP), levels, pulses).to(torch.int64)]
            residual = v.abs() - word
            error = ordered_sum(residual * residual) * (gains[j] * gains[j])
            better = error < best
            best = torch.where(better, error, best)
            values = torch.where(better.unsqueeze(-1), torch.where(v < 0, -word, word) + offset, values)
            gain.masked_fill_(better, j)
            coset.masked_fill_(better, e)
    return values.to(torch.int8), gain, coset


@lru_cache(maxsize=256)
def level_sums(dim: int, levels: tuple[int, ...], pulses: int) -> tuple[int, int]:
    """Bounds of sum t[m_i] over all m of sum K: as t is concave, it is least where few coordinates carry all that they
    can and largest where all carry the same. Compiled encoders pass over gains that it shows to be hopeless."""
    word = [0] * dim
    for i in range(dim):
        word[i] = min(pulses - sum(word), len(levels) - 1)
    some, more = divmod(pulses, dim)
    most = (dim - more) * levels[some] + (more * levels[some + 1] if more else 0)
    return sum(levels[m] for m in word), most


def first_group(dim: int, levels: Sequence[int], shift: int, pulses: int) -> list[int]:
    """The group of rank 0, gain 0 and coset 0: the last coordinates carry as much as they may."""
    word = [0] * dim
    for i in reversed(range(dim)):
        word[i] = min(pulses, len(levels) - 1)
        pulses -= word[i]
    return [levels[m] + shift for m in word]
