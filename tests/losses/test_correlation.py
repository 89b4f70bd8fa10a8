"""DIST against numpy's correlation coefficients, the released formula, and the invariances of a correlation."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from compress.errors import UsageError
from compress.losses import Dist, loss_options, make_loss

INF = math.inf


def pair(rows: int, classes: int, seed: int = 0, scale: float = 2.0, distance: float = 1.0) -> tuple[Tensor, Tensor]:
    """Logits of student and teacher [rows, classes] in float64."""
    generator = torch.Generator().manual_seed(seed)
    teacher = scale * torch.randn(rows, classes, generator=generator, dtype=torch.float64)
    return teacher + distance * torch.randn(rows, classes, generator=generator, dtype=torch.float64), teacher


def parts(student: Tensor, teacher: Tensor, temperature: float) -> tuple[Tensor, float]:
    """inter [N] and intra, line by line."""
    q, p = ((z.double() / temperature).softmax(-1).numpy() for z in (student, teacher))
    inter = [1 - np.corrcoef(a, b)[0, 1] for a, b in zip(q, p, strict=True)]
    intra = [1 - np.corrcoef(a, b)[0, 1] for a, b in zip(q.T, p.T, strict=True)]
    return torch.tensor(np.array(inter)), float(np.mean(intra))


def released(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """The released formula with beta = gamma = 1: cosines of centred vectors, 1e-8 added to the product of lengths."""

    def relation(x: Tensor, y: Tensor) -> Tensor:
        x, y = x - x.mean(1, keepdim=True), y - y.mean(1, keepdim=True)
        return 1 - ((x * y).sum(1) / (x.norm(dim=1) * y.norm(dim=1) + 1e-8)).mean()

    q, p = (student / temperature).softmax(1), (teacher / temperature).softmax(1)
    return temperature**2 * (relation(q, p) + relation(q.T, p.T))


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_both_parts_are_those_of_numpy(temperature: float) -> None:
    student, teacher = pair(600, 1000)  # several chunks in both directions
    inter, intra = parts(student, teacher, temperature)
    got = Dist(1.0, 0.0, temperature, t2=False, reduction="none")(student, teacher)
    torch.testing.assert_close(got, inter, rtol=1e-9, atol=1e-14)
    got = Dist(0.0, 1.0, temperature, t2=False, reduction="none")(student, teacher)
    torch.testing.assert_close(got, torch.full((600,), intra, dtype=torch.float64), rtol=1e-9, atol=0)
    got = Dist(3.0, 0.5, temperature)(student, teacher)
    torch.testing.assert_close(got, temperature**2 * (3.0 * inter.mean() + 0.5 * intra), rtol=1e-9, atol=0)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_eps_is_that_of_the_released_code(temperature: float) -> None:
    student, teacher = pair(32, 200, seed=1, scale=6.0)
    student.requires_grad_()
    got = Dist(1.0, 1.0, temperature, eps=1e-8)(student, teacher)
    want = released(student, teacher, temperature)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=0)
    gradients = [torch.autograd.grad(value, student)[0] for value in (got, want)]
    torch.testing.assert_close(*gradients, rtol=1e-7, atol=1e-14)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("options", [{}, {"beta": 0.0, "temperature": 0.7, "t2": False}, {"gamma": 0.0, "eps": 0.1}])
def test_gradcheck_with_mask_and_weights(options: dict[str, float], reduction: str) -> None:
    student, teacher = (z.view(2, 5, 7) for z in pair(10, 7, seed=2))
    labels = torch.zeros(2, 5, dtype=torch.int64)
    labels[0, :2] = -100
    weights = torch.rand(2, 5, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    weights[1, 4] = 0
    loss = Dist(**options, reduction=reduction)
    assert torch.autograd.gradcheck(lambda z: loss(z, teacher, labels, weights), (student.clone().requires_grad_(),))


def test_masks_and_weights() -> None:
    student, teacher = pair(8, 5, seed=4)
    labels = torch.zeros(8, dtype=torch.int64)
    labels[3] = -100
    weights = torch.tensor([1.0, 2.0, 0.0, 1.0, 0.5, 1.0, 1.0, 1.0], dtype=torch.float64)
    keep = torch.tensor([0, 1, 4, 5, 6, 7])
    inter, intra = parts(student[keep], teacher[keep], 4.0)
    want = 16 * 2 * ((weights[keep] * inter).sum() / weights[keep].sum() + intra)
    torch.testing.assert_close(Dist()(student, teacher, labels, weights), want, rtol=1e-10, atol=0)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(5))
    permuted = Dist()(student[order], teacher[order], labels[order], weights[order])
    torch.testing.assert_close(permuted, want, rtol=1e-10, atol=0)


def test_only_the_relations_count() -> None:
    _, teacher = pair(32, 10, seed=6)
    p = teacher.softmax(-1)
    student = (0.3 * p + 0.07).log()  # another distribution, affine in p
    assert (student.softmax(-1) - p).abs().max() > 0.5
    assert abs(Dist(temperature=1.0)(student, teacher).item()) < 1e-14
    assert Dist(temperature=1.0)(-teacher, teacher).item() > 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_student_equal_to_the_teacher_is_at_the_minimum(dtype: torch.dtype) -> None:
    _, teacher = pair(64, 300, seed=7)
    teacher[:, 100:] -= 8  # two thirds of the classes are rare
    teacher = teacher.to(dtype)
    student = teacher.clone().requires_grad_()
    values = [Dist(0.0, 1.0, 1.0, eps)(student, teacher) for eps in (0.0, 1e-8)]
    exact, damped = (torch.autograd.grad(value, student)[0] for value in values)
    assert values[0].item() == 0 and not exact.any()
    assert values[1].item() > 0.4 and damped.norm() > 5e-3


@pytest.mark.parametrize(("distance", "bound"), [(1.0, 2e-6), (1e-2, 1e-4), (1e-3, 1e-3)])
def test_float32_keeps_its_digits_between_close_models(distance: float, bound: float) -> None:
    student, teacher = (z.float() for z in pair(64, 2000, seed=8, scale=3.0, distance=distance))
    for beta, gamma in ((1.0, 0.0), (0.0, 1.0)):
        loss = Dist(beta, gamma, 2.0, reduction="none")
        values, truth = loss(student, teacher).double(), loss(student.double(), teacher.double())
        assert (values >= 0).all()
        assert ((values - truth) / truth).abs().max() < bound


def test_classes_of_any_size_correlate() -> None:
    student, teacher = pair(16, 6, seed=9)
    offsets = torch.tensor([0.0, 0.0, 0.0, -30.0, -60.0, -85.0], dtype=torch.float64)  # probabilities down to 1e-38
    student, teacher = student + offsets, teacher + offsets
    _, intra = parts(student, teacher, 1.0)
    loss = Dist(0.0, 1.0, 1.0, reduction="mean")
    assert loss(student, teacher).item() == pytest.approx(intra, rel=1e-9)
    assert loss(student.float(), teacher.float()).item() == pytest.approx(intra, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_constant_lines(dtype: torch.dtype) -> None:
    _, teacher = (z.to(dtype) for z in pair(4, 6, seed=10))
    flat = torch.full_like(teacher, 0.3)
    noise = torch.randint(-1, 2, flat.shape, generator=torch.Generator().manual_seed(1))
    rounded = flat * (1 + torch.finfo(dtype).eps * noise)  # constant but for the last digit
    for student, other, inter, intra in (
        (flat, teacher, 1.0, 1.0),
        (rounded, teacher, 1.0, 1.0),
        (teacher, flat, 1.0, 1.0),
        (flat, flat, 0.0, 0.0),
        (teacher[:1], teacher[:1] + 1, 0.0, 0.0),  # one position: its classes are constant
        (teacher[:1].expand(4, -1), teacher, None, 1.0),
    ):
        z = student.clone().requires_grad_()
        for beta, gamma, want in ((1.0, 0.0, inter), (0.0, 1.0, intra)):
            value = Dist(beta, gamma, 1.0)(z, other)
            (gradient,) = torch.autograd.grad(value, z)
            assert want is None or value.item() == pytest.approx(want, abs=1e-6)
            assert torch.isfinite(gradient).all()
            assert want != 1.0 or not gradient.any()


def test_classes_that_both_leave_out_change_nothing() -> None:
    student, teacher = pair(8, 5, seed=11)
    wide = [F.pad(z, (2, 3), value=-INF) for z in (student, teacher)]
    wide[0].requires_grad_()
    for eps in (0.0, 1e-4):
        got = Dist(eps=eps)(*wide)
        torch.testing.assert_close(got, Dist(eps=eps)(student, teacher), rtol=1e-12, atol=0)
        (gradient,) = torch.autograd.grad(got, wide[0])
        assert torch.isfinite(gradient).all() and not gradient[:, :2].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_logits(dtype: torch.dtype) -> None:
    teacher = torch.tensor([[1e4, -1e4, 0.0], [0.0, 0.5, -INF], [-INF, -INF, 2.0], [0.0, 1.0, 2.0]], dtype=dtype)
    student = torch.tensor([[-1e4, 1e4, 0.0], [1.0, 0.0, -INF], [0.5, 1.0, 2.0], [0.0, -INF, 2.0]], dtype=dtype)
    for temperature in (1.0, 4.0):
        z = student.clone().requires_grad_()
        values = Dist(temperature=temperature, reduction="none")(z, teacher)
        (gradient,) = torch.autograd.grad(values.sum(), z)
        assert torch.isfinite(values).all()
        assert torch.isfinite(gradient).all()


def test_no_position_counts_gives_a_connected_zero() -> None:
    student, teacher = pair(4, 3)
    student.requires_grad_()
    value = Dist()(student, teacher, torch.full((4,), -100))
    value.backward()
    assert value.item() == 0.0
    assert student.grad is not None and not student.grad.any()
    assert Dist(reduction="none")(student, teacher, torch.full((4,), -100)).shape == (0,)


def test_half_precision_is_computed_in_float32() -> None:
    student, teacher = (z.bfloat16() for z in pair(16, 300, seed=12))
    got = Dist(reduction="none")(student, teacher)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, Dist(reduction="none")(student.float(), teacher.float()))


def test_names_options_and_mistakes() -> None:
    assert isinstance(make_loss("dist", {"beta": 1, "temperature": 1.0}), Dist)
    assert loss_options("dist") == {"beta": 2.0, "gamma": 2.0, "temperature": 4.0, "eps": 0.0, "t2": True}
    for options in ({"beta": -1.0}, {"gamma": math.nan}, {"eps": -1e-8}, {"temperature": 0.0}):
        with pytest.raises(UsageError, match=f"{next(iter(options))} is"):
            Dist(**options)
    with pytest.raises(UsageError, match="Dist needs the teacher's logits"):
        Dist()(torch.zeros(1, 4))
