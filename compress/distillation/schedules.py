"""Learning-rate schedules as functions of progress.

Progress is the fraction of the training that is done: step / steps, or, when a time limit is given, the larger of that
and elapsed / limit, so that a training that a clock ends has come down to its final rate all the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

ScheduleName = Literal["constant", "linear", "cosine", "wsd"]
DECAY = 0.2
"""The part of the training at whose end `wsd` (warm-up, stable, decay) comes down."""


def factor(name: ScheduleName, progress: float) -> float:
    """The learning rate at `progress` in [0, 1], as a fraction of its peak; warm-up aside."""
    left = max(0.0, 1.0 - progress)
    if name == "constant":
        return 1.0
    if name == "linear":
        return left
    if name == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * (1.0 - left)))
    return min(1.0, left / DECAY)


def make_schedule(
    optimizer: Optimizer,
    name: ScheduleName,
    steps: int,
    warmup_steps: int,
    elapsed_part: Callable[[], float] = lambda: 0.0,
) -> LambdaLR:
    """A schedule over `steps` with a linear warm-up. `elapsed_part` gives the part of a time limit that is used up."""

    def rate(step: int) -> float:
        warm = min(1.0, (step + 1) / (warmup_steps + 1))
        return warm * factor(name, max(step / max(1, steps), elapsed_part()))

    return LambdaLR(optimizer, rate)
