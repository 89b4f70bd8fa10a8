"""A matrix on its way to codes of a table: all scales from the weights, then codes a column at a time."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from compress.codecs.base import CodecSpec, QuantizedMatrix, Rounding
from compress.codecs.normal_float.config import TableConfig
from compress.codecs.normal_float.nibbles import pack
from compress.codecs.normal_float.scales import largest, store, stored, units
from compress.codecs.normal_float.tables import table
from compress.errors import NumericsError


class TableRounding(Rounding):
    """`compress.codecs.base.Rounding` of a table. Every column is rounded on its own, so a metric changes nothing, and
    `round` takes any number of columns.

    Blocks may reach from row to row, so all columns are one scope: scales are chosen once, from the weights as they
    are, and codes are the nearest under the scales as they are stored.
    """

    dim = 1

    def __init__(self, shape: tuple[int, int], spec: CodecSpec, config: TableConfig, device: torch.device) -> None:
        self.shape, self.spec, self.config = shape, spec, config
        self.scope = max(1, shape[1])
        self._table = table(config.name).to(device)
        blocks = -(-shape[0] * shape[1] // config.block)
        self._choose(torch.zeros(blocks, device=device))
        self.codes = self._table.nearest(torch.zeros((shape[1], shape[0]), device=device))
        """Column by column, as they come."""

    def scale(self, start: int, values: Tensor) -> None:
        """See `Rounding.scale`; `values` is the whole matrix."""
        if not bool(torch.isfinite(values).all()):
            raise NumericsError(f"The values to be rounded from column {start} on are not all finite.")
        self._choose(largest(values.flatten(), self.config.block))

    def round(self, start: int, target: Tensor, metric: Tensor | None = None, keep: bool = False) -> Tensor:
        """See `Rounding.round`; every column of a row keeps its code or not by itself."""
        end = start + target.shape[1]
        places = self._blocks(start, end)
        scales = self.scales[places]
        rest = self.shape[0] * self.shape[1] % self.config.block
        short = places == self.scales.numel() - 1 if rest else False
        codes = self._table.nearest(units(target, scales, short))
        values = self._table.decode(codes) * scales
        if keep:
            present = self.codes[start:end].t()
            before = self._table.decode(present) * scales
            near = (target - before).abs() <= (target - values).abs()
            codes, values = torch.where(near, present, codes), torch.where(near, before, values)
        self.codes[start:end] = codes.t()
        return values

    def rescale(self, factors: Tensor) -> None:
        """See `Rounding.rescale`. A block of several rows takes the mean of their factors, each weighed by its columns.
        Raises `NumericsError` for factors that are not finite."""
        if not bool(torch.isfinite(factors).all()):
            raise NumericsError("The factors of the scales are not all finite.")
        block = self.config.block
        each = factors.clamp(min=0).expand(self.shape).flatten()
        first = each[::block]
        differences = each - first.repeat_interleave(block)[: each.numel()]
        sums = functional.pad(differences, (0, -each.numel() % block)).view(-1, block).sum(1)
        sizes = (each.numel() - torch.arange(0, each.numel(), block, device=each.device)).clamp(max=block)
        self._choose((self.scales.clamp(min=0) * (first + sums / sizes)).clamp(max=torch.finfo(torch.float32).max))

    def decoded(self) -> Tensor:
        """See `Rounding.decoded`."""
        return self._table.decode(self.codes.t()) * self.scales[self._blocks(0, self.shape[1])]

    def finish(self) -> QuantizedMatrix:
        """See `Rounding.finish`."""
        filler = self._table.nearest(torch.zeros(1, device=self.codes.device))
        codes = pack(self.codes.t().flatten(), filler)
        return QuantizedMatrix(self.spec, self.shape, {**self._tensors, "codes": codes})

    def _choose(self, scales: Tensor) -> None:
        self._tensors = store(scales, self.config.double)
        self.scales = stored(self._tensors)

    def _blocks(self, start: int, end: int) -> Tensor:
        """The block of each weight in the columns, int64 [o, end - start]."""
        rows = torch.arange(self.shape[0], device=self.scales.device).unsqueeze(1)
        columns = torch.arange(start, end, device=self.scales.device)
        return (rows * self.shape[1] + columns) // self.config.block
