"""Universal logit distillation against the best matching of classes, transport on a line, and autograd."""

from __future__ import annotations

import itertools
import math

import ot
import pytest
import torch

from compress.errors import UsageError
from compress.losses import KL, UniversalLogit, make_loss


def sample(rows: int, student: int, teacher: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (
        2 * torch.randn(rows, student, generator=generator, dtype=torch.float64),
        2 * torch.randn(rows, teacher, generator=generator, dtype=torch.float64),
    )


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_value_is_the_least_distance_over_all_matchings_of_the_classes(temperature: float) -> None:
    student, teacher = sample(4, 5, 6)
    q = torch.cat([(student / temperature).softmax(-1), torch.zeros(4, 1, dtype=torch.float64)], -1)
    p = (teacher / temperature).softmax(-1)
    matchings = torch.tensor(list(itertools.permutations(range(6))))
    want = (q[:, None] - p[:, matchings]).abs().sum(-1).amin(-1)
    assert torch.allclose(UniversalLogit(temperature, reduction="none")(student, teacher), want, rtol=1e-14)


@pytest.mark.parametrize(("narrow", "wide"), [(300, 300), (250, 300)])
def test_value_is_the_transport_between_the_probabilities_on_a_line(narrow: int, wide: int) -> None:
    student, teacher = sample(3, narrow, wide)
    for got, z_s, z_t in zip(UniversalLogit(reduction="none")(student, teacher), student, teacher, strict=True):
        q = torch.cat([z_s.softmax(-1), torch.zeros(wide - narrow, dtype=torch.float64)])
        assert got.item() == pytest.approx(wide * ot.emd2_1d(q.numpy(), z_t.softmax(-1).numpy(), metric="cityblock"))


def test_a_permuted_vocabulary_costs_nothing() -> None:
    student, _ = sample(6, 1000, 1)
    student = student.float().requires_grad_()
    teacher = student.detach()[:, torch.randperm(1000)]
    loss = UniversalLogit()(student, teacher)
    loss.backward()
    assert loss.item() == 0.0
    assert student.grad is not None
    assert not student.grad.any()
    assert KL()(student, teacher) > 1


def test_neither_order_of_the_classes_nor_further_padding_matters() -> None:
    student, teacher = sample(6, 20, 31)
    loss = UniversalLogit(reduction="none")
    value = loss(student, teacher)
    padding = torch.full((6, 15), -math.inf, dtype=torch.float64)
    assert torch.equal(loss(student.flip(-1), teacher[:, torch.randperm(31)]), value)
    assert torch.allclose(loss(torch.cat([student, padding], -1), teacher), value, rtol=1e-14)
    assert torch.allclose(loss(teacher, student), value, rtol=1e-14)
    assert torch.equal(UniversalLogit(reduction="none", vocabulary="common")(student, teacher), value)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize(("narrow", "wide"), [(7, 7), (7, 9), (9, 7)])
def test_gradcheck_with_mask_and_weights(temperature: float, narrow: int, wide: int) -> None:
    student, teacher = (each.view(2, 4, -1) for each in sample(8, narrow, wide, seed=1))
    student.requires_grad_()
    labels = torch.zeros(2, 4, dtype=torch.int64)
    labels[0, :2] = -100
    weights = torch.rand(2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    weights[1, 3] = 0
    for reduction in ("mean", "sum", "none"):
        loss = UniversalLogit(temperature, reduction=reduction)
        assert torch.autograd.gradcheck(lambda z, loss=loss: loss(z, teacher, labels, weights), (student,))


def test_positions_that_do_not_count_change_nothing() -> None:
    student, teacher = sample(5, 6, 8)
    weights = torch.tensor([0.5, 0.0, 2.0, 1.0, 3.0], dtype=torch.float64)
    labels = torch.tensor([1, 1, -100, 1, 1])
    each = [UniversalLogit()(student[i], teacher[i]).item() for i in (0, 3, 4)]
    got = UniversalLogit()(student, teacher, labels, weights)
    assert got.item() == pytest.approx((0.5 * each[0] + each[1] + 3 * each[2]) / 4.5, rel=1e-14)


def test_extreme_logits() -> None:
    inf = math.inf
    teacher = torch.tensor([[1e4, -1e4, 0], [0, 0, -inf], [0, 0, 0], [1e4, 0, 0]])
    student = torch.tensor([[-1e4, 1e4, 0], [1, -inf, 0], [1e4, -1e4, 0], [0, 0, -inf]], requires_grad=True)
    values = UniversalLogit(reduction="none")(student, teacher)
    values.sum().backward()
    want = [0.0, 2 * (1 / (1 + math.exp(-1)) - 0.5), 4 / 3, 1.0]
    assert values.tolist() == pytest.approx(want, rel=1e-6)
    assert student.grad is not None
    assert torch.isfinite(student.grad).all()


def test_float32_against_float64() -> None:
    generator = torch.Generator().manual_seed(3)
    teacher = 3 * torch.randn(8, 40_000, generator=generator)
    student = teacher + 1e-3 * torch.randn(8, 40_000, generator=generator)
    loss = UniversalLogit(reduction="none")
    exact = loss(student.double(), teacher.double())
    assert exact.max() < 1e-3  # of two that sum to one: the absolute error is that of the distributions
    assert (loss(student, teacher) - exact).abs().max() < 2e-7


def test_no_position_counts_gives_a_connected_zero() -> None:
    student = torch.randn(3, 5, requires_grad=True)
    loss = UniversalLogit()(student, torch.randn(3, 8), torch.full((3,), -100))
    loss.backward()
    assert loss.item() == 0.0
    assert student.grad is not None
    assert not student.grad.any()


def test_by_name_and_mistakes() -> None:
    assert isinstance(make_loss("uld", {"temperature": 2.0}), UniversalLogit)
    with pytest.raises(UsageError, match="temperature is 0"):
        UniversalLogit(0)
    with pytest.raises(UsageError, match="needs the teacher's logits"):
        UniversalLogit()(torch.zeros(1, 3))
    with pytest.raises(UsageError, match=r"logits are \(1, 4\), the teacher's \(2, 4\)"):
        UniversalLogit()(torch.zeros(1, 3), torch.zeros(2, 4))
