"""How the weight of a convolution lies in an ONNX file: integers and scales in front of `Conv`.

ONNX has no convolution with quantized weights and float32 activations. The weight, as the matrix [out, in x kernel], is
an initializer of integers; `DequantizeLinear` makes

    W[r, k] = fl32(scale[r, k // block] * (u[r, k] - zero[r, k // block]))

of it, and a `Reshape` the kernel of the `Conv`. The file holds

    u       int4, uint4 or int8 [out, in x kernel], two numbers of 4 bits a byte
    scales  float32 [out, blocks], or [out] where a row has one
    zeros   uint4 like the scales, where u is uint4; else they are 0

Blocks may be of any length, the last one of a row shorter, so every codec whose weights are scale x integer fits bit
for bit: as int4 when all integers are in [-8, 7], as uint4 when those of each block and 0 lie within 16 consecutive
ones, else as int8. Other weights are rounded to int8 in blocks of 32, as matrices are (`containers`).

Four bits and blocks need opset 21.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from compress.errors import CodecError
from compress.exporters.containers import numbers_of, pack, rounded_integers
from compress.quantization.matrix import relative_error

if TYPE_CHECKING:
    from onnx_ir import Graph

    from compress.codecs.base import QuantizedMatrix

OPERATOR = "DequantizeLinear"
OPSET = 21


@dataclass(frozen=True)
class Blocked:
    """A matrix as `DequantizeLinear` reads it: `codes` int8 [out, n], or uint8 with `zeros` uint8 [out, blocks], and
    `scales` float32 [out, blocks]. `bits` of a code are stored."""

    bits: int
    block: int
    codes: Tensor
    scales: Tensor
    zeros: Tensor | None = None
    error: float = 0.0
    """As that of `Container`."""

    @property
    def rows(self) -> int:
        return self.codes.shape[0]

    @property
    def columns(self) -> int:
        return self.codes.shape[1]

    def weight(self) -> Tensor:
        """W float32 [out, n], as the operator makes it."""
        integers = self.codes.to(torch.float32)
        if self.zeros is not None:
            integers -= self._spread(self.zeros)
        return integers * self._spread(self.scales)

    def _spread(self, blocks: Tensor) -> Tensor:
        return blocks.repeat_interleave(self.block, 1)[:, : self.columns]

    @property
    def kind(self) -> str:
        return f"{self.bits} bit" if self.error == 0 else f"{self.bits} bit (rounded)"

    @property
    def stored_bits(self) -> int:
        numbers = (self.codes.numel(), 0 if self.zeros is None else self.zeros.numel())
        return 8 * (sum(-(-count * self.bits // 8) for count in numbers) + self.scales.nbytes)


def blocked_of(matrix: QuantizedMatrix) -> Blocked:
    """The integers and scales of a matrix; rounded to 8 bits where it is no product of both."""
    columns = matrix.shape[1]
    try:
        integers, scales = matrix.integers()
    except CodecError:  # no such product, of which codes that are damaged have none either
        weight = matrix.dequantize()
        made = _blocked(*rounded_integers(weight), columns)
        return Blocked(
            made.bits, made.block, made.codes, made.scales, made.zeros, relative_error(weight, made.weight())
        )
    return _blocked(integers.unflatten(1, (scales.shape[1], -1)), scales, columns)


def _blocked(integers: Tensor, scales: Tensor, columns: int) -> Blocked:
    """Of int8 [o, blocks, block] and float32 [o, blocks], of which `columns` numbers a row are weights."""
    block = min(integers.shape[2], columns)
    blocks = -(-columns // block)
    integers, scales = integers[:, :blocks], scales[:, :blocks].contiguous()
    bits, zeros = numbers_of(integers)
    if bits == 8 or bool((zeros == 8).all()):
        return Blocked(bits, block, integers.flatten(1)[:, :columns].contiguous(), scales)
    codes = (integers + zeros.unsqueeze(-1)).flatten(1)[:, :columns]
    return Blocked(bits, block, codes.to(torch.uint8).contiguous(), scales, zeros.to(torch.uint8))


def dequantized(codes: Tensor, scales: Tensor, zeros: Tensor | None, block: int) -> Tensor:
    """The operator, for tracing: it computes nothing."""
    rows, columns = codes.shape
    one = scales.shape[1] == 1
    inputs = [codes, scales, *([] if zeros is None else [zeros])]
    if one:
        inputs = [codes, *(each.squeeze(1) for each in inputs[1:])]
    attributes: dict[str, Any] = {"axis": 0} if one else {"axis": 1, "block_size": block}
    return torch.onnx.ops.symbolic(
        OPERATOR, inputs, attributes, dtype=torch.float32, shape=(rows, columns), version=OPSET
    )


def store_four_bits(graph: Graph) -> None:
    """Store the integers of every dequantization in 4 bits where they are so small; torch has no such type."""
    from onnx_ir import DataType, PackedTensor, Shape

    types = {DataType.INT8: DataType.INT4, DataType.UINT8: DataType.UINT4}
    for node in graph:
        if node.op_type != OPERATOR:
            continue
        for value in (node.inputs[0], *node.inputs[2:]):
            assert value is not None and value.const_value is not None and value.dtype is not None
            numbers = torch.from_numpy(value.const_value.numpy())
            if value.dtype in types and _are_small(numbers):
                value.dtype, shape = types[value.dtype], Shape(numbers.shape)
                packed = pack((numbers & 15).flatten(), 4).numpy()
                value.const_value = PackedTensor(packed, dtype=value.dtype, shape=shape, name=value.name)


def _are_small(numbers: Tensor) -> bool:
    return numbers.dtype == torch.uint8 or bool((numbers.clamp(-8, 7) == numbers).all())
