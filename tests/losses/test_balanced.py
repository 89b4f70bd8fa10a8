"""Gated sums of forward and reverse KL against their definitions in float64, with the gates detached."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from compress.errors import UsageError
from compress.losses import KL, AdaptiveKL, BalancedKL, EntropyGatedKL, Loss, ReverseKL, TokenwiseKL
from compress.losses.balanced import entropy_gap
from compress.losses.divergence import Distributions

Definition = Callable[[Tensor, Tensor, float], Tensor]


def entropy(logits: Tensor) -> Tensor:
    return -(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1)


def both(student: Tensor, teacher: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """KL(p || q) and KL(q || p)."""
    p, q = (teacher / temperature).log_softmax(-1), (student / temperature).log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1), (q.exp() * (q - p)).sum(-1)


def hard(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    forward, reverse = both(student, teacher, temperature)
    less = entropy(student) < entropy(teacher)
    return torch.where(less, 3.0, 1.0) * forward + torch.where(less, 1.0, 3.0) * reverse


def smooth(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    forward, reverse = both(student, teacher, temperature)
    part = torch.sigmoid((entropy(student) - entropy(teacher)) / 0.3).detach()
    return (1 + 1.5 * (1 - part)) * forward + (1 + 1.5 * part) * reverse


def fixed(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    return 2 * sum(both(student, teacher, temperature))


def adaptive(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """The head found row by row, class by class."""
    forward, reverse = both(student, teacher, temperature)
    p, q = (teacher / temperature).softmax(-1), (student / temperature).softmax(-1).detach()
    share = []
    for p_row, q_row in zip(p, q, strict=True):
        mass, head = 0.0, 0.0
        for v in sorted(range(len(p_row)), key=lambda v, row=p_row: -float(row[v])):
            if mass < 0.4:
                head += float((p_row[v] - q_row[v]).abs())
            mass += float(p_row[v])
        share.append(head / float((p_row - q_row).abs().sum()))
    h = torch.tensor(share, dtype=p.dtype)
    return h * forward + (1 - h) * reverse


def todi(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    p, q = (teacher / temperature).log_softmax(-1), (student / temperature).log_softmax(-1)
    gate = torch.sigmoid(p - q).detach()
    return (gate * p.exp() * (p - q) + (1 - gate) * q.exp() * (q - p)).sum(-1)


def eopd(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    forward, reverse = both(student, teacher, temperature)
    return reverse + torch.where(entropy(teacher) > 1.2, forward, 0.0)


CASES: dict[str, tuple[Callable[..., Loss], Definition]] = {
    "hard": (BalancedKL, hard),
    "smooth": (lambda **options: BalancedKL("smooth", 1.5, 0.3, **options), smooth),
    "fixed": (lambda **options: BalancedKL("fixed", **options), fixed),
    "adaptive": (lambda **options: AdaptiveKL(0.4, **options), adaptive),
    "todi": (TokenwiseKL, todi),
    "eopd": (lambda **options: EntropyGatedKL(1.2, **options), eopd),
}
CONSTANT_GATES = ["hard", "fixed", "eopd"]
"""Their gates do not move with a small change of the student: the gradient is the derivative of the value."""
ALL = [BalancedKL(), BalancedKL("smooth"), BalancedKL("fixed"), AdaptiveKL(), TokenwiseKL(), EntropyGatedKL()]


def logits(*shape: int, seed: int = 0) -> Tensor:
    return 2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_value_and_gradient_are_those_of_the_definition(name: str, temperature: float) -> None:
    make, definition = CASES[name]
    student, teacher = logits(2, 24, 9).unbind()
    student.requires_grad_()
    labels = torch.zeros(24, dtype=torch.int64)
    labels[5:8] = -100
    weights = torch.rand(24, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    weights[11] = 0
    keep = (labels != -100).double() * weights
    want = definition(student, teacher, temperature) * keep * temperature**2
    cases = {"mean": want.sum() / keep.sum(), "sum": want.sum(), "none": want[keep > 0]}
    for reduction, expected in cases.items():
        got = make(temperature=temperature, t2=True, reduction=reduction)(student, teacher, labels, weights)
        assert torch.allclose(got, expected, rtol=1e-12, atol=0)
        (gradient,) = torch.autograd.grad(got.sum(), student)
        (expected,) = torch.autograd.grad(expected.sum(), student, retain_graph=True)
        assert torch.allclose(gradient, expected, rtol=1e-11, atol=1e-15)


@pytest.mark.parametrize("name", CONSTANT_GATES)
def test_gradcheck_where_the_gate_stands_still(name: str) -> None:
    student, teacher = logits(2, 2, 2, 4, seed=2).unbind()
    student.requires_grad_()
    labels = torch.tensor([[0, -100], [0, 0]])
    weights = torch.tensor([[0.5, 1.0], [1.5, 0.0]], dtype=torch.float64)
    for reduction in ("mean", "sum", "none"):
        loss = CASES[name][0](temperature=1.7, reduction=reduction)
        assert torch.autograd.gradcheck(lambda z, loss=loss: loss(z, teacher, labels, weights), (student,))


def test_todi_has_the_value_of_jeffreys_divergence_and_another_gradient() -> None:
    """Between close models w = 1/2, and the gradient is 3/4 of that of Jeffreys; far apart it has another direction."""
    other, teacher = logits(2, 50, 30, seed=4).unbind()
    for student in (other, teacher + 1e-5 * other):
        student.requires_grad_()
        loss = TokenwiseKL(1.3)(student, teacher)
        jeffreys = KL(1.3)(student, teacher) + ReverseKL(1.3)(student, teacher)
        assert loss.item() == pytest.approx(jeffreys.item(), rel=1e-10)
        (ours,), (theirs,) = (torch.autograd.grad(each, student) for each in (loss, jeffreys))
        if student is other:
            assert (ours - theirs).norm() > 0.05 * theirs.norm()
            assert (ours - 0.75 * theirs).norm() > 0.2 * theirs.norm()
        else:
            assert (ours - 0.75 * theirs).norm() < 1e-4 * theirs.norm()


def test_todi_in_the_bregman_form_would_be_another_loss() -> None:
    """The added parts sum to -sum (p - q)^2 / (p + q), here a fifth of the value."""
    student, teacher = logits(2, 50, 30, seed=4).unbind()
    student.requires_grad_()
    log_p, log_q = teacher.log_softmax(-1), student.log_softmax(-1)
    p, q = log_p.exp(), log_q.exp()
    gate = torch.sigmoid(log_p - log_q).detach()
    added = (gate * (q - p) + (1 - gate) * (p - q)).sum(-1).mean()
    assert added.item() == pytest.approx(-((p - q) ** 2 / (p + q)).sum(-1).mean().item(), rel=1e-12)
    value = TokenwiseKL()(student, teacher)
    assert added.item() < -0.2 * value.item()
    assert torch.autograd.grad(added, student)[0].norm() > 0.09 * torch.autograd.grad(value, student)[0].norm()


def test_gradient_of_balanced_kl_is_that_of_the_published_rule_with_a_cross_entropy() -> None:
    student, teacher = logits(2, 40, 8, seed=5).unbind()
    student.requires_grad_()
    uncertain = entropy(teacher) > entropy(student)
    forward = -(teacher.softmax(-1) * student.log_softmax(-1)).sum(-1)
    reverse = (student.softmax(-1) * (student.log_softmax(-1) - teacher.log_softmax(-1))).sum(-1)
    rho, nu = torch.where(uncertain, 3.0, 1.0), torch.where(uncertain, 1.0, 3.0)
    published, ours = (rho * forward + nu * reverse).mean(), BalancedKL()(student, teacher)
    (want,), (got,) = (torch.autograd.grad(each, student) for each in (published, ours))
    assert torch.allclose(got, want, rtol=1e-11, atol=1e-15)
    assert (published - ours).item() == pytest.approx((rho * entropy(teacher)).mean().item(), rel=1e-12)
    assert 5 < uncertain.sum() < 35


def test_limits_of_the_balanced_gates() -> None:
    student, teacher = logits(2, 40, 12, seed=6).unbind()
    kl, reverse = (loss(student, teacher) for loss in (KL(reduction="none"), ReverseKL(reduction="none")))

    def balanced(*options: object) -> Tensor:
        return BalancedKL(*options, reduction="none")(student, teacher)  # type: ignore[arg-type]

    for gate in ("hard", "smooth", "fixed"):
        assert torch.allclose(balanced(gate, 0.0), kl + reverse, rtol=1e-14, atol=0)
    assert torch.allclose(balanced("smooth", 2.0, 1e-6), balanced("hard"), rtol=1e-12, atol=0)
    assert torch.allclose(balanced("smooth", 2.0, 1e9), balanced("fixed"), rtol=1e-8, atol=0)
    flat, peaked = torch.zeros(1, 12), torch.zeros(1, 12)
    peaked[0, 0] = 3.0
    certain_student = 3 * KL()(peaked, flat) + ReverseKL()(peaked, flat)
    certain_teacher = KL()(flat, peaked) + 3 * ReverseKL()(flat, peaked)
    assert BalancedKL()(peaked, flat).item() == pytest.approx(certain_student.item(), rel=1e-6)
    assert BalancedKL()(flat, peaked).item() == pytest.approx(certain_teacher.item(), rel=1e-6)


def test_the_balanced_gate_reads_the_entropies_at_temperature_one() -> None:
    teacher = torch.tensor([[3.0, 3.0, -9.0, -9.0, -9.0, -9.0]])
    student = torch.tensor([[5.0, 0.0, 0.0, 0.0, 0.0, 0.0]])
    at_one, at_ten = entropy(student) - entropy(teacher), entropy(student / 10) - entropy(teacher / 10)
    assert at_one.item() < 0 < at_ten.item()
    want = 3 * KL(10.0)(student, teacher) + ReverseKL(10.0)(student, teacher)
    assert BalancedKL(temperature=10.0)(student, teacher).item() == pytest.approx(want.item(), rel=1e-6)


@pytest.mark.parametrize(("mu", "head"), [(0.3, 0.1), (0.4, 0.1), (0.45, 0.2), (0.7, 0.2), (0.75, 0.3), (0.95, 0.4)])
def test_the_head_is_the_smallest_set_that_reaches_mu(mu: float, head: float) -> None:
    """By hand: p = (.1, .4, .2, .3), q = (.2, .3, .3, .2), so |p - q| = .1 at every class, .4 in all."""
    p, q = torch.tensor([[[0.1, 0.4, 0.2, 0.3]], [[0.2, 0.3, 0.3, 0.2]]], dtype=torch.float64)
    forward, reverse = (p * (p / q).log()).sum(), (q * (q / p).log()).sum()
    if mu in (0.4, 0.7):  # the sums 0.4 and 0.4 + 0.3 are rounded: stay on this side of them
        mu -= 1e-9
    got = AdaptiveKL(mu)(q.log(), p.log())
    assert got.item() == pytest.approx((head / 0.4 * forward + (1 - head / 0.4) * reverse).item(), rel=1e-12)


def test_a_head_of_many_classes() -> None:
    """The first row is flat, so that its head are 2,000 of 4,000 classes; the second has a head of one."""
    student, teacher = logits(2, 2, 4000, seed=14).unbind()
    teacher *= 0.01
    teacher[1, 5] = 12.0
    want = adaptive(student, teacher, 1.0)  # mu = 0.4
    assert torch.allclose(AdaptiveKL(0.4, reduction="none")(student, teacher), want, rtol=1e-12, atol=0)
    assert torch.allclose(AdaptiveKL(0.4)(student[1:], teacher[1:]), want[1:], rtol=1e-12, atol=0)


def test_limits_of_the_adaptive_gate() -> None:
    student, teacher = logits(2, 20, 12, seed=7).unbind()
    assert torch.allclose(AdaptiveKL(1 - 1e-12)(student, teacher), KL()(student, teacher), rtol=1e-12, atol=0)
    first = teacher.argmax(-1, keepdim=True)
    gap = (teacher.softmax(-1) - student.softmax(-1)).abs()
    h = gap.gather(-1, first).squeeze(-1) / gap.sum(-1)
    want = h * KL(reduction="none")(student, teacher) + (1 - h) * ReverseKL(reduction="none")(student, teacher)
    assert torch.allclose(AdaptiveKL(1e-9, reduction="none")(student, teacher), want, rtol=1e-12, atol=0)


def test_limits_of_the_entropy_gate() -> None:
    student, teacher = logits(2, 20, 12, seed=8).unbind()
    kl, reverse = KL()(student, teacher), ReverseKL()(student, teacher)
    for options, want in {
        (0.0, "add"): kl + reverse,
        (0.0, "switch"): kl,
        (9.0, "add"): reverse,
        (9.0, "switch"): reverse,
        (math.inf, "add"): reverse,
    }.items():
        assert torch.allclose(EntropyGatedKL(*options)(student, teacher), want, rtol=1e-13, atol=0)
    three = torch.tensor([[0.0, 0.0, -40.0], [0.0, -40.0, -40.0]])  # entropies log 2 and 0
    values = EntropyGatedKL(0.69, "switch", reduction="none")(torch.zeros(2, 3), three)
    want = torch.tensor([KL()(torch.zeros(1, 3), three[:1]), ReverseKL()(torch.zeros(1, 3), three[1:])])
    assert torch.allclose(values, want)


def test_entropy_gap_of_models_far_apart() -> None:
    """Of classes with |log p - log q| on both sides of 20, where another form is taken."""
    student, teacher = (12 * logits(2, 60, 12, seed=13)).unbind()
    teacher[:, 3] = -math.inf
    d = Distributions.of(student, teacher)
    assert d.bounded.any(-1).all()
    assert not d.bounded.all(-1).any()
    p, q = d.p, d.q
    want = torch.xlogy(p, p).sum(-1) - torch.xlogy(q, q).sum(-1)
    assert torch.allclose(entropy_gap(d), want, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(("distance", "bound"), [(1e-1, 3e-7), (1e-2, 5e-8), (1e-3, 5e-9), (1e-4, 5e-10)])
def test_entropy_gap_of_close_models_in_float32(distance: float, bound: float) -> None:
    """The difference of two entropies in float32 is off by 3e-6 at every distance."""
    generator = torch.Generator().manual_seed(9)
    teacher = 3 * torch.randn(8, 40_000, generator=generator)
    student = teacher + distance * torch.randn(8, 40_000, generator=generator)
    truth = entropy(student.double()) - entropy(teacher.double())
    got = entropy_gap(Distributions.of(student, teacher)).double()
    assert (got - truth).abs().max() < bound
    assert ((entropy(student) - entropy(teacher)).double() - truth).abs().max() > 1e-6


@pytest.mark.parametrize("loss", ALL, ids=lambda loss: type(loss).__name__)
@pytest.mark.parametrize(("distance", "bound"), [(1.0, 2e-6), (1e-2, 2e-6), (1e-4, 5e-4)])
def test_float32_keeps_its_digits_between_close_models(loss: Loss, distance: float, bound: float) -> None:
    generator = torch.Generator().manual_seed(10)
    teacher = 3 * torch.randn(2, 20_000, generator=generator)
    student = teacher + distance * torch.randn(2, 20_000, generator=generator)
    loss.reduction = "none"
    values, truth = loss(student, teacher).double(), loss(student.double(), teacher.double())
    loss.reduction = "mean"
    assert (values > 0).all()
    assert ((values - truth) / truth).abs().max() < bound


@pytest.mark.parametrize("loss", ALL, ids=lambda loss: type(loss).__name__)
def test_extreme_logits(loss: Loss) -> None:
    inf = math.inf
    teacher = torch.tensor([[1e4, -1e4, 0.0], [0.0, 0.0, -inf], [1e4, 0.0, 0.0], [1e4, 0.0, 0.0]])
    student = torch.tensor([[-1e4, 1e4, 0.0], [1.0, 0.0, -inf], [1e4, 0.0, 0.0], [0.0, 0.0, 0.0]], requires_grad=True)
    loss.reduction = "none"
    values, truth = loss(student, teacher), loss(student.double(), teacher.double())
    loss.reduction = "mean"
    values.sum().backward()
    assert torch.allclose(values.double(), truth, rtol=1e-5, atol=0)
    assert values[2].item() == 0.0
    assert torch.isfinite(values).all()
    assert student.grad is not None
    assert torch.isfinite(student.grad).all()
    left_out = torch.tensor([[0.0, 0.0, -inf]])
    assert loss(torch.zeros(1, 3), left_out).item() == inf
    student = torch.tensor([[0.0, 0.0, -300.0]], requires_grad=True)  # a probability that float32 does not hold
    value = loss(student, left_out)
    value.backward()
    assert value.item() == 0.0
    assert student.grad is not None
    assert not student.grad.any()


def test_a_divergence_without_weight_may_be_infinite() -> None:
    student = torch.zeros(1, 3, requires_grad=True)
    teacher = torch.tensor([[0.0, 0.0, -math.inf]])
    loss = EntropyGatedKL(0.5, "switch")(student, teacher)
    loss.backward()
    assert loss.item() == pytest.approx(math.log(1.5))
    assert student.grad is not None
    assert torch.allclose(student.grad, torch.tensor([[-1 / 6, -1 / 6, 1 / 3]]))


@pytest.mark.parametrize("loss", ALL, ids=lambda loss: type(loss).__name__)
def test_equal_models_no_position_and_half_precision(loss: Loss) -> None:
    same = logits(4, 7, seed=11).float().requires_grad_()
    value = loss(same, same.detach())
    value.backward()
    assert value.item() == 0.0
    assert same.grad is not None
    assert not same.grad.any()
    nothing = loss(same, same.detach(), torch.full((4,), -100))
    nothing.backward()
    assert nothing.item() == 0.0
    student, teacher = logits(2, 4, 300, seed=12).bfloat16().unbind()
    value = loss(student, teacher)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(loss(student.double(), teacher.double()).item(), rel=1e-5)


def test_mistakes_are_named() -> None:
    with pytest.raises(UsageError, match="no gate 'soft'"):
        BalancedKL("soft")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="delta is -1"):
        BalancedKL(delta=-1.0)
    with pytest.raises(UsageError, match="gate_temperature is 0"):
        BalancedKL("smooth", gate_temperature=0)
    with pytest.raises(UsageError, match="mu is 1"):
        AdaptiveKL(mu=1.0)
    with pytest.raises(UsageError, match="no mode 'both'"):
        EntropyGatedKL(mode="both")  # type: ignore[arg-type]
