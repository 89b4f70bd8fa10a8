"""Slow, independent solutions of the encoder's problem in float64, for the tests to compare with."""

from __future__ import annotations

import itertools

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def all_vectors(dim: int, pulses: int, limit: int) -> Array:
    """Every integer vector of the pyramid [N, dim], by enumeration."""
    words = itertools.product(range(-limit, limit + 1), repeat=dim)
    return np.array([word for word in words if sum(map(abs, word)) == pulses], dtype=np.float64)


def least_error_by_enumeration(x: Array, levels: Array, vectors: Array) -> Array:
    """min over (j, y) of ||x - levels_j y||^2 for each x [G, D]: float64 [G]."""
    best = np.full(x.shape[0], np.inf)
    for level in levels:
        for start in range(0, x.shape[0], 50):
            difference = x[start : start + 50, None, :] - level * vectors
            errors = np.square(difference).sum(-1).min(-1)
            best[start : start + 50] = np.minimum(best[start : start + 50], errors)
    return best


def least_error_by_dynamic_programming(x: Array, levels: Array, pulses: int, limit: int) -> Array:
    """The same minimum by dynamic programming over (coordinate, pulses spent): exact for any D."""
    best = np.full(x.shape[0], np.inf)
    for level in levels:
        cost = np.full((x.shape[0], pulses + 1), np.inf)
        cost[:, 0] = 0.0
        for i in range(x.shape[1]):
            after = np.full_like(cost, np.inf)
            for magnitude in range(min(limit, pulses) + 1):
                step = np.square(np.abs(x[:, i]) - level * magnitude)[:, None]
                reach = cost[:, : pulses + 1 - magnitude] + step
                after[:, magnitude:] = np.minimum(after[:, magnitude:], reach)
            cost = after
        best = np.minimum(best, cost[:, pulses])
    return best
