"""Levels of the gain s of a group, relative to the norm of its row.

If a row of n weights points anywhere with equal chance, then s^2 / ||row||^2 of a group of D follows the law
Beta(D/2, (n - D)/2) with distribution F. Two sets of L = 2^b levels:

**beta**, of van der Ouderaa et al. (2024): the quantile transform. Cell i holds F = i/L to (i+1)/L and its level is
s_i = sqrt(F^-1((i + 1/2) / L)). All cells are equally likely, which is not where the error is least.

**lloyd**: the Lloyd-Max quantizer of s, whose levels are the means of their cells and whose cells end half-way between
levels. The mean over a cell has a closed form, as s t f(s) is a Beta density of the shape a + 1/2 up to a factor:

    E[s; s^2 < x] = B(a + 1/2, b) / B(a, b)  I_x(a + 1/2, b),        a = D/2,  b = (n - D)/2.

The levels of the best quantizer of many levels have the density f^(1/3) (Panter and Dite 1951), which again is a Beta
law; from there Newton's method solves level = mean of its cell, a tridiagonal system, in a few steps. A step that would
leave the order of the levels is replaced by one of Lloyd's iteration.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np

from compress.codecs.pvq.beta import Array, beta_cdf, beta_density, beta_quantile, log_beta

MOST_STEPS = 100
CLOSE = 1e-8
"""Distance of the levels from the means of their cells, relative, at which the search ends."""


@lru_cache(maxsize=64)
def beta_gains(dim: int, columns: int, bits: int) -> tuple[Array, Array]:
    """Levels [2^b] and the cells' inner ends [2^b - 1] of the quantile transform; columns is a multiple of dim.

    A row of one group has the gain 1 and nothing else.
    """
    count = 1 << bits
    if columns <= dim:
        return np.ones(count), np.full(count - 1, np.inf)
    points = np.sqrt(beta_quantile(np.arange(1, 2 * count) / (2 * count), dim / 2, (columns - dim) / 2))
    return points[::2], points[1::2]


@lru_cache(maxsize=64)
def lloyd_gains(dim: int, columns: int, bits: int) -> tuple[Array, Array]:
    """Levels and the cells' inner ends of the Lloyd-Max quantizer of s, as `beta_gains`."""
    count = 1 << bits
    if columns <= dim:
        return np.ones(count), np.full(count - 1, np.inf)
    a, b = dim / 2, (columns - dim) / 2
    levels = np.sqrt(beta_quantile((np.arange(count) + 0.5) / count, (a + 1) / 3, (b + 2) / 3))
    factor = math.exp(log_beta(a + 0.5, b) - log_beta(a, b))
    for _ in range(MOST_STEPS):
        ends = (levels[1:] + levels[:-1]) / 2
        mass = np.diff(beta_cdf(ends**2, a, b), prepend=0.0, append=1.0)
        moment = factor * np.diff(beta_cdf(ends**2, a + 0.5, b), prepend=0.0, append=1.0)
        means = np.where(mass > 0, moment / np.maximum(mass, 1e-300), levels)
        if np.max(np.abs(means / levels - 1)) < CLOSE:
            break
        density = 2 * ends * beta_density(ends**2, a, b)
        levels = _newton(
            levels, means, (means[1:] - ends) * density / mass[1:], (ends - means[:-1]) * density / mass[:-1]
        )
    return levels, (levels[1:] + levels[:-1]) / 2


def _newton(levels: Array, means: Array, lower: Array, upper: Array) -> Array:
    """The levels after a step towards means(levels) = levels.

    lower [L - 1]: derivatives of the means of the cells 1, 2, ... by their lower ends; upper [L - 1]: those of the
    cells 0, 1, ... by their upper ends. An end lies half-way between levels, so each level moves it by a half.
    """
    own = np.append(0.0, lower) + np.append(upper, 0.0)
    system = np.diag(1 - own / 2) - np.diag(upper / 2, 1) - np.diag(lower / 2, -1)
    after = levels + np.linalg.solve(system, means - levels)
    ordered = after[0] > 0 and after[-1] < 1 and bool(np.all(np.diff(after) > 0))
    return after if ordered else means
