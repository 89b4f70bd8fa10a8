"""Mixing applied to what is stored or summed up: weights and second moments.

    W' = Qo^T W Qi,    H' = Qi^T H Qi    with H = sum x x^T over the inputs x, since those become Qi^T x

Every product is taken in float64, some rows at a time, so that a large matrix needs no float64 copy of itself; between
the two sides it is held in the type of the result, or in float32 if that has fewer bits.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from compress.transforms.mixing import mix, unmix
from compress.transforms.signs import Signs

CHUNK_WEIGHTS = 2**20
"""Entries in float64 at once, whole rows at a time."""

Mixer = Callable[[Tensor, Tensor], Tensor]


def mix_weight(weight: Tensor, signs: Signs, dtype: torch.dtype | None = None) -> Tensor:
    """W' = Qo^T W Qi of W [o, n] in `dtype` (None: W's own), a new tensor."""
    return _both_sides(weight, signs, mix, dtype or weight.dtype)


def unmix_weight(weight: Tensor, signs: Signs, dtype: torch.dtype | None = None) -> Tensor:
    """W = Qo W' Qi^T, the inverse of `mix_weight`."""
    return _both_sides(weight, signs, unmix, dtype or weight.dtype)


def mix_moment(moment: Tensor, signs: Tensor) -> Tensor:
    """Qi^T M Qi of M [n, n], in place where M is contiguous, and returned; `signs` are the input side's.

    M is a Hessian sum x x^T, or what asymmetric calibration needs besides it, sum (x - x~) x~^T: both live in the basis
    of the inputs on both sides. Use float64: the result is as exact as M's type.
    """
    moment = moment.contiguous()
    map_rows(moment, lambda rows: mix(rows, signs), moment)
    map_rows(moment.t(), lambda rows: mix(rows, signs), moment.t())
    return moment


def map_rows(x: Tensor, function: Callable[[Tensor], Tensor], out: Tensor) -> Tensor:
    """`out` [R, n] = function(x [R, n]), a function of single rows, in float64 and chunks of rows; `out` may be x."""
    step = max(1, CHUNK_WEIGHTS // max(x.shape[1], 1))
    for start in range(0, x.shape[0], step):
        out[start : start + step] = function(x[start : start + step].double()).to(out.dtype)
    return out


def _both_sides(weight: Tensor, signs: Signs, mixer: Mixer, dtype: torch.dtype) -> Tensor:
    with torch.no_grad():
        between = torch.promote_types(dtype, torch.float32)
        result = weight.detach().to(between, copy=True)
        inputs, outputs = signs.input, signs.output
        if inputs is not None:
            map_rows(weight.detach(), lambda rows: mixer(rows, inputs), result)
        if outputs is not None:
            map_rows(result.t(), lambda rows: mixer(rows, outputs), result.t())
        return result.to(dtype)
