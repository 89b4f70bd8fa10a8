"""QSUR against counted points, closed forms in one, two and three dimensions, and its invariances."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from compress.errors import NumericsError, UsageError
from compress.transforms.mixing import mix
from compress.transforms.qsur import chi_square_quantile, moment_qsur, qsur, qsur_bound, weight_qsur
from compress.transforms.signs import random_signs


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def cloud(width: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """A mean, a covariance and a root of it."""
    root = normal(width, width, seed=seed) * torch.linspace(0.3, 2, width, dtype=torch.float64)
    return normal(width, seed=seed + 1), root @ root.T, root


def orthogonal(width: int, seed: int = 0) -> Tensor:
    return torch.linalg.qr(normal(width, width, seed=seed))[0]


QUANTILES = {2: -2 * math.log(0.01), 3: 11.344866730144373}


@pytest.mark.parametrize("width", [2, 3])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_counted(width: int, seed: int) -> None:
    """Points drawn evenly in the cube; the cube from the ellipsoid's surface, turned through all directions."""
    mean, covariance, root = cloud(width, seed)
    reach = QUANTILES[width]
    directions = torch.nn.functional.normalize(normal(1_000_000, width, seed=7), dim=-1)
    surface = mean + math.sqrt(reach) * directions @ root.T
    low, high = float(surface.min()), float(surface.max())
    draws = torch.rand(1_000_000, width, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
    points = low + (high - low) * draws - mean
    inside = (torch.linalg.solve(root, points.T).square().sum(0) <= reach).double().mean()
    volume = qsur(mean, covariance) ** width
    assert volume == pytest.approx(float(inside), abs=5 * math.sqrt(volume / 1_000_000) + 1e-4)
    held = torch.linalg.solve(root, (normal(1_000_000, width, seed=9) @ root.T).T).square().sum(0) <= reach
    assert float(held.double().mean()) == pytest.approx(0.99, abs=5e-4)


@pytest.mark.parametrize("alpha", [0.1, 0.5, 0.99])
def test_two_dimensions(alpha: float) -> None:
    """An ellipse of area pi c sqrt(det), c = -2 ln(1 - alpha), in its square."""
    mean, covariance = torch.tensor([1.0, -0.5]), torch.tensor([[2.0, 0.6], [0.6, 0.5]])
    reach = -2 * math.log(1 - alpha)
    upper = max(1 + math.sqrt(reach * 2), -0.5 + math.sqrt(reach * 0.5))
    lower = min(1 - math.sqrt(reach * 2), -0.5 - math.sqrt(reach * 0.5))
    area = math.pi * reach * math.sqrt(2 * 0.5 - 0.6**2)
    assert qsur(mean, covariance, alpha) == pytest.approx(math.sqrt(area) / (upper - lower), rel=1e-7)


@pytest.mark.parametrize(
    ("degrees", "alpha", "quantile"),
    [
        (1, 0.95, 3.841458820694124),
        (1, 0.99, 6.6348966010212145),
        (3, 0.99, 11.344866730144373),
        (10, 0.05, 3.9402991361190605),
        (100, 0.99, 135.80672317102676),
        (4096, 0.5, 4095.333353780),
    ],
)
def test_quantiles_of_tables(degrees: int, alpha: float, quantile: float) -> None:
    assert chi_square_quantile(degrees, alpha) == pytest.approx(quantile, rel=1e-9)


@pytest.mark.parametrize("alpha", [1e-9, 0.3, 0.99, 0.999999])
def test_quantiles_of_two_and_four_degrees(alpha: float) -> None:
    """P is 1 - exp(-x / 2) of two degrees, and 1 - (1 + x / 2) exp(-x / 2) of four."""
    assert chi_square_quantile(2, alpha) == pytest.approx(-2 * math.log1p(-alpha), rel=1e-10)
    half = chi_square_quantile(4, alpha) / 2
    assert -math.expm1(-half) - half * math.exp(-half) == pytest.approx(alpha, rel=1e-6, abs=1e-15)


def test_one_dimension_fills_its_cube() -> None:
    assert qsur(torch.tensor([3.0]), torch.tensor([[4.0]])) == pytest.approx(1, rel=1e-12)


def test_what_does_not_matter() -> None:
    mean, covariance, _ = cloud(5)
    value = qsur(mean, covariance)
    order = torch.tensor([3, 1, 4, 0, 2])
    assert qsur(mean[order], covariance[order][:, order]) == pytest.approx(value)
    assert qsur(mean + 7, covariance) == pytest.approx(value)
    assert qsur(-3 * mean, 9 * covariance) == pytest.approx(value)
    zero = torch.zeros(5)
    flips = torch.tensor([1.0, -1, -1, 1, -1], dtype=torch.float64)
    assert qsur(zero, covariance * torch.outer(flips, flips)) == pytest.approx(qsur(zero, covariance))
    assert qsur(zero, covariance, 0.5) == pytest.approx(qsur(zero, covariance, 0.999))
    assert qsur(mean, covariance) < qsur(zero, covariance)


def test_rotations_change_the_cube_only() -> None:
    _, covariance, _ = cloud(6)
    reach = math.sqrt(chi_square_quantile(6, 0.99))
    volumes = []
    for seed in range(4):
        basis = orthogonal(6, seed)
        turned = basis.T @ covariance @ basis
        side = 2 * reach * math.sqrt(float(turned.diagonal().max()))
        volumes.append(qsur(torch.zeros(6), turned) * side)
    assert volumes == pytest.approx([volumes[0]] * 4)


def test_bounds() -> None:
    """A rotation does best where all variances are equal, a linear map where the cloud is white."""
    _, covariance, _ = cloud(8)
    rotated, white = qsur_bound(covariance)
    zero = torch.zeros(8)
    axes = torch.linalg.eigh(covariance)[1]
    flat = mix(axes, torch.ones(8))  # the eigenvectors spread evenly: all variances equal
    assert qsur(zero, flat.T @ covariance @ flat) == pytest.approx(rotated)
    for seed in range(20):
        basis = orthogonal(8, seed)
        assert qsur(zero, basis.T @ covariance @ basis) < rotated < white
        assert qsur(normal(8, seed=seed), basis.T @ covariance @ basis) < rotated
        assert qsur(zero, basis @ basis.T) == pytest.approx(white)
        linear = normal(8, 8, seed=seed)
        assert qsur(zero, linear.T @ covariance @ linear) < white
    assert white == pytest.approx(math.sqrt(math.pi) / math.gamma(5) ** (1 / 8) / 2)


def test_outliers_and_mixing() -> None:
    weight = normal(400, 64)
    plain = weight_qsur(weight)
    weight[:, 5] *= 30
    outlier = weight_qsur(weight)
    mixed = weight_qsur(mix(weight, random_signs(64, 0, "test")))
    assert outlier < 0.1 * plain and outlier < 0.3 * mixed < 0.3 * plain


@pytest.mark.parametrize("shape", [(50, 6), (6, 6), (5, 9), (2, 7)])
def test_weights_are_clouds_of_rows(shape: tuple[int, int]) -> None:
    """Either Gram matrix has the same eigenvalues, so the way by the covariance gives the same."""
    weight = normal(*shape)
    covariance = (weight - weight.mean(0)).T @ (weight - weight.mean(0)) / shape[0]
    value = weight_qsur(weight)
    assert value == pytest.approx(qsur(weight.mean(0), covariance), rel=1e-9)
    assert weight_qsur(weight.flip(0)) == pytest.approx(value)
    assert weight_qsur(torch.cat([weight, weight])) == pytest.approx(value)
    assert weight_qsur(weight.float()) == pytest.approx(value, rel=1e-6)


def test_two_rows_are_a_line() -> None:
    """Two points +-(3, 4, 0) about (1, 1, 1): lambda = 25, extents 3, 4, 0 times sqrt(c); length over side, 10 / 8."""
    weight = torch.tensor([[4.0, 5.0, 1.0], [-2.0, -3.0, 1.0]])
    assert weight_qsur(weight) == pytest.approx(10 / 8)


def test_a_plane_in_space() -> None:
    points = normal(200, 2) @ torch.tensor([[2.0, 0.3], [0.0, 0.7]], dtype=torch.float64)
    weight = points @ orthogonal(3)[:, :2].T
    reach = -2 * math.log(0.01)
    area = math.pi * reach * math.sqrt(float(torch.cov(points.T, correction=0).det()))
    extents = (reach * weight.var(0, correction=0)).sqrt()
    side = float((weight.mean(0) + extents).max() - (weight.mean(0) - extents).min())
    assert weight_qsur(weight) == pytest.approx(math.sqrt(area) / side)
    covariance = torch.cov(weight.T, correction=0)
    assert qsur(torch.zeros(3), covariance) <= qsur_bound(covariance)[0] <= qsur_bound(covariance)[1]


def test_dead_channels_stay_dead_in_float32() -> None:
    """Rounding a rotated matrix must not make a body of its noise."""
    weight = normal(200, 32)
    weight[:, 3:6] = 0
    mixed = mix(weight, random_signs(32, 0, "test"))
    assert weight_qsur(mixed.float()) == pytest.approx(weight_qsur(mixed), rel=1e-5)


def test_moments_are_those_of_rows() -> None:
    x = normal(300, 6) * torch.linspace(0.5, 3, 6, dtype=torch.float64) + normal(6)
    moment = x.T @ x
    assert moment_qsur(moment, 300, x.mean(0)) == pytest.approx(weight_qsur(x))
    about_zero = weight_qsur(torch.cat([x, -x]))
    assert moment_qsur(moment, 300) == pytest.approx(about_zero)
    assert moment_qsur(moment.float(), 7) == pytest.approx(about_zero, rel=1e-5)


def test_no_spread() -> None:
    assert weight_qsur(torch.ones(4, 3)) == 0
    assert weight_qsur(normal(1, 5)) == 0
    assert qsur(torch.zeros(2), torch.zeros(2, 2)) == 0
    assert qsur_bound(torch.zeros(2, 2)) == (0, 0)


def test_refuses() -> None:
    with pytest.raises(UsageError, match="do not fit"):
        qsur(torch.zeros(3), torch.eye(2))
    with pytest.raises(UsageError, match="quantile of 1"):
        qsur(torch.zeros(2), torch.eye(2), alpha=1.0)
    with pytest.raises(UsageError, match="0 tokens"):
        moment_qsur(torch.eye(2), 0)
    with pytest.raises(NumericsError, match="negative eigenvalues"):
        moment_qsur(torch.eye(2), 10, torch.ones(2))
    for broken in (torch.full((2, 2), math.nan), torch.diag(torch.tensor([1.0, math.inf]))):
        with pytest.raises(NumericsError, match="not finite"):
            weight_qsur(broken)
        with pytest.raises(NumericsError, match="not finite"):
            qsur(torch.zeros(2), broken)
