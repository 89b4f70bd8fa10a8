"""A matrix on its way to integers: scales a group at a time, codes a column at a time."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from compress.codecs.base import CodecSpec, QuantizedMatrix, Rounding
from compress.codecs.integer.config import config_of
from compress.codecs.integer.grid import Grid, stored
from compress.codecs.integer.streams import pack_codes
from compress.errors import NumericsError

LARGEST_SCALE = torch.finfo(torch.float16).max


class IntegerRounding(Rounding):
    """`compress.codecs.base.Rounding` of group integers. Every column is rounded on its own, so a metric changes
    nothing, and `round` takes any number of columns, of one group or several.

    A scale is zero until it is chosen.
    """

    dim = 1

    def __init__(self, shape: tuple[int, int], spec: CodecSpec, device: torch.device) -> None:
        config = config_of(spec)
        self.shape, self.spec = shape, spec
        self.clip = config.clip
        self.grid = Grid(spec.width, config.centred(spec.width))
        self.scope = config.columns(shape[1])
        rows, groups = shape[0], config.groups(shape[1])
        self.scales = torch.zeros((rows, groups), device=device)
        self.zeros = torch.full((rows, groups), self.grid.middle if self.grid.centred else 0, device=device).float()
        self.codes = torch.zeros((shape[1], rows), dtype=torch.uint8, device=device)
        """Column by column, as they come."""

    def scale(self, start: int, values: Tensor) -> None:
        """See `Rounding.scale`."""
        if not bool(torch.isfinite(values).all()):
            raise NumericsError(f"The values to be rounded from column {start} on are not all finite.")
        values = functional.pad(values, (0, self.scope - values.shape[1]))
        group = start // self.scope
        self.scales[:, group], self.zeros[:, group] = self.grid.choose(values, self.clip)

    def round(self, start: int, target: Tensor, metric: Tensor | None = None, keep: bool = False) -> Tensor:
        """See `Rounding.round`; every column of a row keeps its code or not by itself."""
        end = start + target.shape[1]
        scales, zeros = self._of(start, end)
        integers = self.grid.nearest(target, scales, zeros)
        if keep:
            present = self.codes[start:end].t() - zeros
            near = (target - present * scales).abs() <= (target - integers * scales).abs()
            integers = torch.where(near, present, integers)
        self.codes[start:end] = (integers + zeros).t()
        return integers.mul_(scales)

    def rescale(self, factors: Tensor) -> None:
        """See `Rounding.rescale`. Raises `NumericsError` for factors that are not finite."""
        if not bool(torch.isfinite(factors).all()):
            raise NumericsError("The factors of the scales are not all finite.")
        self.scales = stored((self.scales * factors).clamp_(0, LARGEST_SCALE))

    def decoded(self) -> Tensor:
        """See `Rounding.decoded`."""
        scales, zeros = self._of(0, self.shape[1])
        return (self.codes.t().to(torch.float32) - zeros).mul_(scales)

    def finish(self) -> QuantizedMatrix:
        """See `Rounding.finish`."""
        return packed(self.shape, self.spec, self.scales, self.zeros, self.codes.t())

    def _of(self, start: int, end: int) -> tuple[Tensor, Tensor]:
        """Scales and zero points of the columns, [o, end - start]."""
        groups = torch.arange(start, end, device=self.scales.device) // self.scope
        return self.scales[:, groups], self.zeros[:, groups]


def packed(shape: tuple[int, int], spec: CodecSpec, scales: Tensor, zeros: Tensor, codes: Tensor) -> QuantizedMatrix:
    """The matrix of scales and zero points float32 [o, groups] and codes uint8 [o, n]."""
    tensors = {"scales": scales.to(torch.float16)}
    if not config_of(spec).centred(spec.width):
        tensors["zeros"] = pack_codes(zeros.to(torch.uint8), spec.width)
    tensors["codes"] = pack_codes(codes, spec.width)
    return QuantizedMatrix(spec, shape, tensors)
