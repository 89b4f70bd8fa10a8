"""Every divergence where logits are extreme, infinite or not numbers."""

from __future__ import annotations

import math

import pytest
import torch

from compress.losses import (
    KL,
    Alpha,
    AlphaBeta,
    ChiSquare,
    Divergence,
    JensenShannon,
    Renyi,
    ReverseKL,
    ReverseSkewKL,
    SkewKL,
    SymmetricKL,
    TotalVariation,
)
from tests.losses.definitions import CASES, Case, logits

every = pytest.mark.parametrize("case", CASES, ids=str)


@every
def test_not_a_number_is_not_hidden(case: Case) -> None:
    student, teacher = logits(3, 7, dtype=torch.float32)
    student[0, 2] = teacher[1, 3] = math.nan
    student[:, 4] = teacher[:, 4] = -math.inf
    values = case.loss(reduction="none")(student, teacher)
    assert values.isnan().tolist() == [True, True, False]


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_extreme_row_leaves_the_others_alone(case: Case, dtype: torch.dtype) -> None:
    """Where |u| is held the formulas take another way, for the whole chunk; the values are the same."""
    student, teacher = logits(3, 9, dtype=dtype)
    loss = case.loss()
    alone = loss.pair(student, teacher, None)
    extreme = torch.full((1, 9), -50.0, dtype=dtype)
    extreme[0, 0] = 50
    together = loss.pair(torch.cat([student, extreme.flip(-1)]), torch.cat([teacher, extreme]), None)
    for got, want in zip(together, alone, strict=True):
        assert torch.allclose(got[:3], want, rtol=1e-14 if dtype == torch.float64 else 2e-6, atol=1e-15)


@every
def test_columns_that_both_leave_out_count_for_nothing(case: Case) -> None:
    student, teacher = logits(3, 9, dtype=torch.float32)
    gone = torch.full((3, 2), -math.inf)
    values, gradient = case.loss().pair(torch.cat([student, gone], -1), torch.cat([teacher, gone], -1), None)
    want = case.loss().pair(student, teacher, None)
    assert torch.allclose(values, want[0], rtol=2e-6)
    assert torch.allclose(gradient[:, :9], want[1], rtol=1e-5, atol=1e-7)
    assert not gradient[:, 9:].any()


@every
def test_a_class_that_one_leaves_out(case: Case) -> None:
    """Logits of -inf against the definition at -700, which is beyond 20 where the limit is infinite."""
    gone = -math.inf
    student = torch.tensor([[0.0, 1.0, 0.5], [0.0, gone, 0.0], [1.0, 0.0, 2.0]], requires_grad=True)
    teacher = torch.tensor([[0.0, gone, 0.0], [0.0, 1.0, 0.5], [0.0, gone, gone]])
    values = case.loss(reduction="none")(student, teacher)
    (gradient,) = torch.autograd.grad(values.sum(), student)
    assert torch.isfinite(gradient).all()
    for value, near in zip(values, case.truth(student.clamp(min=-700), teacher.clamp(min=-700)), strict=True):
        assert value.item() == (pytest.approx(near.item(), rel=1e-5) if near < 20 else math.inf)


@pytest.mark.parametrize(
    ("loss", "value"),
    [
        (KL(), 2e4),
        (ReverseKL(), 2e4),
        (SymmetricKL(0.8), 2e4),
        (JensenShannon(), math.log(2)),
        (JensenShannon(0.01), -0.01 * math.log(0.01) - 0.99 * math.log(0.99)),
        (SkewKL(), math.log(10)),
        (SkewKL(1e-6), math.log(1e6)),
        (ReverseSkewKL(), math.log(10)),
        (ReverseSkewKL(detach_mixture=True), math.log(10)),
        (TotalVariation(), 1),
        (ChiSquare(), math.inf),
        (ChiSquare(reverse=True), math.inf),
        (Alpha(), 4),
        (Alpha(0.0), 2e4),
        (Alpha(1.1), math.inf),
        (Renyi(), 2e4 - 2 * math.log(3)),
        (Renyi(3.0), 2e4),
        (AlphaBeta(), 1 / 0.14),
        (AlphaBeta(1.0, 1.0), 1),
        (AlphaBeta(0.7, 0.0), 2e4 / 0.7),
        (AlphaBeta(0.0, 0.0), 4e8),
        (AlphaBeta(-0.4, -0.3), math.inf),
    ],
)
def test_opposite_peaks(loss: Divergence, value: float) -> None:
    """Log ratios of +-20,000 that are not infinite; a one-hot pair that agrees is nothing."""
    student = torch.tensor([[-1e4, 1e4, 0.0], [1e4, 0.0, -1e4]], requires_grad=True)
    teacher = torch.tensor([[1e4, -1e4, 0.0], [1e4, 0.0, -1e4]])
    loss.reduction = "none"
    values = loss(student, teacher)
    (gradient,) = torch.autograd.grad(values.sum(), student)
    assert values.tolist() == [pytest.approx(value, rel=1e-6), 0]
    assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("loss", [Alpha(3.0), Alpha(-2.0), AlphaBeta(2.0, 0.5), ChiSquare()])
def test_large_powers_overflow_only_with_the_value(loss: Divergence) -> None:
    """A log ratio of +-30: the cube of p / q is beyond float32, p^3 / q^2 is not."""
    student = torch.tensor([[0.0, -30.0, 0.0], [0.0, 0.0, 0.0]])
    teacher = torch.tensor([[0.0, 0.0, 0.0], [0.0, -30.0, 0.0]])
    got, want = loss.pair(student, teacher, None), loss.pair(student.double(), teacher.double(), None)
    for a, b in zip(got, want, strict=True):
        assert torch.allclose(a.double(), b, rtol=2e-5)
