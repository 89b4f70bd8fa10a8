"""Products with one packed matrix, y = x W^T, that keep what many of them need.

A GPU multiplies a few rows of x with the payload's planes as they are. A processor takes prepared rows, which are made
for the first such product and take one or two more bits a weight. Many rows are worth decoding W anew for, which keeps
the memory that of the packed weight; and so are activations with a gradient, or of a type that has no kernels.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from compress import ops
from compress.codecs.base import QuantizedMatrix
from compress.ops.half_pyramid.native import FLOATS
from compress.ops.half_pyramid.shape import HalfShape

FUSED_ROWS = 16
"""Rows of activations that a processor multiplies with prepared rows; more are worth decoding the weight for."""


class PackedProduct:
    """x [R, n] -> x W^T [R, o] in x's dtype, for x on the device of the planes."""

    def __init__(self, matrix: QuantizedMatrix, planes: list[Tensor], scales: Tensor, shape: HalfShape) -> None:
        self.matrix, self.planes, self.scales, self.shape = matrix, planes, scales, shape
        self._rows: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        on_processor, width = x.device.type == "cpu", self.matrix.spec.width
        with_gradient = torch.is_grad_enabled() and x.requires_grad
        if with_gradient or x.dtype not in FLOATS or (on_processor and x.shape[0] > FUSED_ROWS):
            with torch.no_grad():
                weight = self.matrix.dequantize(x.dtype)
            return functional.linear(x, weight)
        if not on_processor:
            return ops.half_pyramid_linear(x, self.planes, self.scales, self.shape, width)
        if self._rows is None:
            self._rows = ops.half_pyramid_prepare(self.planes, *self.matrix.shape, self.shape, width)
        return ops.half_pyramid_prepared_linear(x, self._rows, self.scales, self.shape)
