"""Rounding of a matrix by a codec of groups under one row scale of 8 bits: a few columns at a time, in a given metric.

The row scales are searched for as they are without calibration (`row_search`), before any group is rounded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from compress.codecs.base import GainRule, QuantizedMatrix, Rounding
from compress.codecs.reallocation import OVERSTEP, reallocate
from compress.codecs.reallocation import STEPS as STEPS_TOWARDS
from compress.codecs.row_search import Encoder, Groups, encode_matrix, fill_groups
from compress.codecs.rows import STEPS, TOP, row_scales
from compress.ops.rounding import can_round_spans, round_span
from compress.ops.span import Codes, Pyramid, Span

Packer = Callable[[Tensor, Tensor, Groups], QuantizedMatrix]
"""The matrix scale [1], the row codes uint8 [o] and the groups of [o ceil(n / D)] to the matrix."""


@dataclass(frozen=True)
class GroupCodec:
    """What `GroupRounding` must know of a codec: its codebook; `encode`, which finds groups under scales, the first of
    their fields being the index of the gain and the second, if there is one, the coset; `pack` makes the matrix."""

    pyramid: Pyramid
    encode: Encoder
    pack: Packer


class GroupRounding(Rounding):
    """See `compress.codecs.base.Rounding`."""

    def __init__(self, shape: tuple[int, int], codec: GroupCodec, gain: GainRule, search: bool) -> None:
        self.dim, self.scope = codec.pyramid.dim, max(shape[1], 1)
        self._rows, self._columns = shape
        self._codec, self._gain, self._search = codec, gain, search

    def scale(self, start: int, values: Tensor) -> None:
        self._matrix_scale, codes, groups = encode_matrix(values, self.dim, self._codec.encode, self.peak)
        self._codes = codes.to(torch.int64)
        self._scales = row_scales(self._matrix_scale, self._codes)
        self._groups = groups.view(self._rows, -(-self._columns // self.dim))

    def round(self, start: int, target: Tensor, metric: Tensor | None = None, keep: bool = False) -> Tensor:
        place, columns = start // self.dim, target.shape[1]
        x = fill_groups(target, self.dim)[:, 0].contiguous()
        if metric is None:
            metric = torch.eye(columns, device=x.device)
        metric = torch.nn.functional.pad(metric, (0, self.dim - columns, 0, self.dim - columns))
        found = self._encode(x)
        value = reallocate(found, x, metric, self._encode, self._decode) if self._search else self._decode(found)
        if keep:
            present = self._groups.column(place)
            before = self._decode(present)
            rows = (_cost(x - value, metric) >= _cost(x - before, metric)).nonzero().squeeze(-1)
            found.put(rows, present, rows)
            value[rows] = before[rows]
        self._groups.put_column(place, found)
        return value[:, :columns]

    def round_span(
        self,
        columns: Sequence[int],
        base: Tensor,
        carried: Tensor,
        inverses: Tensor,
        metrics: Tensor,
        coupling: Tensor,
        keep: bool = False,
    ) -> Tensor:
        if self._gain != "projection" or not can_round_spans(base):
            return super().round_span(columns, base, carried, inverses, metrics, coupling, keep)
        missing = len(columns) * self.dim - base.shape[1]
        if missing:
            metrics = metrics.clone()
            metrics[-1, self.dim - missing :] = 0.0
            metrics[-1, :, self.dim - missing :] = 0.0
        places = torch.tensor([column // self.dim for column in columns])
        span = Span(base, carried, self._scales, inverses, metrics, coupling, places, keep)
        gain, *coset = self._groups.fields
        codes = Codes(self._groups.values, gain, coset[0] if coset else torch.zeros_like(gain), self._groups.gains)
        return round_span(span, self._codec.pyramid, codes, STEPS_TOWARDS if self._search else 0, OVERSTEP)

    def rescale(self, factors: Tensor) -> None:
        """The mean factor goes to the matrix scale, which is a float; the rest of each row's to the nearest step. A row
        that would leave the steps at the top takes the matrix scale with it."""
        if not factors.numel():
            return
        common = factors.mean()
        steps = torch.round(STEPS * torch.log2((factors[:, 0] / common).clamp(0.25, 4.0))).to(torch.int64)
        codes = self._codes + steps
        above = (codes.max() - TOP).clamp_min(0)
        self._matrix_scale = self._matrix_scale * common * torch.exp2(above / STEPS)
        self._codes = torch.where(self._codes > 0, (codes - above).clamp(1, TOP), 0)
        self._scales = row_scales(self._matrix_scale, self._codes)

    def decoded(self) -> Tensor:
        containers = self._scales.unsqueeze(-1) * self._groups.gains
        weight = self._groups.values * containers.unsqueeze(-1)
        return weight.flatten(1)[:, : self._columns]

    def finish(self) -> QuantizedMatrix:
        return self._codec.pack(self._matrix_scale, self._codes.to(torch.uint8), self._groups.view(-1))

    def _encode(self, x: Tensor) -> Groups:
        found = self._codec.encode(x.contiguous(), self._scales)
        if self._gain == "norm":
            length = torch.linalg.vector_norm(found.values.to(torch.float32), dim=1) * self._scales
            wanted = torch.linalg.vector_norm(x, dim=1) / length.clamp_min(torch.finfo(torch.float32).tiny)
            gain = (self._codec.pyramid.gains - wanted.unsqueeze(-1)).abs().argmin(1)
            return Groups(found.values, self._codec.pyramid.gains[gain], (gain, *found.fields[1:]))
        return found

    def _decode(self, found: Groups) -> Tensor:
        return found.values * (self._scales * found.gains).unsqueeze(-1)


def _cost(error: Tensor, metric: Tensor) -> Tensor:
    return ((error @ metric) * error).sum(1)
