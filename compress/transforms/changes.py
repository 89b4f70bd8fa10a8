"""Changes of basis as functions of rows, x [R, n] -> x T, and what undoes them on the other side of a product.

A matrix that computes x W^T stays the same function when x T comes in and W T^-T stands in its place: x T (W T^-T)^T =
x W^T. T^-T is T itself for a rotation, and 1 / s for a scaling s. Every change is cut into heads, n = g m: one tensor
whose first axis is g. They are functions of that tensor that autograd can follow, so that what is learned and what is
folded are the same lines.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from compress.transforms.mixing import mix, unmix


@dataclass(frozen=True)
class Mixing:
    """x Q in each head, with the signs [g, m] of a mixing (`compress.transforms.mixing`)."""

    signs: Tensor

    def __call__(self, rows: Tensor) -> Tensor:
        return mix(rows.reshape(-1, *self.signs.shape), self.signs).reshape(rows.shape)

    @property
    def dual(self) -> Mixing:
        return self

    def undo(self, rows: Tensor) -> Tensor:
        return unmix(rows.reshape(-1, *self.signs.shape), self.signs).reshape(rows.shape)

    def repeated(self, times: int) -> Mixing:
        return Mixing(self.signs.repeat_interleave(times, 0))


@dataclass(frozen=True)
class Rotation:
    """x R in each head, with orthogonal matrices [g, m, m]."""

    matrices: Tensor

    def __call__(self, rows: Tensor) -> Tensor:
        heads, width, _ = self.matrices.shape
        matrices = self.matrices.to(rows.dtype)
        if heads == 1:
            return rows @ matrices[0]
        return torch.einsum("rgm,gmk->rgk", rows.reshape(-1, heads, width), matrices).reshape(rows.shape)

    @property
    def dual(self) -> Rotation:
        return self

    def undo(self, rows: Tensor) -> Tensor:
        return Rotation(self.matrices.mT)(rows)

    def repeated(self, times: int) -> Rotation:
        return Rotation(self.matrices.repeat_interleave(times, 0))


@dataclass(frozen=True)
class Scaling:
    """x diag(s), s = exp(`logs`) [g, m]: the logarithm keeps s positive and 1 / s as exact as s."""

    logs: Tensor

    def __call__(self, rows: Tensor) -> Tensor:
        return rows * self.logs.to(rows.dtype).exp().flatten()

    @property
    def dual(self) -> Scaling:
        return Scaling(-self.logs)

    def undo(self, rows: Tensor) -> Tensor:
        return self.dual(rows)

    def repeated(self, times: int) -> Scaling:
        return Scaling(self.logs.repeat_interleave(times, 0))


Change = Mixing | Rotation | Scaling
Changes = tuple[Change, ...]
"""One after the other, the first one first."""


def dual(changes: Sequence[Change]) -> Changes:
    """What the matrix that reads the changed rows is changed by: T^-T of their product T."""
    return tuple(change.dual for change in changes)


def repeated(changes: Sequence[Change], times: int) -> Changes:
    """Each head `times` in a row: heads of queries that share keys and values."""
    return tuple(change.repeated(times) for change in changes)


def apply(changes: Sequence[Change], rows: Tensor) -> Tensor:
    """x [R, n] -> x T."""
    for change in changes:
        rows = change(rows)
    return rows


def undo(changes: Sequence[Change], rows: Tensor) -> Tensor:
    """x T [R, n] -> x."""
    for change in reversed(changes):
        rows = change.undo(rows)
    return rows
