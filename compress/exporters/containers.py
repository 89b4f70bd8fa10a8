"""How a matrix of integers times scales lies in the ONNX operator `com.microsoft.MatMulNBits`.

The operator computes y = x W^T with W[r, k] = fl32(scale[r, k // block] * (u[r, k] - 2^(bits-1))), where u are
unsigned integers of `bits` bits, packed little-endian along the columns:

    codes   uint8   [out, ceil(in / block), block * bits / 8]
    scales  float32 [out, ceil(in / block)]

ONNX Runtime's processor kernels take bits 2, 4, 8 and block 16, 32, ... 256. A codec whose weights are scale x integer
fits bit for bit, at the price of the container's size: 4 bits when all integers are in [-8, 7], else 8. Only 4 bits
have a kernel that reads them directly; 8 bits are decoded at each call. Two bits would be exact for integers in
[-2, 1], and slower than 4 by a factor of 20, so they are not used.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from compress.errors import ExportError

if TYPE_CHECKING:
    from compress.codecs.base import QuantizedMatrix

BLOCKS = (256, 128, 64, 32, 16)


@dataclass(frozen=True)
class Container:
    """A matrix [rows, columns] as `MatMulNBits` stores it; shapes and dtypes in the module's docstring."""

    bits: int
    block: int
    rows: int
    columns: int
    codes: Tensor
    scales: Tensor

    @property
    def stored_bits(self) -> int:
        return 8 * self.codes.nbytes + 8 * self.scales.nbytes


def container_of(name: str, matrix: QuantizedMatrix) -> Container:
    """The exact container of the matrix called `name`. Raises `ExportError` where none is exact."""
    rows, columns = matrix.shape
    integers, scales = matrix.integers()
    group = integers.shape[1] // scales.shape[1]
    block = next((size for size in BLOCKS if group % size == 0), None)
    if block is None:
        raise ExportError(
            f"'{name}': groups of {group} weights do not divide into ONNX Runtime's blocks of 16 or more.",
            remedy="Quantize again with --codec pyramid, or half_pyramid:dim=16.",
        )
    blocks = -(-columns // block)
    scales = scales.repeat_interleave(group // block, 1)[:, :blocks].contiguous()
    integers = integers[:, : blocks * block].clone()
    integers[:, columns:] = 0
    bits = 4 if int(integers.min()) >= -8 and int(integers.max()) <= 7 else 8
    codes = pack(integers, bits).view(rows, blocks, block * bits // 8)
    return Container(bits, block, rows, columns, codes, scales)


def pack(integers: Tensor, bits: int) -> Tensor:
    """int8 [o, n] in [-2^(bits-1), 2^(bits-1)) as uint8 [o, n * bits / 8]: u = y + 2^(bits-1), low bits first."""
    unsigned = (integers.to(torch.int16) + (1 << bits - 1)).to(torch.uint8)
    if bits == 8:
        return unsigned
    return unsigned[:, 0::2] | unsigned[:, 1::2] << 4
