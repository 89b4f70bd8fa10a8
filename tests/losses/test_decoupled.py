"""DKD, NKD and USKD against their definitions with the label's column taken out, and against torch."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from compress.errors import UsageError
from compress.losses import KL, DecoupledKD, NormalisedKD, TokenLoss, UniversalSelfKD, make_loss
from compress.losses.decoupled import zipf_by_rank

INF = math.inf
CLASSES = 7


def batch(seed: int = 0, scale: float = 1.5) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits [2, 5, 7] of student and teacher in float64, labels with two ignored, weights with one 0."""
    generator = torch.Generator().manual_seed(seed)
    student, teacher = scale * torch.randn(2, 2, 5, CLASSES, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, CLASSES, (2, 5), generator=generator)
    labels[0, :2] = -100
    weights = torch.rand(2, 5, generator=generator, dtype=torch.float64)
    weights[1, 4] = 0
    return student, teacher, labels, weights


def without_label(logits: Tensor, labels: Tensor) -> Tensor:
    """[N, V] -> [N, V - 1]."""
    return logits[F.one_hot(labels, logits.shape[1]) == 0].view(len(logits), -1)


def plain_kl(p: Tensor, q: Tensor) -> Tensor:
    return (p * (p / q).log()).sum(-1)


def dkd(student: Tensor, teacher: Tensor, labels: Tensor, alpha: float, beta: float, temperature: float) -> Tensor:
    s, t = student / temperature, teacher / temperature
    q, p = (z.softmax(-1).gather(1, labels[:, None]) for z in (s, t))
    target = plain_kl(torch.cat([p, 1 - p], 1), torch.cat([q, 1 - q], 1))
    nontarget = plain_kl(without_label(t, labels).softmax(-1), without_label(s, labels).softmax(-1))
    return temperature**2 * (alpha * target + beta * nontarget)


def nkd(student: Tensor, teacher: Tensor, labels: Tensor, gamma: float, temperature: float) -> Tensor:
    q, p = (z.softmax(-1).gather(1, labels[:, None]).squeeze(1) for z in (student, teacher))
    q_others, p_others = (without_label(z, labels).div(temperature).softmax(-1) for z in (student, teacher))
    return -p * q.log() - gamma * temperature**2 * (p_others * q_others.log()).sum(-1)


def uskd_targets(student: Tensor, weak: Tensor | None, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The label's target [N] and the others' [N, V - 1], row by row."""
    squared = student.softmax(-1).gather(1, labels[:, None]).squeeze(1) ** 2
    score = without_label(student, labels).softmax(-1)
    if weak is not None:
        score = score + without_label(weak, labels).softmax(-1)
    rows = []
    for row in score.tolist():
        order = sorted(range(len(row)), key=lambda i, row=row: -row[i])
        weights = [1 / (1 + order.index(i)) for i in range(len(row))]
        rows.append([weight / sum(weights) for weight in weights])
    return squared + 1 - squared.mean(), torch.tensor(rows, dtype=student.dtype)


def uskd(student: Tensor, labels: Tensor, targets: tuple[Tensor, Tensor], alpha: float, beta: float) -> Tensor:
    log_label = student.log_softmax(-1).gather(1, labels[:, None]).squeeze(1)
    log_others = without_label(student, labels).log_softmax(-1)
    return -alpha * targets[0] * log_label - beta * (targets[1] * log_others).sum(-1)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_the_two_parts_of_dkd_make_up_kl(temperature: float) -> None:
    generator = torch.Generator().manual_seed(1)
    student, teacher = 3 * torch.randn(2, 64, 50, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 50, (64,), generator=generator)
    parts = [
        DecoupledKD(alpha, beta, temperature, t2=False, reduction="none")(student, teacher, labels)
        for alpha, beta in ((1, 0), (0, 1))
    ]
    p_label = (teacher / temperature).softmax(-1).gather(1, labels[:, None]).squeeze(1)
    whole = KL(temperature, reduction="none")(student, teacher)
    torch.testing.assert_close(parts[0] + (1 - p_label) * parts[1], whole, rtol=1e-12, atol=1e-15)
    p = torch.stack([p_label, 1 - p_label], 1)
    q_label = (student / temperature).softmax(-1).gather(1, labels[:, None]).squeeze(1)
    torch.testing.assert_close(parts[0], plain_kl(p, torch.stack([q_label, 1 - q_label], 1)), rtol=1e-9, atol=1e-15)


def test_values_are_the_weighted_means_of_the_definitions() -> None:
    student, teacher, labels, weights = batch(2)
    keep = (labels != -100) & (weights != 0)
    s, t, y, w = student[keep], teacher[keep], labels[keep], weights[keep]
    weak = torch.randn(student.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    weak_loss = F.cross_entropy(weak[keep], y, label_smoothing=0.1, reduction="none")

    def mean(values: Tensor) -> Tensor:
        return (w * values).sum() / w.sum()

    for got, want in (
        (DecoupledKD()(student, teacher, labels, weights), dkd(s, t, y, 1, 8, 4)),
        (DecoupledKD(0.3, 2.0, 1.5)(student, teacher, labels, weights), dkd(s, t, y, 0.3, 2, 1.5)),
        (NormalisedKD()(student, teacher, labels, weights), nkd(s, t, y, 1.5, 1)),
        (NormalisedKD(3.5, 3.0)(student, teacher, labels, weights), nkd(s, t, y, 3.5, 3)),
        (UniversalSelfKD()(student, None, labels, weights), uskd(s, y, uskd_targets(s, None, y), 1, 0.1)),
        (
            UniversalSelfKD(0.5, 0.2, 0.3)(student, None, labels, weights, weak_logits=weak),
            uskd(s, y, uskd_targets(s, weak[keep], y), 0.5, 0.2) + 0.3 * weak_loss,
        ),
    ):
        torch.testing.assert_close(got, mean(want), rtol=1e-12, atol=0)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (DecoupledKD, {}),
        (DecoupledKD, {"alpha": 0.0, "beta": 1.0, "temperature": 0.7, "t2": False}),
        (DecoupledKD, {"alpha": 2.0, "beta": 0.0, "temperature": 1.0}),
        (NormalisedKD, {}),
        (NormalisedKD, {"gamma": 3.5, "temperature": 3.0}),
        (NormalisedKD, {"gamma": 0.0}),
        (UniversalSelfKD, {"alpha": 0.0, "beta": 1.0}),
    ],
)
def test_gradcheck_with_mask_and_weights(kind: type[TokenLoss], options: dict[str, float], reduction: str) -> None:
    student, teacher, labels, weights = batch(3)
    loss = kind(**options, reduction=reduction)
    assert torch.autograd.gradcheck(lambda z: loss(z, teacher, labels, weights), (student.requires_grad_(),))


def test_the_targets_of_uskd_are_constants_for_the_gradient() -> None:
    student, weak, labels, weights = batch(4)
    keep = (labels != -100) & (weights != 0)
    loss = UniversalSelfKD(0.8, 0.4, 0.2, reduction="sum")
    student.requires_grad_()
    weak.requires_grad_()
    got = torch.autograd.grad(loss(student, None, labels, weights, weak_logits=weak), (student, weak))
    s, w, y = student[keep], weak[keep], labels[keep]
    targets = uskd_targets(s.detach(), w.detach(), y)
    value = uskd(s, y, targets, 0.8, 0.4) + 0.2 * F.cross_entropy(w, y, label_smoothing=0.1, reduction="none")
    want = torch.autograd.grad((weights[keep] * value).sum(), (student, weak))
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-15)
    alone = UniversalSelfKD(0.0, 0.4, 0.2)
    assert torch.autograd.gradcheck(lambda z: alone(student.detach(), None, labels, weights, weak_logits=z), (weak,))


def test_ranks_follow_both_classifiers_and_ties_the_order_of_the_classes() -> None:
    labels = torch.tensor([1])
    flat = torch.zeros(1, 4, dtype=torch.float64)
    harmonic = 1 + 1 / 2 + 1 / 3

    def zipf(student: Tensor, weak: Tensor | None) -> list[float]:
        z = student.requires_grad_()
        value = UniversalSelfKD(0.0, 1.0, 0.0)(z, None, labels, weak_logits=weak)
        (gradient,) = torch.autograd.grad(value, z)  # q^ - zipf
        return ((without_label(z, labels).softmax(-1) - without_label(gradient, labels)) * harmonic).tolist()[0]

    assert zipf(flat.clone(), None) == pytest.approx([1, 1 / 2, 1 / 3])
    assert zipf(flat.clone(), torch.tensor([[0.0, 9.0, 1.0, 2.0]])) == pytest.approx([1 / 3, 1 / 2, 1])
    lead = torch.tensor([[2.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
    assert zipf(lead, torch.tensor([[0.0, 9.0, 0.1, 0.2]])) == pytest.approx([1, 1 / 3, 1 / 2])
    many = zipf_by_rank(torch.zeros(1, 5000), None)
    assert (many.diff() < 0).all()


def test_limits() -> None:
    generator = torch.Generator().manual_seed(5)
    student, teacher = torch.randn(2, 16, 9, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 9, (16,), generator=generator)
    sure = 1e4 * F.one_hot(labels, 9).double()
    ce = F.cross_entropy(student, labels, reduction="none")
    torch.testing.assert_close(NormalisedKD(0.0, reduction="none")(student, sure, labels), ce)
    torch.testing.assert_close(DecoupledKD(1.0, 0.0, 1.0, reduction="none")(student, sure, labels), ce)
    p = teacher.softmax(-1).gather(1, labels[:, None]).squeeze(1)
    torch.testing.assert_close(NormalisedKD(0.0, reduction="none")(student, teacher, labels), p * ce)
    same = student.clone().requires_grad_()
    value = DecoupledKD(reduction="sum")(same, student, labels)
    value.backward()
    assert value.item() == 0.0
    assert same.grad is not None and not same.grad.any()
    two = DecoupledKD(1.0, 5.0, 2.0, t2=False)(student[:, :2], teacher[:, :2], labels % 2)
    torch.testing.assert_close(two, KL(2.0)(student[:, :2], teacher[:, :2]))
    one = UniversalSelfKD(1.0, 0.0, reduction="none")(student[:1], None, labels[:1])  # p^2 + 1 - mean p^2 = 1
    torch.testing.assert_close(one, ce[:1])


@pytest.mark.parametrize("margin", [5.0, 10.0, 20.0, 40.0, 80.0])
def test_float32_keeps_its_digits_where_both_are_sure(margin: float) -> None:
    generator = torch.Generator().manual_seed(6)
    student, teacher = torch.randn(2, 32, 100, generator=generator)
    labels = torch.randint(0, 100, (32,), generator=generator)
    rows = torch.arange(32)
    teacher[rows, labels] += margin
    student[rows, labels] = teacher[rows, labels] + 1.5

    def logs(logits: Tensor) -> Tensor:
        """log q_y and log(1 - q_y) [N, 2] in float64, without a difference of near numbers."""
        ratio = (without_label(logits.double(), labels).logsumexp(-1) - logits[rows, labels].double()).exp()
        return torch.stack([-ratio.log1p(), ratio.log() - ratio.log1p()], 1)

    log_q, log_p = logs(student), logs(teacher)
    want = (log_p.exp() * (log_p - log_q)).sum(-1)
    got = DecoupledKD(1.0, 0.0, 1.0, reduction="none")(student, teacher, labels).double()
    assert ((got - want) / want).abs().max() < 5e-5
    want = -log_p[:, 0].exp() * log_q[:, 0]
    got = NormalisedKD(0.0, reduction="none")(student, teacher, labels).double()
    assert ((got - want) / want).abs().max() < 1e-5


@pytest.mark.parametrize(("distance", "bound"), [(1.0, 2e-6), (1e-2, 2e-6), (1e-3, 6e-5)])
def test_float32_against_float64(distance: float, bound: float) -> None:
    generator = torch.Generator().manual_seed(7)
    teacher = 3 * torch.randn(64, 5000, generator=generator)
    student = teacher + distance * torch.randn(64, 5000, generator=generator)
    labels = torch.randint(0, 5000, (64,), generator=generator)
    for loss, limit in ((DecoupledKD(), bound), (NormalisedKD(3.5, 3.0), 3e-6), (UniversalSelfKD(), 3e-6)):
        loss.reduction = "none"
        values, gradients = [], []
        for dtype in (torch.float32, torch.float64):
            z = student.to(dtype, copy=True).requires_grad_()
            value = loss(z, teacher.to(dtype), labels)
            value.sum().backward()
            assert z.grad is not None
            values.append(value.detach().double())
            gradients.append(z.grad.double())
        assert ((values[0] - values[1]) / values[1]).abs().max() < limit
        assert (values[0] >= 0).all()
        assert (gradients[0] - gradients[1]).norm() / gradients[1].norm() < 5e-6 / distance


LOSSES: list[TokenLoss] = [DecoupledKD(reduction="none"), NormalisedKD(2.0, 2.0, reduction="none")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_logits(dtype: torch.dtype) -> None:
    teacher = torch.tensor([[1e4, -1e4, 0.0], [0.0, 0.5, -INF], [-INF, -INF, 2.0], [-1e4, 1e4, 1e4]], dtype=dtype)
    student = torch.tensor([[-1e4, 1e4, 0.0], [1.0, 0.0, -INF], [0.5, 1.0, 2.0], [1e4, 1e4, -1e4]], dtype=dtype)
    labels = torch.tensor([0, 1, 2, 0])
    for loss in [*LOSSES, UniversalSelfKD(reduction="none")]:
        z = student.clone().requires_grad_()
        values = loss(z, teacher, labels)
        values.sum().backward()
        assert torch.isfinite(values).all()
        assert z.grad is not None and torch.isfinite(z.grad).all()


def test_a_teacher_that_leaves_out_all_other_classes_has_no_nontarget_part() -> None:
    teacher, labels = torch.tensor([[-INF, -INF, 2.0]]), torch.tensor([2])
    student = torch.tensor([[0.5, 1.0, 2.0]], requires_grad=True)
    want = F.cross_entropy(student, labels)
    for loss in (DecoupledKD(1.0, 8.0, 1.0), NormalisedKD(2.0, 3.0)):
        got = loss(student, teacher, labels)
        torch.testing.assert_close(got, want)
        gradients = [torch.autograd.grad(value, student, retain_graph=True)[0] for value in (got, want)]
        torch.testing.assert_close(*gradients)


def test_a_class_that_only_the_student_leaves_out_costs_infinity_with_a_finite_gradient() -> None:
    teacher = torch.tensor([[0.0, 1.0, 2.0]] * 2)
    student = torch.tensor([[0.0, -INF, 2.0], [0.5, -INF, -INF]], requires_grad=True)
    for labels in (torch.tensor([0, 0]), torch.tensor([1, 1])):
        for loss in LOSSES:
            values = loss(student, teacher, labels)
            assert torch.isposinf(values).all()
            (gradient,) = torch.autograd.grad(values.sum(), student)
            assert torch.isfinite(gradient).all()


def test_classes_that_both_leave_out_change_nothing() -> None:
    student, teacher, labels, _ = batch(8)
    wide = [F.pad(z, (0, 3), value=-INF) for z in (student, teacher)]
    for loss in (DecoupledKD(), NormalisedKD(2.0, 2.0), UniversalSelfKD()):
        torch.testing.assert_close(loss(*wide, labels), loss(student, teacher, labels), rtol=1e-14, atol=0)
    got = UniversalSelfKD(mu=1.0)(wide[0], None, labels, weak_logits=wide[1])
    torch.testing.assert_close(got, UniversalSelfKD(mu=1.0)(student, None, labels, weak_logits=teacher))


def test_a_step_in_pieces_is_the_step() -> None:
    student, teacher, labels, weights = batch(9)
    for loss in (DecoupledKD(), NormalisedKD()):
        parts = [loss(student[i], teacher[i], labels[i], weights[i], denominator=5.0) for i in range(2)]
        torch.testing.assert_close(parts[0] + parts[1], loss(student, teacher, labels, weights, denominator=5.0))
    weak = UniversalSelfKD(0.0, 0.5, 1.0)  # its label target alone ties positions together
    parts = [weak(student[i], None, labels[i], weights[i], 5.0, weak_logits=teacher[i]) for i in range(2)]
    whole = weak(student, None, labels, weights, 5.0, weak_logits=teacher)
    torch.testing.assert_close(parts[0] + parts[1], whole)


def test_no_position_counts_gives_a_connected_zero() -> None:
    student, teacher, labels, _ = batch(10)
    for loss in (DecoupledKD(), NormalisedKD(), UniversalSelfKD()):
        z, weak = student.clone().requires_grad_(), teacher.clone().requires_grad_()
        given = {"weak_logits": weak} if isinstance(loss, UniversalSelfKD) else {}
        value = loss(z, teacher, torch.full_like(labels, -100), **given)
        value.backward()
        assert value.item() == 0.0
        assert z.grad is not None and not z.grad.any()
        loss.reduction = "none"
        assert loss(z, teacher, torch.full_like(labels, -100)).shape == (0,)


def test_names_options_and_mistakes() -> None:
    loss = make_loss("dkd", {"beta": 2, "temperature": 1.0})
    assert isinstance(loss, DecoupledKD) and (loss.alpha, loss.beta, loss.temperature, loss.t2) == (1, 2, 1, True)
    assert isinstance(make_loss("nkd", {"gamma": 3.5}), NormalisedKD)
    assert isinstance(make_loss("uskd"), UniversalSelfKD)
    for wrong in (-1.0, math.nan, INF):
        with pytest.raises(UsageError, match="alpha is"):
            DecoupledKD(alpha=wrong)
    with pytest.raises(UsageError, match="temperature is 0"):
        NormalisedKD(temperature=0)
    with pytest.raises(UsageError, match="DecoupledKD needs labels"):
        DecoupledKD()(torch.zeros(1, 4), torch.zeros(1, 4))
    with pytest.raises(UsageError, match="NormalisedKD needs the teacher's logits"):
        NormalisedKD()(torch.zeros(1, 4), None, torch.zeros(1, dtype=torch.int64))
