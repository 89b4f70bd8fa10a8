"""Packed matrices of several shapes for tests of kernels, made by the reference."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from compress.ops.half_pyramid import reference
from compress.ops.half_pyramid.shape import HalfShape, uniform_levels

GEOMETRIC = tuple(0.01 * 1.2**j for j in range(11))
SHAPES = {
    "3.25 bits": (HalfShape(8, 10, (10, 28, 43, 58, 73, 88, 103, 118), (0.012, 0.016, 0.02, 0.025, 0.03, 0.04), 5), 26),
    "2 bits": (HalfShape(8, 3, (1, 3, 5, 7), (0.4, 0.6)), 16),
    "levels below the shift": (HalfShape(8, 8, (4, 9, 14, 18, 22), (0.1, 0.15, 0.2), 5), 25),
    "4 bits": (HalfShape(8, 18, uniform_levels(15), GEOMETRIC), 32),
    "16 coordinates": (HalfShape(16, 22, uniform_levels(7), (0.2, 0.3, 0.4), 1), 54),
    "32 coordinates": (HalfShape(32, 40, uniform_levels(9), (0.2, 0.3, 0.4, 0.5)), 101),
}
"""Shape and bits of a group: with and without coset, direct tables and halves, planes of 64 bits down to 1."""


@dataclass(frozen=True)
class Case:
    """Groups x under scales, their codes and planes, and the row scales of the matrix that they are read as."""

    shape: HalfShape
    width: int
    x: Tensor
    scale: Tensor
    codes: tuple[Tensor, Tensor, Tensor]
    planes: list[Tensor]
    row_scales: Tensor
    columns: int

    def weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return reference.decode(self.planes, self.row_scales, self.columns, self.shape, self.width, dtype)


def make_case(name: str, rows: int, columns: int) -> Case:
    shape, width = SHAPES[name]
    generator = torch.Generator().manual_seed(rows)
    groups = rows * -(-columns // shape.dim)
    x = torch.randn(groups, shape.dim, generator=generator)
    scale = torch.rand(groups, generator=generator) + 0.5
    scale[::17] = 0
    codes = reference.encode(x, scale, shape)
    planes = reference.pack(*codes, shape, width)
    return Case(shape, width, x, scale, codes, planes, torch.rand(rows, generator=generator) + 0.5, columns)
