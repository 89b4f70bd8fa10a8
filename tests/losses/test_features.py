"""Norm and direction against the sum written out position by position, and its geometry."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from compress.errors import UsageError
from compress.losses import (
    ClassMeans,
    Needs,
    NormDirection,
    Outputs,
    Setting,
    class_means,
    loss_class,
    loss_options,
    make_loss,
)

CLASSES, STUDENT, TEACHER = 5, 6, 4


def definition(student: Tensor, teacher: Tensor, labels: Tensor, means: Tensor, weights: Tensor) -> Tensor:
    """Position by position, in float64: sum of w (1 - <s, e_c> / max(|s|, |t|)) over the sum of w."""
    total, weight_sum = torch.zeros((), dtype=torch.float64), 0.0
    for s, t, label, weight in zip(student.double(), teacher.double(), labels.tolist(), weights.tolist(), strict=True):
        if label != -100 and weight != 0:
            direction = means[label].double() / means[label].double().norm()
            total = total + weight * (1 - torch.dot(s, direction) / max(s.norm(), t.norm()))
            weight_sum += weight
    return total / weight_sum


def batch(student_width: int = STUDENT, dtype: torch.dtype = torch.float64, count: int = 24) -> tuple[Tensor, ...]:
    """Student (half of it longer than the teacher), teacher, labels with -100, weights with 0, class means."""
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(count, student_width, generator=generator, dtype=dtype)
    student[::2] *= 10
    teacher = torch.randn(count, TEACHER, generator=generator, dtype=dtype)
    labels = torch.randint(0, CLASSES, (count,), generator=generator)
    labels[:3] = -100
    weights = torch.rand(count, generator=generator, dtype=dtype)
    weights[5] = 0
    return student, teacher, labels, weights, torch.randn(CLASSES, TEACHER, generator=generator, dtype=dtype)


@pytest.mark.parametrize("width", [STUDENT, TEACHER])
def test_value_is_the_definition(width: int) -> None:
    student, teacher, labels, weights, means = batch(width)
    loss = NormDirection(CLASSES, width, TEACHER).double().fix(means)
    projected = student if loss.weight is None else student @ loss.weight.T + loss.bias
    want = definition(projected, teacher, labels, means, weights)
    assert torch.allclose(loss(student, teacher, labels, weights), want, rtol=1e-14)
    shaped = [each.reshape(4, 6, *each.shape[1:]) for each in (student, teacher, labels, weights)]
    assert torch.allclose(loss(*shaped), want, rtol=1e-14)
    single = NormDirection(CLASSES, width, TEACHER).fix(means.float())
    got = single(student.float(), teacher.float(), labels, weights.float())
    assert got.dtype == torch.float32
    assert torch.allclose(got.double(), want, rtol=1e-6)


def test_no_projection_where_the_widths_are_equal() -> None:
    assert not list(NormDirection(CLASSES, TEACHER, TEACHER).parameters())
    shapes = [tuple(each.shape) for each in NormDirection(CLASSES, STUDENT, TEACHER).parameters()]
    assert shapes == [(TEACHER, STUDENT), (TEACHER,)]


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("width", [STUDENT, TEACHER])
def test_gradcheck(reduction: str, width: int) -> None:
    student, teacher, labels, weights, means = batch(width)
    loss = NormDirection(CLASSES, width, TEACHER, reduction=reduction).double().fix(means)  # type: ignore[arg-type]
    leaves = (student.requires_grad_(), *loss.parameters())
    assert torch.autograd.gradcheck(lambda z, *_: loss(z, teacher, labels, weights), leaves)


def test_a_given_denominator_makes_micro_batches_add_up() -> None:
    student, teacher, labels, weights, means = batch()
    loss = NormDirection(CLASSES, STUDENT, TEACHER).double().fix(means)
    whole = loss(student, teacher, labels, weights)
    denominator = (weights * (labels != -100)).sum()
    halves = [
        loss(student[part], teacher[part], labels[part], weights[part], denominator)
        for part in (slice(0, 7), slice(7, 24))
    ]
    assert torch.allclose(whole, sum(halves), rtol=1e-14)


def test_geometry() -> None:
    """Along the mean and longer than the teacher: 0, at any length. Orthogonal: 1. Opposite: 2. Shorter: must grow."""
    loss = NormDirection(2, 3, 3, reduction="none").fix(torch.tensor([[0.0, 0.0, 5.0], [0.0, 2.0, 0.0]]))
    student = torch.tensor([[0.0, 0, 3], [0, 0, 30], [3, 0, 0], [0, 0, -3], [0, 0, 1]], requires_grad=True)
    teacher = torch.tensor([2.0, 0, 0]).expand(5, 3)
    values = loss(student, teacher, torch.zeros(5, dtype=torch.int64))
    assert values.tolist() == [0.0, 0.0, 1.0, 2.0, 0.5]
    values.sum().backward()
    assert student.grad is not None
    assert torch.equal(student.grad[4], torch.tensor([0.0, 0.0, -0.5]))  # -e_c / |f_t|
    assert torch.equal((student.grad * student).sum(-1)[:4], torch.zeros(4))  # longer: only the direction counts


def test_the_teacher_has_no_gradient() -> None:
    student, teacher, labels, weights, means = batch()
    loss = NormDirection(CLASSES, STUDENT, TEACHER).double().fix(means)
    assert teacher.requires_grad_().requires_grad
    loss(student.requires_grad_(), teacher, labels, weights).backward()
    assert teacher.grad is None


def test_class_means_are_those_of_all_batches() -> None:
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(40_000, 3, generator=generator) + 100
    labels = torch.randint(0, 4, (40_000,), generator=generator)
    labels[labels == 2] = -100
    want = torch.stack(
        [features[labels == c].double().mean(0) if c != 2 else torch.zeros(3).double() for c in range(4)]
    )
    found = class_means(features, labels, 4)
    assert torch.allclose(found.double(), want, rtol=1e-6)
    assert not found[2].any()
    assert torch.allclose(class_means(features.double(), labels, 4), want, rtol=1e-13)
    streamed = ClassMeans(4, 3)
    for start in range(0, 40_000, 1111):
        streamed.update(features[start : start + 1111], labels[start : start + 1111])
    assert torch.allclose(streamed.means.double(), want, rtol=1e-6)
    assert streamed.counts.tolist() == [int((labels == c).sum()) for c in range(4)]


def test_running_means_are_followed_in_training_only() -> None:
    student, teacher, labels, weights, _ = batch()
    loss = NormDirection(CLASSES, STUDENT, TEACHER).double()
    first = loss(student, teacher, labels, weights)
    counted = (labels != -100) & (weights != 0)
    means = class_means(teacher[counted], labels[counted], CLASSES)
    assert torch.allclose(loss.running.means, means)
    fixed = NormDirection(CLASSES, STUDENT, TEACHER).double().fix(means)
    assert torch.allclose(first, fixed(student, teacher, labels, weights))

    before = {name: tensor.clone() for name, tensor in loss.state_dict().items()}
    loss.eval()(student, 2 * teacher, labels, weights)
    assert all(torch.equal(before[name], tensor) for name, tensor in loss.state_dict().items())
    other = NormDirection(CLASSES, STUDENT, TEACHER, seed=1).double()
    other.load_state_dict(before)
    assert torch.equal(other(student, teacher, labels), loss.train()(student, teacher, labels))
    fixed(student, 2 * teacher, labels, weights)
    assert torch.equal(fixed.running.means, means)
    reloaded = NormDirection(CLASSES, STUDENT, TEACHER).double()
    reloaded.load_state_dict(fixed.state_dict())
    reloaded(student, 2 * teacher, labels, weights)
    assert torch.equal(reloaded.running.means, means)


def test_what_has_no_direction_is_left_out() -> None:
    """A class without a mean, and a position whose features are both zero; not a zero feature of the student alone."""
    means = torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    student = torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.0, 0.0], [0.0, 0.0]], requires_grad=True)
    teacher = torch.tensor([[0.5, 0.0], [1.0, 0.0], [0.0, 0.0], [0.0, 0.5]])
    labels = torch.tensor([0, 1, 0, 0])
    assert NormDirection(2, 2, 2, reduction="none").fix(means)(student, teacher, labels).tolist() == [1.0, 1.0]
    loss = NormDirection(2, 2, 2).fix(means)
    value = loss(student, teacher, labels)
    assert value == 1.0
    assert loss(student, teacher, labels, denominator=4) == 0.5
    value.backward()
    assert student.grad is not None
    assert torch.equal(student.grad, torch.tensor([[-0.5, 0.0], [0.0, 0.0], [0.0, 0.0], [-1.0, 0.0]]))
    assert NormDirection(2, 2, 2).eval()(student, teacher, labels) == 0.0  # nothing seen yet


def test_no_position_counts_gives_a_connected_zero() -> None:
    loss = NormDirection(CLASSES, STUDENT, TEACHER)
    student = torch.randn(3, STUDENT, requires_grad=True)
    value = loss(student, torch.randn(3, TEACHER), torch.full((3,), -100))
    value.backward()
    assert value == 0.0
    for leaf in (student, loss.weight, loss.bias):
        assert leaf is not None
        assert leaf.grad is not None
        assert not leaf.grad.any()
    assert loss(student[:0], torch.randn(0, TEACHER), torch.zeros(0, dtype=torch.int64)) == 0.0


@pytest.mark.parametrize("scale", [1e-18, 1e-4, 1e4, 1e18])
def test_extreme_features(scale: float) -> None:
    student, teacher, labels, _, means = batch(dtype=torch.float32)
    loss = NormDirection(CLASSES, STUDENT, TEACHER, reduction="none").fix(scale * means)
    value = loss((scale * student).requires_grad_(), teacher * scale, labels)
    value.sum().backward()
    assert loss.weight is not None
    assert loss.weight.grad is not None
    assert torch.isfinite(loss.weight.grad).all()
    assert ((value >= 0) & (value <= 2)).all()


def test_bfloat16_is_computed_in_float32() -> None:
    student, teacher, labels, _, means = batch(dtype=torch.bfloat16)
    loss = NormDirection(CLASSES, STUDENT, TEACHER).fix(means)
    got = loss(student, teacher, labels)
    assert got.dtype == torch.float32
    wide = loss.double()(student.double(), teacher.double(), labels)
    assert torch.allclose(got.double(), wide, rtol=1e-6)


def test_construction_is_deterministic_and_leaves_the_global_state_alone() -> None:
    state = torch.get_rng_state()
    first, again, other = (NormDirection(CLASSES, STUDENT, TEACHER, seed=seed).weight for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert first is not None
    assert again is not None
    assert other is not None
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first.abs().max() <= STUDENT**-0.5


def test_a_trainer_makes_and_calls_it() -> None:
    assert loss_options("nd") == {"layer": -1, "teacher_layer": -1, "seed": 0}
    assert loss_class("nd").needs == Needs.TEACHER | Needs.LABELS | Needs.FEATURES
    setting = Setting(classes=CLASSES, student_width=STUDENT, teacher_width=TEACHER)
    loss = make_loss("nd", {"layer": 1, "teacher_layer": -2}, setting)
    student, teacher, labels, weights, _ = batch(dtype=torch.float32)
    outputs = Outputs(
        logits=torch.zeros(24, CLASSES),
        labels=labels,
        weights=weights,
        features=(torch.zeros_like(student), student),
        teacher_features=(torch.zeros_like(teacher), teacher, torch.zeros_like(teacher)),
    )
    want = NormDirection(CLASSES, STUDENT, TEACHER)(student, teacher, labels, weights, denominator=10)
    assert torch.equal(loss.of(outputs, 10), want)
    with pytest.raises(UsageError, match="There is no layer 2: the student gives 2 hidden states"):
        make_loss("nd", {"layer": 2}, setting).of(outputs)


def test_mistakes_are_named() -> None:
    loss = NormDirection(CLASSES, STUDENT, TEACHER)
    student, teacher, labels, _, _ = batch(dtype=torch.float32)
    with pytest.raises(UsageError, match=r"width of 4, the teacher's of 6.*made for 6 and 4"):
        loss(teacher, student, labels)
    with pytest.raises(UsageError, match=r"teacher's features have positions \(23,\), the student's features \(24,\)"):
        loss(student, teacher[1:], labels)
    with pytest.raises(UsageError, match=r"weights have positions \(2,\)"):
        loss(student, teacher, labels, torch.ones(2))
    with pytest.raises(UsageError, match="A label is 5; there are 5 classes"):
        loss(student, teacher, torch.full_like(labels, 5))
    with pytest.raises(UsageError, match=r"The class means are \(5, 6\).*Give a tensor of shape \(5, 4\)"):
        loss.fix(torch.zeros(CLASSES, STUDENT))
    with pytest.raises(UsageError, match="a teacher's of 0"):
        NormDirection(CLASSES, STUDENT, 0)
