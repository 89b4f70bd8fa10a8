"""Bytes to bit streams of a few bits and back, a part at a time: `compress.ops` packs int64, eight times as large."""

from __future__ import annotations

import torch
from torch import Tensor

from compress import ops
from compress.ops.bits import packed_bytes

CHUNK_CODES = 2**20
"""Codes handled at once, a multiple of 8: every part of a stream begins with a byte."""


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """uint8 of any shape as one stream uint8 [ceil(numel bits / 8)]; see `compress.ops.bits`."""
    return torch.cat([ops.pack_bits(part.to(torch.int64), bits) for part in codes.flatten().split(CHUNK_CODES)])


def unpack_codes(packed: Tensor, bits: int, shape: tuple[int, int]) -> Tensor:
    """uint8 of this shape, of the stream that `pack_codes` made of it."""
    codes = torch.empty(shape[0] * shape[1], dtype=torch.uint8, device=packed.device)
    for index, part in enumerate(codes.split(CHUNK_CODES)):
        start = index * packed_bytes(CHUNK_CODES, bits)
        piece = packed[start : start + packed_bytes(part.numel(), bits)]
        part.copy_(ops.unpack_bits(piece, bits, part.numel()))
    return codes.view(shape)
