"""Moments of inputs and their factor against sums, traces and products written out in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from compress.errors import NumericsError
from compress.quantization.hessian import CHUNK_TOKENS, Moments, factorize, output_energy
from tests.codecs.payloads import normal

CPU = torch.device("cpu")


def moments_of(x: Tensor, original: Tensor | None = None, calls: tuple[int, ...] = ()) -> Moments:
    """Of the tokens in one call to `add`, or in calls of as many tokens as `calls` says and one with the rest."""
    moments = Moments(x.shape[1], CPU, original is not None)
    sizes = [*calls, len(x) - sum(calls)]
    others = [None] * len(sizes) if original is None else original.split(sizes)
    for part, other in zip(x.split(sizes), others, strict=True):
        moments.add(part, other)
    moments.close()
    return moments


def relative(found: Tensor, expected: Tensor) -> float:
    assert found.dtype == torch.float64
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize(("tokens", "channels"), [(1, 3), (CHUNK_TOKENS, 16), (2 * CHUNK_TOKENS + 37, 44)])
def test_means_over_tokens(tokens: int, channels: int) -> None:
    x = normal(tokens, channels) @ normal(channels, channels, seed=1)
    original = x + 0.1 * normal(tokens, channels, seed=2)
    moments = moments_of(x, original)
    exact = x.double()
    assert relative(moments.hessian, exact.T @ exact / tokens) < 1e-5
    assert moments.shift is not None
    assert relative(moments.shift, (original.double() - exact).T @ exact / tokens) < 1e-5
    assert moments_of(x).shift is None
    assert (moments.tokens, moments.dead, moments.broken) == (tokens, 0, 0)


def test_chunks_are_the_same_however_the_rows_come() -> None:
    x, original = normal(4 * CHUNK_TOKENS + 100, 24), normal(4 * CHUNK_TOKENS + 100, 24, seed=1)
    expected = moments_of(x, original)
    for chunks in ((1,), (2, 1), (1, 1, 1, 1), (3,)):
        found = moments_of(x, original, tuple(CHUNK_TOKENS * count for count in chunks))
        assert torch.equal(found.hessian, expected.hessian)
        assert found.shift is not None
        assert expected.shift is not None
        assert torch.equal(found.shift, expected.shift)


def test_no_tokens() -> None:
    moments = moments_of(torch.zeros(0, 5))
    assert (moments.tokens, moments.dead) == (0, 5)
    assert torch.equal(moments.hessian, torch.zeros(5, 5, dtype=torch.float64))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_dead_and_broken_channels(bad: float) -> None:
    """A channel that broke in one token is none at all, in both moments, whichever of the two inputs broke it."""
    tokens = 3 * CHUNK_TOKENS
    x, original = normal(tokens, 12), normal(tokens, 12, seed=1)
    x[:, [2, 7]] = 0
    x[2 * CHUNK_TOKENS + 5, 4] = bad
    original[9, 10] = bad
    moments = moments_of(x, original)
    assert (moments.dead, moments.broken) == (2, 2)
    gone = [4, 10]
    kept = [channel for channel in range(12) if channel not in gone]
    exact, shift = x[:, kept].double(), (original - x)[:, kept].double()
    assert moments.shift is not None
    for moment in (moments.hessian, moments.shift):
        assert not moment[gone].any()
        assert not moment[:, gone].any()
    assert relative(moments.hessian[kept][:, kept], exact.T @ exact / tokens) < 1e-5
    assert relative(moments.shift[kept][:, kept], shift.T @ exact / tokens) < 1e-5


def test_large_values_are_not_broken() -> None:
    """A sum over the chunk overflows; no single value does."""
    x = torch.full((8, 4), 3e38)
    x[:, 2] = 1.0
    moments = Moments(4, CPU, False)
    moments.add(x)
    moments.close()
    assert moments.broken == 0
    with pytest.raises(NumericsError, match="'proj' overflow") as caught:
        factorize(moments.hessian, 0.01, "proj")
    assert caught.value.remedy


def test_release() -> None:
    moments = moments_of(normal(20, 8), normal(20, 8, seed=1))
    moments.release()
    assert moments.hessian.numel() == 0
    assert moments.shift is None


def positive(channels: int, seed: int = 0) -> Tensor:
    x = normal(4 * channels, channels, seed=seed).double() @ normal(channels, channels, seed=seed + 1).double()
    return x.T @ x / len(x)


@pytest.mark.parametrize("damping", [0.0, 0.01, 1.0])
def test_the_factor(damping: float) -> None:
    hessian = positive(20)
    factor = factorize(hessian.clone(), damping, "w")
    added = damping * float(hessian.diagonal().mean())
    damped = hessian + added * torch.eye(20, dtype=torch.float64)
    assert factor.damping == pytest.approx(added, rel=1e-12)
    assert factor.lower.dtype == factor.hessian.dtype == torch.float32
    assert not factor.lower.triu(1).any()
    lower = factor.lower.double()
    torch.testing.assert_close(lower @ lower.T, damped, rtol=1e-5, atol=1e-5 * float(damped.abs().max()))
    torch.testing.assert_close(factor.hessian.double(), damped, rtol=1e-6, atol=0)


def test_dead_channels_depend_on_no_other() -> None:
    """They get the mean of the diagonal (of all channels), and their rows of the factor are otherwise empty."""
    hessian, dead = positive(9), [0, 4, 8]
    hessian[dead] = 0
    hessian[:, dead] = 0
    mean = float(hessian.diagonal().mean())
    factor = factorize(hessian.clone(), 0.01, "w")
    expected = hessian + 0.01 * mean * torch.eye(9, dtype=torch.float64)
    expected[dead, dead] += mean
    lower = factor.lower.double()
    torch.testing.assert_close(lower @ lower.T, expected, rtol=1e-5, atol=1e-5 * float(expected.max()))
    for channel in dead:
        assert int(factor.lower[channel].count_nonzero()) == int(factor.lower[:, channel].count_nonzero()) == 1


def test_no_input_at_all() -> None:
    factor = factorize(torch.zeros(3, 3, dtype=torch.float64), 0.01, "w")
    torch.testing.assert_close(factor.hessian, 1.01 * torch.eye(3))


def with_eigenvalue(least: float) -> Tensor:
    """A symmetric matrix of mean diagonal 1 with one eigenvalue `least`."""
    basis, _ = torch.linalg.qr(normal(8, 8).double())
    rest = (8 - least) / 7
    hessian = basis @ torch.diag(torch.tensor([least, *[rest] * 7], dtype=torch.float64)) @ basis.T
    return (hessian + hessian.T) / 2


@pytest.mark.parametrize(
    ("least", "damping", "needed"),
    [(-0.005, 0.01, 0.01), (-0.05, 0.01, 0.1), (-0.5, 0.01, 1.0), (-5.0, 0.01, 10.0), (-5e-6, 0.0, 1e-5)],
)
def test_an_indefinite_matrix_gets_stronger_damping(least: float, damping: float, needed: float) -> None:
    """Ten times as much, until the least eigenvalue is above zero."""
    hessian = with_eigenvalue(least)
    factor = factorize(hessian.clone(), damping, "w")
    assert factor.damping == pytest.approx(needed, rel=1e-9)
    lower, damped = factor.lower.double(), hessian + needed * torch.eye(8, dtype=torch.float64)
    torch.testing.assert_close(lower @ lower.T, damped, rtol=1e-5, atol=1e-5 * (1 + needed))


@pytest.mark.parametrize(("least", "damping"), [(-50.0, 0.01), (-0.5, 0.0)])
def test_a_matrix_that_stays_indefinite_is_an_error(least: float, damping: float) -> None:
    with pytest.raises(NumericsError, match=r"Hessian of 'model\.q_proj' is indefinite") as caught:
        factorize(with_eigenvalue(least), damping, "model.q_proj")
    assert "damping" in str(caught.value.remedy)
    assert "calibration data" in str(caught.value.remedy)


@pytest.mark.parametrize(("rows", "channels"), [(1, 7), (33, 44), (CHUNK_TOKENS + 3, 12)])
def test_output_energy_is_a_trace(rows: int, channels: int) -> None:
    """In the Hessian as it was: neither damping nor what a dead channel got is in it."""
    hessian = positive(channels)
    hessian[2] = 0
    hessian[:, 2] = 0
    factor = factorize(hessian.clone(), 0.05, "w")
    weight = normal(rows, channels, seed=1)
    rounded = weight + 0.1 * normal(rows, channels, seed=2)
    left = (weight - rounded).double()
    error = output_energy(weight - rounded, factor, hessian.diagonal())
    energy = output_energy(weight, factor, hessian.diagonal())
    assert error == pytest.approx(float(torch.trace(left @ hessian @ left.T)), rel=1e-5)
    assert energy == pytest.approx(float(torch.trace(weight.double() @ hessian @ weight.double().T)), rel=1e-5)
    assert output_energy(torch.zeros_like(weight), factor, hessian.diagonal()) == 0


def test_output_energy_is_that_of_the_outputs() -> None:
    x, weight = normal(200, 16), normal(10, 16, seed=1)
    rounded = weight.round()
    moments = moments_of(x)
    diagonal = moments.hessian.diagonal().clone()
    factor = factorize(moments.hessian, 0.01, "w")
    error, energy = (output_energy(matrix, factor, diagonal) for matrix in (weight - rounded, weight))
    outputs, lost = x.double() @ weight.double().T, x.double() @ (weight - rounded).double().T
    assert error == pytest.approx(float(lost.square().sum()) / 200, rel=1e-5)
    assert energy == pytest.approx(float(outputs.square().sum()) / 200, rel=1e-5)
