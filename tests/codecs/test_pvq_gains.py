"""The Beta law and its quantizers against closed forms, scipy and a plain Lloyd iteration."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from compress.codecs.pvq.beta import beta_cdf, beta_density, beta_quantile, log_beta
from compress.codecs.pvq.gains import beta_gains, lloyd_gains
from compress.codecs.pvq.norms import decode_norms, encode_norms

SHAPES = [(0.5, 0.5), (1, 1), (8, 8), (16.5, 3), (8, 2040), (64, 1984), (0.5, 2047.5), (3, 1e5)]
INNER = np.linspace(0.002, 0.998, 250)


def test_distribution_has_its_closed_forms() -> None:
    """I_x(1, b) = 1 - (1-x)^b, I_x(a, 1) = x^a, the arcsine law, and a sum of binomials for whole a and b."""
    x = np.linspace(0, 1, 101)
    assert beta_cdf(x, 1, 7.5) == pytest.approx(1 - (1 - x) ** 7.5, abs=1e-14)
    assert beta_cdf(x, 4.25, 1) == pytest.approx(x**4.25, abs=1e-14)
    assert beta_cdf(x, 0.5, 0.5) == pytest.approx(2 / math.pi * np.arcsin(np.sqrt(x)), abs=1e-13)
    a, b = 8, 40
    tail = sum(math.comb(a + b - 1, j) * x**j * (1 - x) ** (a + b - 1 - j) for j in range(a, a + b))
    assert beta_cdf(x, a, b) == pytest.approx(tail, abs=1e-13)


@pytest.mark.parametrize(("a", "b"), SHAPES)
def test_distribution_and_quantiles_equal_those_of_scipy(a: float, b: float) -> None:
    special = pytest.importorskip("scipy.special")
    exact = special.betaincinv(a, b, INNER)
    assert beta_quantile(INNER, a, b) == pytest.approx(exact, rel=1e-10)
    assert beta_cdf(exact, a, b) == pytest.approx(special.betainc(a, b, exact), abs=1e-11)
    assert log_beta(a, b) == pytest.approx(special.betaln(a, b), rel=1e-12, abs=1e-12)
    assert beta_density(exact, a, b) == pytest.approx(
        pytest.importorskip("scipy.stats").beta(a, b).pdf(exact), rel=1e-8
    )


@pytest.mark.parametrize(("a", "b"), SHAPES)
def test_quantiles_invert_the_distribution(a: float, b: float) -> None:
    assert beta_cdf(beta_quantile(INNER, a, b), a, b) == pytest.approx(INNER, abs=1e-11)


@pytest.mark.parametrize(("dim", "columns", "bits"), [(16, 4096, 4), (8, 64, 2), (128, 1024, 8), (1, 4, 3)])
def test_beta_cells_are_equally_likely_and_levels_their_medians(dim: int, columns: int, bits: int) -> None:
    levels, ends = beta_gains(dim, columns, bits)
    a, b, count = dim / 2, (columns - dim) / 2, 1 << bits
    assert beta_cdf(ends**2, a, b) == pytest.approx(np.arange(1, count) / count, abs=1e-11)
    assert beta_cdf(levels**2, a, b) == pytest.approx((np.arange(count) + 0.5) / count, abs=1e-11)


@pytest.mark.parametrize(
    ("dim", "columns", "bits"), [(16, 4096, 4), (8, 64, 2), (128, 1024, 4), (1, 4, 3), (2, 4, 3), (1, 2, 2)]
)
def test_lloyd_levels_are_the_means_of_their_cells(dim: int, columns: int, bits: int) -> None:
    """By a midpoint sum over the law instead of the closed form."""
    levels, ends = lloyd_gains(dim, columns, bits)
    assert ends == pytest.approx((levels[1:] + levels[:-1]) / 2)
    count = 400_000
    s = np.sqrt(beta_quantile((np.arange(2000) + 0.5) / 2000, dim / 2, (columns - dim) / 2))
    fine = np.interp((np.arange(count) + 0.5) / count * 2000 - 0.5, np.arange(2000), s)
    cell = np.searchsorted(ends, fine)
    means = np.bincount(cell, fine) / np.bincount(cell)
    assert means == pytest.approx(levels, rel=0.002)


def test_lloyd_levels_of_one_coordinate_are_maxs() -> None:
    """|w| of a long row is half-normal: the positive levels of the symmetric 16-level quantizer of Max (1960)."""
    published = [0.1284, 0.3881, 0.6568, 0.9424, 1.2562, 1.6181, 2.0691, 2.7326]
    levels, _ = lloyd_gains(1, 2**17, 3)
    assert levels * math.sqrt(2**17) == pytest.approx(published, abs=2e-4)


def test_lloyd_levels_have_less_error_than_quantiles() -> None:
    s = np.sqrt(beta_quantile((np.arange(20000) + 0.5) / 20000, 8, 2040))
    errors = []
    for levels, ends in (beta_gains(16, 4096, 3), lloyd_gains(16, 4096, 3)):
        errors.append(np.square(s - levels[np.searchsorted(ends, s)]).mean())
    assert errors[1] < 0.65 * errors[0]


def test_a_row_of_one_group_has_its_norm() -> None:
    for gains in (beta_gains(16, 16, 3), lloyd_gains(16, 0, 3)):
        assert gains[0].tolist() == [1.0] * 8 and gains[1].tolist() == [math.inf] * 7


def test_norms_are_relative_to_the_largest() -> None:
    norms = torch.tensor([3e30, 2e25, 0.0, 1e22], dtype=torch.float64)
    back = decode_norms(*encode_norms(norms))
    assert back.tolist() == pytest.approx(norms.tolist(), rel=2**-10)
    assert decode_norms(*encode_norms(norms * 0)).tolist() == [0.0] * 4
    assert encode_norms(torch.zeros(0, dtype=torch.float64))[1].shape == (0,)
