"""The fast Walsh-Hadamard transform of rows on a GPU: one pass over memory."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from compress.errors import CompressError
from compress.ops.cuda.compile import Kernel, Launcher

LARGEST_COLUMNS = 32768
TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
"""HALF_TYPE of the sources."""


def hadamard_rows(x: Tensor, launcher: Launcher) -> Tensor:
    """x H / sqrt(n) for every row of x [..., n], H[i, j] = (-1)^popcount(i & j), computed in float32.

    n is a power of two up to 32768, x float32, float16 or bfloat16; the result has its type. Raises `CompressError` for
    others.
    """
    columns = x.shape[-1] if x.ndim else 0
    if x.dtype not in TYPES or not 1 <= columns <= LARGEST_COLUMNS or columns & (columns - 1):
        raise CompressError(
            f"The Hadamard transform takes rows of 2^k floats up to {LARGEST_COLUMNS}, not {x.dtype} {list(x.shape)}."
        )
    x = x.contiguous()
    y = torch.empty_like(x)
    rows = x.numel() // columns
    if rows:
        kernel = Kernel("hadamard.cu", "hadamard", (("HADAMARD_COLUMNS", columns), ("HALF_TYPE", TYPES[x.dtype])))
        warps = max(1, columns // 1024)
        shared = 4 * 33 * columns // 32 if warps > 1 else 0
        scale = np.float32(1 / math.sqrt(columns))
        launcher.launch(kernel, x.device, rows, 32 * warps, shared, (x, y, scale))
    return y
