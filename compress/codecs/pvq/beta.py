"""The Beta law in float64: its distribution function and the inverse, without scipy.

    I_x(a, b) = 1 / B(a, b)  int_0^x t^(a-1) (1-t)^(b-1) dt

is computed from the continued fraction (DLMF 8.17.22) by Lentz's method where it converges fast, x < (a+1) / (a+b+2),
and from I_x(a, b) = 1 - I_{1-x}(b, a) elsewhere. For the shapes at hand (a up to 64, b up to half a row) that is right
to about 1e-12.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

TINY = 1e-300
PRECISION = 1e-14
MOST_TERMS = 2000
"""The fraction needs some sqrt(max(a, b)) terms."""
MOST_STEPS = 100
CLOSE = 1e-13
"""Relative change of a quantile at which Newton's method ends."""


def beta_cdf(x: Array, a: float, b: float) -> Array:
    """I_x(a, b) for x in [0, 1] and a, b > 0."""
    x = np.asarray(x, dtype=np.float64)
    swap = x > (a + 1) / (a + b + 2)
    low = np.where(swap, 0.0, x)
    high = np.where(swap, 1.0 - x, 0.0)
    return np.where(swap, 1.0 - _small(high, b, a), _small(low, a, b))


def beta_quantile(p: Array, a: float, b: float) -> Array:
    """The x with I_x(a, b) = p, for p strictly between 0 and 1.

    Newton's method, kept inside a bracket that every step narrows; where it would leave the bracket, bisection.
    """
    p = np.asarray(p, dtype=np.float64)
    low, high = np.zeros_like(p), np.ones_like(p)
    x = np.full_like(p, a / (a + b))
    for _ in range(MOST_STEPS):
        error = beta_cdf(x, a, b) - p
        low, high = np.where(error < 0, x, low), np.where(error < 0, high, x)
        density = beta_density(x, a, b)
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            step = x - error / density
        inside = (step > low) & (step < high)
        after = np.where(inside, step, (low + high) / 2)
        done = np.abs(after - x) <= CLOSE * x
        x = after
        if done.all():
            break
    return x


def beta_density(x: Array, a: float, b: float) -> Array:
    """x^(a-1) (1-x)^(b-1) / B(a, b) for x strictly between 0 and 1."""
    safe = np.clip(x, TINY, 1.0 - 1e-16)
    return np.exp((a - 1) * np.log(safe) + (b - 1) * np.log1p(-safe) - log_beta(a, b))


def log_beta(a: float, b: float) -> float:
    """log B(a, b). For a large b, log Gamma(b) - log Gamma(a + b) comes from Stirling's series without cancelling."""
    a, b = min(a, b), max(a, b)
    if b < 30:
        return math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)
    ratio = -(b - 0.5) * math.log1p(a / b) - a * math.log(a + b) + a
    return math.lgamma(a) + ratio + _stirling(b) - _stirling(a + b)


def _stirling(z: float) -> float:
    return (1 / 12 - (1 / 360 - (1 / 1260 - 1 / (1680 * z * z)) / (z * z)) / (z * z)) / z


def _small(x: Array, a: float, b: float) -> Array:
    """I_x(a, b) by the continued fraction."""
    safe = np.maximum(x, TINY)
    front = np.exp(a * np.log(safe) + b * np.log1p(-x) - log_beta(a, b)) / a
    c = np.ones_like(x)
    d = _inverse(1.0 - (a + b) * x / (a + 1))
    value = d.copy()
    for m in range(1, MOST_TERMS):
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        d, c = _inverse(1.0 + even * d), _apart(1.0 + even / c)
        value = value * d * c
        d, c = _inverse(1.0 + odd * d), _apart(1.0 + odd / c)
        value = value * d * c
        if np.all(np.abs(d * c - 1.0) < PRECISION):
            break
    return np.where(x > 0, front * value, 0.0)


def _apart(x: Array) -> Array:
    """x, kept away from 0."""
    return np.where(np.abs(x) < TINY, TINY, x)


def _inverse(x: Array) -> Array:
    return 1.0 / _apart(x)
