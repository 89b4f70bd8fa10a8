"""The clipped KL divergence: its mask against a numerical integral, its value against the channel that it stands for,
its gradients against autograd, and what its network does when it is left to itself."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from compress.errors import UsageError
from compress.losses import KL, ClippedKL, base, loss_options, make_loss
from compress.losses.fused import Head, linear_loss


def example(rows: int = 6, classes: int = 40, seed: int = 0, scale: float = 2.0) -> tuple[Tensor, Tensor, Tensor]:
    """Student, teacher and labels in float64, of which some are among the teacher's first classes and some are not."""
    generator = torch.Generator().manual_seed(seed)
    student, teacher = scale * torch.randn(2, rows, classes, generator=generator, dtype=torch.float64)
    return student, teacher, torch.randint(0, classes, (rows,), generator=generator)


def moved(loss: ClippedKL, seed: int = 0) -> ClippedKL:
    """The same with another network, in float64: its windows differ from row to row."""
    generator = torch.Generator().manual_seed(seed)
    assert loss.network is not None
    with torch.no_grad():
        for parameter in loss.network.outer.parameters():
            parameter += torch.randn(parameter.shape, generator=generator)
    return loss.double()


def channel(student: Tensor, teacher: Tensor, mask: Tensor, temperature: float = 1.0) -> Tensor:
    """KL between what a channel shows of p and q: class k with probability w_k, otherwise one more symbol, "other"."""
    shown = []
    for logits in (teacher, student):
        log = torch.log_softmax(logits.double() / temperature, -1)
        other = (log + torch.log1p(-mask)).logsumexp(-1, keepdim=True)
        shown.append(torch.cat([log + mask.log(), other], -1))
    log_p, log_q = shown
    return torch.where(log_p.exp() > 0, log_p.exp() * (log_p - log_q), 0.0).sum(-1)


def integrated_mask(teacher: Tensor, lower: float, upper: float, softness: float, top: int) -> Tensor:
    """The mask of one distribution [V] by a sum over a fine grid; the thresholds by bisection."""
    grid = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000

    def cut(quantile: float) -> float:
        low, high = -3.0, 4.0
        for _ in range(60):
            middle = (low + high) / 2
            above = float(torch.sigmoid((grid - middle) / softness).mean())
            low, high = (middle, high) if above > 1 - quantile else (low, middle)
        return low

    window = torch.sigmoid((grid - cut(lower)) / softness) - torch.sigmoid((grid - cut(upper)) / softness)
    order = teacher.argsort(descending=True)
    masses = torch.softmax(teacher, -1)[order]
    ends = 1 - masses.cumsum(-1)
    starts = [*ends[:top].tolist(), *[0.0] * (len(order) - top)]
    sizes = [*masses[:top].tolist(), *[float(ends[top - 1])] * (len(order) - top)]
    mask = torch.zeros_like(masses)
    for place, start, size in zip(order.tolist(), starts, sizes, strict=True):
        mask[place] = window[(grid >= start) & (grid < start + size)].mean()
    return mask


@pytest.mark.parametrize(("softness", "bounds"), [(0.05, (0.2, 0.8)), (0.02, (0.6, 0.95)), (0.3, (0.0, 0.5))])
def test_the_mask_is_the_mean_of_the_window_over_each_class(softness: float, bounds: tuple[float, float]) -> None:
    _, teacher, _ = example(rows=2, classes=12)
    loss = ClippedKL("fixed", lower=bounds[0], upper=bounds[1], softness=softness, top=9, mass_floor=0, target=False)
    for row, got in zip(teacher, loss.mask(teacher), strict=True):
        assert torch.allclose(got, integrated_mask(row, *bounds, softness, 9), atol=2e-3)  # the error of the grid


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("softness", [0.02, 0.05, 1.0])
def test_the_kept_mass_is_the_width_of_the_window(softness: float, temperature: float) -> None:
    peaked = torch.tensor([[50.0, *[0.0] * 39], [1e4, *[-1e4] * 39], [1.0, 1.0, *[-math.inf] * 38]]).double()
    teacher = torch.cat([example()[1], torch.zeros(1, 40).double(), peaked])
    for top in (1, 7, 40, 64):
        loss = moved(ClippedKL(softness=softness, top=top, target=False, mass_floor=0.3, temperature=temperature))
        p = torch.softmax(teacher / temperature, -1)
        lower, upper = loss.bounds(teacher)
        assert (upper - lower).min() >= 0.3
        assert torch.allclose((loss.mask(teacher) * p).sum(-1), upper - lower, rtol=0, atol=1e-10)
        with_target = ClippedKL("fixed", softness=softness, top=top, temperature=temperature)
        assert ((with_target.mask(teacher) * p).sum(-1) >= 0.6 - 1e-12).all()
        assert (with_target.mask(teacher).gather(1, teacher.argmax(-1, keepdim=True)) == 1).all()


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("target", [False, True])
@pytest.mark.parametrize("top", [3, 64])
def test_the_value_is_the_divergence_behind_the_channel(top: int, target: bool, temperature: float) -> None:
    student, teacher, labels = example()
    for loss in (
        ClippedKL("fixed", top=top, target=target, temperature=temperature, reduction="none"),
        moved(ClippedKL(top=top, target=target, temperature=temperature, reduction="none")),
    ):
        for given in (labels, None):
            mask = loss.mask(teacher, given).detach()
            want = channel(student, teacher, mask, temperature)
            assert torch.allclose(loss(student, teacher, given), want, rtol=1e-12)
            whole = KL(temperature, reduction="none")(student, teacher)
            assert ((want >= 0) & (want <= whole)).all()  # data processing
            assert torch.allclose(channel(student, teacher, torch.ones_like(mask), temperature), whole)
    plain = ClippedKL("fixed", top=top, target=target, residual=False, temperature=temperature, reduction="none")
    mask = plain.mask(teacher, labels)
    log_p, log_q = (torch.log_softmax(x / temperature, -1) for x in (teacher, student))
    want = (mask * log_p.exp() * (log_p - log_q)).sum(-1)
    assert torch.allclose(plain(student, teacher, labels), want, rtol=1e-11)


@pytest.mark.parametrize("options", [{}, {"signal": "student"}, {"signal": "student", "residual": False}])
@pytest.mark.parametrize("target", [True, False])
def test_gradcheck_with_mask_and_weights(options: dict[str, object], target: bool) -> None:
    student, teacher, labels = example(rows=4, classes=5, scale=1.0)
    student.requires_grad_()
    labels[0] = -100
    weights = torch.tensor([1.0, 0.5, 0.0, 2.0], dtype=torch.float64)
    for reduction, clip in itertools.product(("mean", "sum", "none"), ("learned", "fixed")):
        loss = ClippedKL(clip, top=3, target=target, temperature=1.7, t2=True, reduction=reduction, **options).double()
        if loss.network is not None:
            moved(loss)
        assert torch.autograd.gradcheck(lambda z, loss=loss: loss(z, teacher, labels, weights), (student,))


@pytest.mark.parametrize("residual", [True, False])
def test_gradcheck_of_the_network(residual: bool) -> None:
    student, teacher, labels = example(rows=3, classes=9)
    loss = moved(ClippedKL(signal="student", residual=residual, top=5, hidden=3, softness=0.2))
    assert torch.autograd.gradcheck(lambda *_: loss(student, teacher, labels), tuple(loss.parameters()))


def test_what_the_network_retains_is_its_own_objective() -> None:
    """Its gradient is that of the fraction lost plus the price, written out; the student's is as without it."""
    student, teacher, labels = example()
    student.requires_grad_()
    loss = moved(ClippedKL(price=0.7, top=5, target=False))
    loss(student, teacher, labels).backward()
    got = [parameter.grad for parameter in loss.parameters()]

    other = moved(ClippedKL(price=0.7, top=5, target=False))
    mask = other.mask(teacher)
    whole = KL(reduction="none")(student.detach(), teacher)
    ranks = 1.0 + teacher.argsort(descending=True).argsort().double()
    reach = torch.where(ranks <= 5, torch.log1p(1 / ranks), (math.log(41) - math.log(6)) / 35)
    lost = (whole - channel(student.detach(), teacher, mask)) / (whole + 1e-6)
    (lost + 0.7 * (mask * reach).sum(-1) / math.log(41)).mean().backward()
    for mine, theirs in zip(got, other.parameters(), strict=True):
        assert theirs.grad is not None
        assert torch.allclose(mine, theirs.grad, rtol=1e-9, atol=1e-14)

    alone = student.detach().requires_grad_()
    channel(alone, teacher, mask.detach()).mean().backward()
    assert torch.allclose(student.grad, alone.grad, rtol=0, atol=1e-14)


def test_a_window_that_keeps_all_is_the_divergence_itself() -> None:
    student, teacher, _ = example()
    for target in (False, True):
        loss = ClippedKL("fixed", lower=0, upper=1, target=target, reduction="none")
        assert torch.allclose(loss(student, teacher), KL(reduction="none")(student, teacher), rtol=1e-12)


def train(steps: int = 60, rate: float = 0.1, flat: bool = False, **options: object) -> tuple[float, float, float]:
    """The loss before and after training the network alone on one teacher and one student, and the mass that it keeps
    then. The student's logits are the teacher's with noise, or, if it is `flat`, half of the teacher's."""
    generator = torch.Generator().manual_seed(0)
    teacher = 3 * torch.randn(48, 300, generator=generator)
    student = teacher / 2 if flat else teacher + torch.randn(48, 300, generator=generator)
    loss = ClippedKL(target=False, **options)
    optimizer = torch.optim.Adam(loss.parameters(), lr=rate)
    first = loss(student, teacher).item()
    for _ in range(steps):
        optimizer.zero_grad()
        loss(student, teacher).backward()
        optimizer.step()
    kept = (loss.mask(teacher) * torch.softmax(teacher, -1)).sum(-1).mean()
    return first, loss(student, teacher).item(), kept.item()


@pytest.mark.parametrize("residual", [False, True])
def test_collapse_without_the_floor(residual: bool) -> None:
    first, last, kept = train(signal="student", residual=residual, mass_floor=0.0)
    assert first > 0.3
    assert kept < 0.01
    assert abs(last) < 0.01


def test_without_the_bucket_the_network_finds_where_the_sum_is_negative() -> None:
    assert train(signal="student", residual=False, mass_floor=0.0, flat=True)[1] < -0.05


@pytest.mark.parametrize("flat", [False, True])
def test_no_collapse_with_the_floor_and_the_bucket(flat: bool) -> None:
    _, last, kept = train(signal="student", flat=flat)
    assert kept == pytest.approx(0.5, abs=0.01)  # exactly what it must keep, and no more
    assert last > 0.1


def test_no_collapse_when_the_network_retains() -> None:
    first, last, kept = train(mass_floor=0.0)
    assert 0.7 < kept < 0.99  # neither nothing nor all
    assert last > 0.7 * first
    assert train(mass_floor=0.0, price=2.0)[2] < kept - 0.2
    assert train(mass_floor=0.0, price=0.0)[2] > 0.99


def test_equal_distributions() -> None:
    _, teacher, labels = example()
    student = teacher.float().requires_grad_()
    for loss in (ClippedKL(), ClippedKL("fixed"), ClippedKL(signal="student")):
        value = loss(student, teacher.float(), labels)
        assert value.item() == 0.0
        (gradient,) = torch.autograd.grad(value, student, retain_graph=True)
        assert not gradient.any()
        for parameter in loss.parameters():
            assert torch.isfinite(torch.autograd.grad(value, parameter, retain_graph=True)[0]).all()


@pytest.mark.parametrize(("distance", "bound"), [(1e-1, 5e-6), (1e-2, 5e-6), (1e-3, 5e-5)])
def test_float32_keeps_its_digits_between_close_models(distance: float, bound: float) -> None:
    generator = torch.Generator().manual_seed(0)
    teacher = 3 * torch.randn(32, 20_000, generator=generator)
    student = teacher + distance * torch.randn(teacher.shape, generator=generator)
    for loss in (ClippedKL(reduction="none"), ClippedKL("fixed", reduction="none")):
        values = loss(student, teacher)
        truth = loss.double()(student.double(), teacher.double())
        assert (values >= 0).all()
        assert ((values.double() - truth) / truth).abs().max() < bound


@pytest.mark.parametrize("residual", [True, False])
def test_extreme_logits(residual: bool) -> None:
    inf = math.inf
    teacher = torch.tensor([[1e4, -1e4, 0.0], [0, 0, -inf], [1e4, 0, 0], [0, 0, 0], [1e4, 0, -inf], [88.0, 0, -88.0]])
    student = torch.tensor(
        [[-1e4, 1e4, 0.0], [1, 0, -inf], [1e4, 0, 0], [1e4, -1e4, 0], [-1e4, 1e4, -inf], [0, 88.0, 0]]
    )
    student.requires_grad_()
    for clip, target in itertools.product(("learned", "fixed"), (True, False)):
        loss = ClippedKL(clip, "student", residual=residual, target=target, reduction="none")
        values = loss(student, teacher)
        mask = loss.mask(teacher).detach().double()
        if residual:
            assert torch.allclose(values.double(), channel(student, teacher, mask), rtol=1e-5, atol=1e-6)
        gradients = torch.autograd.grad(values.sum(), [student, *loss.parameters()])
        assert all(torch.isfinite(gradient).all() for gradient in (values, *gradients))


@pytest.mark.parametrize("residual", [True, False])
def test_where_the_student_alone_leaves_a_class_out(residual: bool) -> None:
    teacher = torch.tensor([[1.0, 0, 0, 0], [1.0, 0, 0, 0], [5.0, 0, 0, 0]])
    student = torch.zeros(3, 4)
    student[0, 0] = student[1, 3] = -math.inf  # the target, and another
    student.requires_grad_()
    for top, clip in itertools.product((2, 64), ("learned", "fixed")):
        loss = ClippedKL(clip, "student", residual=residual, top=top, reduction="none")
        values = loss(student, teacher)
        gradients = torch.autograd.grad(values.sum(), [student, *loss.parameters()])
        assert values[0] == values[1] == math.inf
        assert torch.isfinite(values[2])
        assert all(torch.isfinite(gradient).all() for gradient in gradients)


def test_the_size_of_chunks_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    student, teacher, labels = example(rows=7)
    results = []
    for rows in (1, 3, 100):
        monkeypatch.setattr(base, "CPU_VALUES", 40 * rows)
        leaf, loss = student.clone().requires_grad_(), moved(ClippedKL(top=8))
        loss(leaf, teacher, labels).backward()
        results.append([leaf.grad, *(parameter.grad for parameter in loss.parameters())])
    for result in results[1:]:
        assert all(torch.allclose(a, b, rtol=1e-12, atol=1e-16) for a, b in zip(result, results[0], strict=True))


def test_half_precision_is_computed_in_float32() -> None:
    student, teacher, labels = example(classes=500)
    student, teacher = student.bfloat16().requires_grad_(), teacher.bfloat16()
    loss = ClippedKL(reduction="none")
    got = loss(student, teacher, labels)
    assert got.dtype == torch.float32
    want = channel(student.detach(), teacher, loss.mask(teacher, labels).detach().double())
    assert torch.allclose(got.double(), want, rtol=1e-4)
    got.sum().backward()
    assert student.grad is not None
    assert student.grad.dtype == torch.bfloat16


def test_without_the_logits_whole() -> None:
    generator = torch.Generator().manual_seed(6)
    hidden, weight = torch.randn(2, 9, 5, generator=generator), torch.randn(30, 5, generator=generator)
    teacher_hidden, teacher_weight = torch.randn(2, 9, 4, generator=generator), torch.randn(30, 4, generator=generator)
    hidden.requires_grad_()
    labels = torch.randint(0, 30, (2, 9), generator=generator)
    loss = moved(ClippedKL(top=8)).float()
    leaves = [hidden, *loss.parameters()]
    dense = torch.autograd.grad(loss(hidden @ weight.T, teacher_hidden @ teacher_weight.T, labels), leaves)
    fused = linear_loss(loss, hidden, Head(weight), teacher_hidden, Head(teacher_weight), labels, memory=30 * 8 * 4)
    for a, b in zip(torch.autograd.grad(fused, leaves), dense, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-7)


def test_no_position_counts_gives_a_connected_zero() -> None:
    student = torch.randn(2, 3, 5, requires_grad=True)
    loss = ClippedKL()(student, torch.randn(2, 3, 5), torch.full((2, 3), -100))
    loss.backward()
    assert loss.item() == 0.0
    assert student.grad is not None
    assert not student.grad.any()


def test_the_network_begins_the_same_whatever_was_drawn_before() -> None:
    torch.manual_seed(1)
    first, drawn = ClippedKL(), torch.rand(1)
    torch.manual_seed(1)
    assert drawn == torch.rand(1)  # and nothing is drawn for it
    second = ClippedKL()
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)
    lower, upper = first.bounds(torch.randn(4, 100))
    assert torch.allclose(upper - lower, torch.full((4,), 0.5 + 0.498 / (1 + math.exp(-2))))


def test_by_name_and_mistakes() -> None:
    loss = make_loss("clipped_kl", {"clip": "fixed", "lower": 0.1})
    assert isinstance(loss, ClippedKL)
    assert list(loss.parameters()) == []
    assert loss_options("clipped_kl")["price"] == 0.5
    student, teacher, _ = example()
    with pytest.raises(UsageError, match=r"bounds 0.2 and 0.6 keep less than the mass_floor, 0.5"):
        ClippedKL("fixed", upper=0.6)
    with pytest.raises(UsageError, match="Without the residual bucket"):
        ClippedKL(residual=False)
    with pytest.raises(UsageError, match="mass_floor is 1"):
        ClippedKL(mass_floor=1)
    with pytest.raises(UsageError, match=r"softness is 0\.001"):
        ClippedKL(softness=0.001)
    with pytest.raises(UsageError, match="no signal 'both'"):
        ClippedKL(signal="both")
    with pytest.raises(UsageError, match="needs the teacher's logits"):
        ClippedKL()(student)
    with pytest.raises(UsageError, match="there are 40 classes"):
        ClippedKL()(student, teacher, torch.full((6,), 40))
