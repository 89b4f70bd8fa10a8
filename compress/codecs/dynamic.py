"""Integers for activations, with a scale of their own for every token: nothing is learned, nothing is stored.

A row x of n numbers, a token's activations or a key or value of one head, becomes b-bit integers on a grid that is
laid over the row's own range:

    asymmetric    low = clip min(x, 0),  high = clip max(x, 0),  s = (high - low) / (2^b - 1),  z = round(-low / s)
                  q = clamp(round(x / s) + z, 0, 2^b - 1)
    symmetric     s = clip max|x| / (2^(b-1) - 1),  z = 0,  q = clamp(round(x / s), -(2^(b-1) - 1), 2^(b-1) - 1)

    x' = (q - z) s

with ties rounded to even. Asymmetric, clip 1 and one scale a token is how W4A4 is published (QuaRot, SpinQuant,
OSTQuant), and what is asked for there. The range always includes 0 and the zero point is an integer, so that 0 is
coded exactly: padding and what a ReLU has cut off stay nothing. The error is at most s / 2 for what is not clipped.

The gradient is straight-through with a grid that moves: the integers stay, the scale follows the row's range,

    x' = x + (high - low) stop((x' - x) / (high - low)),    and x' = (high - low) stop(x' / (high - low))

for what `clip` < 1 has cut off. Constant scales would let no gradient know that a smaller range has smaller errors, and
nothing that is learned with them gets any better.

A call makes no integers and asks the device nothing; a row with an infinity or NaN becomes NaN as a whole, so that
whatever is computed from it shows it. `encode`, which has no integer for that, raises.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from compress.errors import NumericsError, UsageError

Codes = tuple[Tensor, Tensor, Tensor]
"""The integers q, the scales s and the zero points z of rows."""


@dataclass(frozen=True)
class TokenQuantizer:
    """x -> x' with one grid for each row of the last axis, as the module's equations say.

    bits: 2 to 8. symmetric: a grid around 0 without a zero point. clip: the part of the range that the grid covers, in
    (0, 1]. Raises `UsageError` for others.
    """

    bits: int = 8
    symmetric: bool = False
    clip: float = 1.0

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise UsageError(f"There are no activations of {self.bits} bits.", remedy="Integers have 2 to 8 bits.")
        if not 0 < self.clip <= 1:
            raise UsageError(f"A grid cannot cover {self.clip:g} of a range.", remedy="Choose a clip in (0, 1].")

    def __call__(self, x: Tensor) -> Tensor:
        """x' of x [..., n], in x's float type, with the straight-through gradient.

        Computed in float32 (float64 for float64). In float16 a value beyond its range, which the grid may reach by half
        a step, becomes its largest number.
        """
        rounded: Tensor = _StraightThrough.apply(x, self)  # type: ignore[no-untyped-call]
        return rounded

    def encode(self, x: Tensor) -> Codes:
        """(q, s, z) of x [..., n]: q [..., n] and z [..., 1] uint8, or int8 if symmetric; s [..., 1] float32, or
        float64 for float64. Raises `NumericsError` where x is not finite."""
        wide = _wide(x)
        if not bool(wide.isfinite().all()):
            raise NumericsError(
                "Activations that are infinite or NaN have no integers.", remedy="Compute the model in a wider type."
            )
        scale, zero = self._grid(wide)
        kind = torch.int8 if self.symmetric else torch.uint8
        return self._codes(wide, scale, zero).to(kind), scale, zero.to(kind)

    def decode(self, codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        """x' = (q - z) s, in the type of the scales."""
        return (codes.to(scale.dtype) - zero.to(scale.dtype)) * scale

    def _rounded(self, x: Tensor) -> Tensor:
        wide = _wide(x)
        scale, zero = self._grid(wide)
        return _narrow(self.decode(self._codes(wide, scale, zero), scale, zero), x.dtype)

    def _range(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if x.shape[-1] == 0:
            nothing = x.new_zeros(*x.shape[:-1], 1)
            return nothing, nothing
        if self.symmetric:
            largest = x.abs().amax(-1, keepdim=True) * self.clip
            return -largest, largest
        low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
        return low.clamp(max=0) * self.clip, high.clamp(min=0) * self.clip

    def _grid(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Scales and zero points [..., 1] in x's type. A row of zeros has the scale 1."""
        low, high = self._range(x)
        scale = high / (2 ** (self.bits - 1) - 1) if self.symmetric else (high - low) / (2**self.bits - 1)
        scale = torch.where(scale == 0, 1, scale)
        return scale, torch.zeros_like(scale) if self.symmetric else torch.round(-low / scale)

    def _codes(self, x: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        largest = 2 ** (self.bits - 1) - 1 if self.symmetric else 2**self.bits - 1
        return (torch.round(x / scale) + zero).clamp(-largest if self.symmetric else 0, largest)


@dataclass(frozen=True)
class GroupQuantizer:
    """x -> x' with one grid for each group of `group` neighbours in a row: what a cache of keys and values takes.

    group: channels of a group; None takes the row as one, which is a head where rows are heads. A row that no number of
    groups fills ends with a shorter one. Other fields are those of `TokenQuantizer`. Raises `UsageError` for a group
    without channels.
    """

    bits: int = 4
    group: int | None = None
    symmetric: bool = False
    clip: float = 1.0

    def __post_init__(self) -> None:
        if self.group is not None and self.group < 1:
            raise UsageError(f"A group cannot have {self.group} channels.", remedy="Choose a group of at least 1.")
        _ = self.rows

    @property
    def rows(self) -> TokenQuantizer:
        """What rounds a group."""
        return TokenQuantizer(self.bits, self.symmetric, self.clip)

    def __call__(self, x: Tensor) -> Tensor:
        """x' of x [..., n], as `TokenQuantizer` computes it."""
        return self._joined(self.rows(self._groups(x)), x.shape[-1])

    def encode(self, x: Tensor) -> Codes:
        """(q, s, z) of x [..., n], as `TokenQuantizer.encode`: q [..., n], and s and z [..., ceil(n / group)]."""
        codes, scale, zero = self.rows.encode(self._groups(x))
        return self._joined(codes, x.shape[-1]), scale.squeeze(-1), zero.squeeze(-1)

    def decode(self, codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        """x' = (q - z) s, in the type of the scales."""
        decoded = self.rows.decode(self._groups(codes), scale.unsqueeze(-1), zero.unsqueeze(-1))
        return self._joined(decoded, codes.shape[-1])

    def _groups(self, x: Tensor) -> Tensor:
        """[..., n] as [..., groups, group], the last one filled up with zeros, which move no range that includes 0."""
        width = x.shape[-1]
        group = min(self.group or width, width) or 1
        return functional.pad(x, (0, -width % group)).unflatten(-1, (-(-width // group), group))

    def _joined(self, x: Tensor, width: int) -> Tensor:
        return x.flatten(-2)[..., :width]


class _StraightThrough(torch.autograd.Function):
    """x' with the gradient of the module's text."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, quantizer: TokenQuantizer) -> Tensor:
        rounded = quantizer._rounded(x)
        ctx.save_for_backward(x, rounded)
        ctx.quantizer = quantizer
        return rounded

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        x, rounded = (_wide(tensor) for tensor in ctx.saved_tensors)
        wide, quantizer = _wide(gradient), ctx.quantizer
        if x.shape[-1] == 0:
            return gradient, None
        low, high = quantizer._range(x)
        inside = (x >= low) & (x <= high)
        span = high - low
        pull = (wide * torch.where(inside, rounded - x, rounded)).sum(-1, keepdim=True)
        pull = torch.where(span > 0, pull / span, 0) * quantizer.clip
        if quantizer.symmetric:
            ends = _share(x.abs()) * x.sign() * 2
        else:
            ends = _share(x) * (high > 0) - _share(-x) * (low < 0)
        return (wide * inside + pull * ends).to(gradient.dtype), None


def _share(x: Tensor) -> Tensor:
    """1 at the largest of each row, shared by equal ones: the gradient of their maximum."""
    largest = (x == x.amax(-1, keepdim=True)).to(x.dtype)
    return largest / largest.sum(-1, keepdim=True)


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.element_size() < 4 else x


def _narrow(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x in `dtype`, and what float16 has no number for as its largest; NaN stays NaN."""
    if dtype != torch.float16:
        return x.to(dtype)
    largest = torch.finfo(dtype).max
    return x.clamp(-largest, largest).to(dtype)
