"""Bytes to bit streams of a few bits and back, a part at a time: `compress.ops` packs int64, eight times as large."""

from __future__ import annotations

import math

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


def unpack_rows(packed: Tensor, bits: int, columns: int, rows: Tensor) -> Tensor:
    """uint8 [N, columns]: the `rows` int64 [N] of the codes [., columns] that `pack_codes` made this stream of, without
    reading others. The rows must be in it."""
    if columns * bits % 8 == 0:
        return _unpack_whole(packed.view(-1, columns * bits // 8).index_select(0, rows), bits)
    first = rows.unsqueeze(1) * (columns * bits) + torch.arange(columns, device=rows.device) * bits
    byte = (first // 8).flatten()
    low, high = packed.index_select(0, byte), packed.index_select(0, (byte + 1).clamp_max_(packed.numel() - 1))
    return _code(low, high, (first % 8).flatten().to(torch.uint8), bits).view(first.shape)


def _unpack_whole(held: Tensor, bits: int) -> Tensor:
    """The codes of rows of whole bytes [N, .], by the place that a code has in the shortest run of whole bytes."""
    if bits == 8:
        return held
    size = bits // math.gcd(bits, 8)
    runs = held.view(held.shape[0], -1, size)
    codes = runs.new_empty((*runs.shape[:2], 8 * size // bits))
    for place in range(codes.shape[2]):
        byte, shift = divmod(place * bits, 8)
        codes[..., place] = _code(runs[..., byte], runs[..., min(byte + 1, size - 1)], shift, bits)
    return codes.flatten(1)


def _code(low: Tensor, high: Tensor, shift: Tensor | int, bits: int) -> Tensor:
    """The code that begins `shift` bits into the byte `low` and ends in it or in the next one, `high`."""
    code = low >> shift
    if isinstance(shift, Tensor):
        code |= torch.where(shift > 0, high << (8 - shift).clamp_max_(7), 0)
    elif shift + bits > 8:
        code |= high << 8 - shift
    return code.bitwise_and_((1 << bits) - 1)
