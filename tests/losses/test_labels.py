"""Cross-entropy against torch's, and in float64 where torch's float32 has lost its digits."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from compress.errors import UsageError
from compress.losses import KL, CrossEntropy


def test_value_and_gradient_are_those_of_torch() -> None:
    generator = torch.Generator().manual_seed(4)
    logits = torch.randn(2, 6, 9, generator=generator, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, 9, (2, 6), generator=generator)
    labels[1, 3:] = -100
    want = F.cross_entropy(logits.view(-1, 9), labels.view(-1), ignore_index=-100)
    got = CrossEntropy()(logits, labels=labels)
    gradients = [torch.autograd.grad(value, logits)[0] for value in (got, want)]
    assert torch.allclose(got, want, rtol=1e-13)
    assert torch.allclose(*gradients, rtol=1e-12, atol=1e-15)
    assert torch.autograd.gradcheck(lambda z: CrossEntropy(reduction="none")(z, labels=labels), (logits,))


@pytest.mark.parametrize("margin", [10.0, 20.0, 60.0])
def test_a_sure_student_keeps_its_digits_in_float32(margin: float) -> None:
    logits = torch.zeros(1, 1000)
    logits[0, 3] = margin + math.log(999)
    logits.requires_grad_()
    value = CrossEntropy()(logits, labels=torch.tensor([3]))
    value.backward()
    want = math.log1p(math.exp(-margin))
    assert value.item() == pytest.approx(want, rel=1e-5)
    assert logits.grad is not None
    assert -logits.grad[0, 3].item() == pytest.approx(-math.expm1(-want), rel=1e-5)


def test_classes_that_are_left_out() -> None:
    inf = math.inf
    logits = torch.tensor([[0.0, -inf, -inf], [0.0, 1.0, -inf], [1e4, 0.0, -1e4]], requires_grad=True)
    values = CrossEntropy(reduction="none")(logits, labels=torch.tensor([0, 0, 1]))
    assert values.tolist() == pytest.approx([0.0, math.log1p(math.e), 1e4])
    values.sum().backward()
    assert logits.grad is not None
    assert torch.isfinite(logits.grad).all()


def test_weights_in_the_place_of_labels_are_refused() -> None:
    with pytest.raises(UsageError, match=r"labels are torch.float32.*weights are the argument after"):
        KL()(torch.zeros(2, 3), torch.zeros(2, 3), torch.ones(2))
