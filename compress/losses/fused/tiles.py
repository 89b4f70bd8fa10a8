"""Strategy "tiles": rows x vocabulary in tiles that are thrown away; what is kept of a row is its sums.

Over the tiles of both models' logits, projected one after the other,

    1.  log Z_t, log Z_s          by logaddexp
    2.  F = sum f,  A = sum a     (f, a) = terms(p, q) of the tile; the value is finish(F)
    3.  dF/dz = a - q A           in the backward pass, with tiles projected again:  dh += G W,  dW += G^T h

so that each row may have its own upstream gradient, and the memory does not grow with the vocabulary. This serves the
divergences that are sums of `terms`. Where a tile spans the vocabulary, steps 1 and 2 are one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from compress.losses.base import Loss
from compress.losses.divergence import Distributions, Divergence, tempered
from compress.losses.fused.plan import Logits, Piece, Plan, Tensors
from compress.losses.fused.projection import Gradients, once, pieces

LEAST_ROWS = 64
"""Fewer make the matrix products slow: rather than that, the vocabulary is cut. It is two projections more, 8 products
for 6, where 32 rows instead of 64 cost as much."""


def fits(loss: Loss) -> bool:
    """Whether the loss is a divergence that its `terms` define."""
    if not isinstance(loss, Divergence):
        return False
    kind = type(loss)
    return kind.pair is Divergence.pair and kind.of_distributions is Divergence.of_distributions


def values(plan: Plan, tensors: Tensors) -> Tensor:
    """The values [K, n] of K divergences; differentiable, once."""
    found: Tensor = _Tiles.apply(plan, *tensors)
    return found


def tile_shape(plan: Plan, count: int) -> tuple[int, int]:
    """Rows and columns of a tile, for `count` rows."""
    both = 2 * plan.dtype.itemsize
    rows = max(1, min(count, max(plan.memory // (plan.classes * both), LEAST_ROWS)))
    return rows, min(plan.classes, max(1, plan.memory // (rows * both)))


class _Sums:
    """The sums of n rows: log Z [2, n, 1] of student and teacher at each temperature, F and A [K, n] of the terms."""

    def __init__(self, divergences: Sequence[Divergence], like: Tensor) -> None:
        """For rows whose values are `like` [n]."""
        self.divergences = divergences
        zeros = like.new_zeros(len(divergences), len(like))
        self.norms = {each.temperature: like.new_full((2, len(like), 1), -torch.inf) for each in divergences}
        self.totals, self.centres = zeros, zeros.clone()

    def add_norms(self, part: Piece) -> None:
        for temperature, norms in self.norms.items():
            for norm, logits in zip(norms, _both(part), strict=True):
                log_z = tempered(logits, temperature).logsumexp(-1, keepdim=True)
                norm[part.rows] = torch.logaddexp(norm[part.rows], log_z)

    def add_terms(self, part: Piece, whole: bool = False) -> None:
        """Of a part of whole rows, the norms as well."""
        found = self._distributions(part, whole)
        for k, divergence in enumerate(self.divergences):
            f, a = divergence.terms(found[divergence.temperature])
            self.totals[k, part.rows] += f.sum(-1)
            if not divergence.centred:
                self.centres[k, part.rows] += a.sum(-1)

    def finish(self) -> tuple[Tensor, Tensor]:
        """The values D [K, n], and what turns dF / d(z_s / T) into dD / dz_s [K, n]."""
        values, slopes = [], []
        for divergence, total in zip(self.divergences, self.totals, strict=True):
            value, slope = divergence.finish(total)
            slope = torch.ones_like(value) if slope is None else slope
            values.append(value * divergence.scale)
            slopes.append(slope * divergence.scale / divergence.temperature)
        self.lost = torch.stack(values).isinf() & ~self.centres.isfinite()  # as in `divergence.centre`
        return torch.stack(values), torch.stack(slopes)

    def gradient(self, part: Piece, factors: Tensor) -> Tensor:
        """sum_k factor_k dF_k / d(z_s / T)."""
        found = self._distributions(part)
        gradient = torch.zeros_like(part.student)
        for k, divergence in enumerate(self.divergences):
            d = found[divergence.temperature]
            _, a = divergence.terms(d)
            if not divergence.centred:
                a = torch.addcmul(a, d.q, self.centres[k, part.rows].unsqueeze(-1), value=-1)
                a.masked_fill_(self.lost[k, part.rows].unsqueeze(-1), 0)
            gradient.addcmul_(a, factors[k, part.rows].unsqueeze(-1))
        return gradient

    def _distributions(self, part: Piece, whole: bool = False) -> dict[float, Distributions]:
        found, (student, teacher) = {}, _both(part)
        for temperature, norms in self.norms.items():
            if whole:
                made = Distributions.of(student, teacher, temperature)
                norms[:, part.rows] = torch.stack([made.student_norm, made.teacher_norm])
            else:
                made = Distributions(student, teacher, norms[0, part.rows], norms[1, part.rows], temperature)
            found[temperature] = made
        return found


def _both(part: Piece) -> tuple[Tensor, Tensor]:
    """The student's and the teacher's logits: a divergence has both."""
    assert part.teacher is not None
    return part.student, part.teacher


class _Tiles(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, plan: Plan, *tensors: Tensor | None) -> Tensor:
        t = Tensors(*tensors)  # type: ignore[arg-type]
        divergences = [term.loss for term in plan.terms if isinstance(term.loss, Divergence)]
        sums = _Sums(divergences, t.hidden.new_empty(len(t.hidden), dtype=plan.dtype))
        height, width = tile_shape(plan, len(t.hidden))
        logits = Logits(plan, t, height, width)
        columns = list(pieces(plan.classes, width))
        with torch.autocast(t.hidden.device.type, enabled=False):
            for rows in pieces(len(t.hidden), height):
                for place in columns if len(columns) > 1 else []:
                    for part in logits.piece(rows, place).parts():
                        sums.add_norms(part)
                for place in columns:
                    for part in logits.piece(rows, place).parts():
                        sums.add_terms(part, whole=len(columns) == 1)
        values, slopes = sums.finish()
        ctx.plan, ctx.sums, ctx.slopes = plan, sums, slopes
        ctx.save_for_backward(*tensors)
        return values

    @staticmethod
    @once
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        plan: Plan = ctx.plan
        sums: _Sums = ctx.sums
        t = Tensors(*ctx.saved_tensors)
        factors = upstream * ctx.slopes
        found = Gradients.zeros(plan.dtype, plan.wanted, *t[:3])
        height, width = tile_shape(plan, len(t.hidden))
        logits = Logits(plan, t, height, width)
        with torch.autocast(t.hidden.device.type, enabled=False):
            for rows in pieces(len(t.hidden), height):
                for place in pieces(plan.classes, width):
                    piece = logits.piece(rows, place)
                    for part in piece.parts():
                        gradient = sums.gradient(part, factors)
                        part.student.copy_(plan.student.before_activation(gradient, part.student))
                    plan.student.back(piece.student, t.hidden[rows], t.weight[place], found.at(rows, place))
        return None, *found.like(*t[:3]), None, None, None, None
