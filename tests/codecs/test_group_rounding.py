"""Groups under 8-bit row scales, a few columns at a time: nearest, in a metric, with kept lengths, under new scales."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from compress.codecs import QuantizedMatrix, codec
from compress.codecs.base import GainRule, Rounding
from compress.codecs.half_pyramid.table import shipped_tables as half_tables
from compress.codecs.pyramid.table import shipped_tables
from compress.codecs.rows import row_scales
from tests.codecs.payloads import normal

CPU = torch.device("cpu")
RULES: tuple[GainRule, ...] = ("projection", "norm")
CODECS = [("half_pyramid", 24, {}), ("half_pyramid", 34, {"dim": 16, "coset": False}), ("pyramid", 40, {})]


def gains_of(name: str, width: int, dim: int, coset: bool) -> Tensor:
    """The table's gains, which the encoder does not tell."""
    if name == "pyramid":
        return torch.tensor(shipped_tables()[1, dim, 127][width].levels, dtype=torch.float64)
    return torch.tensor(half_tables()[1, dim, coset, "trained"][width].shape.gains, dtype=torch.float64)


def begun(
    name: str,
    width: int,
    options: dict[str, object],
    weight: Tensor,
    gain: GainRule = "projection",
    search: bool = True,
) -> Rounding:
    """With row scales for `weight`."""
    rounder = codec(name, **options)
    rounding = rounder.rounding((weight.shape[0], weight.shape[1]), rounder.spec(width), CPU, gain, search)
    rounding.scale(0, weight)
    return rounding


def round_all(rounding: Rounding, target: Tensor, metrics: Tensor | None = None, keep: bool = False) -> Tensor:
    for index, start in enumerate(range(0, target.shape[1], rounding.dim)):
        part = target[:, start : start + rounding.dim]
        metric = None if metrics is None else metrics[index, : part.shape[1], : part.shape[1]]
        assert rounding.round(start, part, metric, keep).shape == part.shape
    return rounding.decoded()


def metrics_of(count: int, dim: int) -> Tensor:
    """Positive definite, largest eigenvalue 1; of the leading parts, which a last group has, at most that."""
    roots = normal(count, dim, 2 * dim)
    metrics = roots @ roots.mT
    return metrics / torch.linalg.eigvalsh(metrics)[:, -1:, None]


def stored(rounding: Rounding) -> QuantizedMatrix:
    matrix = rounding.finish()
    again = QuantizedMatrix.from_payload(matrix.spec, matrix.shape, matrix.payload())
    assert torch.equal(again.dequantize(), rounding.decoded())
    return again


@pytest.mark.parametrize("search", [False, True])
@pytest.mark.parametrize("columns", [160, 172, 44, 5])
@pytest.mark.parametrize(("name", "width", "options"), CODECS)
def test_weights_as_they_are_give_what_quantize_gives(
    name: str, width: int, options: dict[str, object], columns: int, search: bool
) -> None:
    weight = normal(9, columns)
    weight[4] = 0
    rounding = begun(name, width, options, weight, search=search)
    full = columns // rounding.dim * rounding.dim if search else columns
    expected = codec(name, **options).quantize(weight, rounding.finish().spec).dequantize()
    assert torch.equal(rounding.decoded(), expected), "scales are chosen with codes"
    found = round_all(rounding, weight)
    assert torch.equal(found[:, :full], expected[:, :full])
    assert rounding.scope == columns
    stored(rounding)


@pytest.mark.parametrize("columns", [160, 172])
@pytest.mark.parametrize(("name", "width", "options"), CODECS)
def test_a_search_is_nearer_in_the_metric(name: str, width: int, options: dict[str, object], columns: int) -> None:
    weight = normal(40, columns)
    found = [begun(name, width, options, weight, search=search) for search in (False, True)]
    dim = found[0].dim
    metrics = metrics_of(-(-columns // dim), dim)
    plain, searched = (_costs(weight, round_all(rounding, weight, metrics), metrics) for rounding in found)
    assert bool((searched <= plain * (1 + 1e-5)).all())
    assert float(searched.sum()) < 0.97 * float(plain.sum())
    stored(found[1])


@pytest.mark.parametrize(("name", "width", "options"), CODECS)
def test_codes_that_are_as_near_are_kept(name: str, width: int, options: dict[str, object]) -> None:
    """Rows whose codes are made worse by a search, here one of another target, keep what they have."""
    weight, columns = normal(40, 172), 172
    rounding = begun(name, width, options, weight)
    metrics = metrics_of(-(-columns // rounding.dim), rounding.dim)
    first = round_all(rounding, weight, metrics)
    again = round_all(rounding, weight, metrics, keep=True)
    assert bool((_costs(weight, again, metrics) <= _costs(weight, first, metrics) * (1 + 1e-5)).all())
    far = weight + 0.3 * normal(40, 172, seed=1)
    moved = round_all(rounding, far, metrics, keep=True)
    assert not torch.equal(moved, again)
    assert bool((_costs(far, moved, metrics) <= _costs(far, again, metrics) * (1 + 1e-5)).all())
    untouched = stored(rounding).payload()
    assert torch.equal(round_all(rounding, moved, metrics, keep=True), moved), "codes on the target stay"
    assert torch.equal(stored(rounding).payload(), untouched)


def _costs(target: Tensor, value: Tensor, metrics: Tensor) -> Tensor:
    """(t - v) M (t - v)^T of every row and group, float64 [o, groups]; what lies beyond the columns is no error."""
    dim = metrics.shape[1]
    error = torch.nn.functional.pad((target - value).double(), (0, -target.shape[1] % dim)).unflatten(1, (-1, dim))
    return torch.einsum("ogi,gij,ogj->og", error, metrics.double(), error)


@pytest.mark.parametrize("columns", [160, 172])
@pytest.mark.parametrize(("name", "width", "options"), CODECS)
def test_the_norm_rule_keeps_lengths(name: str, width: int, options: dict[str, object], columns: int) -> None:
    """No other gain of the table brings a whole group's length nearer to its target's: half a step is left."""
    weight = normal(40, columns)
    rounding = begun(name, width, options, weight, "norm", search=False)
    dim, whole = rounding.dim, columns // rounding.dim
    target = weight * (1 + 0.3 * torch.tanh(normal(40, 1)))
    value = round_all(rounding, target)
    matrix = stored(rounding)

    def lengths_of(matrix: Tensor) -> Tensor:
        return matrix[:, : whole * dim].double().unflatten(1, (-1, dim)).norm(dim=2)

    rows = row_scales(matrix.tensors["scale"], matrix.tensors["rows"]).double()
    gains = gains_of(name, width, dim, bool(options.get("coset", True)))
    possible = rows.view(-1, 1, 1) * lengths_of(matrix.integers()[0]).unsqueeze(-1) * gains
    wanted = lengths_of(target)
    nearest = (possible - wanted.unsqueeze(-1)).abs().amin(2)
    torch.testing.assert_close((lengths_of(value) - wanted).abs(), nearest, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "width", "options"), CODECS)
def test_gain_rules_are_each_best_at_what_they_are_for(name: str, width: int, options: dict[str, object]) -> None:
    weight = normal(60, 160)
    projection, norm = (round_all(begun(name, width, options, weight, gain, search=False), weight) for gain in RULES)
    assert float((weight - projection).norm()) < float((weight - norm).norm())
    dim = codec(name, **options).dim
    short, kept = (
        (value.unflatten(1, (-1, dim)).norm(dim=2) - weight.unflatten(1, (-1, dim)).norm(dim=2))
        for value in (projection, norm)
    )
    assert bool((kept.abs() <= short.abs() + 1e-5).all())
    assert float(kept.abs().mean()) < float(short.abs().mean())
    assert float(short.mean()) < 0, "a projection is shorter than what it projects"


@pytest.mark.parametrize(("name", "width", "options"), CODECS)
def test_scales_move_by_whole_steps(name: str, width: int, options: dict[str, object]) -> None:
    """Rows get their factor within half a step of a sixteenth of an octave; the integers stay as they are."""
    weight = normal(33, 172) * torch.logspace(-3, 0, 33).unsqueeze(1)
    weight[7] = 0
    rounding = begun(name, width, options, weight)
    before, integers = rounding.decoded(), stored(rounding).integers()[0]
    factors = torch.exp2(0.8 * torch.tanh(normal(33, 1)))
    rounding.rescale(factors)
    after = rounding.decoded()
    assert torch.equal(stored(rounding).integers()[0], integers)
    assert not after[7].any()
    rows = [row for row in range(33) if row != 7]
    ratio = after[rows].double().norm(dim=1) / before[rows].double().norm(dim=1)
    assert bool(((ratio / factors[rows, 0]).log2().abs() <= 1 / 32 + 1e-4).all())
    common = begun(name, width, options, weight)
    common.rescale(torch.full((33, 1), 1.0371))
    torch.testing.assert_close(common.decoded(), before * 1.0371, rtol=1e-5, atol=0)


@pytest.mark.parametrize(("name", "width", "options"), CODECS)
@pytest.mark.parametrize("shape", [(0, 16), (0, 5), (1, 1)])
def test_matrices_of_hardly_anything(name: str, width: int, options: dict[str, object], shape: tuple[int, int]) -> None:
    weight = normal(*shape)
    rounding = begun(name, width, options, weight)
    round_all(rounding, weight)
    rounding.rescale(torch.ones(shape[0], 1))
    assert stored(rounding).shape == shape
