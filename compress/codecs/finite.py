"""Weights that are not numbers have no nearest code."""

from __future__ import annotations

import torch
from torch import Tensor

from compress.errors import CodecError, NumericsError

CHUNK_WEIGHTS = 2**20
"""Weights looked at once."""


def finite_matrix(weight: Tensor) -> Tensor:
    """W [o, n] in float32, without its history. Raises `CodecError` for what is no matrix of floats, and
    `NumericsError` that names the first weight that is NaN or infinite and counts all."""
    if weight.ndim != 2 or not weight.is_floating_point():
        raise CodecError(f"A codec takes a matrix of floats, not {list(weight.shape)} of {weight.dtype}.")
    weight = weight.detach().to(torch.float32)
    if all(bool(torch.isfinite(chunk).all()) for chunk in weight.flatten().split(CHUNK_WEIGHTS)):
        return weight
    bad = ~torch.isfinite(weight)
    row, column = (int(place) for place in bad.nonzero()[0])
    raise NumericsError(
        f"The weight at row {row}, column {column} is {float(weight[row, column])} in float32 "
        f"({int(bad.sum())} of {weight.numel()} are not finite)."
    )
