"""Bit streams in plain torch: the definition of every backend.

Numbers of `width` bits follow each other without gaps, little-endian: bit b of number g is bit g width + b of the
stream, and bit n of the stream is bit n % 8 of byte n // 8. The last byte is filled with zeros.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compress.ops.words import WORD, word_count, words_shape

CHUNK_BITS = 2**20
"""Bits handled at once."""


def packed_bytes(count: int, width: int) -> int:
    """Bytes of a bit stream of `count` numbers: ceil(count width / 8)."""
    return (count * width + 7) // 8


def pack_bits(values: Tensor, width: int) -> Tensor:
    """The low `width` bits of each of int64 [G], or of words [G, W] for a width above 64: uint8 [ceil(G width / 8)]."""
    count = values.shape[0]
    out = torch.empty(packed_bytes(count, width), dtype=torch.uint8, device=values.device)
    shifts = torch.arange(min(width, WORD), device=values.device)
    weights = (1 << torch.arange(8, device=values.device)).to(torch.uint8)
    step = _step(width)
    for start in range(0, count, step):
        bits = (values[start : start + step].unsqueeze(-1) >> shifts) & 1
        bits = bits.to(torch.uint8).flatten(1)[:, :width].flatten()
        bits = torch.nn.functional.pad(bits, (0, -bits.numel() % 8)).view(-1, 8)
        first = start * width // 8
        out[first : first + bits.shape[0]] = (bits * weights).sum(-1, dtype=torch.uint8)
    return out


def unpack_bits(packed: Tensor, width: int, count: int) -> Tensor:
    """The first `count` numbers of a stream made by `pack_bits`: int64 [G], or words [G, W] for a width above 64."""
    words, held = word_count(width), min(width, WORD)
    out = torch.empty((count, words), dtype=torch.int64, device=packed.device)
    shifts = torch.arange(held, device=packed.device)
    places = torch.arange(8, dtype=torch.uint8, device=packed.device)
    step = _step(width)
    for start in range(0, count, step):
        here = min(step, count - start)
        first = start * width // 8
        piece = packed[first : first + packed_bytes(here, width)]
        bits = ((piece[:, None] >> places) & 1).flatten()[: here * width].view(here, width)
        bits = torch.nn.functional.pad(bits, (0, words * held - width)).view(here, words, held)
        out[start : start + here] = (bits.to(torch.int64) << shifts).sum(-1)
    return out.view(words_shape(count, words))


def _step(width: int) -> int:
    """Numbers handled at once: a multiple of 8, so that every piece of the stream begins with a byte."""
    return max(8, CHUNK_BITS // width // 8 * 8)
