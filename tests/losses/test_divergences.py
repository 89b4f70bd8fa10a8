"""KL against float64, against its definition, and against autograd."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from compress.errors import UsageError
from compress.losses import KL, CrossEntropy, kl_terms, loss_options, make_loss


def definition(student: torch.Tensor, teacher: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """sum p (log p - log q) in float64."""
    p = F.log_softmax(teacher.double() / temperature, -1)
    q = F.log_softmax(student.double() / temperature, -1)
    return (p.exp() * (p - q)).sum(-1)


@pytest.mark.parametrize(("distance", "bound"), [(1e-1, 2e-6), (1e-2, 2e-6), (1e-3, 1e-5), (1e-4, 5e-4)])
def test_float32_keeps_its_digits_between_close_models(distance: float, bound: float) -> None:
    generator = torch.Generator().manual_seed(0)
    teacher = 3 * torch.randn(64, 40_000, generator=generator)
    student = teacher + distance * torch.randn(64, 40_000, generator=generator)
    values, _ = kl_terms(student, teacher)
    truth, _ = kl_terms(student.double(), teacher.double())
    assert torch.allclose(truth, definition(student, teacher), rtol=0, atol=1e-13)
    assert (values >= 0).all()
    assert ((values.double() - truth) / truth).abs().max() < bound


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("t2", [False, True])
def test_gradcheck_with_mask_and_weights(temperature: float, t2: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    student = torch.randn(2, 5, 7, generator=generator, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(2, 5, 7, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 7, (2, 5), generator=generator)
    labels[0, :2] = -100
    weights = torch.rand(2, 5, generator=generator, dtype=torch.float64)
    weights[1, 4] = 0
    for reduction in ("mean", "sum", "none"):
        loss = KL(temperature, t2, reduction)
        assert torch.autograd.gradcheck(lambda z, loss=loss: loss(z, teacher, labels, weights), (student,))


def test_value_is_the_weighted_mean_of_the_definition() -> None:
    generator = torch.Generator().manual_seed(2)
    student, teacher = torch.randn(2, 3, 4, 11, generator=generator)
    weights = torch.rand(3, 4, generator=generator)
    labels = torch.zeros(3, 4, dtype=torch.int64)
    labels[0, 0] = -100
    keep = (labels != -100).double() * weights
    want = 4.0 * (definition(student, teacher, 2.0) * keep).sum() / keep.sum()
    got = KL(temperature=2.0, t2=True)(student, teacher, labels, weights)
    assert torch.allclose(got.double(), want, rtol=1e-5)


def test_extreme_logits() -> None:
    inf = math.inf
    teacher = torch.tensor([[1e4, -1e4, 0.0], [0.0, 0.0, -inf], [1e4, 0.0, 0.0]])
    student = torch.tensor([[-1e4, 1e4, 0.0], [1.0, 0.0, -inf], [1e4, 0.0, 0.0]], requires_grad=True)
    values = KL(reduction="none")(student, teacher)
    values.sum().backward()
    assert values[0].item() == pytest.approx(2e4)
    assert values[1].item() == pytest.approx(math.log((1 + math.e) / 2) - 0.5, rel=1e-5)
    assert values[2].item() == 0.0
    assert student.grad is not None
    assert torch.isfinite(student.grad).all()


def test_no_position_counts_gives_a_connected_zero() -> None:
    student = torch.randn(2, 3, 5)
    student[0, 0, 0] = -math.inf
    student.requires_grad_()
    loss = KL()(student, torch.randn(2, 3, 5), torch.full((2, 3), -100))
    loss.backward()
    assert loss.item() == 0.0
    assert student.grad is not None
    assert not student.grad.any()


def test_half_precision_is_computed_in_float32() -> None:
    generator = torch.Generator().manual_seed(3)
    student, teacher = (4 * torch.randn(2, 8, 4096, generator=generator)).bfloat16()
    got = KL(reduction="none")(student, teacher)
    assert got.dtype == torch.float32
    assert torch.allclose(got.double(), definition(student, teacher), rtol=1e-5)


def test_cross_entropy_is_that_of_torch() -> None:
    generator = torch.Generator().manual_seed(4)
    logits = torch.randn(2, 6, 9, generator=generator)
    labels = torch.randint(0, 9, (2, 6), generator=generator)
    labels[1, 3:] = -100
    want = F.cross_entropy(logits.view(-1, 9), labels.view(-1), ignore_index=-100)
    assert torch.allclose(CrossEntropy()(logits, labels=labels), want)


def test_mistakes_are_named() -> None:
    with pytest.raises(UsageError, match=r"no loss 'kll'.*Did you mean 'kl'"):
        make_loss("kll")
    with pytest.raises(UsageError, match=r"no option 'temprature'.*Did you mean 'temperature'"):
        make_loss("kl", options={"temprature": 2.0})
    with pytest.raises(UsageError, match=r"'temperature' of the loss 'kl' is 'high'.*Give a float"):
        make_loss("kl", options={"temperature": "high"})
    with pytest.raises(UsageError, match=r"'t2' of the loss 'kl' is 'maybe'.*Give a bool"):
        make_loss("kl", options={"t2": "maybe"})
    with pytest.raises(UsageError, match="no option 'reduction'"):
        make_loss("kl", options={"reduction": "mean"})
    with pytest.raises(UsageError, match="temperature is 0"):
        KL(temperature=0)
    with pytest.raises(UsageError, match=r"\(1, 4\).*\(1, 5\)"):
        KL()(torch.zeros(1, 4), torch.zeros(1, 5))
    assert loss_options("kl") == ["temperature", "t2"]
