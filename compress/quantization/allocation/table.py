"""What each group of matrices loses at each width, and what follows from it for all of them together.

Measured are L_g(w), the loss of the model when group g alone is rounded with width w, at some widths, the *levels*. For
small losses they add up (the linearity theorem of HIGGS: Malinovskii et al. 2024, arXiv 2411.17525),

    S(w_1 ... w_G) = sum_g L_g(w_g),

and between two levels log L_g is linear in the width, as it is for errors that fall by a factor with every bit. At few
bits losses are no longer small, and S is not the loss any more. So the loss is also measured with all groups at each
level, and what is predicted is a function of S that goes through those points, linear in the logarithms of both.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

SMALLEST = 1e-12
"""Nats, or parts of a cosine, below which a loss is nothing."""
SLOPE = 1e-6
"""By which part of itself a loss falls with a width at least: more bits are never worth nothing."""
RATES = (1.25, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 5.0, 6.0, 8.0)
"""Bits a weight near which a codec of many widths is measured."""
MOST_LEVELS = 8
"""A codec with no more widths is measured at all of them."""


def levels_of(widths: Sequence[int], dim: int) -> tuple[int, ...]:
    """The widths, ascending, that are measured of a codec of groups of `dim` columns: its narrowest and widest, and
    those nearest to `RATES`."""
    if len(widths) <= MOST_LEVELS:
        return tuple(widths)
    inside = [rate for rate in RATES if widths[0] / dim <= rate <= widths[-1] / dim]
    near = {min(widths, key=lambda width: (abs(width / dim - rate), width)) for rate in inside}
    return tuple(sorted(near | {widths[0], widths[-1]}))


LABELS = {"kl_divergence": "KL divergence", "cosine": "distance 1 - cosine"}


@dataclass(frozen=True)
class Table:
    """What was measured. `losses[group]` and `together`: the loss at each of `levels`; `errors[matrix]`: the relative
    squared error of its weights there; `figure`: what a loss is, "kl_divergence" in nats or "cosine", 1 - cosine."""

    figure: str
    levels: tuple[int, ...]
    losses: Mapping[str, tuple[float, ...]]
    together: tuple[float, ...]
    errors: Mapping[str, tuple[float, ...]]

    @property
    def label(self) -> str:
        """What a loss is, in words."""
        return LABELS[self.figure]

    def loss(self, group: str, width: int) -> float:
        """L_g at any width between the first level and the last: never higher than at a smaller width."""
        falling = np.minimum.accumulate(np.maximum(self.losses[group], SMALLEST))
        value = math.exp(float(np.interp(width, self.levels, np.log(falling))))
        return value * (1 - SLOPE * (width - self.levels[0]))

    def error(self, matrix: str, width: int) -> float:
        """The relative squared error of a matrix at any width, interpolated likewise."""
        measured = np.log(np.maximum(self.errors[matrix], SMALLEST))
        return math.exp(float(np.interp(width, self.levels, measured)))

    def sum(self, widths: Mapping[str, int]) -> float:
        """S for a width for each group."""
        return math.fsum(self.loss(group, width) for group, width in widths.items())

    def predict(self, widths: Mapping[str, int]) -> float:
        """The loss of the model with these widths."""
        sums = [self.sum(dict.fromkeys(self.losses, level)) for level in self.levels]
        points = sorted(zip(sums, np.maximum(self.together, SMALLEST), strict=True))
        known, found = np.log([point[0] for point in points]), np.log([point[1] for point in points])
        value = math.log(self.sum(widths))
        inside = min(max(value, float(known[0])), float(known[-1]))
        return math.exp(float(np.interp(inside, known, np.maximum.accumulate(found))) + value - inside)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; `from_dict` takes it back."""
        return {
            "figure": self.figure,
            "levels": list(self.levels),
            "losses": {group: list(losses) for group, losses in self.losses.items()},
            "together": list(self.together),
            "errors": {matrix: list(errors) for matrix, errors in self.errors.items()},
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        return cls(
            data["figure"],
            tuple(data["levels"]),
            {group: tuple(losses) for group, losses in data["losses"].items()},
            tuple(data["together"]),
            {matrix: tuple(errors) for matrix, errors in data["errors"].items()},
        )
