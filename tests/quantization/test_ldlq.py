"""Rounding with feedback against textbooks in float64.

For single columns the textbook is GPTQ as Frantar et al. write it: the Cholesky factor of the inverse, column after
column. For blocks it is the definition: while the columns before a block are free to make good its error, its cost is
the Schur complement of theirs in the Hessian.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from compress.codecs import QuantizedMatrix, codec
from compress.codecs.base import Rounding
from compress.quantization.hessian import Factor, factorize
from compress.quantization.ldlq import SPAN, Order, round_matrix
from tests.codecs.payloads import normal

CPU = torch.device("cpu")
STEP = 0.4


@dataclass
class Stub(Rounding):
    """Columns are rounded `dim` at a time by `nearest(target, metric)`; notes what it is asked."""

    dim: int
    scope: int
    value: Tensor
    nearest: Callable[[Tensor, Tensor | None], Tensor]
    scales: dict[int, Tensor] = field(default_factory=dict)
    targets: dict[int, Tensor] = field(default_factory=dict)
    metrics: dict[int, Tensor] = field(default_factory=dict)

    def scale(self, start: int, values: Tensor) -> None:
        assert start % self.scope == 0
        self.scales[start] = values.clone()

    def round(self, start: int, target: Tensor, metric: Tensor | None = None, keep: bool = False) -> Tensor:
        assert start % self.dim == 0
        assert start // self.scope * self.scope in self.scales
        assert metric is not None
        found, part = self.nearest(target, metric), slice(start, start + target.shape[1])
        if keep:
            before, after = target - self.value[:, part], target - found
            better = ((after @ metric) * after).sum(1) < ((before @ metric) * before).sum(1)
            found = torch.where(better.unsqueeze(1), found, self.value[:, part])
        self.targets[start], self.metrics[start] = target.clone(), metric.clone()
        self.value[:, part] = found
        return found

    def rescale(self, factors: Tensor) -> None:
        raise AssertionError("nobody asked for other scales")

    def decoded(self) -> Tensor:
        return self.value.clone()

    def finish(self) -> QuantizedMatrix:
        raise AssertionError("rounding does not end a matrix")


def to_integers(target: Tensor, metric: Tensor | None = None) -> Tensor:
    return STEP * torch.round(target / STEP)


def book(dim: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Codewords [64, dim] that no product of intervals gives."""
    return (0.8 * normal(64, dim, seed=dim)).to(dtype)


def from_book(target: Tensor, metric: Tensor | None) -> Tensor:
    """The codeword nearest in the metric, of all."""
    assert metric is not None
    words = book(metric.shape[0], target.dtype)
    error = target.unsqueeze(1) - words
    return words[((error @ metric) * error).sum(2).argmin(1)]


def stub(rows: int, columns: int, dim: int = 1, scope: int | None = None) -> Stub:
    value = torch.zeros(rows, columns)
    return Stub(dim, columns if scope is None else scope, value, to_integers if dim == 1 else from_book)


def hessian_of(columns: int, seed: int = 0) -> Tensor:
    """Of inputs with strong correlations and very different strengths, float64."""
    mixing = normal(columns, columns, seed=seed).double() / columns**0.5 + torch.eye(columns, dtype=torch.float64)
    x = normal(3 * columns, columns, seed=seed + 1).double() @ mixing * normal(columns, seed=seed + 2).double().exp()
    return x.T @ x / len(x)


def problem(rows: int, columns: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    return normal(rows, columns, seed=seed + 10), hessian_of(columns, seed)


def solved(
    weight: Tensor, hessian: Tensor, rounding: Rounding, sort: bool = False, sweeps: int = 0, refit: bool = False
) -> tuple[Tensor, Factor, Order]:
    """What `rounding` has after `round_matrix`, with the factor and the order that it was given."""
    order = Order.of(hessian.diagonal(), rounding.dim, rounding.scope, sort)
    columns = order.columns
    factor = factorize(hessian[columns][:, columns].clone(), 0.01, "w")
    round_matrix(weight[:, columns].clone(), factor, order, rounding, sweeps=sweeps, refit=refit)
    return rounding.decoded(), factor, order


def damped(hessian: Tensor) -> Tensor:
    return hessian + 0.01 * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=torch.float64)


def loss(weight: Tensor, value: Tensor, hessian: Tensor) -> float:
    error = (weight - value).double()
    return float(torch.trace(error @ hessian @ error.T))


def gptq(weight: Tensor, hessian: Tensor) -> Tensor:
    """GPTQ (arXiv 2210.17323, algorithm 1, blocks of one column), from the first column to the last, float64."""
    rest = weight.double().clone()
    upper = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
    value = torch.zeros_like(rest)
    for column in range(rest.shape[1]):
        value[:, column] = STEP * torch.round(rest[:, column] / STEP)
        error = (rest[:, column] - value[:, column]) / upper[column, column]
        rest[:, column:] -= torch.outer(error, upper[column, column:])
    return value


def block_gptq(weight: Tensor, hessian: Tensor, dim: int) -> tuple[Tensor, dict[int, Tensor], dict[int, Tensor]]:
    """From the last block to the first: values, targets and metrics by Schur complements, float64."""
    exact, columns = weight.double(), weight.shape[1]
    value = exact.clone()
    targets, metrics = {}, {}
    for start in reversed(range(0, columns, dim)):
        stop = min(start + dim, columns)
        free, fixed = slice(0, start), slice(start, columns)
        schur = hessian[fixed, fixed] - hessian[fixed, free] @ torch.linalg.solve(
            hessian[free, free], hessian[free, fixed]
        )
        width = stop - start
        own, across = schur[:width, :width], schur[width:, :width]
        later = exact[:, stop:] - value[:, stop:]
        targets[start] = exact[:, start:stop] + later @ across @ torch.linalg.inv(own)
        metrics[start] = own / torch.linalg.eigvalsh(own)[-1]
        value[:, start:stop] = from_book(targets[start], metrics[start]).double()
    return value, targets, metrics


@pytest.mark.parametrize(("rows", "columns"), [(16, 48), (1, 172), (5, SPAN + 44), (7, 1)])
def test_single_columns_are_gptq(rows: int, columns: int) -> None:
    """The textbook's order is ours reversed."""
    weight, hessian = problem(rows, columns)
    value, _, _ = solved(weight, hessian, stub(rows, columns))
    expected = gptq(weight.flip(1), damped(hessian).flip(0, 1)).flip(1)
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-5)
    assert columns == 1 or not torch.equal(value, to_integers(weight))


@pytest.mark.parametrize("columns", [48, 172])
def test_the_strongest_columns_come_first(columns: int) -> None:
    weight, hessian = problem(8, columns)
    value, _, _ = solved(weight, hessian, stub(8, columns), sort=True)
    strongest = torch.argsort(hessian.diagonal(), descending=True, stable=True)
    expected = torch.empty(8, columns, dtype=torch.float64)
    expected[:, strongest] = gptq(weight[:, strongest], damped(hessian)[strongest][:, strongest])
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("columns", "dim"), [(16, 2), (24, 3), (SPAN + 40, 4), (44, 8), (5, 8), (19, 4)])
def test_blocks_are_schur_complements(columns: int, dim: int) -> None:
    """Targets, metrics (to a largest eigenvalue of 1) and codes, with blocks that the last columns do not fill."""
    weight, hessian = problem(6, columns, seed=dim)
    rounding = stub(6, columns, dim)
    value, _, _ = solved(weight, hessian, rounding)
    expected, targets, metrics = block_gptq(weight, damped(hessian), dim)
    assert rounding.targets.keys() == targets.keys()
    for start in targets:
        torch.testing.assert_close(rounding.targets[start].double(), targets[start], rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(rounding.metrics[start].double(), metrics[start], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(value.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("columns", "dim"), [(24, 3), (44, 8)])
def test_blocks_in_order_are_those_of_permuted_columns(columns: int, dim: int) -> None:
    weight, hessian = problem(6, columns)
    value, _, order = solved(weight, hessian, stub(6, columns, dim), sort=True)
    places = order.columns
    expected, _, _ = block_gptq(weight[:, places], damped(hessian)[places][:, places], dim)
    torch.testing.assert_close(value[:, places].double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("columns", "dim", "scope"), [(48, 1, 48), (172, 8, 172), (172, 1, 64), (44, 8, 16), (5, 8, 8), (64, 4, 16)]
)
def test_orders(columns: int, dim: int, scope: int) -> None:
    """A permutation that keeps blocks, and scopes, together, whole ones by strength and what fills none at the end."""
    importance = normal(columns).abs()
    order = Order.of(importance, dim, scope, sort=True)
    assert torch.equal(order.columns.sort().values, torch.arange(columns))
    assert torch.equal(order.columns[order.places], torch.arange(columns))
    for unit in {dim, scope if scope < columns else dim}:
        whole = columns // unit
        blocks = order.columns[: whole * unit].view(whole, unit)
        assert torch.equal(blocks // unit, (blocks[:, :1] // unit).expand(-1, unit))
        assert torch.equal(order.columns[whole * unit :] // unit, torch.full((columns - whole * unit,), whole))
    outer = scope if scope < columns else dim
    sums = importance[order.columns[: columns // outer * outer]].view(-1, outer).sum(1)
    assert torch.equal(sums, sums.sort().values)
    for start in range(0, columns // outer * outer, outer):
        inside = order.columns[start : start + outer].view(-1, dim)
        assert torch.equal(inside, inside[:, :1] + torch.arange(dim))
        strengths = importance[inside].sum(1)
        assert torch.equal(strengths, strengths.sort().values)
    plain = Order.of(importance, dim, scope, sort=False)
    assert torch.equal(plain.columns, torch.arange(columns))


@pytest.mark.parametrize(("columns", "dim", "scope"), [(300, 1, 300), (300, 8, 300), (400, 1, 64), (44, 1, 16)])
def test_spans_cover_every_place_once(columns: int, dim: int, scope: int) -> None:
    """From the last to the first, whole blocks and scopes in each."""
    order = Order.of(normal(columns).abs(), dim, scope, sort=True)
    spans = list(order.spans())
    assert [place for first, last in spans for place in reversed(range(first, last))] == [*reversed(range(columns))]
    assert all(first % (dim if scope == columns else scope) == 0 for first, _ in spans)


@pytest.mark.parametrize("sort", [False, True])
@pytest.mark.parametrize(("columns", "dim", "scope"), [(96, 1, 16), (172, 1, 64), (44, 4, 16), (300, 2, 100)])
def test_scales_are_chosen_for_what_a_scope_should_be(columns: int, dim: int, scope: int, sort: bool) -> None:
    """W and what makes good the later errors best while everything before is free: a Schur complement again."""
    weight, hessian = problem(4, columns)
    rounding = stub(4, columns, dim, scope)
    value, _, order = solved(weight, hessian, rounding, sort=sort)
    places = order.columns
    exact, ordered = weight.double()[:, places], damped(hessian)[places][:, places]
    error = exact - value.double()[:, places]
    assert sorted(rounding.scales) == list(range(0, columns, scope))
    for begin in range(0, columns, scope):
        end = min(begin + scope, columns)
        free, width = slice(0, begin), end - begin
        schur = ordered[begin:, begin:] - ordered[begin:, free] @ torch.linalg.solve(
            ordered[free, free], ordered[free, begin:]
        )
        update = error[:, end:] @ schur[width:, :width] @ torch.linalg.inv(schur[:width, :width])
        expected = torch.empty(4, width, dtype=torch.float64)
        inside = places[begin:end] - places[begin:end].min()
        expected[:, inside] = exact[:, begin:end] + update
        found = rounding.scales[int(places[begin:end].min())]
        torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-3)


def test_scales_of_whole_rows_are_those_of_the_weight() -> None:
    weight, hessian = problem(4, 44)
    rounding = stub(4, 44, 8)
    solved(weight, hessian, rounding, sort=True)
    assert list(rounding.scales) == [0]
    assert torch.equal(rounding.scales[0], weight)


CODECS = ["half_pyramid:24", "half_pyramid:18", "pyramid:40", "integer:3", "integer:2"]


def coded(name: str, shape: tuple[int, int], search: bool = True) -> Rounding:
    title, _, width = name.partition(":")
    rounder = codec(title)
    return rounder.rounding(shape, rounder.spec(int(width)), CPU, search=search)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", CODECS)
def test_sweeps_never_raise_the_error(name: str, seed: int) -> None:
    weight, hessian = problem(16, 172, seed)
    losses = [
        loss(weight, solved(weight, hessian, coded(name, (16, 172)), True, sweeps)[0], damped(hessian))
        for sweeps in range(4)
    ]
    assert all(after <= before * (1 + 1e-5) for before, after in itertools.pairwise(losses))
    assert losses[3] < losses[0]


@pytest.mark.parametrize("dim", [1, 4])
def test_a_sweep_ends_where_no_block_alone_can_be_better(dim: int) -> None:
    """After many sweeps, every block has the best of all codewords for the others as they are."""
    weight, hessian = problem(5, 20)
    rounding = stub(5, 20, dim)
    value, _, _ = solved(weight, hessian, rounding, sweeps=60)
    metric, error = damped(hessian), (weight - value).double()
    least = ((error @ metric) * error).sum(1)
    words = STEP * torch.arange(-20.0, 21.0).unsqueeze(1) if dim == 1 else book(4)
    for start in range(0, 20, dim):
        for word in words:
            other = value.clone()
            other[:, start : start + dim] = word
            changed = (weight - other).double()
            assert bool((((changed @ metric) * changed).sum(1) >= least * (1 - 1e-5)).all())


@pytest.mark.parametrize("name", CODECS)
def test_the_error_is_less_than_that_of_the_nearest(name: str) -> None:
    title, _, width = name.partition(":")
    rounder = codec(title)
    for seed in range(3):
        weight, hessian = problem(24, 96, seed)
        nearest = rounder.quantize(weight, rounder.spec(int(width))).dequantize()
        value, _, _ = solved(weight, hessian, coded(name, (24, 96)), sort=True)
        assert loss(weight, value, hessian) < 0.9 * loss(weight, nearest, hessian)


@pytest.mark.parametrize("name", ["half_pyramid:24", "pyramid:40"])
def test_search_helps_on_average(name: str) -> None:
    ratios = []
    for seed in range(6):
        weight, hessian = problem(24, 96, seed)
        found = [solved(weight, hessian, coded(name, (24, 96), search), True)[0] for search in (True, False)]
        ratios.append(loss(weight, found[0], damped(hessian)) / loss(weight, found[1], damped(hessian)))
    assert sum(ratios) / len(ratios) < 1


@pytest.mark.parametrize("name", ["half_pyramid:24", "pyramid:40", "integer:3"])
def test_refitted_scales_help_on_average(name: str) -> None:
    ratios = []
    for seed in range(6):
        weight, hessian = problem(24, 96, seed)
        found = [solved(weight, hessian, coded(name, (24, 96)), True, 1, refit)[0] for refit in (True, False)]
        ratios.append(loss(weight, found[0], damped(hessian)) / loss(weight, found[1], damped(hessian)))
    assert sum(ratios) / len(ratios) < 1


@pytest.mark.parametrize("name", ["half_pyramid:24", "pyramid:40", "integer:3"])
@pytest.mark.parametrize(("rows", "columns"), [(3, 172), (3, 44), (2, 5), (1, 64), (1, 1), (0, 16)])
def test_any_shape(name: str, rows: int, columns: int) -> None:
    """What is decoded is what is stored, for groups and scopes that the columns do not fill too."""
    weight, hessian = problem(rows, columns)
    rounding = coded(name, (rows, columns))
    value, _, _ = solved(weight, hessian, rounding, sort=True, sweeps=1, refit=True)
    matrix = rounding.finish()
    again = QuantizedMatrix.from_payload(matrix.spec, (rows, columns), matrix.payload())
    assert torch.equal(again.dequantize(), value)
    assert loss(weight, value, hessian) <= 0.5 * loss(weight, torch.zeros_like(weight), hessian)


@pytest.mark.parametrize("name", ["half_pyramid:24", "pyramid:40", "integer:3"])
def test_inputs_that_share_nothing_are_rounded_to_the_nearest(name: str) -> None:
    """With a diagonal Hessian of equal entries there is nothing to make good. (A last group that is not full may still
    get better: a search knows that what fills it does not count.)"""
    weight, columns = normal(8, 172), 160
    title, _, width = name.partition(":")
    rounder = codec(title)
    value, _, _ = solved(weight, torch.eye(172, dtype=torch.float64), coded(name, (8, 172)), sweeps=2)
    nearest = rounder.quantize(weight, rounder.spec(int(width))).dequantize()
    assert torch.equal(value[:, :columns], nearest[:, :columns])
    rest = weight[:, columns:]
    assert bool(((rest - value[:, columns:]).norm(dim=1) <= (rest - nearest[:, columns:]).norm(dim=1) + 1e-6).all())
