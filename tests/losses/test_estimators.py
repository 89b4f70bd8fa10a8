"""The estimates of the reverse KL divergence against exact sums over a small vocabulary."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from compress.losses.estimators import k1, k2, k3, k3_plus

Estimate = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def models(classes: int = 12, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """The student's logits, and log p."""
    generator = torch.Generator().manual_seed(seed)
    student, teacher = torch.randn(2, classes, generator=generator, dtype=torch.float64)
    return student.requires_grad_(), teacher.log_softmax(-1)


def reverse_kl(log_q: torch.Tensor, log_p: torch.Tensor) -> torch.Tensor:
    return (log_q.exp() * (log_q - log_p)).sum()


def forward_kl(log_q: torch.Tensor, log_p: torch.Tensor) -> torch.Tensor:
    return (log_p.exp() * (log_p - log_q)).sum()


def gradient(value: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    return torch.autograd.grad(value, at)[0]


def expected_gradient(estimate: Estimate, logits: torch.Tensor, log_p: torch.Tensor) -> torch.Tensor:
    """E_q[gradient of the estimate]: the sampling is not differentiated."""
    log_q = logits.log_softmax(-1)
    return gradient((log_q.detach().exp() * estimate(log_q, log_p)).sum(), logits)


def test_expected_values() -> None:
    logits, log_p = models()
    log_q = logits.detach().log_softmax(-1)
    want = reverse_kl(log_q, log_p).item()
    for unbiased in (k1, k3, k3_plus):
        assert (log_q.exp() * unbiased(log_q, log_p)).sum().item() == pytest.approx(want, rel=1e-14)
    assert abs((log_q.exp() * k2(log_q, log_p)).sum().item() - want) > 0.05 * want


def test_expected_gradients() -> None:
    logits, log_p = models()
    log_q = logits.log_softmax(-1)
    reverse, forward = (
        gradient(reverse_kl(log_q, log_p), logits),
        gradient(forward_kl(logits.log_softmax(-1), log_p), logits),
    )
    assert not torch.allclose(reverse, forward, rtol=0.1)
    close = {"rtol": 0.0, "atol": 1e-15}
    assert torch.allclose(expected_gradient(k1, logits, log_p), torch.zeros_like(logits), **close)
    assert torch.allclose(expected_gradient(k2, logits, log_p), reverse, **close)
    assert torch.allclose(expected_gradient(k3, logits, log_p), forward, **close)
    assert torch.allclose(expected_gradient(k3_plus, logits, log_p), reverse, **close)


def test_k3_plus_has_the_value_of_k3_and_the_gradient_of_k2() -> None:
    logits, log_p = models(seed=1)
    log_q = logits.detach().log_softmax(-1).requires_grad_()
    assert torch.equal(k3_plus(log_q, log_p), k3(log_q, log_p))
    assert torch.equal(gradient(k3_plus(log_q, log_p).sum(), log_q), gradient(k2(log_q, log_p).sum(), log_q))


@pytest.mark.parametrize("estimate", [k1, k2, k3])
def test_gradcheck(estimate: Estimate) -> None:
    logits, log_p = models(seed=2)
    assert torch.autograd.gradcheck(lambda z: estimate(z.log_softmax(-1), log_p), (logits,))


def test_k3_keeps_its_digits_and_is_never_negative() -> None:
    log_q = -3 * torch.rand(1000, generator=torch.Generator().manual_seed(3))
    log_p = log_q + torch.logspace(-7, 0, 1000)
    ratio = log_p.double() - log_q.double()  # the difference of two float32 numbers is exact in float64
    values = k3(log_q, log_p)
    close = ((log_p - log_q).double() == ratio) & (ratio != 0)
    assert close.sum() > 300
    # e^R - R - 1 = R^2 / 2 + R^3 / 6 + ...
    want = sum(ratio**power / math.factorial(power) for power in range(2, 20))
    assert (values >= 0).all()
    assert ((values.double() - want) / want)[close].abs().max() < 1e-6


def test_extreme_log_probabilities() -> None:
    log_q = torch.tensor([-1.0, -50.0, -0.5, -200.0], requires_grad=True)
    log_p = torch.tensor([-math.inf, -1.0, -1e4, -0.1])
    assert k1(log_q, log_p).tolist() == pytest.approx([math.inf, -49, 1e4 - 0.5, -199.9])
    assert k2(log_q, log_p)[:3].tolist() == pytest.approx([math.inf, 49**2 / 2, (1e4 - 0.5) ** 2 / 2])
    for estimate in (k3, k3_plus):
        assert estimate(log_q, log_p).tolist() == pytest.approx(
            [math.inf, math.exp(49) - 50, 1e4 - 1.5, math.inf], rel=1e-5
        )
    assert gradient(k3(log_q, log_p)[:3].sum(), log_q)[:3].tolist() == pytest.approx([1, 1 - math.exp(49), 1], rel=1e-5)
    kept = log_q.detach()[1:].requires_grad_()
    assert gradient(k3_plus(kept, log_p[1:]).sum(), kept).tolist() == pytest.approx([-49, 1e4 - 0.5, -199.9])


def test_the_teacher_receives_no_gradient_and_shapes_are_kept() -> None:
    log_q = torch.full((2, 3), -1.0, requires_grad=True)
    log_p = torch.full((2, 3), -2.0, requires_grad=True)
    for estimate in (k1, k2, k3, k3_plus):
        value = estimate(log_q, log_p)
        assert value.shape == (2, 3)
        assert torch.autograd.grad(value.sum(), log_p, allow_unused=True)[0] is None
