"""The operations on integer pyramids in plain torch: the definition that the native backend repeats bit for bit.

The encoder is that of all pyramids (`compress.ops.search`), with levels 0, 1, ... m; ranks are those of Fischer
(`compress.ops.fischer`), bit streams those of `compress.ops.bits`.
"""

from __future__ import annotations

from torch import Tensor

from compress.ops.bits import pack_bits, packed_bytes, unpack_bits
from compress.ops.fischer import pyramid_rank, pyramid_unrank
from compress.ops.search import encode

__all__ = ["pack_bits", "packed_bytes", "pyramid_encode", "pyramid_rank", "pyramid_unrank", "unpack_bits"]


def pyramid_encode(x: Tensor, scale: Tensor, levels: Tensor, pulses: int, limit: int) -> tuple[Tensor, Tensor]:
    """argmin over (j, y) of ||x - scale levels_j y||^2: y int8 [G, D] and j int64 [G]."""
    y, gain, _ = encode(x, scale, levels, range(limit + 1), 0, pulses)
    return y, gain
