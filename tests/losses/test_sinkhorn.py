"""Sinkhorn distillation against the published loop, two transport libraries, finite differences and autograd."""

from __future__ import annotations

import math
from typing import Any

import geomloss
import ot
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from compress.distillation.objective import Objective, Term, make_term
from compress.errors import UsageError
from compress.losses import KL, Outputs, Sinkhorn, UniversalLogit, make_loss
from compress.losses.pairwise import pairwise_l1
from compress.losses.sinkhorn import evenly_spaced, sinkhorn

CONVERGED: dict[str, Any] = {"iterations": 5000, "tolerance": 1e-12}


def sample(rows: int, classes: int, seed: int = 0, scale: float = 2.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    student, teacher = scale * torch.randn(2, rows, classes, generator=generator, dtype=torch.float64)
    return student.requires_grad_(), teacher


def costs_of(student: Tensor, teacher: Tensor, temperature: float = 2.0) -> Tensor:
    return torch.cdist((student / temperature).softmax(-1), (teacher / temperature).softmax(-1), p=1)


def published(student: Tensor, teacher: Tensor, regularisation: float = 0.1, iterations: int = 20) -> Tensor:
    """Rows and columns of exp(-C / lambda) normalised to 1 by turns; sum of the plan times C."""
    costs = costs_of(student, teacher)
    plan = torch.exp(-costs / regularisation)
    for _ in range(iterations):
        plan = plan / plan.sum(1, keepdim=True)
        plan = plan / plan.sum(0, keepdim=True)
    return (plan * costs).sum()


def gradient(value: Tensor, at: Tensor) -> Tensor:
    return torch.autograd.grad(value, at)[0]


@pytest.mark.parametrize(("rows", "classes"), [(32, 2), (16, 10), (9, 100), (1, 5)])
def test_value_and_gradient_are_the_published_ones(rows: int, classes: int) -> None:
    student, teacher = sample(rows, classes)
    want = published(student, teacher)
    got = Sinkhorn(reduction="sum")(student, teacher)
    assert got.item() == pytest.approx(want.item(), rel=1e-12)
    assert torch.allclose(gradient(got, student), gradient(want, student), rtol=0, atol=1e-12)
    assert Sinkhorn()(student, teacher).item() == pytest.approx(want.item() / rows, rel=1e-12)
    assert Sinkhorn(reduction="none")(student, teacher).shape == (rows,)


@pytest.mark.parametrize("regularisation", [0.1, 0.05])
def test_converged_plan_is_that_of_pot(regularisation: float) -> None:
    student, teacher = sample(16, 10)
    costs = costs_of(student, teacher).detach()
    found = sinkhorn(costs, regularisation, **CONVERGED)
    uniform = torch.full((16,), 1 / 16, dtype=torch.float64)
    want = ot.bregman.sinkhorn_log(uniform, uniform, costs, regularisation, numItermax=5000, stopThr=1e-13)
    assert torch.allclose(found.plan, want, rtol=0, atol=1e-12)
    loss = Sinkhorn(regularisation=regularisation, **CONVERGED)
    assert loss(student, teacher).item() == pytest.approx((want * costs).sum().item(), rel=1e-11)
    # <P, C> + lambda KL(P || uniform) is what the potentials say.
    entropy = (want * (want * 256).log()).sum()
    assert torch.allclose(found.regularised, (want * costs).sum() + regularisation * entropy, rtol=1e-12)


def test_the_cost_falls_to_that_of_the_earth_mover_as_lambda_does() -> None:
    student, teacher = sample(16, 10)
    costs = costs_of(student, teacher).detach()
    uniform = torch.full((16,), 1 / 16, dtype=torch.float64)
    exact = ot.emd2(uniform, uniform, costs).item()
    gaps = []
    for regularisation in (0.1, 0.05, 0.02):
        loss = Sinkhorn(regularisation=regularisation, **CONVERGED)
        gaps.append(loss(student, teacher).item() - exact)
        assert loss.marginal_error is not None
        assert loss.marginal_error < 1e-11
        assert 0 <= gaps[-1] <= regularisation * math.log(16)
    assert gaps[0] > 2 * gaps[1] > 4 * gaps[2]


def test_values_are_those_of_geomloss() -> None:
    q, p = (each.detach().softmax(-1) for each in sample(12, 10, scale=1.0))
    options = {"p": 1, "blur": 0.1, "cost": pairwise_of_batches, "scaling": 0.99, "diameter": 2.0}
    biased = geomloss.SamplesLoss("sinkhorn", debias=False, backend="tensorized", **options)(q, p)
    found = sinkhorn(pairwise_l1(q, p), 0.1, **CONVERGED)
    assert found.regularised.item() == pytest.approx(biased.item(), rel=1e-5)
    debiased = geomloss.SamplesLoss("sinkhorn", debias=True, backend="tensorized", **options)(q, p)
    ours = Sinkhorn(debias=True, **CONVERGED).of_predictions(q, p).mean()
    assert ours.item() == pytest.approx(debiased.item(), rel=1e-5)


def pairwise_of_batches(left: Tensor, right: Tensor) -> Tensor:
    return torch.cdist(left, right, p=1)


def test_exchanging_the_rows_of_the_teacher_changes_nothing() -> None:
    """A limit of the method, not a virtue: the loss does not see which prediction belongs to which input."""
    student, teacher = sample(12, 6)
    shuffled = teacher[torch.randperm(12, generator=torch.Generator().manual_seed(1))]
    loss, paired = Sinkhorn(), Sinkhorn(paired=0.5)
    assert torch.allclose(loss(student, shuffled), loss(student, teacher), rtol=1e-12)
    assert torch.allclose(
        gradient(loss(student, shuffled), student), gradient(loss(student, teacher), student), rtol=0, atol=1e-14
    )
    assert (KL()(student, shuffled) - KL()(student, teacher)).abs() > 0.5
    # ... unless leaving the own row has a price.
    assert (
        paired(student.detach(), student.detach()[[*range(1, 12), 0]])
        > paired(student.detach(), student.detach()) + 0.1
    )


def test_a_high_price_of_other_rows_leaves_the_paired_distance() -> None:
    student, teacher = sample(8, 6)
    want = costs_of(student, teacher).diagonal()
    got = Sinkhorn(paired=50.0, reduction="none")(student, teacher)
    assert torch.allclose(got, want, rtol=1e-12)


def test_debiased_divergence_is_zero_only_between_equals() -> None:
    student, _ = sample(10, 7)
    loss = Sinkhorn(debias=True)
    same = loss(student, student.detach().clone())
    assert same.item() == 0.0  # at any number of iterations
    assert gradient(same, student).abs().max() < 1e-4
    assert Sinkhorn()(student.detach(), student.detach()) > 1e-3  # the entropic bias
    for seed in range(5):
        other = student.detach() + 0.1 * sample(10, 7, seed)[1]
        assert loss(student, other) > 1e-5


def test_envelope_is_the_gradient_of_the_value_with_entropy_and_not_of_the_cost() -> None:
    """They differ at convergence too: the plan moves with the costs."""
    student, teacher = sample(10, 10)
    options: dict[str, Any] = {"regularisation": 0.2, **CONVERGED, "tolerance": 1e-11}
    envelope = gradient(Sinkhorn(gradient="envelope", **options)(student, teacher), student)
    costs = pairwise_l1((student / 2).softmax(-1), (teacher / 2).softmax(-1))
    assert torch.allclose(envelope, gradient(sinkhorn(costs, 0.2, 5000, 1e-11).regularised, student), atol=1e-11)
    unrolled = gradient(Sinkhorn(**options)(student, teacher), student)
    assert 0.2 < (envelope - unrolled).norm() / unrolled.norm() < 0.5
    debiased = [
        gradient(Sinkhorn(gradient=kind, debias=True, **options)(student, teacher), student)
        for kind in ("envelope", "unrolled")
    ]
    assert torch.allclose(*debiased, rtol=0, atol=1e-10)


def test_envelope_and_unrolled_meet_where_the_plan_is_a_matching() -> None:
    teacher = 4 * torch.eye(5, dtype=torch.float64)
    student = (3.7 * torch.eye(5, dtype=torch.float64) + 0.1 * sample(5, 5)[1])[[2, 0, 1, 4, 3]].requires_grad_()
    differences = []
    for regularisation in (0.1, 0.05, 0.02):
        one, other = (
            gradient(Sinkhorn(regularisation=regularisation, gradient=kind, iterations=100)(student, teacher), student)
            for kind in ("envelope", "unrolled")
        )
        differences.append(((one - other).norm() / other.norm()).item())
    assert differences[0] > 1e-3
    assert differences[0] > differences[1] > differences[2]
    assert differences[2] < 1e-9


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 1.3, "iterations": 3, "regularisation": 0.3},
        {"debias": True, "iterations": 4},
        {"paired": 0.2, "tolerance": 1e-3},
        {"max_rows": 3},
    ],
)
def test_gradcheck_with_mask_and_weights(options: dict[str, Any]) -> None:
    student, teacher = (each.detach().view(2, 4, 5) for each in sample(8, 5, seed=1))
    student.requires_grad_()
    labels = torch.zeros(2, 4, dtype=torch.int64)
    labels[0, :2] = -100
    weights = torch.rand(2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    weights[1, 3] = 0
    for reduction in ("mean", "sum", "none"):
        loss = Sinkhorn(reduction=reduction, **options)
        assert torch.autograd.gradcheck(lambda z, loss=loss: loss(z, teacher, labels, weights), (student,))


def test_gradcheck_of_the_envelope_where_it_is_exact() -> None:
    student, teacher = sample(3, 4, seed=1, scale=1.0)
    loss = Sinkhorn(1.0, regularisation=0.5, gradient="envelope", debias=True, **CONVERGED)
    assert torch.autograd.gradcheck(lambda z: loss(z, teacher), (student,))


def test_positions_that_do_not_count_change_nothing() -> None:
    student, teacher = sample(9, 6)
    labels = torch.zeros(9, dtype=torch.int64)
    labels[[1, 4]] = -100
    weights = torch.rand(9, dtype=torch.float64)
    weights[7] = 0
    keep = [0, 2, 3, 5, 6, 8]
    rows = Sinkhorn(reduction="none")(student[keep], teacher[keep])
    got = Sinkhorn()(student, teacher, labels, weights)
    assert torch.allclose(got, (rows * weights[keep]).sum() / weights[keep].sum(), rtol=1e-14)
    assert Sinkhorn(reduction="sum")(student, teacher, labels).item() == pytest.approx(
        published(student[[0, 2, 3, 5, 6, 7, 8]], teacher[[0, 2, 3, 5, 6, 7, 8]]).item(), rel=1e-12
    )


def test_float32_stays_finite_where_the_published_loop_does_not() -> None:
    student, teacher = sample(8, 30, scale=8.0)
    single = student.detach().float().requires_grad_()
    assert published(single, teacher.float(), 0.01).isnan()
    for options in ({}, {"debias": True}, {"gradient": "envelope"}):
        loss = Sinkhorn(regularisation=0.01, **options)
        got, want = loss(single, teacher.float()), loss(student, teacher)
        assert got.item() == pytest.approx(want.item(), rel=1e-5)
        assert torch.allclose(gradient(got, single).double(), gradient(want, student), rtol=0, atol=1e-5)
    halves = Sinkhorn(reduction="none")(single.detach().bfloat16(), teacher.bfloat16())
    assert halves.dtype == torch.float32
    assert torch.isfinite(halves).all()


def test_tolerance_ends_the_iteration_and_the_error_is_that_of_the_plan() -> None:
    student, teacher = sample(32, 2)
    costs = costs_of(student, teacher).detach()
    for options in ({"iterations": 20}, {"iterations": 1000, "tolerance": 1e-3}):
        found = sinkhorn(costs, 0.1, **options)
        rows = found.plan.sum(-1)
        assert found.marginal_error.item() == pytest.approx((rows - 1 / 32).abs().sum().item(), rel=1e-9)
        assert torch.allclose(found.plan.sum(-2), torch.full((32,), 1 / 32, dtype=torch.float64), rtol=1e-14)
        loss = Sinkhorn(**options)
        loss(student, teacher)
        assert loss.marginal_error == found.marginal_error
    assert found.marginal_error <= 1e-3
    assert 20 < found.iterations < 1000
    assert sinkhorn(costs, 0.1, found.iterations - 1).marginal_error > 1e-3
    assert sinkhorn(costs, 0.1, 3, 1e-3).iterations == 3  # the limit comes first, and the error tells
    # With two classes the published number of iterations is too small.
    assert (32 * sinkhorn(costs, 0.1, 20).plan.sum(-1) - 1).abs().max() > 0.02


def test_batches_and_rectangles_of_costs() -> None:
    costs = 2 * torch.rand(3, 5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    found = sinkhorn(costs, 0.2, 400)
    assert found.plan.shape == (3, 5, 7)
    for each in range(3):
        alone = sinkhorn(costs[each], 0.2, 400)
        assert torch.allclose(found.plan[each], alone.plan, rtol=1e-13)
        assert torch.allclose(found.cost(costs)[each], alone.cost(costs[each]), rtol=1e-13)
        assert torch.allclose(found.regularised[each], alone.regularised, rtol=1e-13)
        assert torch.allclose(found.marginal_error[each], alone.marginal_error, rtol=1e-9, atol=1e-15)
        left, right = (torch.full((count,), 1 / count, dtype=torch.float64) for count in (5, 7))
        want = ot.sinkhorn(left, right, costs[each], 0.2, stopThr=1e-13)
        assert torch.allclose(alone.plan, want, rtol=0, atol=1e-12)


def test_more_rows_than_are_transported() -> None:
    assert evenly_spaced(10, 4, torch.device("cpu")).tolist() == [0, 2, 5, 7]
    assert evenly_spaced(3, 4, torch.device("cpu")).tolist() == [0, 1, 2]
    student, teacher = sample(10, 6)
    rows = [0, 2, 5, 7]
    values = Sinkhorn(max_rows=4, reduction="none")(student, teacher)
    alone = Sinkhorn(reduction="none")(student[rows], teacher[rows])
    assert torch.equal(values[rows], alone)
    assert torch.allclose(values[[1, 3, 4, 6, 8, 9]], alone.mean(), rtol=1e-14)
    got = Sinkhorn(max_rows=4)(student, teacher)
    assert torch.allclose(got, alone.mean(), rtol=1e-14)
    assert gradient(got, student).abs().sum(-1).nonzero().flatten().tolist() == rows


def test_pairwise_distances_and_their_gradient() -> None:
    left, right = (each.detach()[:, :700].requires_grad_() for each in sample(5, 5000, scale=3.0))
    right = right[:4]
    assert torch.autograd.gradcheck(pairwise_l1, (left[:, :9], right[:, :9]))
    upstream = torch.rand(5, 4, dtype=torch.float64)
    ours = torch.autograd.grad(pairwise_l1(left, right), (left, right), upstream)
    theirs = torch.autograd.grad(torch.cdist(left, right, p=1), (left, right), upstream)
    assert all(torch.allclose(one, other, rtol=1e-13) for one, other in zip(ours, theirs, strict=True))
    equal = torch.ones(2, 3, requires_grad=True)
    assert not gradient(pairwise_l1(equal, equal.detach()).sum(), equal).any()


def test_automatic_half_precision_changes_nothing() -> None:
    student, teacher = (each.detach().float() for each in sample(6, 50))
    student.requires_grad_()
    want = Sinkhorn()(student, teacher)
    with torch.autocast("cpu", torch.bfloat16):
        got = Sinkhorn()(student, teacher)
        assert torch.equal(gradient(got, student), gradient(want, student))
    assert got.item() == want.item()


def test_pairwise_distances_of_a_large_vocabulary_in_float32() -> None:
    q, p = (each.detach().softmax(-1) for each in sample(16, 32_768))
    exact = torch.cdist(q, p, p=1)
    assert (pairwise_l1(q.float(), p.float()) - exact).abs().max() < 1e-6
    assert (torch.cdist(q.float(), p.float(), p=1) - exact).abs().max() > 1e-5


class Largest(TorchDispatchMode):
    """The largest number of values in one result."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for each in result if isinstance(result, tuple | list) else (result,):
            if isinstance(each, Tensor):
                self.numel = max(self.numel, each.numel())
        return result


def test_memory_does_not_hold_rows_by_rows_by_classes() -> None:
    student, teacher = sample(48, 8192)
    with Largest() as seen:
        gradient(Sinkhorn(iterations=2, debias=True)(student, teacher), student)
    assert seen.numel == 48 * 8192


def test_extreme_logits() -> None:
    inf = math.inf
    teacher = torch.tensor([[1e4, -1e4, 0, -inf], [0, 0, 0, -inf], [1e4, 0, 0, -inf]])
    student = torch.tensor([[-1e4, 1e4, 0, -inf], [1, 0, 0, -inf], [1e4, 0, 0, -inf]], requires_grad=True)
    for options in ({}, {"gradient": "envelope"}, {"debias": True}, {"regularisation": 1e-3}):
        value = Sinkhorn(**options)(student, teacher)
        assert 0 <= value <= 2
        assert torch.isfinite(gradient(value, student)).all()
    # One row: the L1 distance of its two predictions.
    assert Sinkhorn()(student[:1], teacher[:1]).item() == 2.0


def test_no_position_counts_gives_a_connected_zero() -> None:
    student = torch.randn(3, 5, requires_grad=True)
    loss = Sinkhorn()(student, torch.randn(3, 5), torch.full((3,), -100))
    assert loss.item() == 0.0
    assert not gradient(loss, student).any()
    none = Sinkhorn(reduction="none")(student, torch.randn(3, 5), torch.full((3,), -100))
    assert none.shape == (0,)
    assert none.requires_grad


@pytest.mark.parametrize("weight", [1.0, 0.25])
def test_balance_gives_the_gradient_the_norm_that_is_asked_for(weight: float) -> None:
    student, teacher = sample(12, 20)
    outputs = Outputs(student, teacher)
    objective = Objective([Term("kl", KL(), weight), make_term("sinkhorn", {"balance": 0.3}, has_teacher=True)])
    total, values = objective(outputs, 12.0)
    anchor = weight * gradient(KL()(student, teacher), student)
    balanced = gradient(total, student) - anchor
    transport = gradient(Sinkhorn()(student, teacher), student)
    assert values["sinkhorn"].item() == pytest.approx(Sinkhorn()(student, teacher).item())
    assert (balanced.norm() / anchor.norm()).item() == pytest.approx(0.3, rel=1e-6)
    assert torch.cosine_similarity(balanced.flatten(), transport.flatten(), dim=0).item() == pytest.approx(1)
    assert (transport.norm() / anchor.norm()).item() != pytest.approx(0.3, rel=0.1)
    with torch.no_grad():
        assert objective(Outputs(student.detach(), teacher))[0].isfinite()


def test_a_balanced_loss_without_a_gradient_adds_nothing() -> None:
    student, _ = sample(6, 20)
    teacher = student.detach().flip(-1)  # to ULD the same, to KL not
    total, _ = Objective([Term("kl", KL(), 100.0), Term("uld", UniversalLogit(), balance=0.5)])(
        Outputs(student, teacher), 6.0
    )
    assert torch.allclose(gradient(total, student), 100 * gradient(KL()(student, teacher), student), rtol=1e-13)


def test_by_name_and_mistakes() -> None:
    loss = make_loss("sinkhorn", {"tolerance": 1e-3, "gradient": "envelope", "max_rows": 64})
    assert isinstance(loss, Sinkhorn)
    assert (loss.tolerance, loss.gradient, loss.max_rows, loss.temperature) == (1e-3, "envelope", 64, 2.0)
    for options, message in (
        ({"regularisation": 0}, "regularisation is 0"),
        ({"iterations": 0}, "iterations is 0"),
        ({"max_rows": 0}, "max_rows is 0"),
        ({"paired": -1}, "paired is -1"),
        ({"paired": math.inf}, "paired is inf"),
        ({"gradient": "implicit"}, "no gradient 'implicit'"),
    ):
        with pytest.raises(UsageError, match=message):
            Sinkhorn(**options)  # type: ignore[arg-type]
