"""Pseudo-subclasses against a route of their own (SVD of the projected embeddings), LELP against cross-entropy, and the
example of the documentation, as it stands there."""

from __future__ import annotations

import io
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from compress.errors import UsageError
from compress.losses import KL, LELP, PseudoSubclasses, class_logits, loss_names

PAGE = Path(__file__).parents[2] / "docs" / "losses" / "features.md"
CLASSES, WIDTH, COUNT = 3, 12, 900


def embeddings(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Embeddings whose variance differs from direction to direction and class to class, labels, output weights."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, CLASSES, (COUNT,), generator=generator)
    mixing = torch.randn(CLASSES, WIDTH, WIDTH, generator=generator, dtype=torch.float64)
    mixing = mixing * torch.linspace(2, 0.1, WIDTH)
    noise = torch.randn(COUNT, WIDTH, generator=generator, dtype=torch.float64)
    features = torch.einsum("nij,nj->ni", mixing[labels], noise) + 3 * labels.unsqueeze(-1)
    weight = torch.randn(CLASSES, WIDTH, generator=generator, dtype=torch.float64)
    return features.to(dtype), labels, weight.to(dtype)


def projector(weight: Tensor) -> Tensor:
    """Onto the null space of W, as I - W+ W."""
    return torch.eye(weight.shape[1], dtype=torch.float64) - torch.linalg.pinv(weight.double()) @ weight.double()


@pytest.mark.parametrize("rotate", [True, False])
@pytest.mark.parametrize("null_space", [True, False])
def test_directions_span_the_principal_ones_of_the_null_space(null_space: bool, rotate: bool) -> None:
    features, labels, weight = embeddings()
    found = PseudoSubclasses.fit(features, labels, weight, 4, null_space=null_space, rotate=rotate, beta=0.5)
    plane = projector(weight) if null_space else torch.eye(WIDTH, dtype=torch.float64)
    for label in range(CLASSES):
        rows = features[labels == label] @ plane
        _, singular, axes = torch.linalg.svd(rows - rows.mean(0), full_matrices=False)
        got = found.directions[label]
        scale = 0.5 * (singular[:4].square().mean() / len(rows)).sqrt()
        assert torch.allclose(got @ got.T * scale**2, torch.eye(4, dtype=torch.float64), atol=1e-10)
        assert torch.allclose(got.T @ got * scale**2, axes[:4].T @ axes[:4], atol=1e-8)
        if null_space:
            assert torch.allclose(got @ weight.T, torch.zeros(4, CLASSES, dtype=torch.float64), atol=1e-10)
        if not rotate:
            assert torch.allclose((got * scale).abs(), axes[:4].abs(), atol=1e-7)
            assert (got.gather(-1, got.abs().argmax(-1, keepdim=True)) > 0).all()


def test_coordinates_of_a_class_have_mean_zero_and_variance_one_over_beta_squared() -> None:
    features, labels, weight = embeddings()
    found = PseudoSubclasses.fit(features, labels, weight, 5, beta=0.25)
    for label in range(CLASSES):
        coordinates = features[labels == label] @ found.directions[label].T - found.offsets[label]
        assert torch.allclose(coordinates.mean(0), torch.zeros(5, dtype=torch.float64), atol=1e-10)
        assert coordinates.square().mean().item() == pytest.approx(16)


def test_a_rotation_evens_the_variances_out() -> None:
    """In expectation, as the paper asks: over 100 seeds each coordinate has 1 / S of the variance."""
    features, labels, weight = embeddings()
    rows = features[labels == 0]

    def variances(**options: Any) -> Tensor:
        found = PseudoSubclasses.fit(features, labels, weight, 4, **options)
        return (rows @ found.directions[0].T - found.offsets[0]).var(0)

    turned = torch.stack([variances(seed=seed) for seed in range(100)])
    assert (turned.mean(0) - 1).abs().max() < 0.1
    assert variances(rotate=False)[0] > 1.5
    assert torch.equal(variances(seed=3), turned[3])
    assert not torch.allclose(turned[3], turned[4])


def test_targets_are_the_definition() -> None:
    features, labels, weight = embeddings()
    found = PseudoSubclasses.fit(features, labels, weight, 4)
    p = torch.randn(COUNT, CLASSES, generator=torch.Generator().manual_seed(1), dtype=torch.float64).softmax(-1)
    targets = found.targets(features, probabilities=p)
    for n in (0, 17, 500):
        for c in range(CLASSES):
            scores = [math.exp(float(found.directions[c, s] @ features[n] - found.offsets[c, s])) for s in range(4)]
            for s in range(4):
                want = float(p[n, c]) * scores[s] / sum(scores)
                assert targets[n, c * 4 + s].item() == pytest.approx(want, rel=1e-10)
    hard = found.targets(features.view(30, 30, WIDTH), labels=labels.view(30, 30)).view(COUNT, CLASSES, 4)
    assert torch.allclose(hard.sum(-1), F.one_hot(labels, CLASSES).double())
    assert torch.allclose(hard.sum(1), (targets.view(COUNT, CLASSES, 4) / p.unsqueeze(-1))[range(COUNT), labels])
    assert found.targets(features.float(), labels=labels).dtype == torch.float32
    assert torch.allclose(found.targets(features.float(), labels=labels).double(), hard.flatten(1), atol=1e-5)


def test_what_the_teacher_sees_does_not_move_the_subclasses() -> None:
    features, labels, weight = embeddings()
    found = PseudoSubclasses.fit(features, labels, weight, 4)
    moved = features + torch.randn(COUNT, CLASSES, dtype=torch.float64) @ weight
    assert torch.allclose(found.targets(moved, labels=labels), found.targets(features, labels=labels), atol=1e-9)


def test_it_finds_clusters_that_the_output_does_not_show() -> None:
    generator = torch.Generator().manual_seed(2)
    labels, cluster = torch.randint(0, 2, (2, 1000), generator=generator)
    features = torch.randn(1000, 8, generator=generator)
    features[:, 0] += 10 * labels
    features[:, 1] += 10 * cluster
    found = PseudoSubclasses.fit(features, labels, torch.eye(8)[:1], 2, beta=0.1, rotate=False)
    for label in (0, 1):
        split = found.targets(features, labels=labels).view(-1, 2, 2)[labels == label, label].argmax(-1)
        agreement = (split == cluster[labels == label]).double().mean()
        assert max(agreement, 1 - agreement) > 0.99


def test_fit_is_deterministic_and_leaves_the_global_state_alone() -> None:
    features, labels, weight = embeddings(torch.float32)
    state = torch.get_rng_state()
    first, again = (PseudoSubclasses.fit(features, labels, weight, 4, seed=7) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.directions, again.directions)
    order = torch.randperm(COUNT, generator=torch.Generator().manual_seed(0))
    shuffled = PseudoSubclasses.fit(features[order], labels[order], weight, 4, seed=7)
    assert torch.allclose(first.directions, shuffled.directions, rtol=1e-6, atol=1e-8)  # no sign turned


def test_a_fit_is_stored_and_read() -> None:
    features, labels, weight = embeddings()
    found = PseudoSubclasses.fit(features, labels, weight, 4)
    stored = io.BytesIO()
    torch.save(found.state_dict(), stored)
    stored.seek(0)
    again = PseudoSubclasses.from_state(torch.load(stored))
    assert torch.equal(again.targets(features, labels=labels), found.targets(features, labels=labels))


def soft_targets(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    logits, other = torch.randn(2, count, 6, generator=generator, dtype=torch.float64)
    return logits, (2 * other).softmax(-1)


def test_loss_is_cross_entropy_and_kl_plus_the_entropy() -> None:
    logits, targets = soft_targets(20, torch.Generator().manual_seed(3))
    values = LELP(reduction="none")(logits, targets)
    assert torch.allclose(LELP()(logits, targets), F.cross_entropy(logits, targets), rtol=1e-14)
    entropy = -(targets * targets.log()).sum(-1)
    assert torch.allclose(values - entropy, KL(reduction="none")(logits, targets.log()), rtol=1e-10)
    single = LELP(reduction="none")(logits.float(), targets.float())
    assert torch.allclose(single.double(), values, rtol=1e-6)
    assert LELP()(logits.bfloat16(), targets.float()).dtype == torch.float32


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_gradcheck_with_mask_and_weights(reduction: str) -> None:
    generator = torch.Generator().manual_seed(4)
    logits, targets = soft_targets(8, generator)
    labels = torch.zeros(8, dtype=torch.int64)
    labels[:2] = -100
    weights = torch.rand(8, generator=generator, dtype=torch.float64)
    weights[4] = 0
    loss = LELP(reduction=reduction)  # type: ignore[arg-type]
    logits.requires_grad_()
    assert torch.autograd.gradcheck(lambda z: loss(z, targets, labels, weights), (logits,))


def test_extreme_logits() -> None:
    inf = math.inf
    logits = torch.tensor([[1e4, -1e4, 0.0], [0.0, 1.0, -inf], [1e4, 0.0, 0.0]], requires_grad=True)
    targets = torch.tensor([[0.0, 1.0, 0.0], [0.5, 0.5, 0.0], [1.0, 0.0, 0.0]])
    values = LELP(reduction="none")(logits, targets)
    values.sum().backward()
    assert values.tolist() == pytest.approx([2e4, math.log1p(math.e) - 0.5, 0.0], rel=1e-6)
    assert logits.grad is not None
    assert torch.isfinite(logits.grad).all()
    nothing = torch.tensor([[0.0, -inf]], requires_grad=True)
    impossible = LELP()(nothing, torch.tensor([[0.5, 0.5]]))
    impossible.backward()
    assert impossible == inf
    assert nothing.grad is not None
    assert torch.isfinite(nothing.grad).all()


def test_no_position_counts_gives_a_connected_zero() -> None:
    logits = torch.randn(2, 6, requires_grad=True)
    loss = LELP()(logits, torch.full((2, 6), 1 / 6), torch.full((2,), -100))
    loss.backward()
    assert loss == 0.0
    assert logits.grad is not None
    assert not logits.grad.any()


def test_class_logits_sum_the_subclasses() -> None:
    logits = torch.randn(4, 5, 6, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    got = class_logits(logits, 2).softmax(-1)
    assert got.shape == (4, 5, 3)
    assert torch.allclose(got, logits.softmax(-1).view(4, 5, 3, 2).sum(-1), rtol=1e-12)


def test_mistakes_are_named() -> None:
    features, labels, weight = embeddings()
    with pytest.raises(UsageError, match=r"\(12, 12\) leave a null space of 0 dimensions.*null_space=False"):
        PseudoSubclasses.fit(features, labels, torch.randn(WIDTH, WIDTH), 2)
    with pytest.raises(UsageError, match=r"\(50, 12\) leave a null space of 0 dimensions; 2 subclasses need 2"):
        PseudoSubclasses.fit(features, labels, torch.randn(50, WIDTH), 2)
    with pytest.raises(UsageError, match="null space of 9 dimensions; 10 subclasses need 10"):
        PseudoSubclasses.fit(features, labels, weight, 10)
    with pytest.raises(UsageError, match="The 0 embeddings of class 3 vary in 0 directions"):
        PseudoSubclasses.fit(features, labels, torch.randn(4, WIDTH), 2)
    with pytest.raises(UsageError, match="embeddings of class 0 vary in 1 directions; 3 subclasses need 3"):
        PseudoSubclasses.fit(features[:, :1] * torch.ones(1, WIDTH), labels, weight, 3, null_space=False)
    with pytest.raises(UsageError, match="Give at least 2"):
        PseudoSubclasses.fit(features, labels, weight, 1)
    with pytest.raises(UsageError, match="A label is 2; there are 2 classes"):
        PseudoSubclasses.fit(features, labels, weight[:1], 2)
    with pytest.raises(UsageError, match=r"\(900, 12\), \(5,\), \(3, 12\)"):
        PseudoSubclasses.fit(features, labels[:5], weight, 2)
    found = PseudoSubclasses.fit(features, labels, weight, 2)
    with pytest.raises(UsageError, match="labels or probabilities"):
        found.targets(features)
    with pytest.raises(UsageError, match="not distributions"):
        LELP()(torch.zeros(1, 6), torch.ones(1, 6))
    assert "lelp" not in loss_names()


def blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)


def test_the_loop_of_the_documentation_runs() -> None:
    loop, _ = blocks()
    scope: dict[str, Any] = {}
    exec(loop, scope)
    assert torch.isfinite(scope["loss"])
    assert scope["nd"].weight.grad.any()


def test_the_example_of_the_documentation_has_its_order(capsys: pytest.CaptureFixture[str]) -> None:
    """LELP above distillation above the labels, as the mean of three seeds."""
    _, example = blocks()
    scope: dict[str, Any] = {}
    exec(example, scope)
    labels, distilled, lelp = (scope["accuracy"][name] for name in ("cross-entropy", "distillation", "LELP"))
    assert all(len(each) == 3 for each in (labels, distilled, lelp))
    assert sum(lelp) / 3 > sum(distilled) / 3 > sum(labels) / 3 + 1
    assert "LELP: " in capsys.readouterr().out
