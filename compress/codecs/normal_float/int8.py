"""Rows of signed bytes: the weights of LLM.int8 (Dettmers et al. 2022, arXiv 2208.07339, section 2.1).

    w ~ fl32(q fl32(a / 127)),    a = max |w| of the row,    q = round(w fl32(127 / a)),    -127 <= q <= 127

with one float32 a for each row and ties to even: 8 + 32 / n bits a weight, and no rate to choose. a / 127 is computed
as a fl32(1/127). Codes and scales are those of `int8_vectorwise_quant` of bitsandbytes 0.50.2, bit for bit, and values
those of its product with float activations; `int8_vectorwise_dequant` multiplies in another order and differs by an ulp
or two. Where 127 / a is beyond float32, a below 3.8e-37, bitsandbytes casts infinity to a byte; here such rows are 0.

The module `Linear8bitLt` of bitsandbytes rounds weights to float16 before that, which this codec does not, and rounds
activations to 8 bits too, each row with its own scale and outliers apart; that is no matter of the weights.
"""

from __future__ import annotations

from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from compress.codecs.base import (
    Codec,
    CodecSpec,
    FieldLayout,
    GainRule,
    QuantizedMatrix,
    Rounding,
    exact_containers,
)
from compress.codecs.finite import finite_matrix
from compress.codecs.normal_float.config import BITSANDBYTES, INTEGER_BITS, Int8Config, config_of, require_width
from compress.codecs.registry import register_codec
from compress.errors import NumericsError

TOP = 127
STEP = 1 / TOP
ROW_BLOCK = 32
"""A row with one scale may be cut into blocks of any size."""


def steps(absmax: Tensor) -> Tensor:
    """The value of q = 1, float32 [o], for a float32 [o]."""
    return absmax * STEP


def nearest(values: Tensor, absmax: Tensor) -> Tensor:
    """q int8 [o, m] of values float32 [o, m] in rows with a [o]; 0 where 127 / a is not finite."""
    inverse = TOP / absmax
    inverse = torch.where(torch.isfinite(inverse), inverse, 0)
    return torch.round(values * inverse.unsqueeze(1)).clamp_(-TOP, TOP).to(torch.int8)


@register_codec
class Int8Codec(Codec):
    """See the module's text; the methods are those of `compress.codecs.base.Codec`."""

    config_type: ClassVar[type[Any]] = Int8Config

    def __init__(self, config: Int8Config) -> None:
        self.config = config

    @classmethod
    def from_spec(cls, spec: CodecSpec) -> Self:
        return cls(config_of(spec, Int8Config, INTEGER_BITS))

    @property
    def dim(self) -> int:
        return 1

    def widths(self, lowest: float = 0.0, highest: float = float("inf")) -> tuple[int, ...]:
        return (INTEGER_BITS,) if lowest <= INTEGER_BITS <= highest else ()

    def spec(self, width: int) -> CodecSpec:
        require_width(self.config.name, width, INTEGER_BITS)
        return CodecSpec(self.config.name, INTEGER_BITS, 1)

    def layout(self, spec: CodecSpec, shape: tuple[int, int]) -> tuple[FieldLayout, ...]:
        return (FieldLayout("absmax", torch.float32, (shape[0],)), FieldLayout("codes", torch.int8, shape))

    def quantize(self, weight: Tensor, spec: CodecSpec) -> QuantizedMatrix:
        weight = finite_matrix(weight)
        rows, columns = weight.shape
        absmax = weight.abs().amax(1) if columns else weight.new_zeros(rows)
        return QuantizedMatrix(spec, (rows, columns), {"absmax": absmax, "codes": nearest(weight, absmax)})

    def rounding(
        self,
        shape: tuple[int, int],
        spec: CodecSpec,
        device: torch.device,
        gain: GainRule = "projection",
        search: bool = True,
    ) -> Int8Rounding:
        """`gain` and `search` are for groups that are rounded as a whole; these are single columns."""
        return Int8Rounding(shape, spec, device)

    def spread(self, weight: Tensor) -> Tensor:
        """The largest magnitude of each row."""
        return weight.abs().amax(1, keepdim=True)

    def integers(self, matrix: QuantizedMatrix) -> tuple[Tensor, Tensor]:
        return matrix.tensors["codes"], steps(matrix.tensors["absmax"]).unsqueeze(1)

    def decode(self, matrix: QuantizedMatrix, dtype: torch.dtype) -> Tensor:
        integers, scales = self.integers(matrix)
        return integers.to(torch.float32).mul_(scales).to(dtype)

    def containers(self, spec: CodecSpec) -> tuple[str, ...]:
        return (*exact_containers(ROW_BLOCK, TOP), BITSANDBYTES)


class Int8Rounding(Rounding):
    """`compress.codecs.base.Rounding` of rows of bytes: scales once, from the weights as they are, then columns, each
    on its own, so that a metric changes nothing."""

    dim = 1

    def __init__(self, shape: tuple[int, int], spec: CodecSpec, device: torch.device) -> None:
        self.shape, self.spec = shape, spec
        self.scope = max(1, shape[1])
        self.absmax = torch.zeros(shape[0], device=device)
        self.codes = torch.zeros((shape[1], shape[0]), dtype=torch.int8, device=device)
        """Column by column, as they come."""

    def scale(self, start: int, values: Tensor) -> None:
        """See `Rounding.scale`; `values` is the whole matrix."""
        if not bool(torch.isfinite(values).all()):
            raise NumericsError(f"The values to be rounded from column {start} on are not all finite.")
        self.absmax = values.abs().amax(1)

    def round(self, start: int, target: Tensor, metric: Tensor | None = None, keep: bool = False) -> Tensor:
        """See `Rounding.round`; every column of a row keeps its code or not by itself."""
        end, scales = start + target.shape[1], steps(self.absmax).unsqueeze(1)
        codes = nearest(target, self.absmax)
        if keep:
            present = self.codes[start:end].t()
            near = (target - present * scales).abs() <= (target - codes * scales).abs()
            codes = torch.where(near, present, codes)
        self.codes[start:end] = codes.t()
        return codes * scales

    def rescale(self, factors: Tensor) -> None:
        """See `Rounding.rescale`. Raises `NumericsError` for factors that are not finite."""
        if not bool(torch.isfinite(factors).all()):
            raise NumericsError("The factors of the scales are not all finite.")
        self.absmax = (self.absmax * factors[:, 0]).clamp_(0, torch.finfo(torch.float32).max)

    def decoded(self) -> Tensor:
        """See `Rounding.decoded`."""
        return self.codes.t() * steps(self.absmax).unsqueeze(1)

    def finish(self) -> QuantizedMatrix:
        """See `Rounding.finish`."""
        return QuantizedMatrix(self.spec, self.shape, {"absmax": self.absmax, "codes": self.codes.t().contiguous()})
