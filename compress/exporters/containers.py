"""How a matrix of integers times scales lies in the ONNX operator `com.microsoft.MatMulNBits`.

The operator computes y = x W^T with W[r, k] = fl32(scale[r, k // block] * (u[r, k] - zero[r, k // block])), where u
are unsigned integers of `bits` bits, packed little-endian along the columns, and zero points, packed in the same way
along the blocks, are 2^(bits-1) where none are given:

    codes   uint8   [out, ceil(in / block), block * bits / 8]
    scales  float32 [out, ceil(in / block)]
    zeros   uint8   [out, ceil(ceil(in / block) * bits / 8)]

ONNX Runtime's processor kernels take bits 2, 4, 8 and block 16, 32, ... 256. A codec whose weights are scale x integer
fits bit for bit, at the price of the container's size: 4 bits when all integers are in [-8, 7]; 4 bits with zero points
when those of each block and 0 lie within 16 consecutive ones; else 8. A row with one scale may be cut anywhere. Other
groups that are no multiple of 16 share blocks, whose weights are then rounded once more, to 8 bits: some 2e-5 of their
energy, a thousandth of what few bits cost, and reported. Only 4 bits have a kernel that reads them directly; 8 bits
are decoded at each call. Two bits, exact for integers in [-2, 1], are slower than 4 by a factor of 20, so they are not
used.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from compress.errors import CodecError, ExportError
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
    zeros: Tensor | None = None

    def weight(self) -> Tensor:
        """W float32 [rows, columns], as the operator reads it."""
        unsigned = unpack(self.codes.view(self.rows, -1), self.bits).view(self.rows, -1, self.block)
        if self.zeros is None:
            integers = unsigned - (1 << self.bits - 1)
        else:
            integers = unsigned - unpack(self.zeros, self.bits)[:, : self.scales.shape[1]].unsqueeze(-1)
        blocks = integers.to(torch.float32) * self.scales.unsqueeze(-1)
        return blocks.view(self.rows, -1)[:, : self.columns].contiguous()

    @property
    def kind(self) -> str:
        return f"{self.bits} bit" if self.error == 0 else f"{self.bits} bit (rounded)"

    @property
    def stored_bits(self) -> int:
        return 8 * (self.codes.nbytes + self.scales.nbytes + (0 if self.zeros is None else self.zeros.nbytes))


def container_of(matrix: QuantizedMatrix) -> Container:
    """The container of a matrix: exact where its groups are whole blocks, else rounded to 8 bits. So is a mixed
    matrix, since the operator multiplies in the original basis, and one of values from a table."""
    rows, columns = matrix.shape
    if not rows or not columns:
        raise ExportError(f"A matrix of {rows} x {columns} has no weights to export.")
    try:
        integers, scales = matrix.integers()
    except CodecError:  # no such product, of which codes that are damaged have none either
        return rounded(matrix.dequantize())
    group = integers.shape[1] // scales.shape[1]
    if scales.shape[1] == 1:
        group = -(-group // ROUNDED_BLOCK) * ROUNDED_BLOCK
    block = next((size for size in BLOCKS if group % size == 0), None)
    if block is None:
        return rounded(matrix.dequantize())
    blocks = -(-columns // block)
    scales = scales.repeat_interleave(group // block, 1)[:, :blocks].contiguous()
    integers = functional.pad(integers[:, :columns], (0, blocks * block - columns)).view(rows, blocks, block)
    bits, zeros = numbers_of(integers)
    codes = pack(integers + zeros.unsqueeze(-1), bits)
    fixed = bool((zeros == 1 << bits - 1).all())
    return Container(bits, block, rows, columns, codes, scales, zeros=None if fixed else pack(zeros, bits))


def numbers_of(integers: Tensor) -> tuple[int, Tensor]:
    """Bits and zero points int16 [o, blocks] for int8 [o, blocks, block]; 2^(bits-1) everywhere if that will do."""
    low, high = integers.amin(2).clamp_max_(0).to(torch.int16), integers.amax(2).clamp_min_(0).to(torch.int16)
    if int(low.min()) >= -8 and int(high.max()) <= 7:
        return 4, torch.full_like(low, 8)
    if int((high - low).max()) <= 15:
        return 4, -low
    return 8, torch.full_like(low, 128)


def rounded(weight: Tensor) -> Container:
    """W float32 [o, n] in blocks of 32 integers of 8 bits."""
    (rows, columns), (integers, scales) = weight.shape, rounded_integers(weight)
    codes = pack(integers.to(torch.int16) + 128, 8)
    container = Container(8, ROUNDED_BLOCK, rows, columns, codes, scales)
    return replace(container, error=relative_error(weight, container.weight()))


def rounded_integers(weight: Tensor) -> tuple[Tensor, Tensor]:
    """W float32 [o, n] as int8 [o, ceil(n / 32), 32], zeros at the end, times float32 [o, ceil(n / 32)], which is
    max |w| / 127 of the block."""
    rows, columns = weight.shape
    blocks = -(-columns // ROUNDED_BLOCK)
    padded = functional.pad(weight, (0, blocks * ROUNDED_BLOCK - columns)).view(rows, blocks, ROUNDED_BLOCK)
    scales = padded.abs().amax(2) / 127
    return torch.round(padded / torch.where(scales > 0, scales, 1).unsqueeze(-1)).to(torch.int8), scales


def pack(numbers: Tensor, bits: int) -> Tensor:
    """Numbers [..., n] from 0 to 2^bits - 1, of 4 or 8 bits, as uint8 [..., ceil(n * bits / 8)], low bits first."""
    numbers = numbers.to(torch.uint8)
    if bits == 8:
        return numbers
    numbers = functional.pad(numbers, (0, numbers.shape[-1] % 2))
    return numbers[..., 0::2] | numbers[..., 1::2] << 4


def unpack(packed: Tensor, bits: int) -> Tensor:
    """The numbers of `pack`, int16; of 4 bits always an even count."""
    packed = packed.to(torch.int16)
    return packed if bits == 8 else torch.stack([packed & 15, packed >> 4], -1).flatten(-2)
