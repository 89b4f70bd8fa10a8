"""L1 distances between all pairs of rows, with memory for the distances alone.

`torch.cdist(p=1)` is the same function, but on a CPU it adds a whole vocabulary into one float32 number (for 32,768
classes its error is 100 times that of the sums of parts taken here), and its backward pass on a GPU holds [n, m, V]
numbers.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from compress.losses.base import CPU_VALUES, DEVICE_VALUES

COLUMNS = 2048
"""Classes of a tile: enough for long loops, few enough for the tile's part of every row to stay in the caches."""


def pairwise_l1(left: Tensor, right: Tensor) -> Tensor:
    """C_ij = sum_v |left_iv - right_jv|, [n, m] of [n, V] and [m, V].

    Time O(n m V); memory O(n m + tile) forward and backward. The derivative of |x| at 0 is taken to be 0. The backward
    pass computes the signs again; there is no second one.
    """
    return _PairwiseL1.apply(left, right)


class _PairwiseL1(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, left: Tensor, right: Tensor) -> Tensor:
        ctx.save_for_backward(left, right)
        distances = left.new_zeros(len(left), len(right))
        for rows, columns in _tiles(left, len(right)):
            distances[rows] += (left[rows, None, columns] - right[None, :, columns]).abs_().sum(-1)
        return distances

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, Tensor | None]:  # type: ignore[override]
        left, right = ctx.saved_tensors
        wanted_left, wanted_right = ctx.needs_input_grad
        with torch.autocast(left.device.type, enabled=False):  # which would multiply matrices in half precision
            return (
                _gradient(left, right, upstream) if wanted_left else None,
                _gradient(right, left, upstream.mT) if wanted_right else None,
            )


def _gradient(left: Tensor, right: Tensor, upstream: Tensor) -> Tensor:
    """sum_j upstream_ij sign(left_iv - right_jv), [n, V]."""
    gradient = torch.empty_like(left)
    for rows, columns in _tiles(left, len(right)):
        signs = (left[rows, None, columns] - right[None, :, columns]).sign_()
        gradient[rows, columns] = torch.bmm(upstream[rows, None, :], signs).squeeze(1)
    return gradient


def _tiles(left: Tensor, others: int) -> Iterator[tuple[slice, slice]]:
    """Rows and columns such that [rows, others, columns] stays in a CPU's caches, or bounds the memory elsewhere."""
    values = CPU_VALUES if left.device.type == "cpu" else DEVICE_VALUES
    columns = min(left.shape[1], COLUMNS)
    rows = max(1, values // max(1, others * columns))
    for row in range(0, len(left), rows):
        for column in range(0, left.shape[1], columns):
            yield slice(row, row + rows), slice(column, column + columns)
