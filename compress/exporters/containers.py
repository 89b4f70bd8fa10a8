"""How a matrix of integers times scales lies in the ONNX operator `com.microsoft.MatMulNBits`.

The operator computes y = x W^T with W[r, k] = fl32(scale[r, k // block] * (u[r, k] - 2^(bits-1))), where u are
unsigned integers of `bits` bits, packed little-endian along the columns:

    codes   uint8   [out, ceil(in / block), block * bits / 8]
    scales  float32 [out, ceil(in / block)]

ONNX Runtime's processor kernels take bits 2, 4, 8 and block 16, 32, ... 256. A codec whose weights are scale x integer
fits bit for bit, at the price of the container's size: 4 bits when all integers are in [-8, 7], else 8. Groups that are
no multiple of 16 share blocks, whose weights are then rounded once more, to 8 bits: some 2e-5 of their energy, a
thousandth of what few bits cost, and reported. Only 4 bits have a kernel that reads them directly; 8 bits are decoded
at each call. Two bits, exact for integers in [-2, 1], are slower than 4 by a factor of 20, so they are not used.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from compress.errors import ExportError
from compress.quantization.matrix import relative_error

if TYPE_CHECKING:
    from compress.codecs.base import QuantizedMatrix

BLOCKS = (256, 128, 64, 32, 16)
ROUNDED_BLOCK = 32


@dataclass(frozen=True)
class Container:
    """A matrix [rows, columns] as `MatMulNBits` stores it; shapes and dtypes in the module's docstring."""

    bits: int
    block: int
    rows: int
    columns: int
    codes: Tensor
    scales: Tensor
    error: float = 0.0
    """Of rounding to this container: squared error over the energy of the weights; 0 where it is exact."""

    def weight(self) -> Tensor:
        """W float32 [rows, columns], as the operator reads it."""
        unsigned = self.codes.view(self.rows, -1).to(torch.int16)
        if self.bits == 4:
            unsigned = torch.stack([unsigned & 15, unsigned >> 4], 2).view(self.rows, -1)
        integers = (unsigned - (1 << self.bits - 1)).to(torch.float32)
        blocks = integers.view(self.rows, -1, self.block) * self.scales.unsqueeze(-1)
        return blocks.view(self.rows, -1)[:, : self.columns].contiguous()

    @property
    def kind(self) -> str:
        return f"{self.bits} bit" if self.error == 0 else f"{self.bits} bit (rounded)"

    @property
    def stored_bits(self) -> int:
        return 8 * self.codes.nbytes + 8 * self.scales.nbytes


def container_of(matrix: QuantizedMatrix) -> Container:
    """The container of a matrix: exact where its groups are whole blocks, else rounded to 8 bits."""
    rows, columns = matrix.shape
    if not rows or not columns:
        raise ExportError(f"A matrix of {rows} x {columns} has no weights to export.")
    block = next((size for size in BLOCKS if matrix.spec.dim % size == 0), None)
    if block is None:
        return rounded(matrix.dequantize())
    integers, scales = matrix.integers()
    group = integers.shape[1] // scales.shape[1]
    blocks = -(-columns // block)
    scales = scales.repeat_interleave(group // block, 1)[:, :blocks].contiguous()
    integers = integers[:, : blocks * block].clone()
    integers[:, columns:] = 0
    bits = 4 if int(integers.min()) >= -8 and int(integers.max()) <= 7 else 8
    codes = pack(integers, bits).view(rows, blocks, block * bits // 8)
    return Container(bits, block, rows, columns, codes, scales)


def rounded(weight: Tensor) -> Container:
    """W float32 [o, n] in blocks of 32 integers of 8 bits, scale = max |w| / 127 of the block."""
    rows, columns = weight.shape
    blocks = -(-columns // ROUNDED_BLOCK)
    padded = torch.nn.functional.pad(weight, (0, blocks * ROUNDED_BLOCK - columns)).view(rows, blocks, ROUNDED_BLOCK)
    scales = padded.abs().amax(2) / 127
    integers = torch.round(padded / torch.where(scales > 0, scales, 1).unsqueeze(-1)).to(torch.int8)
    codes = pack(integers.view(rows, -1), 8).view(rows, blocks, ROUNDED_BLOCK)
    container = Container(8, ROUNDED_BLOCK, rows, columns, codes, scales)
    return replace(container, error=relative_error(weight, container.weight()))


def pack(integers: Tensor, bits: int) -> Tensor:
    """int8 [o, n] in [-2^(bits-1), 2^(bits-1)) as uint8 [o, n * bits / 8]: u = y + 2^(bits-1), low bits first."""
    unsigned = (integers.to(torch.int16) + (1 << bits - 1)).to(torch.uint8)
    if bits == 8:
        return unsigned
    return unsigned[:, 0::2] | unsigned[:, 1::2] << 4
