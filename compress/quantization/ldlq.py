"""Rounding a matrix a few columns at a time, each time allowing for the errors of the columns before.

With H = L L^T (L lower triangular) the error of the outputs is ||(W - V) L||^2, a sum over blocks b of D columns:

    ||(W_b - V_b) L_bb + S_b||^2,     S_b = sum_{a > b} (W_a - V_a) L_ab.

From the last block to the first, S_b is known when V_b is to be chosen. The best code is near

    W_b + S_b L_bb^-1    in the metric    M_b = L_bb L_bb^T,

which is GPTQ (Frantar et al. 2023, arXiv 2210.17323) and LDLQ (QuIP, arXiv 2307.13304; blocks: QuIP#, 2402.04396) with
one factorization, no inverse, and the codec's own encoder in place of round(). Columns that matter most, by the
diagonal of H, come first, so that most others are left to make good their errors; codes stay where they belong.

Afterwards each block is rounded again, all others being known now: with G = (W - V) H the optimum of block b alone is
V_b + G_b H_bb^-1 in the metric H_bb, and a row takes a code that is nearer than its present one. The error falls with
every such sweep.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from compress.codecs.base import Rounding
from compress.quantization.hessian import Factor
from compress.quantization.scales import refit_scales

SPAN = 128
"""Columns whose errors are carried among themselves before the rest hears of them: large products instead of many."""


@dataclass(frozen=True)
class Order:
    """In which order n columns are rounded. Everything here is in the order of places: `columns[place]` is the column,
    the last place is rounded first. The columns of a block, and the blocks of a scope, stay together; those that
    fill no whole block or scope have the last places."""

    columns: Tensor
    dim: int
    scope: int

    @classmethod
    def of(cls, importance: Tensor, dim: int, scope: int, sort: bool) -> Order:
        """By ascending sum of `importance` [n] over the scopes, and over the blocks within; as they are without `sort`.
        A scope of all columns is none."""
        columns = torch.arange(importance.numel(), device=importance.device)
        if sort:
            columns = _sorted(columns, importance, dim)
            if scope < columns.numel():
                columns = _sorted(columns[torch.argsort(columns // scope, stable=True)], importance, scope)
        return cls(columns, dim, scope)

    @cached_property
    def places(self) -> Tensor:
        """The place of each column: the inverse of `columns`."""
        return torch.argsort(self.columns)

    @property
    def whole(self) -> bool:
        """Whether all columns share scales."""
        return self.scope >= self.columns.numel()

    def spans(self) -> Iterator[tuple[int, int]]:
        """Ranges of places, in the order of rounding; one for each scope where scales are chosen on the way."""
        size = max(SPAN // self.dim, 1) * self.dim if self.whole else self.scope
        for first in reversed(range(0, self.columns.numel(), size)):
            yield first, min(first + size, self.columns.numel())

    def blocks(self, first: int, last: int) -> list[int]:
        """The first column of each block between two places."""
        return [int(column) for column in self.columns[first : last : self.dim]]


def _sorted(columns: Tensor, importance: Tensor, unit: int) -> Tensor:
    whole = columns.numel() // unit * unit
    units = columns[:whole].view(-1, unit)
    units = units[torch.argsort(importance[units].sum(1), stable=True)]
    return torch.cat([units.flatten(), columns[whole:]])


@dataclass(frozen=True)
class Blocks:
    """Of each block of columns the metric [b, D, D], its largest eigenvalue 1, and the inverse [b, D, D] of L_bb or of
    H_bb, by which carried errors move the target."""

    metrics: Tensor
    inverses: Tensor

    @classmethod
    def of_first_pass(cls, factor: Factor, order: Order) -> Blocks:
        """Those of L."""
        roots = _diagonal_blocks(factor.lower, order.dim)
        return cls(_unit(roots @ roots.mT), torch.linalg.inv(roots))

    @classmethod
    def of_sweeps(cls, factor: Factor, order: Order) -> Blocks:
        """Those of H."""
        diagonal = _diagonal_blocks(factor.hessian, order.dim)
        return cls(_unit(diagonal), torch.linalg.inv(diagonal))


def round_matrix(
    weight: Tensor,
    factor: Factor,
    order: Order,
    rounding: Rounding,
    *,
    sweeps: int = 0,
    refit: bool = False,
    blocks: tuple[Blocks, Blocks | None] | None = None,
) -> None:
    """Give `rounding` the codes for W float32 [o, n], whose columns, like those of `factor`, are in `order`.

    `sweeps`: how often each block is rounded again. `refit`: after the first pass and each sweep, scales of least
    error for the codes that there are. `blocks`: those of the first pass and of sweeps (`blocks_of`), for a caller that
    rounds several matrices with one factor.
    """
    first, later = blocks or blocks_of(factor, order, sweeps)
    _first_pass(weight, factor.lower, first, order, rounding)
    for _ in range(sweeps):
        assert later is not None
        if refit:
            refit_scales(weight, factor.hessian, order.places, order.scope, rounding)
        _sweep(weight, factor.hessian, later, order, rounding)
    if refit:
        refit_scales(weight, factor.hessian, order.places, order.scope, rounding)


def blocks_of(factor: Factor, order: Order, sweeps: int) -> tuple[Blocks, Blocks | None]:
    """What `round_matrix` needs of the blocks of one factor."""
    return Blocks.of_first_pass(factor, order), Blocks.of_sweeps(factor, order) if sweeps else None


def _first_pass(weight: Tensor, lower: Tensor, given: Blocks, order: Order, rounding: Rounding) -> None:
    error = torch.zeros_like(weight)
    if order.whole:
        rounding.scale(0, weight[:, order.places])
    for first, last in order.spans():
        span, blocks = slice(first, last), slice(first // order.dim, -(-last // order.dim))
        carried = error[:, last:] @ lower[last:, span]
        if not order.whole:
            _choose_scales(weight[:, span], lower[span, span], carried, order.columns[span], rounding)
        columns = order.blocks(first, last)
        value = rounding.round_span(
            columns, weight[:, span], carried, given.inverses[blocks], given.metrics[blocks], lower[span, span]
        )
        error[:, span] = weight[:, span] - value


def _choose_scales(weight: Tensor, lower: Tensor, carried: Tensor, columns: Tensor, rounding: Rounding) -> None:
    """Scales of one scope, for what its columns should be, given the errors so far."""
    values = weight + torch.linalg.solve_triangular(lower, carried, upper=False, left=False)
    rounding.scale(int(columns.min()), values[:, torch.argsort(columns)])


def _sweep(weight: Tensor, hessian: Tensor, given: Blocks, order: Order, rounding: Rounding) -> None:
    """Round every block again."""
    value = rounding.decoded()[:, order.columns]
    gradient = (weight - value) @ hessian
    for first, last in order.spans():
        span, blocks = slice(first, last), slice(first // order.dim, -(-last // order.dim))
        before = value[:, span]
        after = rounding.round_span(
            order.blocks(first, last),
            before,
            gradient[:, span],
            given.inverses[blocks],
            given.metrics[blocks],
            hessian[span, span],
            keep=True,
        )
        gradient.addmm_(before - after, hessian[span])


def _diagonal_blocks(matrix: Tensor, dim: int) -> Tensor:
    """The blocks of `dim` places on the diagonal of [n, n], [ceil(n / dim), dim, dim]; the last one is filled up with
    the identity."""
    places = matrix.shape[0]
    whole, rest = divmod(places, dim)
    blocks = torch.eye(dim, device=matrix.device).repeat(whole + bool(rest), 1, 1)
    inside = matrix[: whole * dim, : whole * dim].unflatten(0, (whole, dim)).unflatten(2, (whole, dim))
    blocks[:whole] = inside.diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    if rest:
        blocks[whole, :rest, :rest] = matrix[whole * dim :, whole * dim :]
    return blocks


def _unit(metrics: Tensor) -> Tensor:
    """Each of [b, D, D] over its largest eigenvalue."""
    return metrics / torch.linalg.eigvalsh(metrics)[:, -1:, None]
