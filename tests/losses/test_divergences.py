"""Every divergence against its definition in float64, against autograd, and cut into tiles."""

from __future__ import annotations

import math
from decimal import Decimal, localcontext

import pytest
import torch

from compress.errors import UsageError
from compress.losses import (
    KL,
    Alpha,
    Distributions,
    JensenShannon,
    Renyi,
    ReverseSkewKL,
    SkewKL,
    SymmetricKL,
    loss_options,
    make_loss,
)
from compress.losses.divergence import excess
from tests.losses.definitions import CASES, Case, logits

every = pytest.mark.parametrize("case", CASES, ids=str)


@every
def test_value_and_gradient_are_those_of_the_definition(case: Case) -> None:
    student, teacher = logits(16, 11)
    student.requires_grad_()
    values = case.loss(temperature=1.7, t2=True, reduction="none")(student, teacher)
    truth = 1.7**2 * case.truth(student, teacher, 1.7)
    assert torch.allclose(values, truth, rtol=1e-12, atol=1e-14)
    upstream = torch.rand(16, dtype=torch.float64)
    (got,), (want,) = (torch.autograd.grad(v, student, upstream) for v in (values, truth))
    assert torch.allclose(got, want, rtol=1e-11, atol=1e-13)


@every
def test_gradcheck_with_mask_and_weights(case: Case) -> None:
    student, teacher = logits(2, 3, 5, seed=1)
    student.requires_grad_()
    labels = torch.tensor([[0, -100, 3], [1, 2, 4]])
    weights = torch.tensor([[0.4, 1.0, 2.0], [0.0, 0.7, 1.0]], dtype=torch.float64)
    for reduction in ("mean", "sum", "none"):
        loss = case.loss(temperature=0.6, reduction=reduction)
        quick = reduction != "none"
        assert torch.autograd.gradcheck(
            lambda z, loss=loss: loss(z, teacher, labels, weights), (student,), fast_mode=quick
        )
    assert loss(student, teacher, labels, weights).shape == (4,)


@every
def test_float32_agrees_with_float64(case: Case) -> None:
    student, teacher = logits(8, 3000, seed=2, dtype=torch.float32)
    wide = student.double().requires_grad_()
    student.requires_grad_()
    loss = case.loss(reduction="none")
    values, truth = loss(student, teacher), loss(wide, teacher.double())
    assert values.dtype == torch.float32
    assert torch.allclose(values.double(), truth, rtol=5e-6)
    (got,), (want,) = (torch.autograd.grad(v.sum(), z) for v, z in ((values, student), (truth, wide)))
    assert (got - want).norm() < 1e-5 * want.norm()


@every
def test_of_equals_it_is_exactly_nothing(case: Case) -> None:
    _, teacher = logits(4, 500, dtype=torch.float32)
    student = teacher.clone().requires_grad_()
    values = case.loss(reduction="none")(student, teacher)
    values.sum().backward()
    assert student.grad is not None
    assert not values.any()
    assert not student.grad.any()


@every
def test_of_no_position_it_is_a_connected_zero(case: Case) -> None:
    student, teacher = logits(2, 3, 5)
    student[0, 0, 0] = -math.inf
    student.requires_grad_()
    value = case.loss()(student, teacher, torch.full((2, 3), -100))
    value.backward()
    assert value.item() == 0
    assert student.grad is not None
    assert not student.grad.any()
    assert case.loss(reduction="none")(student, teacher, torch.full((2, 3), -100)).shape == (0,)


@every
def test_terms_of_tiles_add_up(case: Case) -> None:
    student, teacher = logits(4, 10)
    teacher[0, 0], student[0, 1] = 60, 70
    norms = [each.logsumexp(-1, keepdim=True) for each in (student, teacher)]
    loss = case.loss()
    tiles = [Distributions(student[:, s], teacher[:, s], *norms) for s in (slice(0, 3), slice(3, 9), slice(9, 10))]
    terms = [loss.terms(tile) for tile in tiles]
    value, slope = loss.finish(sum(f.sum(-1) for f, _ in terms))
    a = torch.cat([a for _, a in terms], -1)
    gradient = (a - student.softmax(-1) * a.sum(-1, keepdim=True)) * (1 if slope is None else slope.unsqueeze(-1))
    want_value, want_gradient = loss.of_distributions(Distributions.of(student, teacher))
    rows = slice(1 if isinstance(loss, Renyi) else 0, None)  # its total has lost what is left of so small a sum
    assert torch.allclose(value[rows], want_value[rows], rtol=1e-13)
    assert torch.allclose(gradient[rows], want_gradient[rows], rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_excess_to_the_last_digits(dtype: torch.dtype) -> None:
    """e^-u - 1 + u in 60 decimal digits."""
    sizes = torch.logspace(-9, math.log10(40), 300, dtype=torch.float64)
    points = torch.cat([sizes, -sizes, torch.tensor([0.25, -0.25])]).to(dtype)
    with localcontext() as context:
        context.prec = 60
        truth = [float((-Decimal(u)).exp() - 1 + Decimal(u)) for u in points.tolist()]
    got = excess(points)
    assert (got >= 0).all()
    assert ((got.double() - torch.tensor(truth, dtype=torch.float64)) / torch.tensor(truth).double()).abs().max() < (
        1e-6 if dtype == torch.float32 else 3e-15
    )


def test_sums_over_a_large_vocabulary() -> None:
    """`torch.softmax` is 1e-5 off here."""
    teacher = 3 * torch.randn(4, 151_936, generator=torch.Generator().manual_seed(0))
    d = Distributions.of(teacher, teacher)
    assert torch.allclose(d.teacher_norm, teacher.double().logsumexp(-1, keepdim=True).float(), rtol=0, atol=2e-6)
    assert torch.allclose(d.p.double().sum(-1), torch.ones(4).double(), rtol=1e-6)


def test_half_precision_is_computed_in_float32() -> None:
    generator = torch.Generator().manual_seed(3)
    student, teacher = (4 * torch.randn(2, 8, 4096, generator=generator)).bfloat16()
    for case in CASES[:2]:
        got = case.loss(reduction="none")(student, teacher)
        assert got.dtype == torch.float32
        assert torch.allclose(got.double(), case.truth(student, teacher), rtol=1e-5)


def test_mistakes_are_named() -> None:
    with pytest.raises(UsageError, match=r"no loss 'kll'.*Did you mean 'kl'"):
        make_loss("kll")
    with pytest.raises(UsageError, match=r"no option 'temprature'.*Did you mean 'temperature'"):
        make_loss("kl", options={"temprature": 2.0})
    with pytest.raises(UsageError, match=r"'temperature' of the loss 'kl' is 'high'.*Give a number"):
        make_loss("kl", options={"temperature": "high"})
    with pytest.raises(UsageError, match=r"'t2' of the loss 'kl' is 'maybe'.*Give true or false"):
        make_loss("kl", options={"t2": "maybe"})
    with pytest.raises(UsageError, match="no option 'reduction'"):
        make_loss("kl", options={"reduction": "mean"})
    with pytest.raises(UsageError, match="temperature is 0"):
        KL(temperature=0)
    with pytest.raises(UsageError, match=r"beta is 0.*'kl'.*normalise"):
        JensenShannon(beta=0)
    with pytest.raises(UsageError, match=r"beta is 1.*'reverse_kl'"):
        JensenShannon(beta=1)
    for wrong in (lambda: SkewKL(0), lambda: ReverseSkewKL(1), lambda: SymmetricKL(1), lambda: Renyi(0)):
        with pytest.raises(UsageError, match=r"(alpha|forward) is [01]"):
            wrong()
    with pytest.raises(UsageError, match="alpha is nan"):
        Alpha(math.nan)
    with pytest.raises(UsageError, match="4 classes, the teacher 5"):
        KL()(torch.zeros(1, 4), torch.zeros(1, 5))
    assert loss_options("kl") == {"temperature": 1.0, "t2": False}
