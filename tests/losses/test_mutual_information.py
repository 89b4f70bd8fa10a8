"""CMI against its definition, the entropies it is the difference of, and autograd through the centroids."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from compress.errors import UsageError
from compress.losses import (
    ConditionalMutualInformation,
    Needs,
    Outputs,
    Setting,
    class_means,
    loss_class,
    loss_options,
    make_loss,
)

CLASSES = 6


def batch(count: int = 30, dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(count, CLASSES, generator=generator, dtype=dtype)
    return logits, torch.randint(0, CLASSES, (count,), generator=generator)


def centroids() -> Tensor:
    generator = torch.Generator().manual_seed(9)
    return torch.randn(CLASSES, CLASSES, generator=generator, dtype=torch.float64).softmax(-1)


def given(**options: Any) -> ConditionalMutualInformation:
    """The loss in float64 with fixed centroids."""
    return ConditionalMutualInformation(CLASSES, running=False, **options).double().start(centroids())


def test_value_is_minus_the_divergence_from_the_centroid() -> None:
    logits, labels = batch()
    want = F.kl_div(centroids().log()[labels], logits.log_softmax(-1), reduction="batchmean", log_target=True)
    assert want > 0
    assert torch.allclose(given()(logits, labels=labels), -want, rtol=1e-14)
    assert torch.allclose(given(maximise=False)(logits, labels=labels), want, rtol=1e-14)
    single = ConditionalMutualInformation(CLASSES, running=False).start(centroids())
    assert torch.allclose(single(logits.float(), labels=labels).double(), -want, rtol=1e-6)
    assert single(logits.bfloat16(), labels=labels).dtype == torch.float32


def test_mean_over_a_batch_is_the_mutual_information() -> None:
    """With the batch's own centroids: H(Y' | Y) - H(Y' | X), from the joint distribution of the batch."""
    logits, labels = batch(200)
    p = logits.softmax(-1)
    mutual = torch.zeros((), dtype=torch.float64)
    for label in range(CLASSES):
        rows = p[labels == label]
        average = rows.mean(0)
        entropies = -(average * average.log()).sum() + (rows * rows.log()).sum(-1).mean()
        mutual += entropies * len(rows) / len(p)
    loss = ConditionalMutualInformation(CLASSES, decay=0).double()
    assert torch.allclose(-loss(logits, labels=labels), mutual, rtol=1e-12)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("maximise", [True, False])
def test_gradcheck_with_mask_and_weights(reduction: str, maximise: bool) -> None:
    logits, labels = batch(8)
    labels[:2] = -100
    weights = torch.rand(8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    weights[4] = 0
    loss = given(maximise=maximise, reduction=reduction)
    logits.requires_grad_()
    assert torch.autograd.gradcheck(lambda z: loss(z, None, labels, weights), (logits,))


def test_constant_centroids_lose_no_gradient() -> None:
    """Autograd through E KL(p || Q) *and* through Q = the class means of the batch gives the same gradient."""
    logits, labels = batch(60)
    ours = logits.clone().requires_grad_()
    ConditionalMutualInformation(CLASSES, decay=0).double()(ours, labels=labels).backward()
    whole = logits.clone().requires_grad_()
    p = whole.softmax(-1)
    average = torch.stack([p[labels == label].mean(0) for label in range(CLASSES)])
    (-(p * (p.log() - average[labels].log())).sum(-1).mean()).backward()
    assert ours.grad is not None
    assert whole.grad is not None
    assert ours.grad.norm() > 1e-2
    assert torch.allclose(ours.grad, whole.grad, rtol=1e-10, atol=1e-14)


def test_centroids_begin_as_plain_means() -> None:
    logits, labels = batch(90)
    loss = ConditionalMutualInformation(CLASSES).double()
    for start in range(0, 90, 30):
        loss(logits[start : start + 30], labels=labels[start : start + 30])
    assert torch.allclose(loss.centroids, class_means(logits.softmax(-1), labels, CLASSES), rtol=1e-12)


def test_centroids_follow_the_published_average() -> None:
    """8 samples of each class at each step: Q <- 0.9999 Q + 0.0001 mean."""
    want, loss = centroids(), given()
    labels = torch.arange(CLASSES).repeat_interleave(8)
    for step in range(5):
        logits, _ = batch(8 * CLASSES, seed=step)
        loss.update(logits, labels)
        want = 0.9999 * want + 0.0001 * logits.softmax(-1).view(CLASSES, 8, CLASSES).mean(1)
    assert torch.allclose(loss.centroids, want, rtol=1e-9)
    assert (loss.centroids - centroids()).abs().max() > 1e-5


def test_cutting_a_batch_moves_the_centroids_alike() -> None:
    logits, labels = batch(120)
    whole, cut = given(), given()
    whole.update(logits, labels)
    for start in range(0, 120, 40):
        cut.update(logits[start : start + 40], labels[start : start + 40])
    moved = (whole.centroids - centroids()).abs().max()
    assert (whole.centroids - cut.centroids).abs().max() < 1e-3 * moved


def test_centroids_are_followed_in_training_only_and_are_stored() -> None:
    logits, labels = batch()
    loss = ConditionalMutualInformation(CLASSES).double()
    loss(logits, labels=labels)
    before = {name: tensor.clone() for name, tensor in loss.state_dict().items()}
    loss.eval()(2 * logits, labels=labels)
    given()(logits, labels=labels)  # not running
    assert all(torch.equal(before[name], tensor) for name, tensor in loss.state_dict().items())
    other = ConditionalMutualInformation(CLASSES).double()
    other.load_state_dict(before)
    assert torch.equal(other(logits, labels=labels), loss.train()(logits, labels=labels))
    masked = ConditionalMutualInformation(CLASSES).double()
    weights = torch.ones(30)
    weights[7:] = 0
    masked(logits, None, labels, weights)
    assert int(masked.counts.sum()) == 7


def test_a_class_without_a_centroid_counts_as_zero() -> None:
    logits, _ = batch(4)
    known = centroids()
    known[1] = 0
    loss = ConditionalMutualInformation(CLASSES, reduction="none").double().start(known).eval()
    logits.requires_grad_()
    values = loss(logits, labels=torch.tensor([0, 1, 0, 1]))
    assert values[1::2].tolist() == [0, 0]
    assert (values[::2] < 0).all()
    values.sum().backward()
    assert logits.grad is not None
    assert not logits.grad[1::2].any()


def test_one_example_of_a_class_is_its_own_centroid() -> None:
    logits, _ = batch(CLASSES, dtype=torch.float32)
    value = ConditionalMutualInformation(CLASSES, reduction="none")(logits, labels=torch.arange(CLASSES))
    assert value.abs().max() < 1e-12


def test_extreme_logits() -> None:
    """One-hot outputs far from their centroid, columns of -inf: finite, and below the 88 nats of the floor."""
    inf = math.inf
    logits = torch.tensor([[1e4, -1e4, 0.0, -inf], [-1e4, 1e4, 0.0, -inf], [0.0, 0.0, 0.0, -inf]], requires_grad=True)
    loss = ConditionalMutualInformation(4, reduction="none", maximise=False)
    values = loss(logits, labels=torch.zeros(3, dtype=torch.int64))
    third = torch.tensor([1 / 3])
    average = torch.tensor([4 / 9, 4 / 9, 1 / 9])
    want = torch.stack([-average[0].log(), -average[0].log(), (third * (third / average).log()).sum()])
    assert torch.allclose(values, want, rtol=0, atol=1e-3)  # the spacing of float32 at logits of 1e4
    far = ConditionalMutualInformation(4, running=False, reduction="none", maximise=False)
    far.start(torch.eye(4))
    floored = far(logits, labels=torch.tensor([2, 3, 3]))
    assert floored[0].item() == pytest.approx(-math.log(torch.finfo(torch.float32).tiny), abs=1e-3)
    assert (floored < 88).all()
    (values.sum() + floored.sum()).backward()
    assert logits.grad is not None
    assert torch.isfinite(logits.grad).all()


def test_no_position_counts_gives_a_connected_zero() -> None:
    logits = torch.randn(3, CLASSES, requires_grad=True)
    loss = ConditionalMutualInformation(CLASSES)
    value = loss(logits, labels=torch.full((3,), -100))
    value.backward()
    assert value == 0.0
    assert logits.grad is not None
    assert not logits.grad.any()
    assert not loss.counts.any()


def test_training_raises_the_information_or_lowers_it() -> None:
    """A softmax regression: with the sign of MCMI the information grows beyond that of cross-entropy alone."""
    generator = torch.Generator().manual_seed(4)
    inputs = torch.randn(200, 4, generator=generator)
    labels = (inputs @ torch.randn(4, CLASSES, generator=generator)).argmax(-1)

    def information(weight: float, maximise: bool) -> float:
        matrix = torch.zeros(4, CLASSES, requires_grad=True)
        optimizer = torch.optim.SGD([matrix], lr=1.0)
        term = ConditionalMutualInformation(CLASSES, decay=0.99, maximise=maximise)
        for _ in range(25):
            logits = inputs @ matrix
            optimizer.zero_grad()
            (F.cross_entropy(logits, labels) + weight * term(logits, labels=labels)).backward()
            optimizer.step()
        exact = ConditionalMutualInformation(CLASSES, decay=0, maximise=False)
        return exact((inputs @ matrix).detach(), labels=labels).item()

    plain = information(0.0, True)
    assert information(0.5, True) > 1.05 * plain
    assert information(0.5, False) < 0.95 * plain


def test_a_trainer_makes_and_calls_it_without_a_teacher() -> None:
    assert loss_class("cmi").needs == Needs.LABELS
    assert loss_options("cmi") == {"decay": 0.9999, "maximise": True, "running": True, "limit": 16384}
    loss = make_loss("cmi", {"decay": 0.999}, Setting(classes=CLASSES, student_width=8))
    logits, labels = batch(dtype=torch.float32)
    want = ConditionalMutualInformation(CLASSES)(logits, labels=labels, denominator=7)
    assert torch.equal(loss.of(Outputs(logits, labels=labels), 7), want)


def test_columns_beyond_the_common_vocabulary_are_dropped() -> None:
    logits, labels = batch()
    padded = torch.cat([logits, torch.randn(30, 2, dtype=torch.float64)], -1)
    assert torch.equal(given(vocabulary="common")(padded, labels=labels), given()(logits, labels=labels))
    with pytest.raises(UsageError, match="The logits have 8 classes, the centroids 6"):
        given()(padded, labels=labels)


def test_mistakes_are_named() -> None:
    with pytest.raises(UsageError, match=r"Centroids of 151936 classes take 86\.0 GiB"):
        make_loss("cmi", {}, Setting(classes=151_936, student_width=8))
    assert ConditionalMutualInformation(20, limit=20).centroids.shape == (20, 20)
    with pytest.raises(UsageError, match="20 classes"):
        ConditionalMutualInformation(20, limit=19)
    with pytest.raises(UsageError, match=r"decay is 1\.5"):
        ConditionalMutualInformation(3, decay=1.5)
    with pytest.raises(UsageError, match="needs labels"):
        ConditionalMutualInformation(3)(torch.zeros(2, 3))
    with pytest.raises(UsageError, match="The logits have 4 classes, the centroids 3"):
        ConditionalMutualInformation(3)(torch.zeros(2, 4), labels=torch.zeros(2, dtype=torch.int64))
    with pytest.raises(UsageError, match="has no centroids"):
        ConditionalMutualInformation(3, running=False)(torch.zeros(2, 3), labels=torch.zeros(2, dtype=torch.int64))
    with pytest.raises(UsageError, match="not distributions"):
        ConditionalMutualInformation(3).start(torch.ones(3, 3))
