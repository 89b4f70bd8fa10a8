"""The rate at which a codec has codes of one width for every matrix of a model."""

from __future__ import annotations

from torch import nn

from compress.codecs.base import Codec
from compress.modeling.structure import matrices

SLACK = 0.004
"""Bits a weight for the signs of transforms; too few for a wider code anywhere."""


def rate_of(model: nn.Module, codec: Codec, width: int) -> float:
    """Bits a weight of `model` with codes of `width` bits and their scales, and `SLACK`."""
    views = matrices(model)
    stored = sum(codec.bits(codec.spec(width), view.shape) for view in views)
    return stored / sum(view.weights for view in views) + SLACK
