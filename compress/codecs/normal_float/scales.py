"""Scales of blocks: the largest magnitude of each, and the form in which they are stored.

A block is `block` consecutive weights of the matrix written row after row: where a row is no multiple of it, a block
reaches into the next row, and the last one of the matrix may be shorter. Each has a scale a = max |w|; a weight is then
looked up as w / a. That quotient is w fl32(1 / a), but in a last, shorter block it is a division, and there a is at
least 1e-38, as in bitsandbytes: the codes are to be the same.

Nested scales (QLoRA, section 3, "double quantization") are those of 8 bits: with m the mean of all a and
t = max |a - m| of 256 of them,

    a ~ fl32(fl32(t d[c]) + m),    c = the nearest of (a - m) / t in the dynamic map d.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compress.codecs.base import FieldLayout
from compress.codecs.normal_float.tables import table
from compress.errors import NumericsError

LEAST = 1e-38
"""Below this a scale counts as this much: 1 / a stays finite."""
NESTED_BLOCK = 256
CHUNK_WEIGHTS = 2**20
"""Weights handled at once, a multiple of every block."""


def largest(flat: Tensor, block: int) -> Tensor:
    """a float32 [ceil(N / block)] of w float32 [N]."""
    whole = flat.numel() // block * block
    scales = flat[:whole].view(-1, block).abs().amax(1)
    if whole == flat.numel():
        return scales
    return torch.cat([scales, flat[whole:].abs().amax().clamp_min(LEAST).view(1)])


def units(values: Tensor, scales: Tensor, short: Tensor | bool) -> Tensor:
    """w / a in [-1, 1]; shapes broadcast. `short`: where the last, shorter block is."""
    scales = torch.where(scales.abs() < LEAST, LEAST, scales)
    quotient = values * (1 / scales)
    if short is not False:
        quotient = torch.where(torch.as_tensor(short, device=values.device), values / scales, quotient)
    return quotient.clamp_(-1, 1)


def nested_layout(blocks: int, double: bool) -> tuple[FieldLayout, ...]:
    """The tensors that hold so many scales."""
    if not double:
        return (FieldLayout("absmax", torch.float32, (blocks,)),)
    return (
        FieldLayout("nested_absmax", torch.float32, (-(-blocks // NESTED_BLOCK),)),
        FieldLayout("nested_offset", torch.float32, (1,)),
        FieldLayout("absmax", torch.uint8, (blocks,)),
    )


def store(scales: Tensor, double: bool) -> dict[str, Tensor]:
    """The tensors of `nested_layout`. Raises `NumericsError` where the mean of the scales is beyond float32."""
    if not double:
        return {"absmax": scales}
    offset = scales.mean() if scales.numel() else scales.new_zeros(())
    if not bool(torch.isfinite(offset)):
        raise NumericsError(
            f"The mean of the scales of a matrix, the largest {float(scales.max()):.3g}, is beyond float32.",
            remedy="Scale the matrix down, or leave out double=true.",
        )
    differences = scales - offset
    whole = differences.numel() // NESTED_BLOCK * NESTED_BLOCK
    tops = differences[:whole].view(-1, NESTED_BLOCK).abs().amax(1)
    if whole < differences.numel():
        tops = torch.cat([tops, differences[whole:].abs().amax().view(1)])
    spread = tops.repeat_interleave(NESTED_BLOCK)[: differences.numel()]
    quotients = torch.where(spread > 0, differences / spread, 0)
    codes = table("dynamic").to(scales.device).nearest(quotients)
    return {"nested_absmax": tops, "nested_offset": offset.view(1), "absmax": codes}


def stored(tensors: dict[str, Tensor]) -> Tensor:
    """The scales float32 [blocks] that the tensors of `store` stand for. Nested ones may be below 0 by rounding."""
    codes = tensors["absmax"]
    if codes.dtype == torch.float32:
        return codes
    tops = tensors["nested_absmax"].repeat_interleave(NESTED_BLOCK)[: codes.numel()]
    return table("dynamic").to(codes.device).decode(codes) * tops + tensors["nested_offset"]
