"""The divergences against each other, against torch, TRL and Liger, and at the limits of their parameters."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical, kl_divergence

from compress.errors import UsageError
from compress.losses import (
    KL,
    Alpha,
    AlphaBeta,
    ChiSquare,
    Divergence,
    FDivergence,
    JensenShannon,
    Renyi,
    ReverseKL,
    ReverseSkewKL,
    SkewKL,
    SymmetricKL,
    TotalVariation,
)


def logits(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    teacher = 2 * torch.randn(4, 6, 13, generator=generator, dtype=dtype)
    return (teacher + torch.randn(4, 6, 13, generator=generator, dtype=dtype)).requires_grad_(), teacher


def both(loss: Callable[[Tensor, Tensor], Tensor], student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """The mean of a loss's values, and its gradient."""
    value = loss(student, teacher).mean()
    return value, torch.autograd.grad(value, student)[0]


def assert_same(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor], rtol: float = 1e-12, factor: float = 1.0) -> None:
    for got, want in zip(a, b, strict=True):
        assert (got - factor * want).norm() <= rtol * want.norm() * abs(factor)


@pytest.mark.parametrize(
    ("one", "factor", "other"),
    [
        (AlphaBeta(1, 0), 1, KL()),
        (AlphaBeta(0, 1), 1, ReverseKL()),
        (Alpha(1), 1, KL()),
        (Alpha(0), 1, ReverseKL()),
        (Renyi(1), 1, KL()),
        (AlphaBeta(0.3, 0.7), 1, Alpha(0.3)),
        (AlphaBeta(-1.4, 2.4), 1, Alpha(-1.4)),
        (ChiSquare(), 2, Alpha(2)),
        (ChiSquare(reverse=True), 2, Alpha(-1)),
        (JensenShannon(0, normalise=True), 1, KL()),
        (JensenShannon(1, normalise=True), 1, ReverseKL()),
        (JensenShannon(0.3, normalise=True), 1 / 0.21, JensenShannon(0.3)),
    ],
)
def test_names_of_the_same(one: Divergence, factor: float, other: Divergence) -> None:
    assert_same(both(one, *logits()), both(other, *logits()), factor=factor)


@pytest.mark.parametrize(
    ("loss", "plain"),
    [
        (AlphaBeta(0.5, 0.5), lambda p, q: 2 * (p.sqrt() - q.sqrt()).square()),
        (AlphaBeta(1, 1), lambda p, q: 0.5 * (p - q).square()),
        (Alpha(0.5), lambda p, q: 2 * (p.sqrt() - q.sqrt()).square()),
        (SymmetricKL(), lambda p, q: 0.5 * (p - q) * (p / q).log()),
    ],
)
def test_closed_forms(loss: Divergence, plain: Callable[[Tensor, Tensor], Tensor]) -> None:
    student, teacher = logits()
    want = both(lambda s, t: plain(t.softmax(-1), s.softmax(-1)).sum(-1), student, teacher)
    assert_same(both(loss, student, teacher), want)


def test_jensen_shannon_is_made_of_the_skewed_divergences() -> None:
    want = both(JensenShannon(0.2), *logits())
    parts = (0.2, both(SkewKL(0.2), *logits())), (0.8, both(ReverseSkewKL(0.8), *logits()))
    assert_same(want, (sum(w * part[0] for w, part in parts), sum(w * part[1] for w, part in parts)))


def test_exchanging_student_and_teacher() -> None:
    student, teacher = logits()
    for alpha, beta in ((0.2, 0.7), (1.3, -0.4), (0.0, 0.6)):
        assert torch.allclose(AlphaBeta(alpha, beta)(student, teacher), AlphaBeta(beta, alpha)(teacher, student))
    assert torch.allclose(0.7 * Renyi(0.3)(student, teacher), 0.3 * Renyi(0.7)(teacher, student))
    assert torch.allclose(JensenShannon(0.2)(student, teacher), JensenShannon(0.8)(teacher, student))


@pytest.mark.parametrize("alpha", [0.1, 0.6])
def test_detaching_the_mixture_gives_the_gradient_of_jensen_shannon(alpha: float) -> None:
    student, teacher = logits()
    value, gradient = both(ReverseSkewKL(alpha, detach_mixture=True), student, teacher)
    p, q = teacher.softmax(-1), student.softmax(-1)
    detached = (q * (q / (alpha * q.detach() + (1 - alpha) * p)).log()).sum(-1).mean()
    assert_same((value, gradient), (detached, torch.autograd.grad(detached, student)[0]))
    assert_same((gradient,), (both(JensenShannon(1 - alpha), student, teacher)[1],), factor=1 / alpha)


@pytest.mark.parametrize(
    ("near", "limit"),
    [
        (lambda e: Alpha(1 + e), KL()),
        (lambda e: Alpha(e), ReverseKL()),
        (lambda e: Renyi(1 + e), KL()),
        (lambda e: AlphaBeta(0.6, e), AlphaBeta(0.6, 0)),
        (lambda e: AlphaBeta(e, 0.6), AlphaBeta(0, 0.6)),
        (lambda e: AlphaBeta(0.6, -0.6 + e), AlphaBeta(0.6, -0.6)),
        (lambda e: AlphaBeta(-0.6 + e, 0.6), AlphaBeta(-0.6, 0.6)),
        (lambda e: AlphaBeta(e, 2 * e), AlphaBeta(0, 0)),
        (lambda e: AlphaBeta(e, -e), AlphaBeta(0, 0)),
        (lambda e: JensenShannon(abs(e), normalise=True), KL()),
        (lambda e: JensenShannon(1 - abs(e), normalise=True), ReverseKL()),
        (lambda e: SkewKL(abs(e)), KL()),
        (lambda e: ReverseSkewKL(abs(e)), ReverseKL()),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nothing_jumps_at_a_limit(near: Callable[[float], Divergence], limit: Divergence, dtype: torch.dtype) -> None:
    """The distance to the limit is proportional to that of the parameter, and no rounding is left when it is gone."""
    want = both(limit, *logits(dtype))
    for step in (1e-3, -1e-3, 1e-6, -1e-6, 1e-12, -1e-12):
        assert_same(
            both(near(step), *logits(dtype)), want, rtol=30 * abs(step) + (1e-6 if dtype.itemsize == 4 else 1e-11)
        )


def test_jensen_shannon_shrinks_towards_its_ends() -> None:
    student, teacher = logits()
    value = JensenShannon(1e-6)(student, teacher)
    assert value.item() == pytest.approx(1e-6 * KL()(student, teacher).item(), rel=1e-4)


def test_kl_is_that_of_torch_distributions() -> None:
    student, teacher = logits()
    want = both(lambda s, t: kl_divergence(Categorical(logits=t), Categorical(logits=s)), student, teacher)
    assert_same(both(KL(), student, teacher), want)


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_jensen_shannon_is_that_of_trl(beta: float) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is experimental
        from trl.experimental.gkd.gkd_trainer import GKDTrainer
    student, teacher = logits()
    labels = torch.zeros(4, 6, dtype=torch.int64)
    labels[1, 2:] = -100
    theirs = GKDTrainer.generalized_jsd_loss(student, teacher, labels, beta=beta, temperature=1.4)
    kinds: dict[float, Divergence] = {0.0: KL(temperature=1.4), 1.0: ReverseKL(temperature=1.4)}
    ours = kinds.get(beta) or JensenShannon(beta, temperature=1.4)
    value = ours(student, teacher, labels)
    assert_same((value, torch.autograd.grad(value, student)[0]), (theirs, torch.autograd.grad(theirs, student)[0]))


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
def test_jensen_shannon_is_that_of_liger(beta: float) -> None:
    module = pytest.importorskip("liger_kernel.chunked_loss.jsd_loss")
    student, teacher = (each.flatten(0, 1) for each in logits())
    theirs = module.LigerFusedLinearJSDFunction.distillation_loss_fn(student, teacher, beta=beta)
    assert torch.allclose(JensenShannon(beta, reduction="sum")(student, teacher), theirs, rtol=1e-12)


GENERATORS: list[tuple[Divergence, Callable[[Tensor], Tensor]]] = [
    (KL(), lambda t: t * t.log()),
    (KL(), lambda t: t * t.log() - 5 * (t - 1)),
    (ReverseKL(), lambda t: -t.log()),
    (SymmetricKL(0.3), lambda t: 0.3 * t * t.log() - 0.7 * t.log()),
    (JensenShannon(0.3), lambda t: 0.3 * t * t.log() - (0.3 * t + 0.7) * (0.3 * t + 0.7).log()),
    (SkewKL(0.1), lambda t: t * (t / (0.1 * t + 0.9)).log()),
    (ReverseSkewKL(0.1), lambda t: -(0.1 + 0.9 * t).log()),
    (TotalVariation(), lambda t: (t - 1).abs() / 2),
    (ChiSquare(), lambda t: (t - 1) ** 2),
    (ChiSquare(reverse=True), lambda t: (t - 1) ** 2 / t),
    (Alpha(0.3), lambda t: (0.3 * t + 0.7 - t**0.3) / 0.21),
    (Alpha(-0.8), lambda t: (-0.8 * t + 1.8 - t**-0.8) / -1.44),
]


@pytest.mark.parametrize(("named", "generator"), GENERATORS, ids=lambda each: type(each).__name__)
def test_f_divergence_of_each_generator_is_the_named_one(
    named: Divergence, generator: Callable[[Tensor], Tensor]
) -> None:
    assert_same(both(FDivergence(generator), *logits()), both(named, *logits()))


def test_f_divergence_keeps_the_digits_of_close_models() -> None:
    student, teacher = (each.detach() for each in logits(torch.float32))
    student = teacher + 1e-4 * (student - teacher)
    values = FDivergence(lambda t: t * t.log(), reduction="none")(student, teacher)
    assert (values > 0).all()
    assert torch.allclose(values, KL(reduction="none")(student, teacher), rtol=1e-5)
    assert not any(each.any() for each in FDivergence(lambda t: t * t.log()).pair(teacher[0], teacher[0], None))


def test_f_divergence_takes_a_derivative_and_refuses_what_is_none() -> None:
    given = FDivergence(lambda t: t * t.log(), lambda t: t.log() + 1, temperature=2.0, t2=True)
    assert_same(both(given, *logits()), both(KL(temperature=2.0, t2=True), *logits()))
    with pytest.raises(UsageError, match=r"f\(1\) is 1"):
        FDivergence(lambda t: t**2)
    with pytest.raises(UsageError, match="not convex"):
        FDivergence(lambda t: t.log())
    with pytest.raises(UsageError, match="not finite"):
        FDivergence(lambda t: (t - 1).clamp(min=0).sqrt())


def test_inequalities() -> None:
    """Pinsker 2 TV^2 <= KL; JSD <= log 2; Renyi grows with its order; the order of Gibbs and Su (2002)."""
    student, teacher = logits()
    value = {
        name: loss(student, teacher)
        for name, loss in {
            "kl": KL(reduction="none"),
            "tv": TotalVariation(reduction="none"),
            "js": JensenShannon(reduction="none"),
            "chi": ChiSquare(reduction="none"),
            "half": Renyi(0.5, reduction="none"),
            "two": Renyi(2.0, reduction="none"),
        }.items()
    }
    assert (2 * value["tv"] ** 2 <= value["kl"]).all()
    assert (value["js"] <= math.log(2)).all()
    assert (value["half"] <= value["kl"]).all()
    assert (value["kl"] <= value["two"]).all()
    assert torch.allclose(value["two"], torch.log1p(value["chi"]))
