"""Prepared rows of half-integer pyramids, in plain torch: what they hold, how they are made, and products with them.

A product should not have to unrank compositions, so a matrix that is multiplied often is brought into a form that takes
one or two more bits a weight and no tables: the indices m of the levels themselves. 256 weights of a row, 32 octets,
make one chunk of four units; with octet g of a unit, and j = 0..3, a chunk has

    indices   128 bytes   byte 32 unit + 4 g + j: the index of weight j of the octet | that of weight j + 4 << 4
    signs      32 bytes   byte 4 g + j: bit 2 unit of weight j, bit 2 unit + 1 of weight j + 4; 1 is negative
    uppers     32 bytes   the same with the fifth bits of m
    digits     16 bytes   four bits of each octet: the gain | coset << 3

Up to eight levels take the sign as the highest bit of the index, and have no signs; up to sixteen have no uppers. Above
eight gains a digit is a byte, gain | coset << 7. Groups of 16 and 32 repeat their digit. Rows are filled up to whole
chunks with zero bits. Row scales stay apart.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from compress.errors import CodecError
from compress.ops.half_pyramid import reference
from compress.ops.half_pyramid.shape import HalfShape

CHUNK = 256
UNITS, OCTETS = 4, 8
MOST_GAINS = 128
"""Gains that a digit of one byte can tell apart, beside the coset."""


def chunk_count(columns: int) -> int:
    return -(-columns // CHUNK)


def chunk_bytes(shape: HalfShape) -> int:
    planes = (shape.limit > 7) + (shape.limit > 15)
    return CHUNK // 2 + CHUNK // 8 * planes + CHUNK // (16 if len(shape.gains) <= 8 else 8)


def row_bytes(shape: HalfShape, columns: int) -> int:
    """Raises `CodecError` for a shape that cannot be prepared."""
    if len(shape.gains) > MOST_GAINS:
        raise CodecError(
            f"Rows with {len(shape.gains)} gains cannot be prepared, only those with up to {MOST_GAINS}.",
            remedy="Decode the matrix.",
        )
    return chunk_count(columns) * chunk_bytes(shape)


def check_prepared(prepared: Tensor, scales: Tensor, columns: int, shape: HalfShape) -> None:
    """Raises `CodecError` unless these are prepared rows of this many columns, and their scales."""
    if scales.ndim != 1 or scales.dtype != torch.float32:
        raise CodecError(f"Row scales are float32 [o], not {scales.dtype} {list(scales.shape)}.")
    size = [scales.shape[0], row_bytes(shape, columns)]
    if prepared.dtype != torch.uint8 or list(prepared.shape) != size or prepared.device != scales.device:
        raise CodecError(
            f"Prepared rows are uint8 {size} on {scales.device}, "
            f"not {prepared.dtype} {list(prepared.shape)} on {prepared.device}.",
            remedy="Prepare the matrix for this many columns, and on the device of its scales.",
        )


def prepare(planes: list[Tensor], rows: int, columns: int, shape: HalfShape, width: int) -> Tensor:
    """uint8 [rows, row bytes] of a payload's planes. Raises `CodecError` for a rest that no group has."""
    size, groups = row_bytes(shape, columns), -(-columns // shape.dim)
    m, negative, gain, coset = reference.unpack_parts(planes, rows * groups, shape, width)
    if rows == 0 or size == 0:
        return torch.empty((rows, size), dtype=torch.uint8)
    filled = chunk_count(columns) * CHUNK - groups * shape.dim
    weights = (functional.pad(each.reshape(rows, groups * shape.dim), (0, filled)) for each in (m, negative))
    m, negative = (each.view(rows, -1, UNITS, OCTETS, 2, 4) for each in weights)
    index = m | negative << 3 if shape.limit <= 7 else m & 15
    parts = [index[..., 0, :] | index[..., 1, :] << 4]
    if shape.limit > 7:
        parts.append(_to_plane(negative))
    if shape.limit > 15:
        parts.append(_to_plane(m >> 4))
    narrow = len(shape.gains) <= 8
    digit = (gain | coset << (3 if narrow else 7)).view(rows, groups).repeat_interleave(shape.dim // 8, 1)
    digit = functional.pad(digit, (0, filled // 8)).view(rows, -1, CHUNK // 8)
    parts.append(digit[..., ::2] | digit[..., 1::2] << 4 if narrow else digit)
    return torch.cat([part.flatten(2) for part in parts], 2).to(torch.uint8).view(rows, size)


def decode(prepared: Tensor, scales: Tensor, columns: int, shape: HalfShape) -> Tensor:
    """W float32 [o, columns], bit for bit that of the payload."""
    rows, count = prepared.shape[0], chunk_count(columns)
    chunks = prepared.to(torch.int64).view(rows, count, chunk_bytes(shape))
    packed = chunks[..., : CHUNK // 2].reshape(rows, count, UNITS, OCTETS, 1, 4)
    index = torch.cat((packed & 15, packed >> 4), 4)
    narrow, planes = len(shape.gains) <= 8, chunks[..., CHUNK // 2 :].split(CHUNK // 8, 2)
    negative = index >> 3 if shape.limit <= 7 else _from_plane(planes[0])
    m = index & 7 if shape.limit <= 7 else index | _from_plane(planes[1]) << 4 if shape.limit > 15 else index
    digit = torch.stack((planes[-1] & 15, planes[-1] >> 4), -1) if narrow else planes[-1]
    gain, coset = digit & (7 if narrow else 127), digit >> (3 if narrow else 7)
    values = reference.group_values(m.view(-1, 8), negative.view(-1, 8), coset.flatten(), shape)
    gains = torch.tensor(shape.gains, dtype=torch.float32)[gain].view(rows, count * CHUNK // 8)
    weight = values.view(rows, count * CHUNK // 8, 8) * (scales.unsqueeze(-1) * gains).unsqueeze(-1)
    return weight.view(rows, count * CHUNK)[:, :columns].contiguous()


def _to_plane(bits: Tensor) -> Tensor:
    """[..., 4, 8] bytes of bits [..., 4 units, 8, 2, 4]."""
    places = 2 * torch.arange(UNITS).view(-1, 1, 1, 1) + torch.arange(2).view(-1, 1)
    return (bits << places).sum((-4, -2))


def _from_plane(plane: Tensor) -> Tensor:
    places = 2 * torch.arange(UNITS).view(-1, 1, 1, 1) + torch.arange(2).view(-1, 1)
    return plane.reshape(*plane.shape[:-1], 1, OCTETS, 1, 4) >> places & 1
