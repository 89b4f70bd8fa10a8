"""Losses from hidden states against the dense loss in float64, which knows nothing of pieces."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compress.errors import UsageError
from compress.losses import (
    KL,
    CrossEntropy,
    JensenShannon,
    Needs,
    ReverseKL,
    Setting,
    TokenLoss,
    loss_names,
    loss_options,
    make_loss,
)
from compress.losses.fused import Head, Strategy, checkpoint, gradient, linear_loss, linear_losses, tiles
from compress.losses.fused.projection import Projection

CLASSES, TEACHER_CLASSES = 91, 96
STRATEGIES: tuple[Strategy, ...] = ("gradient", "tiles", "checkpoint")
SETTING = Setting(CLASSES, 16, 24, 2, lambda ids: [str(each) for each in ids])


@dataclass(frozen=True)
class Problem:
    """Positions [3, 7] of which the first three and one of weight 0 do not count."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor
    teacher_hidden: Tensor
    teacher_weight: Tensor
    teacher_bias: Tensor
    labels: Tensor
    weights: Tensor
    scale: float = 0.7
    softcap: float | None = 30.0

    @classmethod
    def of(cls, dtype: torch.dtype = torch.float64, classes: int = CLASSES, device: str = "cpu") -> Problem:
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int, size: float = 1.0) -> Tensor:
            return (size * torch.randn(*shape, generator=generator, dtype=torch.float64)).to(device, dtype)

        labels = torch.randint(0, CLASSES, (3, 7), generator=generator)
        labels[0, :3] = -100
        weights = torch.rand(3, 7, generator=generator, dtype=torch.float64)
        weights[1, 1] = 0
        return cls(
            normal(3, 7, 16),
            normal(classes, 16, size=0.5),
            normal(classes),
            normal(3, 7, 24),
            normal(TEACHER_CLASSES, 24, size=0.4),
            normal(TEACHER_CLASSES),
            labels.to(device),
            weights.to(device),
        )

    def in_float64(self) -> Problem:
        tensors = {name: each.double() for name, each in vars(self).items() if isinstance(each, Tensor)}
        return replace(self, **tensors | {"labels": self.labels})

    @property
    def heads(self) -> tuple[Head, Head]:
        student = Head(self.weight, self.bias, self.scale, self.softcap)
        return student, Head(self.teacher_weight, self.teacher_bias)

    def learning(self) -> tuple[Problem, tuple[Tensor, Tensor, Tensor]]:
        leaves = tuple(each.detach().clone().requires_grad_() for each in (self.hidden, self.weight, self.bias))
        hidden, weight, bias = leaves
        return replace(self, hidden=hidden, weight=weight, bias=bias), (hidden, weight, bias)

    def dense(self, loss: TokenLoss, **options: Any) -> Tensor:
        """The loss of whole logits, written out."""
        logits = self.scale * (self.hidden @ self.weight.T + self.bias)
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        teacher = self.teacher_hidden @ self.teacher_weight.T + self.teacher_bias
        return loss(logits, teacher if Needs.TEACHER in loss.needs else None, self.labels, self.weights, **options)

    def fused(self, loss: TokenLoss, **options: Any) -> Tensor:
        student, teacher = self.heads
        return linear_loss(
            loss, self.hidden, student, self.teacher_hidden, teacher, self.labels, self.weights, **options
        )


def fresh(loss: TokenLoss, dtype: torch.dtype = torch.float64) -> TokenLoss:
    """A copy, with the state that the loss began with."""
    return copy.deepcopy(loss).to(dtype)


def gradients(loss: Tensor, leaves: tuple[Tensor, ...]) -> list[Tensor]:
    return list(torch.autograd.grad(loss, leaves))


def error(found: Tensor, truth: Tensor) -> float:
    return float((found.double() - truth.double()).detach().norm() / truth.detach().double().norm())


def cases() -> list[Any]:
    """Every registered loss that can be computed row by row, with every strategy that can serve it."""
    found = []
    for name in loss_names():
        options = {"temperature": 1.7, "t2": True}
        loss = make_loss(name, {key: options[key] for key in options if key in loss_options(name)}, SETTING)
        if not isinstance(loss, TokenLoss) or not loss.independent or loss.needs & (Needs.FEATURES | Needs.TOKENS):
            continue
        learns = any(each.requires_grad for each in loss.parameters())
        for strategy in STRATEGIES:
            if strategy == "checkpoint" or (not learns and (strategy == "gradient" or tiles.fits(loss))):
                loss.vocabulary = "common"
                found.append(pytest.param(loss, strategy, id=f"{name}-{strategy}"))
    return found


@pytest.mark.parametrize(("loss", "strategy"), cases())
def test_every_loss_in_pieces_is_the_dense_one(loss: TokenLoss, strategy: Strategy) -> None:
    """With a mask, weights, a denominator, unequal vocabularies, a bias, a scale and a softcap, in 2 rows at a time."""
    for dtype, of_value, of_gradient in ((torch.float32, 1e-6, 5e-6), (torch.float64, 1e-12, 1e-12)):
        problem, leaves = Problem.of(dtype).learning()
        truth, true_leaves = problem.in_float64().learning()
        want = truth.dense(fresh(loss), denominator=11.0)
        want_gradients = gradients(want, true_leaves)
        got = problem.fused(fresh(loss, dtype), denominator=11.0, strategy=strategy, memory=2 * 187 * dtype.itemsize)
        assert got.dtype == dtype
        assert error(got, want) < of_value
        for found, true in zip(gradients(got, leaves), want_gradients, strict=True):
            assert error(found, true) < of_gradient


@pytest.mark.parametrize(("loss", "strategy"), cases())
def test_bfloat16_inputs_lose_nothing_but_the_last_rounding(loss: TokenLoss, strategy: Strategy) -> None:
    problem, leaves = Problem.of(torch.bfloat16).learning()
    truth, true_leaves = problem.in_float64().learning()
    want = truth.dense(fresh(loss))
    got = problem.fused(fresh(loss, torch.float32), strategy=strategy, memory=5000)
    assert got.dtype == torch.float32
    assert error(got, want) < 2e-6
    for found, true in zip(gradients(got, leaves), gradients(want, true_leaves), strict=True):
        assert found.dtype == torch.bfloat16
        assert error(found, true.bfloat16()) < 1e-3  # some numbers beside a tie are rounded to its other side


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("loss", [KL(1.3, vocabulary="common"), JensenShannon(0.3, vocabulary="common")])
def test_the_size_of_the_pieces_changes_nothing(loss: TokenLoss, strategy: Strategy) -> None:
    problem, leaves = Problem.of().learning()
    whole = problem.fused(loss, strategy=strategy)
    expected = gradients(whole, leaves)
    for memory in (1, 1000, 2 * 8 * 21 * 13, 2 * 8 * 91 * 8, 10**9):
        got = problem.fused(loss, strategy=strategy, memory=memory)
        torch.testing.assert_close(got, whole, rtol=1e-13, atol=0)
        torch.testing.assert_close(gradients(got, leaves), expected, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_micro_batches_with_a_common_denominator_add_up(strategy: Strategy) -> None:
    problem, leaves = Problem.of().learning()
    loss = KL(vocabulary="common")
    whole = problem.fused(loss, denominator=torch.tensor(9), strategy=strategy)
    parts = torch.stack(
        [
            linear_loss(
                loss,
                problem.hidden[i],
                problem.heads[0],
                problem.teacher_hidden[i],
                problem.heads[1],
                problem.labels[i],
                problem.weights[i],
                denominator=torch.tensor(9),
                strategy=strategy,
            )
            for i in range(3)
        ]
    )
    torch.testing.assert_close(parts.sum(), whole, rtol=1e-13, atol=0)
    torch.testing.assert_close(gradients(parts.sum(), leaves), gradients(whole, leaves), rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("strategy", ["tiles", "checkpoint"])
def test_each_position_may_have_its_own_upstream_gradient(strategy: Strategy) -> None:
    loss = ReverseKL(1.7, t2=True, reduction="none", vocabulary="common")
    problem, leaves = Problem.of().learning()
    want, got = problem.dense(loss), problem.fused(loss, strategy=strategy, memory=5000)
    assert want.shape == got.shape == (17,)
    upstream = torch.randn(17, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(gradients(got @ upstream, leaves), gradients(want @ upstream, leaves))


@pytest.mark.parametrize(
    ("loss", "memory", "expected"),
    [
        (KL(vocabulary="common"), None, "gradient"),
        (KL(vocabulary="common", reduction="none"), None, "checkpoint"),
        (KL(vocabulary="common", reduction="none"), 2000, "tiles"),
        (CrossEntropy(reduction="none"), 2000, "checkpoint"),
    ],
)
def test_auto(loss: TokenLoss, memory: int | None, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    used = []
    for strategy, module, name in (
        ("gradient", gradient, "values_and_gradients"),
        ("checkpoint", checkpoint, "values"),
        ("tiles", tiles, "values"),
    ):
        run = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *given, s=strategy, run=run: used.append(s) or run(*given))
    Problem.of().fused(loss, memory=memory)
    assert used == [expected]


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_gradcheck(strategy: Strategy, reduction: Any) -> None:
    if strategy == "gradient" and reduction == "none":
        pytest.skip("needs a scalar")
    problem, leaves = Problem.of().learning()
    problem = replace(problem, softcap=3.0)
    loss = JensenShannon(0.4, temperature=1.7, vocabulary="common", reduction=reduction)

    def run(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return replace(problem, hidden=hidden, weight=weight, bias=bias).fused(loss, strategy=strategy, memory=5000)

    assert torch.autograd.gradcheck(run, leaves, fast_mode=True)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_extreme_logits_are_those_of_the_dense_loss(strategy: Strategy) -> None:
    """Of 1e4, of a class that both leave out, and of a class that the student leaves out and the teacher as good as."""
    problem, leaves = Problem.of(torch.float32, TEACHER_CLASSES).learning()
    with torch.no_grad():
        problem.bias[:3], problem.teacher_bias[:3] = (
            torch.tensor([1e4, -1e4, -math.inf]),
            torch.tensor([-1e4, 1e4, -math.inf]),
        )
    problem = replace(problem, softcap=None, scale=1.0)
    truth, true_leaves = problem.in_float64().learning()
    for loss in (KL(), JensenShannon(), ReverseKL()):
        want, got = truth.dense(loss), problem.fused(loss, strategy=strategy, memory=5000)
        assert want.item() > 0.6
        assert error(got, want) < 1e-6
        for found, true in zip(gradients(got, leaves), gradients(want, true_leaves), strict=True):
            assert torch.isfinite(found).all()
            torch.testing.assert_close(found.double(), true, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("loss", [KL(), ReverseKL(), JensenShannon()])
def test_classes_that_one_of_the_two_leaves_out(strategy: Strategy, loss: TokenLoss) -> None:
    """Infinite values where the dense loss has them, and its gradients."""
    problem, leaves = Problem.of(classes=TEACHER_CLASSES).learning()
    with torch.no_grad():
        problem.bias[5], problem.teacher_bias[7] = -math.inf, -math.inf
    problem = replace(problem, softcap=None)
    want, got = problem.dense(loss), problem.fused(loss, strategy=strategy, memory=5000)
    assert math.isinf(want.item()) is not isinstance(loss, JensenShannon)
    torch.testing.assert_close(got, want)
    for found, true in zip(gradients(got, leaves), gradients(want, leaves), strict=True):
        assert torch.isfinite(found).all()
        torch.testing.assert_close(found, true)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("empty", [False, True])
def test_no_position_counts_gives_a_connected_zero(strategy: Strategy, empty: bool) -> None:
    problem, leaves = Problem.of().learning()
    with torch.no_grad():
        problem.hidden[0], problem.weight[3] = math.nan, math.inf
    if empty:
        cut = {name: getattr(problem, name)[:0] for name in ("hidden", "teacher_hidden", "labels", "weights")}
        problem = replace(problem, **cut)
    else:
        problem = replace(problem, labels=torch.full_like(problem.labels, -100))
    loss = problem.fused(KL(vocabulary="common"), strategy=strategy)
    assert loss.item() == 0
    for each in gradients(loss, leaves):
        assert not each.any()
    if strategy != "gradient":
        none = problem.fused(KL(vocabulary="common", reduction="none"), strategy=strategy)
        assert none.shape == (0,)
        assert not gradients(none.sum(), leaves)[1].any()


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_positions_that_do_not_count_may_hold_anything(strategy: Strategy) -> None:
    problem, leaves = Problem.of().learning()
    with torch.no_grad():
        problem.hidden[0, :3], problem.hidden[1, 1], problem.teacher_hidden[0, 0] = math.nan, math.inf, math.nan
    for each in gradients(problem.fused(KL(vocabulary="common"), strategy=strategy), leaves):
        assert torch.isfinite(each).all()
    hidden = gradients(problem.fused(KL(vocabulary="common"), strategy=strategy), leaves)[0]
    assert not hidden[0, :3].any()
    assert not hidden[1, 1].any()
    assert hidden[2].all()


def test_several_terms_share_the_projection() -> None:
    """Cross-entropy sees all classes of the student, KL those that the teacher has too, ULD both vocabularies."""
    wide = Problem.of(classes=99)
    for problem, leaves in (wide.learning(), Problem.of().learning()):
        terms = [
            (0.3, make_loss("cross_entropy", vocabulary="common")),
            (2.0, KL(1.7, vocabulary="common")),
            (0.5, JensenShannon(vocabulary="common", reduction="sum")),
            (0.7, make_loss("uld")),
        ]
        each = [problem.dense(loss) for _, loss in terms]
        want = torch.stack([weight * value for (weight, _), value in zip(terms, each, strict=True)]).sum()
        expected = gradients(want, leaves)
        student, teacher = problem.heads
        given = (problem.hidden, student, problem.teacher_hidden, teacher, problem.labels, problem.weights)
        for strategy in ("auto", "checkpoint"):
            total, parts = linear_losses(terms, *given, strategy=strategy, memory=5000)
            assert not parts.requires_grad
            torch.testing.assert_close(parts, torch.stack(each))
            torch.testing.assert_close(total, want)
            torch.testing.assert_close(gradients(total, leaves), expected)
        divergences = [(2.0, KL(1.7, vocabulary="common")), (1.0, ReverseKL(vocabulary="common"))]
        want = sum(weight * problem.dense(loss) for weight, loss in divergences)
        total, _ = linear_losses(divergences, *given, strategy="tiles", memory=5000)
        torch.testing.assert_close(gradients(total, leaves), gradients(want, leaves))


class Learned(TokenLoss):
    """KL at a temperature that is learned."""

    def __init__(self, **common: Any) -> None:
        super().__init__(**common)
        self.log_temperature = nn.Parameter(torch.tensor(0.3, dtype=torch.float64))

    def values(self, student: Tensor, teacher: Tensor | None, labels: Tensor | None) -> Tensor:
        assert teacher is not None
        logits = [F.log_softmax(each * torch.exp(-self.log_temperature), -1) for each in (student, teacher)]
        return F.kl_div(*logits, reduction="none", log_target=True).sum(-1)


class Mixing(TokenLoss):
    """KL of logits that are mixed by a matrix, which autocast would round."""

    def values(self, student: Tensor, teacher: Tensor | None, labels: Tensor | None) -> Tensor:
        assert teacher is not None
        mix = torch.arange(student.shape[-1] ** 2).reshape(student.shape[-1], -1).to(student).sin() / 5
        logits = [F.log_softmax(each @ mix, -1) for each in (student, teacher)]
        return F.kl_div(*logits, reduction="none", log_target=True).sum(-1)


class Noisy(Learned):
    """With a part of the classes dropped at random."""

    def values(self, student: Tensor, teacher: Tensor | None, labels: Tensor | None) -> Tensor:
        return super().values(F.dropout(student, 0.3), teacher, labels)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_loss_with_parameters_of_its_own_learns(reduction: Any) -> None:
    problem, leaves = Problem.of().learning()
    loss = Learned(reduction=reduction, vocabulary="common")
    learning = (*leaves, loss.log_temperature)
    want = gradients(problem.dense(loss).sum(), learning)
    torch.testing.assert_close(gradients(problem.fused(loss, memory=5000).sum(), learning), want)
    twice, _ = linear_losses(
        [(0.5, loss), (0.5, loss)], problem.hidden, problem.heads[0], problem.teacher_hidden, problem.heads[1],
        problem.labels, problem.weights,
    )  # fmt: skip
    torch.testing.assert_close(gradients(twice.sum(), learning), want)


def test_a_loss_that_draws_random_numbers_draws_them_once() -> None:
    problem, _ = Problem.of().learning()
    loss = Noisy(vocabulary="common")
    torch.manual_seed(0)
    value = problem.fused(loss, memory=5000)
    after = torch.rand(())
    torch.manual_seed(1)
    (slope,) = torch.autograd.grad(value, loss.log_temperature)
    assert torch.rand(()) == torch.rand((), generator=torch.Generator().manual_seed(1))
    step = 1e-6
    with torch.no_grad():
        loss.log_temperature += step
        torch.manual_seed(0)
        moved = problem.fused(loss, memory=5000)
    assert torch.rand(()) == after
    assert slope.item() == pytest.approx((moved - value).item() / step, rel=1e-4)


def test_the_state_of_a_loss_moves_on_once() -> None:
    problem, leaves = Problem.of().learning()
    dense, fused = (make_loss("sampled_kl", vocabulary="common") for _ in range(2))
    first, second = (problem.fused(fused, strategy="checkpoint", memory=5000) for _ in range(2))
    found = gradients(first, leaves)
    expected = gradients(problem.dense(dense), leaves)
    torch.testing.assert_close(second, problem.dense(dense))
    torch.testing.assert_close(found, expected)
    assert torch.equal(fused.stream, dense.stream)


def test_weights_of_positions_can_be_learned() -> None:
    problem, _ = Problem.of().learning()
    weights = problem.weights.clone().requires_grad_()
    problem = replace(problem, weights=weights)
    loss = KL(vocabulary="common")
    torch.testing.assert_close(gradients(problem.fused(loss), (weights,)), gradients(problem.dense(loss), (weights,)))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_upstream_gradients_graphs_that_stay_and_double_backward(strategy: Strategy) -> None:
    problem, leaves = Problem.of().learning()
    loss = problem.fused(KL(vocabulary="common"), strategy=strategy)
    once = torch.autograd.grad(loss, leaves, retain_graph=True)
    before = [each.clone() for each in once]
    again = torch.autograd.grad(3 * loss, leaves, retain_graph=True)
    torch.testing.assert_close([each / 3 for each in again], before)
    assert all(torch.equal(*pair) for pair in zip(once, before, strict=True))
    with pytest.raises(UsageError, match="cannot be differentiated again"):
        torch.autograd.grad(loss, leaves[0], create_graph=True)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_only_what_learns_gets_a_gradient(strategy: Strategy) -> None:
    problem, (hidden, weight, bias) = Problem.of().learning()
    loss = KL(vocabulary="common")
    want = gradients(problem.dense(loss), (hidden, weight, bias))
    for learns in range(3):
        leaves = [each.detach().requires_grad_(place == learns) for place, each in enumerate((hidden, weight, bias))]
        part = replace(problem, hidden=leaves[0], weight=leaves[1], bias=leaves[2])
        part.teacher_hidden.requires_grad_()
        part.fused(loss, strategy=strategy).backward()
        assert part.teacher_hidden.grad is None
        for place, (leaf, true) in enumerate(zip(leaves, want, strict=True)):
            if place == learns:
                torch.testing.assert_close(leaf.grad, true)
            else:
                assert leaf.grad is None
    for without in (torch.no_grad, torch.inference_mode):
        with without():
            value = problem.fused(loss, strategy=strategy)
        assert not value.requires_grad
        torch.testing.assert_close(value.clone(), problem.dense(loss).detach())


def test_autocast_rounds_the_operands_and_nothing_else() -> None:
    problem, leaves = Problem.of(torch.float32).learning()
    rounded = {
        name: getattr(problem, name).detach().bfloat16().float()
        for name in ("hidden", "weight", "teacher_hidden", "teacher_weight")
    }
    truth, true_leaves = replace(problem, **rounded).in_float64().learning()
    for loss, strategies in ((KL(vocabulary="common"), STRATEGIES), (Mixing(vocabulary="common"), STRATEGIES[::2])):
        want = truth.dense(loss)
        expected = gradients(want, true_leaves)
        for strategy in strategies:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                got = problem.fused(loss, strategy=strategy)
                found = gradients(got, leaves)
            assert got.dtype == found[0].dtype == torch.float32
            assert error(got, want) < 5e-6
            assert max(error(*pair) for pair in zip(found, expected, strict=True)) < 1e-5


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_float16_gradients_survive_a_large_denominator(strategy: Strategy) -> None:
    """A gradient scaler multiplies by 65,536 in the backward pass: what underflowed before is lost."""
    problem, leaves = Problem.of(torch.float16).learning()
    truth, true_leaves = problem.in_float64().learning()
    loss = KL(vocabulary="common")
    want = gradients(65536 * truth.dense(loss, denominator=1e6), true_leaves)
    found = gradients(65536 * problem.fused(loss, denominator=1e6, strategy=strategy), leaves)
    assert max(error(*pair) for pair in zip(found, want, strict=True)) < 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_products_on_tensor_cores(strategy: Strategy, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """What runs on CUDA, with products that take half precision and give float32 written out for the CPU: the gradient
    at the logits is rounded to bfloat16, and never to float16."""
    products, of = {"mm": torch.mm, "addmm": torch.addmm}, Projection.of
    seen = []

    def in_float32(name: str) -> Any:
        def product(*operands: Tensor, out_dtype: torch.dtype | None = None, out: Tensor) -> Tensor:
            if out_dtype is None:
                return products[name](*operands, out=out)
            seen.append((name, operands[-1].dtype, operands[-2].dtype))
            assert out.dtype == out_dtype == torch.float32
            return products[name](*(each.float() for each in operands), out=out)

        return product

    for name in products:
        monkeypatch.setattr(torch, name, in_float32(name))
    monkeypatch.setattr(Projection, "of", lambda *given: replace(of(*given), on_tensor_cores=True))
    problem, leaves = Problem.of(dtype).learning()
    truth, true_leaves = problem.in_float64().learning()
    loss = KL(1.7, vocabulary="common")
    want, got = truth.dense(loss), problem.fused(loss, strategy=strategy, memory=5000)
    found = gradients(got, leaves)
    assert set(seen) == {(name, dtype, dtype) for name in (["mm", "addmm"] if dtype == torch.bfloat16 else ["mm"])}
    assert error(got, want) < 2e-6
    for each, true in zip(found, gradients(want, true_leaves), strict=True):
        assert error(each, true.to(dtype)) < (3e-3 if dtype == torch.bfloat16 else 5e-4)


def test_agrees_with_trl() -> None:
    chunked = pytest.importorskip("trl.kernels.chunked_divergence").ChunkedDivergenceFunction
    problem, leaves = Problem.of(torch.float32, TEACHER_CLASSES).learning()
    given = [problem.hidden.flatten(0, 1), problem.weight, problem.bias]
    teacher = [problem.teacher_hidden.flatten(0, 1), problem.teacher_weight, problem.teacher_bias]
    head, teacher_head = problem.heads
    for beta, loss in ((0.0, KL(1.7)), (1.0, ReverseKL(1.7)), (0.3, JensenShannon(0.3, temperature=1.7))):
        want = chunked.apply(*given, *teacher, beta, 1.7, problem.scale, problem.softcap)[0].mean()
        got = linear_loss(loss, problem.hidden, head, problem.teacher_hidden, teacher_head)
        assert error(got, want) < 1e-6
        for pair in zip(gradients(got, leaves), gradients(want, leaves), strict=True):
            assert error(*pair) < 5e-6


def test_agrees_with_liger() -> None:
    jsd = pytest.importorskip("liger_kernel.chunked_loss.jsd_loss").LigerFusedLinearJSDLoss
    problem, leaves = Problem.of(torch.float32, TEACHER_CLASSES).learning()
    want = jsd(0.0, 1.0, beta=0.3, temperature=1.7, compiled=False, chunk_size=4)(
        problem.hidden.flatten(0, 1), problem.weight, problem.teacher_hidden.flatten(0, 1), problem.teacher_weight,
        problem.labels.flatten(), problem.bias, problem.teacher_bias,
    )  # fmt: skip
    problem = replace(problem, scale=1.0, softcap=None, weights=torch.ones_like(problem.weights))
    got = problem.fused(JensenShannon(0.3, temperature=1.7))
    assert error(got, want) < 1e-6
    for pair in zip(gradients(got, leaves), gradients(want, leaves), strict=True):
        assert error(*pair) < 5e-6


def test_head_is_the_whole_projection() -> None:
    problem, leaves = Problem.of().learning()
    logits = problem.heads[0](problem.hidden)
    want = 30 * torch.tanh(0.7 * (problem.hidden @ problem.weight.T + problem.bias) / 30)
    torch.testing.assert_close(logits, want)
    torch.testing.assert_close(gradients(logits.sin().sum(), leaves), gradients(want.sin().sum(), leaves))
    half = Problem.of(torch.bfloat16)
    assert half.heads[0](half.hidden).dtype == torch.float32


class Comparing(KL):
    independent: ClassVar[bool] = False


def test_mistakes_are_named() -> None:
    problem = Problem.of()
    with pytest.raises(UsageError, match=r"Comparing compares positions.*whole logits: loss\(head\(hidden\)"):
        problem.fused(Comparing())
    with pytest.raises(UsageError, match="reads more than logits and labels"):
        problem.fused(make_loss("nd", setting=SETTING))
    with pytest.raises(UsageError, match="91 classes, the teacher 96"):
        problem.fused(KL())
    with pytest.raises(UsageError, match=r"'gradient' cannot serve .*'none'.*Use 'checkpoint' or 'tiles'"):
        problem.fused(KL(reduction="none", vocabulary="common"), strategy="gradient")
    with pytest.raises(UsageError, match=r"'tiles' cannot serve .*`terms`.*Use 'gradient' or 'checkpoint'"):
        problem.fused(CrossEntropy(), strategy="tiles")
    with pytest.raises(UsageError, match=r"'gradient' cannot serve .*parameters of its own.*Use 'checkpoint'"):
        problem.fused(Learned(vocabulary="common"), strategy="gradient")
    with pytest.raises(UsageError, match="no strategy 'fast'"):
        problem.fused(KL(vocabulary="common"), strategy="fast")
    with pytest.raises(UsageError, match="KL needs the teacher's logits"):
        linear_loss(KL(), problem.hidden, problem.heads[0])
    with pytest.raises(UsageError, match="hidden states and its head belong together"):
        linear_loss(KL(), problem.hidden, problem.heads[0], problem.teacher_hidden)
    with pytest.raises(UsageError, match=r"24 wide, and the head reads 16"):
        linear_loss(CrossEntropy(), problem.teacher_hidden, problem.heads[0], labels=problem.labels)
    with pytest.raises(UsageError, match=r"labels are \(7,\), the logits \(3, 7, 91\)"):
        linear_loss(CrossEntropy(), problem.hidden, problem.heads[0], labels=problem.labels[0])
    with pytest.raises(UsageError, match=r"A label is .* 95; there are 91 classes"):
        problem.labels[2, 2] = 95
        problem.fused(CrossEntropy())
    with pytest.raises(UsageError, match=r"reduction 'none', and others"):
        linear_losses([(1.0, KL()), (1.0, KL(reduction="none"))], problem.hidden, problem.heads[0])
    with pytest.raises(UsageError, match="No loss is named"):
        linear_losses([], problem.hidden, problem.heads[0])
    with pytest.raises(UsageError, match=r"weight of a head is \(3,\)"):
        Head(torch.zeros(3))
    with pytest.raises(UsageError, match=r"bias of a head is \(2,\), its weight \(3, 4\)"):
        Head(torch.zeros(3, 4), torch.zeros(2))
    with pytest.raises(UsageError, match="softcap is 0"):
        Head(torch.zeros(3, 4), softcap=0.0)
    with pytest.raises(UsageError, match="memory is 0"):
        problem.fused(KL(vocabulary="common"), memory=0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("loss", "strategy"), cases())
def test_on_a_cuda_device(loss: TokenLoss, strategy: Strategy) -> None:
    for dtype, bounds in ((torch.float32, (1e-5, 1e-4)), (torch.bfloat16, (2e-5, 5e-3)), (torch.float16, (2e-5, 5e-3))):
        problem, leaves = Problem.of(dtype, device="cuda").learning()
        truth, true_leaves = problem.in_float64().learning()
        want, got = truth.dense(fresh(loss).cuda()), problem.fused(fresh(loss, torch.float32).cuda(), strategy=strategy)
        assert error(got, want) < bounds[0]
        for found, true in zip(gradients(got, leaves), gradients(want, true_leaves), strict=True):
            assert error(found, true) < bounds[1]
