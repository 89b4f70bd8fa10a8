"""The norms of the rows: float16 multiples of one float32.

    ||row|| ~ fl32(s h),    s = 2^-15 max ||row||,    h float16

A row's norm alone in float16 would overflow at 65504 and lose bits below 6e-5, so h is relative to the matrix: it has
11 bits down to 2^-29 of the largest norm.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compress.errors import NumericsError

HEADROOM = 2.0**-15
LARGEST_NORM = 1e37
"""With it, no sum of squares of float64 and no product of norm and level of float32 overflows."""


def encode_norms(norms: Tensor) -> tuple[Tensor, Tensor]:
    """s float32 [1] and h float16 [o] of norms float64 [o]. Raises `NumericsError` for a norm above 1e37."""
    largest = float(norms.max()) if norms.numel() else 0.0
    if largest > LARGEST_NORM:
        raise NumericsError(
            f"The largest row has a norm of {largest:.3g}; above {LARGEST_NORM:g} float32 overflows.",
            remedy="Scale the matrix down.",
        )
    scale = torch.tensor([largest * HEADROOM], dtype=torch.float32, device=norms.device)
    if largest > 0 and float(scale) < torch.finfo(torch.float32).tiny:
        scale.fill_(torch.finfo(torch.float32).tiny)
    divisor = float(scale) or 1.0
    return scale, (norms / divisor).to(torch.float16)


def decode_norms(scale: Tensor, rows: Tensor) -> Tensor:
    """The norms float32 [o] that s and h stand for."""
    return scale.reshape(1) * rows.to(torch.float32)
