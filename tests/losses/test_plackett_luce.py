"""Plackett-Luce distillation against its definition, the losses that it contains, and autograd."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from compress.errors import UsageError
from compress.losses import PlackettLuce, make_loss
from compress.losses.plackett_luce import ranked_loss, top_ranks


def ranking(teacher: list[float], label: int) -> list[int]:
    """The label, then the other classes by descending logit of the teacher."""
    return [label, *sorted((v for v in range(len(teacher)) if v != label), key=lambda v: (-teacher[v], v))]


def definition(
    student: torch.Tensor, teacher: torch.Tensor, labels: torch.Tensor, tau: float = 1.0, top_k: int | None = None
) -> list[float]:
    """The sum over the ranks, each with its own sum over those that are left, in Python's floats."""
    values = []
    for s, t, label in zip(student.tolist(), teacher.tolist(), labels.tolist(), strict=True):
        order = ranking(t, label)
        ranked = len(s) if top_k is None else top_k
        norm = math.fsum(math.exp(x / tau) for x in t)
        value = 0.0
        for rank, chosen in enumerate(order):
            left = order[min(rank, ranked) :]
            z = math.fsum(math.exp(s[other]) for other in left)
            value += math.exp(t[chosen] / tau) / norm * (math.log(z) - s[chosen])
        values.append(value)
    return values


def sample(rows: int, classes: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    student, teacher = 2 * torch.randn(2, rows, classes, generator=generator, dtype=torch.float64)
    return student, teacher, torch.randint(0, classes, (rows,), generator=generator)


@pytest.mark.parametrize("tau", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("top_k", [None, 1, 4, 16, 17, 40])
def test_value_is_the_definition(tau: float, top_k: int | None) -> None:
    student, teacher, labels = sample(20, 17)
    got = PlackettLuce(tau, top_k, reduction="none")(student, teacher, labels)
    want = definition(student, teacher, labels, tau, top_k)
    assert got.tolist() == pytest.approx(want, rel=1e-13)


def test_gradient_is_that_of_autograd_through_the_definition() -> None:
    student, teacher, labels = sample(6, 23, seed=1)
    student.requires_grad_()
    order = torch.tensor([ranking(t, y) for t, y in zip(teacher.tolist(), labels.tolist(), strict=True)])
    s = student.gather(1, order)
    alpha = teacher.softmax(-1).gather(1, order)
    value = sum(alpha[:, k] * (s[:, k:].logsumexp(-1) - s[:, k]) for k in range(23))
    (want,) = torch.autograd.grad(value.sum(), student)
    (got,) = torch.autograd.grad(PlackettLuce(reduction="sum")(student, teacher, labels), student)
    assert torch.allclose(got, want, rtol=0, atol=1e-15)
    assert got.sum(-1).abs().max() < 1e-15


@pytest.mark.parametrize("top_k", [None, 1, 3])
@pytest.mark.parametrize("tau", [1.0, 2.5])
def test_gradcheck_with_mask_and_weights(tau: float, top_k: int | None) -> None:
    generator = torch.Generator().manual_seed(2)
    student = torch.randn(2, 4, 7, generator=generator, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(2, 4, 7, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 7, (2, 4), generator=generator)
    labels[0, :2] = -100
    weights = torch.rand(2, 4, generator=generator, dtype=torch.float64)
    weights[1, 3] = 0
    for reduction in ("mean", "sum", "none"):
        loss = PlackettLuce(tau, top_k, reduction=reduction)
        assert torch.autograd.gradcheck(lambda z, loss=loss: loss(z, teacher, labels, weights), (student,))


def test_positions_that_do_not_count_change_nothing() -> None:
    student, teacher, labels = sample(8, 11)
    labels[2:5] = -100
    weights = torch.rand(8, dtype=torch.float64)
    weights[7] = 0
    keep = [0, 1, 5, 6]
    values = torch.tensor(definition(student[keep], teacher[keep], labels[keep]), dtype=torch.float64)
    got = PlackettLuce()(student, teacher, labels, weights)
    assert torch.allclose(got, (values * weights[keep]).sum() / weights[keep].sum(), rtol=1e-14)


def test_all_weight_on_the_first_rank_is_cross_entropy() -> None:
    student, _, _ = sample(9, 13)
    first = torch.full_like(student, -math.inf)
    first[:, 0] = 0
    values, gradient = ranked_loss(student, first)
    assert torch.allclose(values, -student.log_softmax(-1)[:, 0], rtol=1e-14)
    assert torch.allclose(gradient, student.softmax(-1) - first.exp(), atol=1e-15)


def test_equal_weights_are_list_mle_and_falling_ones_its_position_aware_form() -> None:
    student, _, _ = sample(5, 9)
    for weights in (torch.ones(9), 2.0 ** torch.arange(8, -1, -1) - 1):
        values, _ = ranked_loss(student, weights.double().log().expand(5, 9))
        want = torch.zeros(5, dtype=torch.float64)
        for rank in range(9):  # the likelihood of choosing `rank` among those that are left
            want -= weights[rank] * student[:, rank:].softmax(-1)[:, 0].log()
        assert torch.allclose(values, want, rtol=1e-14)


def test_a_student_without_preferences_pays_the_logarithm_of_what_is_left() -> None:
    teacher = torch.tensor([[3.0, 1.0, 2.0]], dtype=torch.float64)
    alpha = teacher.softmax(-1)[0]
    got = PlackettLuce()(torch.zeros(1, 3, dtype=torch.float64), teacher, torch.tensor([2]))
    assert got.item() == pytest.approx((alpha[2] * math.log(3) + alpha[0] * math.log(2)).item(), rel=1e-15)


def test_equal_logits_of_the_teacher_rank_the_lower_class_first() -> None:
    teacher = torch.tensor([[1.0, 2.0, 1.0, 2.0, 1.0, 2.0]])
    keys = teacher.scatter(1, torch.tensor([[4]]), math.inf)
    assert top_ranks(keys, 6).tolist() == [[4, 1, 3, 5, 0, 2]]
    assert keys.argsort(dim=-1, descending=True, stable=True).tolist() == [[4, 1, 3, 5, 0, 2]]
    student = torch.randn(1, 6, dtype=torch.float64)
    for top_k in (None, 5):
        got = PlackettLuce(top_k=top_k)(student, teacher.double(), torch.tensor([4]))
        assert got.item() == pytest.approx(definition(student, teacher, torch.tensor([4]))[0], rel=1e-13)


def test_top_k_falls_to_the_full_loss_and_starts_from_soft_cross_entropy() -> None:
    student, teacher, labels = sample(16, 30, seed=3)
    full = PlackettLuce(reduction="none")(student, teacher, labels)
    values = torch.stack([PlackettLuce(top_k=k, reduction="none")(student, teacher, labels) for k in range(1, 30)])
    assert (values.diff(dim=0) <= 1e-15).all()
    assert torch.allclose(values[-1], full, rtol=1e-14)
    soft = -(teacher.softmax(-1) * student.log_softmax(-1)).sum(-1)
    assert (values[0] < soft).all()
    # One rank: the label against all, and the others by a cross-entropy among themselves.
    others = torch.ones_like(student, dtype=torch.bool).scatter_(1, labels[:, None], False)
    p, q = teacher.softmax(-1), student.masked_fill(~others, -math.inf).log_softmax(-1).masked_fill(~others, 0)
    first = p.gather(1, labels[:, None])[:, 0] * F.cross_entropy(student, labels, reduction="none")
    assert torch.allclose(values[0], first - (p * q).sum(-1), rtol=1e-14)


@pytest.mark.parametrize("top_k", [None, 2, 5])
def test_a_teacher_tempered_to_certainty_leaves_cross_entropy(top_k: int | None) -> None:
    student, teacher, _ = sample(6, 8)
    labels = teacher.argmax(-1)
    got = PlackettLuce(1e-4, top_k)(student, teacher, labels)
    assert torch.allclose(got, F.cross_entropy(student, labels), rtol=1e-14)


@pytest.mark.parametrize("top_k", [None, 1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_logits(top_k: int | None, dtype: torch.dtype) -> None:
    inf = math.inf
    teacher = torch.tensor([[1e4, -1e4, 0, 0], [0, 1, -inf, -inf], [1e4, 0, 0, 0], [3, 2, 1, -inf]], dtype=dtype)
    student = torch.tensor([[-1e4, 1e4, 0, 0], [1, 0, -inf, -inf], [1e4, 0, 0, 0], [-inf, 2, 1, 0]], dtype=dtype)
    student.requires_grad_()
    labels = torch.tensor([1, 0, 0, 1])
    values = PlackettLuce(top_k=top_k, reduction="none")(student, teacher, labels)
    values.sum().backward()
    # The label costs nothing and has no weight; the teacher's choice, of weight 1, is the last of the three others.
    assert values[0].item() == pytest.approx(1e4 + math.log(2), rel=1e-6)
    # The third class on cannot be chosen: two are ranked.
    assert values[1].item() == pytest.approx(math.log(1 + math.e**-1) / (1 + math.e), rel=1e-5)
    assert values[2].item() == 0.0
    # The teacher's first class, which the student leaves out, is to be chosen before another one.
    assert values[3].item() == inf
    assert student.grad is not None
    assert torch.isfinite(student.grad).all()


@pytest.mark.parametrize("top_k", [None, 1, 2, 3])
def test_what_only_the_student_leaves_out_is_free_at_the_end_and_infinite_before(top_k: int | None) -> None:
    teacher = torch.tensor([[3.0, 2.0, 1.0, 0.0]], dtype=torch.float64)
    for end, student in enumerate(([1.0, 0.5, -math.inf, -math.inf], [1.0, -math.inf, 0.5, -math.inf])):
        logits = torch.tensor([student], dtype=torch.float64, requires_grad=True)
        value = PlackettLuce(top_k=top_k)(logits, teacher, torch.tensor([0]))
        (gradient,) = torch.autograd.grad(value, logits)
        assert torch.isfinite(gradient).all()
        if end == 0 and top_k != 1:  # with one rank the last two are to be chosen beside the second
            first = teacher.softmax(-1)[0, 0].item()
            assert value.item() == pytest.approx(first * math.log1p(math.exp(-0.5)), rel=1e-14)
        else:
            assert value.item() == math.inf


def test_a_label_that_the_teacher_leaves_out_has_no_weight() -> None:
    teacher = torch.tensor([[0.0, 1.0, -math.inf]], dtype=torch.float64)
    student = torch.tensor([[0.5, 0.0, 0.3]], dtype=torch.float64)
    want = math.log(math.exp(0.5) + 1) * torch.tensor(1.0).sigmoid().item()
    assert PlackettLuce()(student, teacher, torch.tensor([2])).item() == pytest.approx(want, rel=1e-7)


@pytest.mark.parametrize("top_k", [None, 64])
def test_float32_against_float64_with_a_large_vocabulary(top_k: int | None) -> None:
    generator = torch.Generator().manual_seed(4)
    teacher = 3 * torch.randn(4, 131_072, generator=generator)
    student = (teacher + torch.randn(4, 131_072, generator=generator)).requires_grad_()
    labels = torch.randint(0, 131_072, (4,), generator=generator)
    loss = PlackettLuce(top_k=top_k, reduction="none")
    values, exact = loss(student, teacher, labels), loss(student.double(), teacher.double(), labels)
    (got,) = torch.autograd.grad(values.sum(), student, retain_graph=True)
    (want,) = torch.autograd.grad(exact.sum(), student)
    assert torch.allclose(values.double(), exact, rtol=5e-7, atol=0)
    assert (got - want).norm() < 5e-7 * want.norm()
    halves = loss(student.detach().bfloat16(), teacher.bfloat16(), labels)
    assert halves.dtype == torch.float32
    assert torch.equal(halves, loss(student.detach().bfloat16().float(), teacher.bfloat16().float(), labels))


def test_adding_a_constant_changes_nothing_and_the_loss_is_convex() -> None:
    student, teacher, labels = sample(12, 10)
    other = student + torch.randn(12, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    for top_k in (None, 3):
        loss = PlackettLuce(top_k=top_k, reduction="none")
        at, there = loss(student, teacher, labels), loss(other, teacher, labels)
        assert torch.allclose(loss(student + 7, teacher, labels), at, rtol=1e-13)
        assert (loss((student + other) / 2, teacher, labels) < (at + there) / 2).all()


def test_no_position_counts_gives_a_connected_zero() -> None:
    student = torch.randn(3, 5, requires_grad=True)
    loss = PlackettLuce()(student, torch.randn(3, 5), torch.full((3,), -100))
    loss.backward()
    assert loss.item() == 0.0
    assert student.grad is not None
    assert not student.grad.any()
    assert PlackettLuce(reduction="none")(student[:0], student[:0], torch.zeros(0, dtype=torch.int64)).shape == (0,)


def test_by_name_and_mistakes() -> None:
    loss = make_loss("plackett_luce", {"teacher_temperature": 4.0, "top_k": 64})
    assert isinstance(loss, PlackettLuce)
    assert (loss.teacher_temperature, loss.top_k) == (4.0, 64)
    with pytest.raises(UsageError, match="top_k is 0"):
        PlackettLuce(top_k=0)
    with pytest.raises(UsageError, match="teacher_temperature is -1"):
        PlackettLuce(-1)
    with pytest.raises(UsageError, match="needs labels"):
        PlackettLuce()(torch.zeros(1, 3), torch.zeros(1, 3))
    with pytest.raises(UsageError, match="A label is 3"):
        PlackettLuce()(torch.zeros(1, 3), torch.zeros(1, 3), torch.tensor([3]))
