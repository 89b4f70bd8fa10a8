"""Losses against a part of the teacher's distribution: definitions in float64, identities, and statistics of draws."""

from __future__ import annotations

import math
from dataclasses import replace
from decimal import Decimal, getcontext

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from compress.errors import UsageError
from compress.losses import KL, Outputs, SampledKL, SparseTarget, TopKKL, make_loss, sampled_target, top_k_target
from compress.losses.sparse import log1mexp
from compress.losses.targets import TAILS

BETAS = [(tail, 0.0) for tail in TAILS] + [("residual", 0.3)]


def logits(*shape: int, seed: int = 0, scale: float = 2.0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def masses(student: Tensor, teacher: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """p and q of the teacher's k most probable classes, and which they are."""
    p, q = teacher.softmax(-1), student.softmax(-1)
    listed = p.topk(k, -1).indices
    return p.gather(-1, listed), q.gather(-1, listed), listed


def definition(tail: str, beta: float, student: Tensor, teacher: Tensor, k: int, temperature: float = 1.0) -> Tensor:
    p, q, _ = masses(student / temperature, teacher / temperature, k)
    m, big_q = p.sum(-1), q.sum(-1)
    of_s = p / m.unsqueeze(-1)
    if tail == "residual":
        r = m + beta * (1 - m)
        a = r.unsqueeze(-1) * of_s
        return (a * (a / q).log()).sum(-1) + (1 - r) * ((1 - r) / (1 - big_q)).log()
    if tail == "partial":
        return (p * (p / q).log()).sum(-1)
    if tail == "renormalised":
        return (of_s * (of_s / q).log()).sum(-1)
    return (of_s * (of_s / (q / big_q.unsqueeze(-1))).log()).sum(-1)


@pytest.mark.parametrize(("tail", "beta"), BETAS)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_value_and_gradient_are_those_of_the_definition(tail: str, beta: float, temperature: float) -> None:
    """Of dense logits, and of a ready target."""
    student, teacher = logits(2, 24, 11).unbind()
    student.requires_grad_()
    labels = torch.zeros(24, dtype=torch.int64)
    labels[5:8] = -100
    weights = torch.rand(24, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    weights[11] = 0
    keep = (labels != -100).double() * weights
    want = definition(tail, beta, student, teacher, 4, temperature) * keep * temperature**2
    cases = {"mean": want.sum() / keep.sum(), "sum": want.sum(), "none": want[keep > 0]}
    for reduction, expected in cases.items():
        loss = TopKKL(4, tail, beta, temperature=temperature, t2=True, reduction=reduction)
        (slope,) = torch.autograd.grad(expected.sum(), student, retain_graph=True)
        for target in (teacher, top_k_target(teacher, 4, temperature)):
            got = loss(student, target, labels, weights)
            (gradient,) = torch.autograd.grad(got.sum(), student)
            assert torch.allclose(got, expected, rtol=1e-11, atol=1e-14)
            assert torch.allclose(gradient, slope, rtol=1e-10, atol=1e-15)


@pytest.mark.parametrize(("tail", "beta"), BETAS)
def test_gradcheck_with_mask_and_weights(tail: str, beta: float) -> None:
    student, teacher = logits(2, 2, 2, 4, seed=2).unbind()
    student.requires_grad_()
    labels = torch.tensor([[0, -100], [0, 0]])
    weights = torch.tensor([[0.5, 1.0], [1.5, 0.0]], dtype=torch.float64)
    for reduction in ("mean", "sum", "none"):
        loss = TopKKL(2, tail, beta, temperature=1.7, reduction=reduction)
        assert torch.autograd.gradcheck(lambda z, loss=loss: loss(z, teacher, labels, weights), (student,))


def test_gradcheck_of_the_sampled_loss() -> None:
    """In evaluation mode, where the draws stand still."""
    student, teacher = logits(2, 2, 2, 4, seed=3).unbind()
    student.requires_grad_()
    labels = torch.tensor([[0, -100], [0, 0]])
    weights = torch.tensor([[0.5, 1.0], [1.5, 0.0]], dtype=torch.float64)
    for reduction in ("mean", "sum", "none"):
        loss = SampledKL(6, temperature=1.7, reduction=reduction).eval()
        assert torch.autograd.gradcheck(lambda z, loss=loss: loss(z, teacher, labels, weights), (student,))


def test_kl_top_of_ostquant_with_and_without_post_attn() -> None:
    """Both branches of the published training code, written with torch's kl_div."""
    student, teacher = logits(2, 6, 50, seed=4).unbind()
    p, q, listed = masses(student, teacher, 8)
    partial = F.kl_div(q.log(), p, reduction="batchmean")
    assert torch.allclose(TopKKL(8, "partial")(student, teacher), partial, rtol=1e-12, atol=0)
    top_student, top_teacher = student.gather(-1, listed), teacher.gather(-1, listed)
    conditional = F.kl_div(top_student.log_softmax(-1), top_teacher.softmax(-1), reduction="batchmean")
    assert torch.allclose(TopKKL(8, "conditional")(student, teacher), conditional, rtol=1e-12, atol=0)


def gradient_at_equality(tail: str, teacher: Tensor, k: int) -> tuple[float, Tensor]:
    student = teacher.clone().requires_grad_()
    value = TopKKL(k, tail, reduction="sum")(student, teacher)
    return value.item(), torch.autograd.grad(value, student)[0]


def test_what_each_tail_does_to_a_student_that_is_right() -> None:
    teacher = logits(1, 40, seed=5)
    p, _, listed = masses(teacher, teacher, 10)
    m = p.sum().item()
    assert 0.5 < m < 0.95
    for tail in ("residual", "conditional"):
        value, gradient = gradient_at_equality(tail, teacher, 10)
        assert value == 0.0
        assert not gradient.any()
    value, gradient = gradient_at_equality("renormalised", teacher, 10)
    assert value == pytest.approx(-math.log(m), rel=1e-12)
    assert gradient.abs().sum().item() == pytest.approx(2 * (1 - m), rel=1e-12)
    assert (gradient.gather(-1, listed) < 0).all()
    value, gradient = gradient_at_equality("partial", teacher, 10)
    assert value == 0.0
    assert gradient.abs().sum().item() == pytest.approx(2 * m * (1 - m), rel=1e-12)
    want = (m * teacher.softmax(-1)).scatter_add(-1, listed, -p)
    assert torch.allclose(gradient, want, rtol=1e-12, atol=1e-17)


def test_the_partial_sum_is_negative_where_the_student_has_more_of_the_top() -> None:
    """p = (.4, .3, .3), q = (.6, .2, .2), k = 1: 0.4 log(2/3) = -0.162, while the KL is 0.081."""
    p, q = torch.tensor([[[0.4, 0.3, 0.3]], [[0.6, 0.2, 0.2]]], dtype=torch.float64).log()
    assert TopKKL(1, "partial")(q, p).item() == pytest.approx(0.4 * math.log(2 / 3), rel=1e-12)
    assert KL()(q, p).item() == pytest.approx(0.4 * math.log(2 / 3) + 0.6 * math.log(1.5), rel=1e-12)


def test_chain_rule_of_the_residual_kl() -> None:
    """KL = residual + (1 - m) KL(p given the rest || q given the rest), so the residual is a lower bound."""
    student, teacher = logits(2, 30, 25, seed=6).unbind()
    p, _, listed = masses(student, teacher, 6)
    rest = [z.scatter(-1, listed, -math.inf) for z in (student, teacher)]
    full, bucket, within = (
        KL(reduction="none")(student, teacher),
        TopKKL(6, reduction="none")(student, teacher),
        KL(reduction="none")(*rest),
    )
    assert torch.allclose(full, bucket + (1 - p.sum(-1)) * within, rtol=1e-12, atol=0)
    assert (bucket < full).all()
    growing = torch.stack([TopKKL(k, reduction="none")(student, teacher) for k in range(1, 26)])
    assert (growing.diff(dim=0) > -1e-14).all()


def test_identity_of_the_renormalised_tail() -> None:
    student, teacher = logits(2, 30, 25, seed=7).unbind()
    _, q, _ = masses(student, teacher, 6)
    none = {"reduction": "none"}
    renormalised, conditional = (TopKKL(6, tail, **none)(student, teacher) for tail in ("renormalised", "conditional"))
    assert torch.allclose(renormalised, conditional - q.sum(-1).log(), rtol=1e-12, atol=0)
    assert torch.allclose(renormalised, TopKKL(6, "residual", 1.0, **none)(student, teacher), rtol=1e-13, atol=0)


@pytest.mark.parametrize("beta", [0.0, 0.25, 0.9])
def test_target_mass_has_the_gradient_of_its_formula(beta: float) -> None:
    """With r = m + beta (1 - m): q_i - r p_i / m on S, q_j (r - Q) / (1 - Q) off S."""
    student, teacher = logits(2, 12, 25, seed=8).unbind()
    student.requires_grad_()
    p, q, listed = masses(student.detach(), teacher, 6)
    m, big_q = p.sum(-1, keepdim=True), q.sum(-1, keepdim=True)
    r = m + beta * (1 - m)
    want = (student.detach().softmax(-1) * (r - big_q) / (1 - big_q)).scatter(-1, listed, q - r * p / m)
    (got,) = torch.autograd.grad(TopKKL(6, beta=beta, reduction="sum")(student, teacher), student)
    assert torch.allclose(got, want, rtol=1e-10, atol=1e-16)


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("k", [12, 1000])
def test_all_classes_make_the_full_kl(tail: str, k: int) -> None:
    student, teacher = logits(2, 9, 12, seed=9).unbind()
    student.requires_grad_()
    full = KL(2.0)(student, teacher)
    got = TopKKL(k, tail, temperature=2.0)(student, teacher)
    assert torch.allclose(got, full, rtol=1e-12, atol=0)
    (want,), (gradient,) = (torch.autograd.grad(each, student) for each in (full, got))
    assert torch.allclose(gradient, want, rtol=1e-11, atol=1e-16)


def test_a_rest_of_1e_9_in_float32() -> None:
    """The teacher leaves 6.7e-9 to 999 classes, the student twice that. 1 - p is 0 in float32, and so is log p."""
    teacher = torch.zeros(1, 1000)
    teacher[0, 0] = math.log(999 / 6.7e-9)
    student = teacher.clone()
    student[0, 0] -= math.log(2)
    assert (1 - teacher.softmax(-1)[0, 0]).item() == 0.0
    assert log1mexp(teacher.log_softmax(-1)[0, 0]).item() == -math.inf
    assert top_k_target(teacher, 1).log_rest.exp().item() == pytest.approx(6.7e-9, rel=1e-5)
    m, q = 6.7e-9, 13.4e-9
    bucket = m * math.log(m / q) - m + q  # to first order in m
    for target in (teacher, top_k_target(teacher, 1)):
        leaf = student.clone().requires_grad_()
        value = TopKKL(1)(leaf, target)
        value.backward()
        assert value.item() == pytest.approx(bucket, rel=1e-5)
        assert leaf.grad is not None
        assert leaf.grad[0, 0].item() == pytest.approx(m - q, rel=1e-5)
        assert leaf.grad[0, 1:].sum().item() == pytest.approx(q - m, rel=1e-5)


@pytest.mark.parametrize(("tail", "beta"), BETAS)
@pytest.mark.parametrize(("distance", "temperature"), [(1e-1, 1.0), (1e-3, 0.7), (1e-4, 1.0)])
def test_float32_keeps_its_digits_between_close_models(
    tail: str, beta: float, distance: float, temperature: float
) -> None:
    generator = torch.Generator().manual_seed(10)
    teacher = 3 * torch.randn(8, 20_000, generator=generator)
    student = teacher + distance * torch.randn(8, 20_000, generator=generator)
    loss = TopKKL(64, tail, beta, temperature=temperature, reduction="none")
    values, truth = loss(student, teacher).double(), loss(student.double(), teacher.double())
    if tail == "partial":  # it crosses zero; the definition in float32 is off by 1e-7 and more
        assert ((values - truth).abs() - 1e-6 * truth.abs()).max() < 2e-9
        assert (definition(tail, beta, student, teacher, 64, temperature).double() - truth).abs().max() > 1e-7
        return
    assert (values > 0).all()
    assert ((values - truth) / truth).abs().max() < (3e-7 if distance > 1e-2 else 5e-5)


def test_a_target_stored_in_float16_is_still_a_distribution() -> None:
    generator = torch.Generator().manual_seed(11)
    teacher = 3 * torch.randn(16, 20_000, generator=generator)
    student = (teacher + 0.3 * torch.randn(16, 20_000, generator=generator)).requires_grad_()
    exact = top_k_target(teacher, 64)
    stored = replace(
        exact, indices=exact.indices.int(), log_probs=exact.log_probs.half(), log_rest=exact.log_rest.half()
    )
    total = stored.log_probs.double().exp().sum(-1) + stored.log_rest.double().exp()
    assert 1e-5 < (total - 1).abs().max() < 2e-3
    value, want = TopKKL()(student, stored), TopKKL()(student, exact)
    assert value.item() == pytest.approx(want.item(), rel=2e-3)
    (gradient,) = torch.autograd.grad(value, student)
    assert gradient.sum(-1).abs().max() < 1e-6
    right = teacher.scatter(-1, exact.indices, -math.inf).log_softmax(-1) + stored.log_rest.float().unsqueeze(-1)
    right = right.scatter(-1, exact.indices, stored.log_probs.float()).requires_grad_()
    value = TopKKL()(right, stored)
    assert 0 <= value.item() < 1e-12
    assert torch.autograd.grad(value, right)[0].abs().max() < 1e-7


def test_target_of_a_source_without_a_rest() -> None:
    student, teacher = logits(2, 5, 30, seed=12).unbind()
    exact = top_k_target(teacher, 4)
    derived = SparseTarget.from_log_probs(exact.indices, exact.log_probs, 30)
    assert torch.allclose(derived.log_rest, exact.log_rest, rtol=1e-12, atol=0)
    assert torch.allclose(TopKKL(4)(student, derived), TopKKL(4)(student, exact), rtol=1e-12, atol=0)


@pytest.mark.parametrize("x", [-1e-300, -1e-12, -1e-3, -0.69, -0.7, -3.0, -40.0, -700.0])
def test_log1mexp_against_fifty_digits(x: float) -> None:
    getcontext().prec = 350
    want = float((1 - Decimal(x).exp()).ln())
    assert log1mexp(torch.tensor(x, dtype=torch.float64)).item() == pytest.approx(want, rel=1e-15)


@pytest.mark.parametrize(("tail", "beta"), BETAS)
def test_unused_entries_count_for_nothing(tail: str, beta: float) -> None:
    """A target of 3 classes in rows of 5, the rest of which point at a class that is listed and at one that is not."""
    student, teacher = logits(2, 4, 9, seed=13).unbind()
    student.requires_grad_()
    three = top_k_target(teacher, 3)
    others = torch.stack([three.indices[:, 0], teacher.argmin(-1)], -1)
    padded = replace(
        three,
        indices=torch.cat([others, three.indices], -1),
        log_probs=torch.cat([torch.full((4, 2), -math.inf, dtype=torch.float64), three.log_probs], -1),
    )
    loss = TopKKL(3, tail, beta)
    values = [loss(student, target) for target in (three, padded)]
    slopes = [torch.autograd.grad(value, student)[0] for value in values]
    assert torch.allclose(*values, rtol=1e-13, atol=0)
    assert torch.allclose(*slopes, rtol=1e-12, atol=1e-17)


def test_many_rows_are_cut_into_chunks_with_their_targets() -> None:
    """40 rows of 2^14 classes are three chunks."""
    student, teacher = logits(2, 4, 10, 2**14, seed=14).float().unbind()
    labels = torch.zeros(4, 10, dtype=torch.int64)
    labels[:, 3] = -100
    want = definition("residual", 0.0, student.double(), teacher.double(), 64)
    for target in (teacher, top_k_target(teacher, 64)):
        got = TopKKL(reduction="none")(student, target, labels)
        assert torch.allclose(got.double(), want[labels == 0], rtol=1e-5, atol=0)


@pytest.mark.parametrize("tail", TAILS)
def test_extreme_logits(tail: str) -> None:
    inf = math.inf
    teacher = torch.tensor(
        [[1e4, -1e4, 0.0, 1.0], [0.0, 0.0, -inf, -inf], [1e4, 0.0, 0.0, 0.0], [0.0, -inf, -inf, -inf]]
    )
    student = torch.tensor([[-1e4, 1e4, 0.0, 1.0], [1.0, 0.0, -inf, 0.0], [1e4, 0.0, 0.0, 0.0], [1.0, 0.0, 0.0, -inf]])
    student.requires_grad_()
    loss = TopKKL(2, tail, reduction="none")
    for target in (teacher, top_k_target(teacher, 2)):
        values = loss(student, target)
        (gradient,) = torch.autograd.grad(values.sum(), student)
        assert torch.allclose(values.double(), loss(student.double(), teacher.double()), rtol=1e-5, atol=0)
        assert torch.isfinite(values).all()
        assert torch.isfinite(gradient).all()
    full = KL(reduction="none")(student, teacher)
    assert torch.allclose(values[1], full[1] if tail != "conditional" else KL()(student[1:2, :2], teacher[1:2, :2]))
    left_out = loss(torch.tensor([[0.0, -inf, 0.0]]), torch.tensor([[0.0, 0.0, -1.0]]))
    assert left_out.item() == inf


@pytest.mark.parametrize("loss", [TopKKL(3), SampledKL(5)], ids=["top", "sampled"])
def test_no_position_and_half_precision(loss: TopKKL | SampledKL) -> None:
    student, teacher = logits(2, 4, 50, seed=15).bfloat16().unbind()
    student.requires_grad_()
    generator = torch.Generator().manual_seed(0)
    ready = top_k_target(teacher, 3) if isinstance(loss, TopKKL) else sampled_target(teacher, 5, generator)
    for target in (teacher, ready):
        nothing = loss(student, target, torch.full((4,), -100))
        nothing.backward()
        assert nothing.item() == 0.0
        assert student.grad is not None
        assert not student.grad.any()
        assert loss(student, target).dtype == torch.float32
    assert loss(student, ready).item() == pytest.approx(loss(student.double(), ready).item(), rel=1e-5)


def test_padded_vocabularies() -> None:
    student, teacher = logits(2, 3, 20, seed=16).unbind()
    wide = torch.cat([student, torch.full((3, 4), 9.0, dtype=torch.float64)], -1)
    want = TopKKL(5)(student, teacher)
    loss = TopKKL(5, vocabulary="common")
    assert torch.allclose(loss(wide, teacher), want)
    assert torch.allclose(loss(wide, top_k_target(teacher, 5)), want)
    with pytest.raises(UsageError, match=r"24 classes, the target 20.*vocabulary='common'"):
        TopKKL(5)(wide, top_k_target(teacher, 5))
    with pytest.raises(UsageError, match=r"20 classes, the target 24.*cut to the student's"):
        loss(student, top_k_target(wide, 5))


def test_draws_of_a_sampled_target() -> None:
    teacher = logits(3, 4, 30, seed=17)
    teacher[..., 7] = -math.inf
    target = sampled_target(teacher, 50, torch.Generator().manual_seed(0))
    counts = target.log_probs.exp() * 50
    assert torch.allclose(counts, counts.round(), atol=1e-9)
    assert torch.allclose(counts.sum(-1), torch.full((3, 4), 50.0).double())
    for indices, count in zip(target.indices.reshape(-1, 50), counts.reshape(-1, 50), strict=True):
        used = indices[count > 0].tolist()
        assert len(used) == len(set(used))
        assert 7 not in used
    again = sampled_target(teacher, 50, torch.Generator().manual_seed(0))
    other = sampled_target(teacher, 50, torch.Generator().manual_seed(1))
    assert torch.equal(target.indices, again.indices)
    assert not torch.equal(target.indices, other.indices)


def test_gradient_of_the_sampled_loss_is_unbiased() -> None:
    """100,000 draws: chi-squared of the counts, the z of each class, and the z of the mean value."""
    rows, draws, classes = 2000, 50, 40
    student, teacher = logits(2, 1, classes, seed=18).expand(2, rows, classes).clone().unbind()
    student.requires_grad_()
    loss = SampledKL(draws, seed=3, reduction="none")
    values = loss(student, teacher)
    (gradient,) = torch.autograd.grad(values.sum(), student)
    p, q = teacher[0].softmax(-1), student[0].detach().softmax(-1)
    error = gradient.mean(0) - (q - p)
    z = error / (p * (1 - p) / (rows * draws)).sqrt()
    assert z.abs().max() < 4.5
    chi_squared = (error**2 / p).sum() * rows * draws
    assert 15 < chi_squared < 80  # 39 degrees of freedom: each side has a probability below 3e-4
    cross_entropy = -(p * q.log()).sum()
    assert abs((values.mean() - cross_entropy) / (values.std() / math.sqrt(rows))) < 4.5


def test_top_k_is_biased_where_draws_are_not() -> None:
    """A Zipf teacher of 2,000 classes and a student of the same: 50 classes of the top against 50 draws, 400 times."""
    teacher = -torch.arange(1, 2001, dtype=torch.float64).log().repeat(400, 1)
    student = teacher.clone().requires_grad_()
    (sampled,) = torch.autograd.grad(SampledKL(50)(student, teacher), student)
    (top,) = torch.autograd.grad(TopKKL(50, "renormalised")(student, teacher), student)
    p = teacher[0].softmax(-1)
    noise = (p * (1 - p) / (400 * 50)).sqrt().sum().item() * math.sqrt(2 / math.pi)
    assert sampled.sum(0).abs().sum().item() == pytest.approx(noise, rel=0.1)
    assert top.sum(0).abs().sum().item() == pytest.approx(2 * (1 - p[:50].sum().item()), rel=1e-9)
    assert top.sum(0).abs().sum() > 4 * sampled.sum(0).abs().sum()


def test_draws_are_fresh_at_each_step_and_go_on_after_a_checkpoint() -> None:
    student, teacher = logits(2, 6, 30, seed=19).unbind()

    def steps(loss: SampledKL, count: int) -> list[float]:
        return [loss(student, teacher).item() for _ in range(count)]

    whole = SampledKL(10, seed=5)
    values = steps(whole, 6)
    assert len(set(values)) == 6
    assert steps(SampledKL(10, seed=5), 6) == values
    assert steps(SampledKL(10, seed=6), 6) != values
    first = SampledKL(10, seed=5)
    steps(first, 3)
    resumed = SampledKL(10, seed=99)
    resumed.load_state_dict(first.state_dict())
    resumed.eval()
    assert len(set(steps(resumed, 3))) == 1  # the stream stands still
    resumed.train()
    assert steps(resumed, 3) == values[3:]


def test_a_ready_sampled_target_is_used_as_it_is() -> None:
    student, teacher = logits(2, 2, 3, 30, seed=20).unbind()
    student.requires_grad_()
    target = sampled_target(teacher, 20, torch.Generator().manual_seed(0), temperature=2.0)
    loss = SampledKL(temperature=2.0, t2=True)
    before = loss.stream.clone()
    value = loss(student, target)
    dense = torch.zeros_like(teacher).scatter_add_(-1, target.indices, target.log_probs.exp())
    want = 4 * -(dense * (student / 2).log_softmax(-1)).sum(-1).mean()
    assert torch.allclose(value, want, rtol=1e-12, atol=0)
    (got,), (expected,) = (torch.autograd.grad(each, student) for each in (value, want))
    assert torch.allclose(got, expected, rtol=1e-11, atol=1e-16)
    assert torch.equal(loss.stream, before)
    stored = replace(target, indices=target.indices.int(), log_probs=target.log_probs.half())
    (got,) = torch.autograd.grad(loss(student, stored), student)
    assert torch.allclose(got, expected, rtol=0, atol=1e-3 * float(expected.abs().max()))
    assert got.sum(-1).abs().max() < 1e-15


def test_the_way_of_a_trainer() -> None:
    student, teacher = logits(2, 2, 3, 30, seed=21).unbind()
    outputs = Outputs(student, teacher, labels=torch.zeros(2, 3, dtype=torch.int64))
    loss = make_loss("top_kl", {"k": 1000, "tail": "partial"})
    assert torch.allclose(loss.of(outputs, 6.0), KL()(student, teacher))
    assert make_loss("sampled_kl", {"draws": 8}).of(outputs).ndim == 0


def test_mistakes_are_named() -> None:
    student, teacher = logits(2, 4, 9, seed=22).unbind()
    top, drawn = top_k_target(teacher, 3), sampled_target(teacher, 3, torch.Generator())
    with pytest.raises(UsageError, match=r"k is 0.*at least 1"):
        TopKKL(0)
    with pytest.raises(UsageError, match="draws is 0"):
        SampledKL(0)
    with pytest.raises(UsageError, match="no tail 'bucket'"):
        TopKKL(tail="bucket")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="beta is 2"):
        TopKKL(beta=2.0)
    with pytest.raises(UsageError, match=r"beta is 0.5 and tail 'partial'.*goes with tail 'residual'"):
        TopKKL(tail="partial", beta=0.5)
    with pytest.raises(UsageError, match="nothing to compare"):
        TopKKL(1, "conditional")
    with pytest.raises(UsageError, match="TopKKL was given a 'sampled' target"):
        TopKKL(3)(student, drawn)
    with pytest.raises(UsageError, match="SampledKL was given a 'top' target"):
        SampledKL()(student, top)
    with pytest.raises(UsageError, match="temperature 1, TopKKL of 2"):
        TopKKL(3, temperature=2.0)(student, top)
    with pytest.raises(UsageError, match=r"\(2, 9\), the target's positions \(4,\)"):
        TopKKL(3)(student[:2], top)
    with pytest.raises(UsageError, match=r"The labels are \(3,\)"):
        TopKKL(3)(student, top, torch.zeros(3, dtype=torch.int64))
    with pytest.raises(UsageError, match=r"a rest \(3,\).*Give"):
        replace(top, log_rest=top.log_rest[:3])
