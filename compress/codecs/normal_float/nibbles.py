"""Two codes to a byte, the first in the upper half."""

from __future__ import annotations

import torch
from torch import Tensor


def pack(codes: Tensor, filler: Tensor) -> Tensor:
    """uint8 [N] below 16 as uint8 [ceil(N / 2)]; `filler` uint8 [1] ends an odd number of them."""
    if codes.numel() % 2:
        codes = torch.cat([codes, filler])
    return codes[0::2] << 4 | codes[1::2]


def unpack(packed: Tensor, count: int) -> Tensor:
    """The first `count` codes of `pack`."""
    return torch.stack([packed >> 4, packed & 15], 1).flatten()[:count]
