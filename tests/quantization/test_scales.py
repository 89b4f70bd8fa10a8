"""Scales of least error against least squares by torch.linalg, row by row in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from compress.codecs import QuantizedMatrix, codec
from compress.codecs.base import Rounding
from compress.quantization.scales import LARGEST, SMALLEST, refit_scales, scale_factors
from tests.codecs.payloads import normal

CPU = torch.device("cpu")


def hessian_of(columns: int, seed: int = 0) -> Tensor:
    x = normal(3 * columns, columns, seed=seed) @ normal(columns, columns, seed=seed + 1)
    return x.T @ x / len(x) + 0.5 * torch.eye(columns)


def problem(rows: int, columns: int, scope: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """W, and V with errors and with scales that are off by up to a quarter."""
    weight = normal(rows, columns, seed=seed)
    off = 1 + 0.25 * torch.tanh(normal(rows, -(-columns // scope), seed=seed + 1))
    value = (weight + 0.1 * normal(rows, columns, seed=seed + 2)) * off.repeat_interleave(scope, 1)[:, :columns]
    return weight, value


def least_squares(weight: Tensor, value: Tensor, hessian: Tensor, scope: int) -> Tensor:
    """min over s of ||(w - s V) C|| with H = C C^T, where V has a row for each scope with the other columns zero."""
    root = torch.linalg.cholesky(hessian.double())
    rows, columns = weight.shape
    factors = torch.ones(rows, -(-columns // scope), dtype=torch.float64)
    for row in range(rows):
        parts = torch.stack(
            [value[row].double() * (torch.arange(columns) // scope == p) for p in range(len(factors[0]))]
        )
        used = parts.abs().sum(1) > 0
        solution = torch.linalg.lstsq((parts[used] @ root).T, (weight[row].double() @ root).unsqueeze(1)).solution
        factors[row, used] = solution[:, 0]
    return factors


@pytest.mark.parametrize(("rows", "columns", "scope"), [(7, 96, 32), (3, 172, 64), (5, 44, 44), (1, 5, 1), (0, 16, 8)])
def test_factors_are_least_squares(rows: int, columns: int, scope: int) -> None:
    weight, value = problem(rows, columns, scope)
    hessian = hessian_of(columns)
    expected = least_squares(weight, value, hessian, scope)
    found = scale_factors(weight, value, hessian, scope)
    assert found.dtype == torch.float32
    inside = (expected > 1.01 * SMALLEST) & (expected < 0.99 * LARGEST)
    assert bool(inside.all())
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=0)


def test_no_other_factors_are_better() -> None:
    weight, value = problem(6, 64, 16)
    hessian = hessian_of(64).double()

    def error(factors: Tensor) -> Tensor:
        left = weight.double() - value.double() * factors.double().repeat_interleave(16, 1)
        return ((left @ hessian) * left).sum(1)

    best = scale_factors(weight, value, hessian.float(), 16)
    assert bool((error(best) < error(torch.ones_like(best))).all())
    for seed in range(5):
        assert bool((error(best) < error(best * (1 + 0.01 * normal(6, 4, seed=seed)))).all())


def test_scopes_of_zeros_and_far_factors_stay() -> None:
    weight, value = problem(4, 48, 16)
    hessian = hessian_of(48)
    value[0, 16:32] = 0
    value[1] = 0
    found = scale_factors(weight, value, hessian, 16)
    assert float(found[0, 1]) == 1
    assert torch.equal(found[1], torch.ones(3))
    torch.testing.assert_close(found.double(), least_squares(weight, value, hessian, 16), rtol=1e-3, atol=0)
    far = scale_factors(weight, torch.cat([10 * value[:, :16], value[:, 16:]], 1), torch.eye(48), 16)
    assert torch.equal(far[:, 0], torch.ones(4))
    assert bool((far[2:, 1:] != 1).all())
    assert torch.equal(scale_factors(weight, -weight, torch.eye(48), 16), torch.ones(4, 3))


@pytest.mark.parametrize(
    ("name", "width", "scope"), [("integer", 3, 64), ("half_pyramid", 24, 172), ("pyramid", 40, 172)]
)
def test_refitting_in_any_order(name: str, width: int, scope: int) -> None:
    """What a codec is told is in the order of columns, whatever order the Hessian comes in; it lowers the error."""
    rounder, columns = codec(name), 172
    weight, hessian = normal(12, columns), hessian_of(columns)
    order = torch.randperm(columns, generator=torch.Generator().manual_seed(0))
    rounding = rounder.rounding((12, columns), rounder.spec(width), CPU)
    assert rounding.scope == scope
    off = 1 + 0.2 * torch.tanh(normal(12, -(-columns // scope)))
    wrong = weight * off.repeat_interleave(scope, 1)[:, :columns]
    for start in range(0, columns, scope):
        rounding.scale(start, wrong[:, start : start + scope])
    for start in range(0, columns, rounding.dim):
        rounding.round(start, wrong[:, start : start + rounding.dim])
    before = rounding.decoded()
    wanted = scale_factors(weight, before, hessian, scope)
    refit_scales(weight[:, order], hessian[order][:, order], torch.argsort(order), scope, rounding)
    after = rounding.decoded()
    ratio = torch.where(before != 0, after / before, 1.0)
    spread = 2 ** (1 / 32) - 1 if name != "integer" else 1e-3
    expected = wanted.repeat_interleave(scope, 1)[:, :columns]
    assert bool(((ratio / expected - 1).abs() <= spread + 1e-4)[before != 0].all())
    assert _error(weight, after, hessian) < _error(weight, before, hessian)
    _check_stored(rounding, after)


def _error(weight: Tensor, value: Tensor, hessian: Tensor) -> float:
    left = (weight - value).double()
    return float(((left @ hessian.double()) * left).sum())


def _check_stored(rounding: Rounding, value: Tensor) -> None:
    matrix = rounding.finish()
    assert torch.equal(QuantizedMatrix.from_payload(matrix.spec, matrix.shape, matrix.payload()).dequantize(), value)
