"""The direction of a group: the y of the pyramid P(D, K, m) with the largest cosine to x.

For a fixed step t the nearest vector, min_y ||x - t y||^2, is what `compress.ops.pyramid_encode` finds exactly, and

    min_t ||x - t y||^2 = ||x||^2 - n^2 / d,      n = <x, y>,  d = ||y||^2,

so the best direction is a nearest vector of some t. **Round and fix**, as published, takes t = ||x||_1 / K alone: x is
scaled to the pyramid and rounded, and the sum is repaired by the cheapest unit steps.

**Exact.** Written in u = 1 / t, a nearest vector maximises 2 u n - d: it is a vertex of the convex hull of all points
(n, d), which is followed from its flat end (u = 0, least d) to its steep end (u = infinity, largest n) as u grows. If
u1 < u2 gave the vertices 1 and 2, every vertex between lies above both their supporting lines,

    d >= d1 + 2 u1 (n - n1)    and    d >= d2 + 2 u2 (n - n2),

hence n^2 / d is nowhere larger than where the lines meet (it is quasi-convex along a line). An interval whose bound is
not above the best value found is done. Otherwise the u at which 1 and 2 tie either finds a vertex between, which
splits the interval, or proves that there is none. A few probes a group settle it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compress import ops

CHUNK_WEIGHTS = 2**19
"""Weights searched at once: few enough for a processor's cache, enough to hide what a call costs."""
STRETCH = 1.2
"""Factor between probes on the way to an end of the hull."""
TOLERANCE = 1e-6
"""Relative; n is a sum of float32 products."""
INFINITE = 1e9
"""u of the steep end, times 1 / ||x||_1: so large that 2 u n outweighs d by far."""


def round_and_fix(x: Tensor, pulses: int, limit: int) -> Tensor:
    """y int8 [G, D] nearest to the groups x float32 [G, D] after these are scaled to ||x||_1 = K."""
    x = _unit(x)
    return _nearest(x, _sum(x.abs()) / pulses, pulses, limit)


def best_direction(x: Tensor, pulses: int, limit: int) -> Tensor:
    """y int8 [G, D] of the largest cosine to each group x float32 [G, D]; zeros get the codebook's first vector."""
    y = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    step = max(1, CHUNK_WEIGHTS // x.shape[1])
    for start in range(0, x.shape[0], step):
        y[start : start + step] = _Search(_unit(x[start : start + step]), pulses, limit).run()
    return y


class _Search:
    """The groups of one chunk with the best vector found so far and its n^2 / d.

    A point is (u, n, d), float64 [B, 3]: a vertex of the hull and a u at which it is the nearest vector.
    """

    def __init__(self, x: Tensor, pulses: int, limit: int) -> None:
        self.x, self.pulses, self.limit = x, pulses, limit
        self.length = _sum(x.abs()).double()
        self.y = torch.empty(x.shape, dtype=torch.int8, device=x.device)
        self.value = torch.full_like(self.length, -1.0)

    def run(self) -> Tensor:
        everyone = torch.arange(self.x.shape[0], device=self.x.device)
        start = self._probe(everyone, self.pulses / self.length)
        alive = everyone[self.length > 0]
        start, flat, steep = (points[alive] for points in (start, self._flat_end(), self._steep_end()))
        todo = [(alive, flat, start), (alive, start, steep)]
        while todo:
            todo += self._split(*todo.pop())
        return self.y

    def _split(self, group: Tensor, low: Tensor, high: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Probes the intervals that may hold a better vector; returns what is left of them."""
        open_ = (_bound(low, high) > self.value[group] * (1 + TOLERANCE)).nonzero().squeeze(-1)
        if not open_.numel():
            return []
        group, low, high = group[open_], low[open_], high[open_]
        (u1, n1, d1), (u2, n2, d2) = low.unbind(1), high.unbind(1)
        to_flat, to_steep = u1 == 0, u2 >= INFINITE / self.length[group]
        u = torch.where(to_flat, u2 / STRETCH, torch.where(to_steep, u1 * STRETCH, (d2 - d1) / (2 * (n2 - n1))))
        found = self._probe(group, u)
        _, n, d = found.unbind(1)
        above = 2 * u * (n - n1) - (d - d1) > TOLERANCE * (2 * u * n + d)
        fresh = (to_flat | to_steep | above).nonzero().squeeze(-1)
        if not fresh.numel():
            return []
        group, low, high, found = group[fresh], low[fresh], high[fresh], found[fresh]
        return [(group, low, found), (group, found, high)]

    def _probe(self, group: Tensor, u: Tensor) -> Tensor:
        """The nearest vectors of t = 1 / u, as points; keeps those that are better than all before."""
        x = self.x if group.numel() == self.x.shape[0] else self.x[group]
        y = _nearest(x, torch.where(self.length[group] > 0, 1 / u, 0).to(torch.float32), self.pulses, self.limit)
        n, d = (part.double() for part in products(x, y))
        value = n * n / d
        better = (value > self.value[group]).nonzero().squeeze(-1)
        self.value[group[better]], self.y[group[better]] = value[better], y[better]
        return torch.stack([u, n, d], 1)

    def _flat_end(self) -> Tensor:
        """u = 0: d is least where the pulses are spread evenly. (n does not matter on a level line.)"""
        each, more = divmod(self.pulses, self.x.shape[1])
        least = float((self.x.shape[1] - more) * each**2 + more * (each + 1) ** 2)
        nothing = torch.zeros_like(self.length)
        return torch.stack([nothing, nothing, torch.full_like(nothing, least)], 1)

    def _steep_end(self) -> Tensor:
        """u = infinity: n is largest where the largest coordinates carry as much as they may."""
        full, rest = divmod(self.pulses, self.limit)
        largest = self.x.abs().topk(full + (rest > 0), -1).values.double()
        n = self.limit * largest[:, :full].sum(-1) + (rest * largest[:, full] if rest else 0)
        d = torch.full_like(n, float(full * self.limit**2 + rest**2))
        return torch.stack([INFINITE / self.length, n, d], 1)


def _bound(low: Tensor, high: Tensor) -> Tensor:
    """n^2 / d where the supporting lines of two points meet."""
    (u1, n1, d1), (u2, n2, d2) = low.unbind(1), high.unbind(1)
    n = ((d2 - d1) / 2 + u1 * n1 - u2 * n2) / (u1 - u2)
    return n * n / (d1 + 2 * u1 * (n - n1))


def _unit(x: Tensor) -> Tensor:
    """The groups scaled to a largest magnitude of 1, which moves no direction and keeps products off float32's ends."""
    largest = x.abs().amax(-1, keepdim=True)
    return x / torch.where(largest > 0, largest, 1)


def products(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """n = <x, y> and d = <y, y> float32 [G] of x float32 [G, D] and y int8 [G, D], in the same order everywhere."""
    real = y.to(torch.float32)
    return _sum(x * real), _sum(real * real)


def _sum(values: Tensor) -> Tensor:
    """Sum over the last axis by halves: element-wise, so that the order of additions is everywhere the same."""
    while (count := values.shape[-1]) > 1:
        half = (count + 1) // 2
        pairs = values[..., : count // 2] + values[..., half:]
        values = pairs if count % 2 == 0 else torch.cat([pairs, values[..., count // 2 : half]], -1)
    return values[..., 0]


def _nearest(x: Tensor, step: Tensor, pulses: int, limit: int) -> Tensor:
    y, _ = ops.pyramid_encode(x, step, torch.ones(1, device=x.device), pulses, limit)
    return y
