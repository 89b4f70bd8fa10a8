"""The values that a group can have, w = s i with -z <= i <= 2^b - 1 - z, and which s and z serve it best.

Zero is always among them: rows pruned to zero stay so, and padding costs nothing. Spanning the group, from the lesser
of its least weight and 0 to the larger of its largest and 0, wastes levels on a few weights in the tails:

    s = fl16((max - min) / (2^b - 1)),    z = round(-min / s)

The search multiplies both ends by common factors and keeps what has the least squared error; then it tries the
neighbours of z, and twice the least squares scale <w, i> / <i, i> of the integers found. For Gaussian groups of 64 at 3
bits that takes 19 % off the error, and comes within 0.2 % of trying every s and z (0.7 % in groups of 32 at 4 bits). It
never ends above the span, which it starts from. Scales are rounded to float16 before they are judged, so what is judged
is what is read.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from compress.errors import NumericsError

FACTORS: Final = tuple(1.05 * 0.96**step for step in range(24))
"""On both ends of the span, 1.05 to 0.41; what is finer the least squares find. With many levels the best scale is at
times above the span: levels need not end where the weights do."""
REFITS: Final = 2


@dataclass(frozen=True)
class Grid:
    """2^bits levels; `centred` fixes z at 2^(bits-1)."""

    bits: int
    centred: bool

    @property
    def top(self) -> int:
        """The largest code."""
        return (1 << self.bits) - 1

    @property
    def middle(self) -> int:
        return 1 << self.bits - 1

    def nearest(self, values: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
        """The integer i, float32, whose s i is nearest to each of `values`, clamped to [-z, 2^b - 1 - z]; ties to even.

        Shapes broadcast. Where s is 0, i is 0.
        """
        steps = torch.where(scales > 0, scales, math.inf)
        return torch.div(values, steps).round_().clamp_(-zeros, self.top - zeros)

    def choose(self, values: Tensor, clip: bool) -> tuple[Tensor, Tensor]:
        """Scales (float16 numbers) and zero points (integers) float32 [...] for groups float32 [..., g].

        Raises `NumericsError` where a scale is beyond float16.
        """
        values = values.contiguous()
        low, high = values.amin(-1).clamp_max_(0), values.amax(-1).clamp_min_(0)
        span = torch.maximum(low / -self.middle, high / (self.middle - 1)) if self.centred else (high - low) / self.top
        scales = stored(span)
        if not bool(torch.isfinite(scales).all()):
            raise NumericsError(
                f"A group of weights from {float(low.min()):.3g} to {float(high.max()):.3g} needs a scale of "
                f"{float(span.max()):.3g} at {self.bits} bits; float16 ends at 65504.",
                remedy="Scale the matrix down, or take another codec.",
            )
        zeros = self._zeros(low, scales)
        return self._search(values, low, span, scales, zeros) if clip else (scales, zeros)

    def _zeros(self, low: Tensor, scales: Tensor) -> Tensor:
        """The zero point that puts `low` at code 0; 0 in a group of zeros."""
        if self.centred:
            return torch.full_like(scales, self.middle)
        return torch.where(scales > 0, -low / scales, 0).round_().clamp_(0, self.top)

    def _search(
        self, values: Tensor, low: Tensor, span: Tensor, scales: Tensor, zeros: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The best of the module's text, from the span's `scales` and `zeros` on."""
        best = _Best(scales, zeros, self._error(values, scales, zeros))
        for factor in FACTORS:
            trial = stored(span * factor)
            best.take(trial, at := self._zeros(low * factor, trial), self._error(values, trial, at))
        if not self.centred:
            scales, zeros = best.scales, best.zeros
            for trial in ((zeros - 1).clamp_min_(0), (zeros + 1).clamp_max_(self.top)):
                best.take(scales, trial, self._error(values, scales, trial))
        for _ in range(REFITS):
            integers = self.nearest(values, best.scales.unsqueeze(-1), best.zeros.unsqueeze(-1))
            square = integers.square().sum(-1).clamp_min_(1)
            trial = stored(integers.mul_(values).sum(-1) / square)
            best.take(trial, best.zeros, self._error(values, trial, best.zeros))
        return best.scales, best.zeros

    def _error(self, values: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
        """Squared error [...]."""
        scales = scales.unsqueeze(-1)
        return self.nearest(values, scales, zeros.unsqueeze(-1)).mul_(scales).sub_(values).square_().sum(-1)


class _Best:
    """Scales, zero points and errors [...] of the least error so far."""

    def __init__(self, scales: Tensor, zeros: Tensor, errors: Tensor) -> None:
        self.scales, self.zeros, self.errors = scales, zeros, errors

    def take(self, scales: Tensor, zeros: Tensor, errors: Tensor) -> None:
        """What is better of another choice. An error that is no number is not."""
        better = errors < self.errors
        self.scales = torch.where(better, scales, self.scales)
        self.zeros = torch.where(better, zeros, self.zeros)
        self.errors = torch.where(better, errors, self.errors)


def stored(scales: Tensor) -> Tensor:
    """The nearest float16 of each scale, as float32; infinity from 65520 on."""
    return scales.to(torch.float16).to(torch.float32)
