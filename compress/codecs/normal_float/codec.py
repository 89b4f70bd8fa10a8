"""Four bits into a fixed table of 16 values: the weights that bitsandbytes holds.

    w ~ fl32(a v[c]),    a = max |w| of a block,    c = the nearest of w / a among v[0 .. 15]

The tables are in `tables`, blocks and their scales in `scales`. A scale adds 32 / block bits a weight, a nested one
(8 + 32 / 256) / block: with blocks of 64, 4.5 and 4.127 bits. There is one width, so there is no rate to choose.

Codes, scales and decoded values are those of `quantize_4bit` and `dequantize_4bit` of bitsandbytes 0.50.2 on the CPU,
bit for bit, but for nested codes: its library looks those up in 65,536 steps of the quotient, which takes a neighbour
of the nearest for about one in a thousand, and more near 0. These here are the nearest.

The values are no integers times a scale, so there are no `integers()`, and no container of integers is exact.
"""

from __future__ import annotations

from typing import Any, ClassVar, Self

import torch
from torch import Tensor
from torch.nn import functional

from compress.codecs.base import Codec, CodecSpec, FieldLayout, GainRule, QuantizedMatrix
from compress.codecs.finite import finite_matrix
from compress.codecs.normal_float.config import (
    BITSANDBYTES,
    TABLE_BITS,
    Fp4Config,
    Nf4Config,
    TableConfig,
    config_of,
    require_width,
)
from compress.codecs.normal_float.nibbles import pack, unpack
from compress.codecs.normal_float.rounding import TableRounding
from compress.codecs.normal_float.scales import CHUNK_WEIGHTS, largest, nested_layout, store, stored, units
from compress.codecs.normal_float.tables import table
from compress.codecs.registry import register_codec
from compress.errors import CodecError


class TableCodec(Codec):
    """See the module's text; the methods are those of `compress.codecs.base.Codec`."""

    config_type: ClassVar[type[Any]]

    def __init__(self, config: TableConfig) -> None:
        self.config = config

    @classmethod
    def from_spec(cls, spec: CodecSpec) -> Self:
        return cls(config_of(spec, cls.config_type, TABLE_BITS))

    @property
    def dim(self) -> int:
        return 1

    def widths(self, lowest: float = 0.0, highest: float = float("inf")) -> tuple[int, ...]:
        return (TABLE_BITS,) if lowest <= TABLE_BITS <= highest else ()

    def spec(self, width: int) -> CodecSpec:
        require_width(self.config.name, width, TABLE_BITS)
        options = {"block": self.config.block, "double": self.config.double}
        return CodecSpec(self.config.name, TABLE_BITS, 1, options)

    def layout(self, spec: CodecSpec, shape: tuple[int, int]) -> tuple[FieldLayout, ...]:
        config, weights = self.from_spec(spec).config, shape[0] * shape[1]
        scales = nested_layout(-(-weights // config.block), config.double)
        return (*scales, FieldLayout("codes", torch.uint8, (-(-weights // 2),)))

    def quantize(self, weight: Tensor, spec: CodecSpec) -> QuantizedMatrix:
        config, weight = self.from_spec(spec).config, finite_matrix(weight)
        flat, values = weight.flatten(), table(config.name).to(weight.device)
        scales = largest(flat, config.block)
        codes = torch.empty(flat.numel(), dtype=torch.uint8, device=flat.device)
        for start in range(0, flat.numel(), CHUNK_WEIGHTS):
            part = flat[start : start + CHUNK_WEIGHTS]
            whole = part.numel() // config.block * config.block
            first = start // config.block
            blocks = part[:whole].view(-1, config.block)
            around = scales[first : first + blocks.shape[0]].unsqueeze(1)
            codes[start : start + whole] = values.nearest(units(blocks, around, False)).flatten()
            if whole < part.numel():
                codes[start + whole :] = values.nearest(units(part[whole:], scales[-1], True))
        rows, columns = weight.shape
        tensors = {**store(scales, config.double), "codes": pack(codes, values.nearest(flat.new_zeros(1)))}
        return QuantizedMatrix(spec, (rows, columns), tensors)

    def rounding(
        self,
        shape: tuple[int, int],
        spec: CodecSpec,
        device: torch.device,
        gain: GainRule = "projection",
        search: bool = True,
    ) -> TableRounding:
        """`gain` and `search` are for groups that are rounded as a whole; these are single columns."""
        return TableRounding(shape, spec, self.from_spec(spec).config, device)

    def spread(self, weight: Tensor) -> Tensor:
        """The largest magnitude of each block."""
        block, flat = self.config.block, weight.flatten()
        padded = functional.pad(flat, (0, -flat.numel() % block)).view(-1, block)
        return padded.abs().amax(1).repeat_interleave(block)[: flat.numel()].view(weight.shape)

    def integers(self, matrix: QuantizedMatrix) -> tuple[Tensor, Tensor]:
        """There are none: raises `CodecError`."""
        raise CodecError(
            f"The values of '{self.config.name}' are no integers times a scale.",
            remedy="Take the decoded matrix, or quantize with integer, int8 or pyramid.",
        )

    def decode(self, matrix: QuantizedMatrix, dtype: torch.dtype) -> Tensor:
        config, (rows, columns) = self.from_spec(matrix.spec).config, matrix.shape
        packed, scales = matrix.tensors["codes"], stored(matrix.tensors)
        values = table(config.name).to(packed.device)
        weight = torch.empty(rows * columns, dtype=dtype, device=packed.device)
        for start in range(0, weight.numel(), CHUNK_WEIGHTS):
            part = weight[start : start + CHUNK_WEIGHTS]
            first, end = start // config.block, -(-(start + part.numel()) // config.block)
            around = scales[first:end].repeat_interleave(config.block)[: part.numel()]
            codes = unpack(packed[start // 2 : -(-(start + part.numel()) // 2)], part.numel())
            part.copy_(values.decode(codes).mul_(around))
        return weight.view(rows, columns)

    def containers(self, spec: CodecSpec) -> tuple[str, ...]:
        return (BITSANDBYTES,)


@register_codec
class Nf4Codec(TableCodec):
    """NF4; see the module's text."""

    config_type: ClassVar[type[Any]] = Nf4Config


@register_codec
class Fp4Codec(TableCodec):
    """FP4; see the module's text."""

    config_type: ClassVar[type[Any]] = Fp4Config
