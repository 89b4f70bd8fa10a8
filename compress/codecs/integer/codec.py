"""Group integers: a weight is a scale times an integer of a few bits, after a zero point.

    w ~ s_g (q - z_g),    0 <= q, z_g <= 2^b - 1,    s_g float16

with one scale s and one zero point z for each row and `group` columns. This is the format of GPTQ, AWQ and most
runtimes: the baseline of everything here, and the one that stock containers carry. b is the code's width, so a budget
chooses it; a scale and a zero point add (16 + b) / group bits a weight. How they are chosen is in `grid`.

Symmetric groups have z = 2^(b-1), not stored. At 8 bits all groups are symmetric: q - z then is a signed byte, as
`integers()` and the containers want it, and what a free zero point could save is below 1e-4 of the energy.

A product s (q - z) has at most 11 + 8 bits and is exact in float32. The payload is described in docs/formats.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, Self

import torch
from torch import Tensor
from torch.nn import functional

from compress.codecs.base import Codec, CodecSpec, FieldLayout, GainRule, QuantizedMatrix, exact_containers
from compress.codecs.finite import finite_matrix
from compress.codecs.integer.config import WIDTHS, IntegerConfig, config_of
from compress.codecs.integer.grid import Grid
from compress.codecs.integer.rounding import IntegerRounding, packed
from compress.codecs.integer.streams import unpack_codes, unpack_rows
from compress.codecs.registry import register_codec
from compress.errors import UsageError
from compress.ops.bits import packed_bytes

CHUNK_WEIGHTS = 2**18
"""Weights handled at once, whole rows at a time: the search reads them 30 times, so they should stay in the cache."""


@register_codec
class IntegerCodec(Codec):
    """See the module's text; the methods are those of `compress.codecs.base.Codec`."""

    rows_apart = 8
    config_type: ClassVar[type[Any]] = IntegerConfig

    def __init__(self, config: IntegerConfig) -> None:
        self.config = config

    @classmethod
    def from_spec(cls, spec: CodecSpec) -> Self:
        return cls(config_of(spec))

    @property
    def dim(self) -> int:
        return 1

    def widths(self, lowest: float = 0.0, highest: float = float("inf")) -> tuple[int, ...]:
        return tuple(width for width in WIDTHS if lowest <= width <= highest)

    def spec(self, width: int) -> CodecSpec:
        if width not in WIDTHS:
            raise UsageError(
                f"There are no group integers of {width} bits.", remedy=f"They have {WIDTHS[0]} to {WIDTHS[-1]} bits."
            )
        config = self.config
        options = {"group": config.group, "symmetric": config.symmetric, "clip": config.clip}
        return CodecSpec(config.name, width, 1, options)

    def layout(self, spec: CodecSpec, shape: tuple[int, int]) -> tuple[FieldLayout, ...]:
        config, (rows, columns) = config_of(spec), shape
        groups = config.groups(columns)
        scales = FieldLayout("scales", torch.float16, (rows, groups))
        zeros = FieldLayout("zeros", torch.uint8, (packed_bytes(rows * groups, spec.width),))
        codes = FieldLayout("codes", torch.uint8, (packed_bytes(rows * columns, spec.width),))
        return (scales, codes) if config.centred(spec.width) else (scales, zeros, codes)

    def quantize(self, weight: Tensor, spec: CodecSpec) -> QuantizedMatrix:
        config, weight = config_of(spec), finite_matrix(weight)
        rows, columns = weight.shape
        grid = Grid(spec.width, config.centred(spec.width))
        size, groups = config.columns(columns), config.groups(columns)
        scales, zeros = weight.new_empty((2, rows, groups))
        codes = torch.empty((rows, columns), dtype=torch.uint8, device=weight.device)
        for part in _parts(rows, columns):
            x = _cut(weight[part], size, groups)
            scales[part], zeros[part] = grid.choose(x, config.clip)
            s, z = scales[part].unsqueeze(-1), zeros[part].unsqueeze(-1)
            codes[part] = grid.nearest(x, s, z).add_(z).flatten(1)[:, :columns]
        return packed((rows, columns), spec, scales, zeros, codes)

    def rounding(
        self,
        shape: tuple[int, int],
        spec: CodecSpec,
        device: torch.device,
        gain: GainRule = "projection",
        search: bool = True,
    ) -> IntegerRounding:
        """`gain` and `search` are for groups that are rounded as a whole; these are single columns."""
        return IntegerRounding(shape, spec, device)

    def spread(self, weight: Tensor) -> Tensor:
        """The range of each group, in which its grid is laid."""
        size = self.config.columns(weight.shape[1])
        groups = _cut(weight, size, self.config.groups(weight.shape[1]))
        if self.config.symmetric:
            ranges = groups.abs().amax(2)
        else:
            ranges = groups.amax(2).clamp(min=0) - groups.amin(2).clamp(max=0)
        return ranges.repeat_interleave(size, 1)[:, : weight.shape[1]]

    def integers(self, matrix: QuantizedMatrix) -> tuple[Tensor, Tensor]:
        config, (rows, columns) = config_of(matrix.spec), matrix.shape
        size, groups = config.columns(columns), config.groups(columns)
        codes = unpack_codes(matrix.tensors["codes"], matrix.spec.width, matrix.shape)
        zeros = _zeros(matrix)
        integers = torch.zeros((rows, groups * size), dtype=torch.int8, device=codes.device)
        for part in _parts(rows, columns):
            x = _cut(codes[part].to(torch.int16), size, groups) - zeros[part].unsqueeze(-1)
            integers[part, :columns] = x.flatten(1)[:, :columns]
        return integers, matrix.tensors["scales"].to(torch.float32)

    def decode(self, matrix: QuantizedMatrix, dtype: torch.dtype) -> Tensor:
        (rows, columns), (integers, scales) = matrix.shape, self.integers(matrix)
        size = config_of(matrix.spec).columns(columns)
        weight = torch.empty((rows, columns), dtype=dtype, device=scales.device)
        for part in _parts(rows, columns):
            x = _cut(integers[part].to(torch.float32), size, scales.shape[1])
            weight[part] = x.mul_(scales[part].unsqueeze(-1)).flatten(1)[:, :columns]
        return weight

    def rows(self, matrix: QuantizedMatrix, rows: Tensor, dtype: torch.dtype) -> Tensor:
        config, width, columns = config_of(matrix.spec), matrix.spec.width, matrix.shape[1]
        groups = config.groups(columns)
        scales = matrix.tensors["scales"].index_select(0, rows).to(torch.float32)
        codes = unpack_rows(matrix.tensors["codes"], width, columns, rows).to(torch.float32)
        x = _cut(codes, config.columns(columns), groups)
        if config.centred(width):
            x = x - (1 << width - 1)
        else:
            x = x - unpack_rows(matrix.tensors["zeros"], width, groups, rows).unsqueeze(-1)
        return x.mul_(scales.unsqueeze(-1)).flatten(1)[:, :columns].to(dtype)

    def containers(self, spec: CodecSpec) -> tuple[str, ...]:
        """A row with one scale may be cut into blocks of any size, of 32 for example."""
        return exact_containers(config_of(spec).group or 32, (1 << spec.width - 1) - 1)


def _parts(rows: int, columns: int) -> Iterator[slice]:
    """All rows, some at a time."""
    step = max(1, CHUNK_WEIGHTS // max(columns, 1))
    return (slice(start, start + step) for start in range(0, rows, step))


def _cut(values: Tensor, size: int, groups: int) -> Tensor:
    """[r, n] as groups [r, groups, size], the last filled up with zeros, which change neither span nor error."""
    filled = functional.pad(values, (0, groups * size - values.shape[1]))
    return filled.reshape(values.shape[0], groups, size)


def _zeros(matrix: QuantizedMatrix) -> Tensor:
    """Zero points int16 [o, groups]."""
    spec, scales = matrix.spec, matrix.tensors["scales"]
    if config_of(spec).centred(spec.width):
        return torch.full(scales.shape, 1 << spec.width - 1, dtype=torch.int16, device=scales.device)
    return unpack_codes(matrix.tensors["zeros"], spec.width, (scales.shape[0], scales.shape[1])).to(torch.int16)
