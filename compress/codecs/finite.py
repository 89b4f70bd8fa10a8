"""Weights that are not numbers have no nearest code."""

from __future__ import annotations

import torch
from torch import Tensor

from compress.errors import NumericsError

CHUNK_WEIGHTS = 2**20
"""Weights looked at once."""


def refuse_not_finite(weight: Tensor) -> None:
    """Raises `NumericsError` that names the first weight of W [o, n] that is NaN or infinite, and counts all."""
    if all(bool(torch.isfinite(chunk).all()) for chunk in weight.flatten().split(CHUNK_WEIGHTS)):
        return
    bad = ~torch.isfinite(weight)
    row, column = (int(place) for place in bad.nonzero()[0])
    raise NumericsError(
        f"The weight at row {row}, column {column} is {float(weight[row, column])} in float32 "
        f"({int(bad.sum())} of {weight.numel()} are not finite)."
    )
