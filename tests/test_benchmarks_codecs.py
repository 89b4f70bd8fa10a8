"""The baselines that `benchmarks/codecs.py` compares with are what they say."""

from __future__ import annotations

import itertools
import math
import shutil
from pathlib import Path
from types import ModuleType

import pytest
import torch

from compress import ops

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def greedy(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(FOLDER)
    if not any(map(shutil.which, ("c++", "g++", "clang++"))):
        pytest.skip("no C++ compiler")
    return pytest.importorskip("greedy")


@pytest.fixture
def scalar(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(FOLDER)
    return pytest.importorskip("scalar_quantizers")


@pytest.mark.parametrize(("dim", "pulses"), [(8, 14), (16, 28), (16, 5)])
def test_greedy_search_is_the_same_in_cpp_and_numpy_and_worse_than_the_exact_one(
    greedy: ModuleType, dim: int, pulses: int
) -> None:
    x = torch.randn(4000, dim, generator=torch.Generator().manual_seed(dim))
    levels = torch.tensor([0.6, 0.9, 1.2, 1.6]) * (0.8 * dim / pulses)
    y, gain = greedy.Greedy().encode(x, levels, pulses)
    assert bool((y.to(torch.int64).abs().sum(1) == pulses).all())
    other_y, other_gain = greedy.by_numpy(x.numpy(), levels.numpy(), pulses)
    assert (other_y == y.numpy()).mean() > 0.999
    assert (other_gain == gain.numpy()).mean() > 0.999

    def error(y: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
        return (x - levels[gain].unsqueeze(-1) * y).double().square().sum(1)

    exact = error(*ops.pyramid_encode(x, torch.ones(4000), levels, pulses, pulses))
    assert bool((exact <= error(y, gain) * (1 + 1e-5)).all())
    assert 1.005 < float(error(y, gain).sum() / exact.sum()) < 1.2


def test_greedy_search_finds_nearly_the_largest_cosine(greedy: ModuleType) -> None:
    """All of 8 coordinates and 3 pulses by brute force: the literature has the best one in 94 to 97 % of tiny cases."""
    vectors = torch.tensor([y for y in itertools.product(range(4), repeat=8) if sum(y) == 3], dtype=torch.float32)
    x = torch.randn(500, 8, generator=torch.Generator().manual_seed(5))
    cosines = x.abs() @ (vectors / vectors.norm(dim=1, keepdim=True)).T
    y = greedy.Greedy().encode(x, torch.ones(1), 3)[0].float()
    found = (x * y).sum(1) / y.norm(dim=1)
    assert float((found >= cosines.max(1).values - 1e-5).float().mean()) > 0.9


def test_lloyd_max_is_the_published_one(scalar: ModuleType) -> None:
    """Max 1960: 0.1175, 0.03454 and 0.009497 for 4, 8 and 16 levels; two levels are +-sqrt(2 / pi)."""
    assert [scalar.lloyd_max(bits)[1] for bits in (2, 3, 4)] == pytest.approx([0.1175, 0.03454, 0.009497], rel=1e-3)
    assert scalar.lloyd_max(1)[0].tolist() == pytest.approx([-math.sqrt(2 / math.pi), math.sqrt(2 / math.pi)])


def test_nf4_is_the_published_table(scalar: ModuleType) -> None:
    values = scalar.normal_float().tolist()
    assert len(values) == 16 and values[7] == 0
    assert values[0] == -1 and values[15] == 1
    assert [values[1], values[6], values[8], values[14]] == pytest.approx(
        [-0.6961928, -0.0910500, 0.0795803, 0.7229568], abs=1e-6
    )


def test_integers_are_rounded_to_their_nearest(scalar: ModuleType) -> None:
    """The largest of a group is exact, no error is above half a step, and searching the scale only helps."""
    weight = torch.randn(4, 128, generator=torch.Generator().manual_seed(2))
    after, bits = scalar.round_to_nearest(weight, 4, 64, "absmax")
    step = weight.view(-1, 64).abs().amax(1, keepdim=True) / 7
    assert bits == 4.25
    assert bool(((after - weight).view(-1, 64).abs() <= 0.51 * step).all())
    errors = [
        float((scalar.round_to_nearest(weight, 4, 64, mode)[0] - weight).square().sum())
        for mode in ("absmax", "min-max", "best clip")
    ]
    assert errors == sorted(errors, reverse=True)
