"""One byte of scale per row: 8-bit logarithmic, sixteen steps to the octave.

    r = fl32(s F_q),   F_0 = 0,   F_q = fl32(2^(-(255 - q) / 16)) for q = 1..255

with one float32 s for the matrix. F_q is the float32 nearest to the real number, the same on every machine; r is one
rounded product. 255 values span 15.9 octaves in steps of 4.4 %.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

STEPS = 16
TOP = 255
HEADROOM = 4
"""Steps of the scale above the largest row's RMS, left for the search of a better scale."""
CHUNK_ROWS = 256
"""Rows taken to float64 at once."""


@lru_cache(maxsize=1)
def factors() -> Tensor:
    """F_q as float32 [256]. (The float64 power is within an ulp of the real number, far from any float32 tie.)"""
    return torch.tensor([0.0] + [2.0 ** (-(TOP - q) / STEPS) for q in range(1, TOP + 1)], dtype=torch.float32)


def row_scales(matrix_scale: Tensor, codes: Tensor) -> Tensor:
    """r float32 [o] of the codes q [o], any integer type, and the matrix scale s, float32 of one element."""
    return matrix_scale.reshape(1).to(codes.device) * factors().to(codes.device)[codes.to(torch.int64)]


def initial_codes(weight: Tensor, peak: float = 0.0) -> tuple[Tensor, Tensor]:
    """The matrix scale s float32 [1] and, for each row of W [o, n], the code q int64 [o] nearest to the row's RMS.

    s is `HEADROOM` steps above the largest RMS, so that every row has neighbours on both sides, or above `peak`, the
    largest RMS of a matrix of which W is some rows. Rows of zeros get 0.
    """
    rms = row_rms(weight)
    largest = max(float(rms.max()), peak) if rms.numel() else peak
    scale = torch.tensor([largest * 2.0 ** (HEADROOM / STEPS)], dtype=torch.float64, device=weight.device)
    scale = scale.clamp_max(torch.finfo(torch.float32).max).to(torch.float32)
    if float(scale) == 0.0:
        return scale, torch.zeros(rms.numel(), dtype=torch.int64, device=weight.device)
    depth = torch.round(-STEPS * torch.log2(rms / scale.double()))
    return scale, torch.where(rms > 0, (TOP - depth).clamp(1, TOP), 0).to(torch.int64)


def row_rms(weight: Tensor) -> Tensor:
    """sqrt(mean w^2) of each row in float64 [o], without overflow for any finite float32; 0 for an empty row."""
    rows, columns = weight.shape
    if columns == 0:
        return torch.zeros(rows, dtype=torch.float64, device=weight.device)
    parts = [
        torch.linalg.vector_norm(weight[start : start + CHUNK_ROWS], dim=1, dtype=torch.float64)
        for start in range(0, rows, CHUNK_ROWS)
    ]
    norms = torch.cat(parts) if parts else torch.zeros(0, dtype=torch.float64, device=weight.device)
    return norms / math.sqrt(columns)
