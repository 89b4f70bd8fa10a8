"""OFA against its definition and its limits, and the exit branches against the same computation by hand."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compress.errors import UsageError
from compress.losses import (
    KL,
    BranchedOneForAll,
    Needs,
    OneForAll,
    Outputs,
    Setting,
    StagedOneForAll,
    loss_options,
    make_loss,
)

INF = math.inf


def batch(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits [2, 5, 7] of student and teacher in float64, labels with two ignored, weights with one 0."""
    generator = torch.Generator().manual_seed(seed)
    student, teacher = 1.5 * torch.randn(2, 2, 5, 7, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 7, (2, 5), generator=generator)
    labels[0, :2] = -100
    weights = torch.rand(2, 5, generator=generator, dtype=torch.float64)
    weights[1, 4] = 0
    return student, teacher, labels, weights


def ofa(student: Tensor, teacher: Tensor, labels: Tensor, eps: float, temperature: float = 1.0) -> Tensor:
    p, log_q = (teacher / temperature).softmax(-1), (student / temperature).log_softmax(-1)
    label = F.one_hot(labels, student.shape[-1]).to(p.dtype)
    return -(((p + label) ** eps - label) * log_q).sum(-1)


@pytest.mark.parametrize("eps", [1.0, 1.2, 1.5, 3.0])
def test_the_value_is_the_weighted_mean_of_the_definition(eps: float) -> None:
    student, teacher, labels, weights = batch()
    keep = (labels != -100) & (weights != 0)
    w = weights[keep]
    for temperature, t2 in ((1.0, False), (3.0, True), (0.5, False)):
        want = (w * ofa(student[keep], teacher[keep], labels[keep], eps, temperature)).sum() / w.sum()
        want = want * (temperature**2 if t2 else 1)
        got = OneForAll(eps, temperature, t2)(student, teacher, labels, weights)
        torch.testing.assert_close(got, want, rtol=1e-13, atol=0)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(
    "options", [{}, {"eps": 1.0, "temperature": 3.0}, {"eps": 2.5, "temperature": 0.7, "t2": True}]
)
def test_gradcheck_with_mask_and_weights(options: dict[str, float], reduction: str) -> None:
    student, teacher, labels, weights = batch(1)
    loss = OneForAll(**options, reduction=reduction)
    assert torch.autograd.gradcheck(lambda z: loss(z, teacher, labels, weights), (student.requires_grad_(),))


def test_limits() -> None:
    student, teacher, _, _ = batch(2)
    labels = teacher.argmin(-1)
    s, t, y = student.view(-1, 7).requires_grad_(), teacher.view(-1, 7), labels.view(-1)
    one = OneForAll(1.0)(s, t, y)
    torch.testing.assert_close(one, F.cross_entropy(s, t.softmax(-1)))
    gradients = [torch.autograd.grad(value, s)[0] for value in (one, KL()(s, t))]
    torch.testing.assert_close(*gradients)
    sure = OneForAll(1.5)(s, 1e4 * F.one_hot(y, 7).double(), y)
    torch.testing.assert_close(sure, (2**1.5 - 1) * F.cross_entropy(s, y))
    doubtful = 1e4 * F.one_hot((y + 1) % 7, 7).double()  # the teacher is sure of another class
    torch.testing.assert_close(OneForAll(1.5)(s, doubtful, y), F.cross_entropy(s, (y + 1) % 7))
    label = F.one_hot(y, 7)
    weights = (t.softmax(-1) + label) ** 1.5 - label
    at_minimum = (weights / weights.sum(-1, keepdim=True)).log().requires_grad_()
    (gradient,) = torch.autograd.grad(OneForAll(1.5)(at_minimum, t, y), at_minimum)
    assert gradient.abs().max() < 1e-15


def test_float32_against_float64() -> None:
    generator = torch.Generator().manual_seed(3)
    teacher = 3 * torch.randn(64, 5000, generator=generator)
    student = teacher + torch.randn(64, 5000, generator=generator)
    labels = torch.randint(0, 5000, (64,), generator=generator)
    rows = torch.arange(64)
    teacher[rows[::2], labels[::2]] += 25  # both sure: -log q_y down to 1e-7
    student[rows[::2], labels[::2]] += 25
    values, gradients = [], []
    for dtype in (torch.float32, torch.float64):
        z = student.to(dtype, copy=True).requires_grad_()
        value = OneForAll(reduction="none")(z, teacher.to(dtype), labels)
        gradients.append(torch.autograd.grad(value.sum(), z)[0].double())
        values.append(value.detach().double())
    assert values[1].min() < 1e-5
    assert ((values[0] - values[1]) / values[1]).abs().max() < 5e-6
    assert ((gradients[0] - gradients[1]).norm(dim=-1) / gradients[1].norm(dim=-1)).max() < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_logits(dtype: torch.dtype) -> None:
    teacher = torch.tensor([[1e4, -1e4, 0.0], [0.0, 0.5, -INF], [-INF, -INF, 2.0], [-1e4, 1e4, 1e4]], dtype=dtype)
    student = torch.tensor([[-1e4, 1e4, 0.0], [1.0, 0.0, -INF], [0.5, 1.0, 2.0], [1e4, 1e4, -1e4]], dtype=dtype)
    labels = torch.tensor([0, 1, 2, 0])
    z = student.clone().requires_grad_()
    values = OneForAll(reduction="none")(z, teacher, labels)
    (gradient,) = torch.autograd.grad(values.sum(), z)
    assert values[0].item() == pytest.approx((2**1.5 - 1) * 2e4)
    assert torch.isfinite(values).all() and torch.isfinite(gradient).all()
    z = torch.tensor([[0.0, -INF, 2.0]], dtype=dtype, requires_grad=True)
    value = OneForAll()(z, torch.zeros(1, 3, dtype=dtype), torch.tensor([0]))
    (gradient,) = torch.autograd.grad(value, z)
    assert value.item() == INF and torch.isfinite(gradient).all()
    wide = [F.pad(each[1:2, :2], (1, 3), value=-INF) for each in (student, teacher)]
    narrow = OneForAll()(student[1:2, :2], teacher[1:2, :2], torch.tensor([1]))
    torch.testing.assert_close(OneForAll()(*wide, torch.tensor([2])), narrow)


def test_no_position_counts_gives_a_connected_zero() -> None:
    student, teacher, labels, _ = batch(4)
    student.requires_grad_()
    value = OneForAll()(student, teacher, torch.full_like(labels, -100))
    value.backward()
    assert value.item() == 0.0
    assert student.grad is not None and not student.grad.any()


def staged(seed: int = 0, **options: object) -> StagedOneForAll:
    """Made as the trainer makes it, but with random last layers."""
    loss = make_loss("ofa_staged", {"seed": seed, **options}, Setting(classes=7, student_width=6, student_layers=4))
    assert isinstance(loss, StagedOneForAll)
    generator = torch.Generator().manual_seed(seed)
    for branch in loss.branches:
        nn.init.normal_(branch.up.weight, generator=generator)
    return loss.double()


def hidden_states(seed: int = 5) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(2, 5, 6, generator=generator, dtype=torch.float64) for _ in range(5))


@pytest.mark.parametrize(
    ("layers", "stages", "want"),
    [(4, 2, (2, 4)), (4, 1, (4,)), (4, 4, (1, 2, 3, 4)), (6, 4, (2, 3, 5, 6)), (12, 4, (3, 6, 9, 12)), (7, 2, (4, 7))],
)
def test_the_stages_are_spread_evenly(layers: int, stages: int, want: tuple[int, ...]) -> None:
    assert StagedOneForAll(4, layers, 3, stages, bottleneck=2).layers == want


@pytest.mark.parametrize("final", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_branches_by_hand(reduction: str, final: bool) -> None:
    student, teacher, labels, weights = batch(6)
    features = hidden_states()
    loss = staged(bottleneck=3, eps=1.2, final=final)
    loss.loss.reduction = reduction
    logits = [student] if final else []
    for layer, branch in zip((2, 4), loss.branches, strict=True):
        normed = F.layer_norm(features[layer], (6,), branch.norm.weight, branch.norm.bias)
        logits.append(F.gelu(normed @ branch.down.weight.T + branch.down.bias) @ branch.up.weight.T + branch.up.bias)
    single = OneForAll(1.2, reduction=reduction)
    for denominator in (None, 3.0):
        want = sum(single(each, teacher, labels, weights, denominator) for each in logits)
        outputs = Outputs(student, teacher, labels, weights, features=features)
        torch.testing.assert_close(loss.of(outputs, denominator), want, rtol=1e-12, atol=1e-14)


def test_gradcheck_of_the_branches() -> None:
    student, teacher, labels, weights = batch(7)
    features = tuple(state.requires_grad_() for state in hidden_states())
    loss = staged(bottleneck=3, temperature=2.0)
    chosen = (student.requires_grad_(), features[2], features[4])

    def value(logits: Tensor, *states: Tensor) -> Tensor:
        shown = (*features[:2], states[0], features[3], states[1])
        return loss(logits, teacher, labels, weights, features=shown)

    assert torch.autograd.gradcheck(value, chosen)
    value(*chosen).backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in loss.parameters())
    assert [state.grad is not None for state in features] == [False, False, True, False, True]
    ignored = (labels == -100) | (weights == 0)
    for state in chosen:
        assert state.grad is not None and not state.grad[ignored].any() and state.grad[~ignored].any(-1).all()


def test_initial_parameters_depend_on_the_seed_alone() -> None:
    def made(seed: int) -> Tensor:
        return torch.cat([p.flatten() for p in StagedOneForAll(6, 4, 7, seed=seed).parameters()])

    before = torch.get_rng_state()
    first = made(0)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1234)
    assert torch.equal(made(0), first)
    assert not torch.equal(made(1), first)
    torch.set_rng_state(before)


def test_the_first_step_does_not_push_the_student() -> None:
    student, teacher, labels, _ = batch(8)
    features = tuple(state.float().requires_grad_() for state in hidden_states())
    loss = StagedOneForAll(6, 4, 7, final=False)
    loss(student, teacher.float(), labels, features=features).backward()
    for branch in loss.branches:
        assert branch.up.weight.grad.any()
    assert all(state.grad is None or not state.grad.any() for state in features)


def test_state_comes_back() -> None:
    student, teacher, labels, _ = batch(8)
    one, other = staged(seed=0), staged(seed=1)
    values = [loss(student, teacher, labels, features=hidden_states()).item() for loss in (one, other)]
    other.load_state_dict(one.state_dict())
    assert values[0] != values[1]
    assert other(student, teacher, labels, features=hidden_states()).item() == values[0]


def test_branches_learn_what_the_states_hold() -> None:
    generator = torch.Generator().manual_seed(9)
    states = F.layer_norm(torch.randn(256, 6, generator=generator), (6,))
    teacher = 2 * states @ torch.randn(6, 7, generator=generator)
    labels = teacher.argmax(-1)
    loss = StagedOneForAll(6, 1, 7, stages=1, bottleneck=32, final=False)
    optimizer = torch.optim.Adam(loss.parameters(), lr=1e-2)
    label = F.one_hot(labels, 7)
    weights = (teacher.softmax(-1) + label) ** 1.5 - label
    least = ofa((weights / weights.sum(-1, keepdim=True)).log(), teacher, labels, 1.5).mean().item()
    excess = []
    for _ in range(120):
        value = loss(teacher, teacher, labels, features=(states, states))
        excess.append(value.item() - least)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    assert 0 < excess[-1] < 0.05 * excess[0]


def test_a_convolutional_student_brings_its_branches() -> None:
    generator = torch.Generator().manual_seed(10)
    maps = [torch.randn(4, channels, 8, 8, generator=generator) for channels in (3, 5, 6)]
    teacher = torch.randn(4, 7, generator=generator)
    labels = torch.tensor([0, -100, 3, 6])
    branches = {
        layer: nn.Sequential(nn.Conv2d(channels, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 7))
        for layer, channels in ((2, 6), (1, 5))
    }
    loss = BranchedOneForAll(branches, eps=1.3, final=False)
    keep = labels != -100
    want = sum(ofa(branches[layer](maps[layer]), teacher, labels.clamp(0), 1.3)[keep].mean() for layer in (1, 2))
    torch.testing.assert_close(loss(teacher, teacher, labels, features=maps), want)
    assert len(list(loss.parameters())) == 8


def test_half_precision_states_and_padded_vocabularies() -> None:
    student, teacher, labels, _ = batch(11)
    features = tuple(state.bfloat16() for state in hidden_states())
    loss = StagedOneForAll(6, 4, 7, vocabulary="common")
    got = loss(student.bfloat16(), F.pad(teacher, (0, 2)).float(), labels, features=features)
    assert got.dtype == torch.float32
    wide = tuple(state.float() for state in features)
    torch.testing.assert_close(got, loss(student.bfloat16().float(), teacher.float(), labels, features=wide))
    with pytest.raises(UsageError, match="7 classes, the teacher 9"):
        StagedOneForAll(6, 4, 7)(student, F.pad(teacher, (0, 2)), labels, features=features)


def test_no_position_leaves_all_connected() -> None:
    student, teacher, labels, _ = batch(12)
    loss = staged()
    student.requires_grad_()
    value = loss(student, teacher, torch.full_like(labels, -100), features=hidden_states())
    value.backward()
    assert value.item() == 0.0
    for leaf in (student, *loss.parameters()):
        assert leaf.grad is not None and not leaf.grad.any()


def test_names_options_and_mistakes() -> None:
    student, teacher, labels, _ = batch()
    assert loss_options("ofa") == {"eps": 1.5, "temperature": 1.0, "t2": False}
    stages = {"stages": 2, "bottleneck": 256, "seed": 0, "final": True}
    assert loss_options("ofa_staged") == {**stages, **loss_options("ofa")}
    assert StagedOneForAll.needs == Needs.TEACHER | Needs.LABELS | Needs.FEATURES
    for eps in (0.9, INF, math.nan):
        with pytest.raises(UsageError, match="eps is"):
            OneForAll(eps)
    for count in (0, 5):
        with pytest.raises(UsageError, match=f"stages is {count}.*4 layers"):
            StagedOneForAll(6, 4, 7, count)
    with pytest.raises(UsageError, match="bottleneck is 0"):
        StagedOneForAll(6, 4, 7, bottleneck=0)
    with pytest.raises(UsageError, match="no branches"):
        BranchedOneForAll({})
    loss = staged()
    with pytest.raises(UsageError, match="There are 0 hidden states; a branch reads number 2"):
        loss.of(Outputs(student, teacher, labels))
    with pytest.raises(UsageError, match="needs the teacher's logits and labels"):
        loss(student, None, labels, features=hidden_states())
    with pytest.raises(UsageError, match=r"Hidden state 2 is \(2, 4, 6\), the labels \(2, 5\)"):
        loss(student, teacher, labels, features=tuple(state[:, :4] for state in hidden_states()))
    with pytest.raises(UsageError, match=r"The labels are \(2, 4\)"):
        loss(student, teacher, labels[:, :4], features=hidden_states())
