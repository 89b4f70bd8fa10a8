"""What a table says between its levels and of widths together, and what budgets make of it."""

from __future__ import annotations

import itertools
import json
import math
import random

import pytest

from compress.codecs import codec
from compress.errors import UsageError
from compress.modeling.loading import skeleton
from compress.modeling.structure import MatrixView, matrices
from compress.quantization.allocation import (
    Rates,
    Table,
    allocate,
    by_table,
    make_groups,
    uniformly,
)
from compress.quantization.allocation.groups import Group, cost
from compress.quantization.allocation.table import levels_of
from tests import families

HALF, INTEGER = codec("half_pyramid"), codec("integer", group=32)
RATES = [1.53, 2.0, 2.25, 2.5, 3.0, 3.25, 4.0, 5.0, *(random.Random(0).uniform(1.6, 5) for _ in range(42))]


def table_of(groups: list[Group], levels: tuple[int, ...], seed: int = 0) -> Table:
    """Losses that fall by about 4 for 8 bits of width, each group's on a scale of its own."""
    draw = random.Random(seed)
    losses = {
        group.name: tuple(scale * 4.0 ** (-level / 8) * draw.uniform(0.9, 1.1) for level in levels)
        for group, scale in ((group, math.exp(draw.gauss(0, 2))) for group in groups)
    }
    together = tuple(1.5 * sum(row[place] for row in losses.values()) for place in range(len(levels)))
    errors = {name: tuple(4.0 ** (-level / 8) for level in levels) for group in groups for name in group.names}
    return Table("kl_divergence", levels, losses, together, errors)


def views_of(family: str) -> list[MatrixView]:
    sizes = {"num_hidden_layers": 5, "hidden_size": 128, "intermediate_size": 336}
    architectures = {"bert": {}, "qwen3": {"head_dim": 32}, "llama": {}}
    return matrices(skeleton(families.config(family, **{**sizes, **architectures[family]})))


def test_levels_span_the_widths() -> None:
    assert levels_of(INTEGER.widths(), INTEGER.dim) == tuple(INTEGER.widths())
    levels = levels_of(HALF.widths(), HALF.dim)
    assert (levels[0], levels[-1]) == (HALF.widths()[0], HALF.widths()[-1])
    assert set(levels) <= set(HALF.widths())
    assert max(b - a for a, b in itertools.pairwise(levels)) <= 8


def test_between_levels_the_logarithm_is_linear() -> None:
    table = Table("kl_divergence", (16, 24), {"a": (0.4, 0.1)}, (0.5, 0.1), {"a": (0.2, 0.05)})
    assert table.loss("a", 16) == pytest.approx(0.4)
    assert table.loss("a", 20) == pytest.approx(0.2, rel=1e-5)
    assert table.error("a", 22) == pytest.approx(0.2 * 4 ** (-6 / 8))
    assert Table.from_dict(json.loads(json.dumps(table.to_dict()))) == table


def test_noise_never_makes_more_bits_worse() -> None:
    table = Table("kl_divergence", (16, 20, 24), {"a": (0.2, 0.25, 0.0)}, (1, 1, 1), {"a": (0.1, 0.1, 0.1)})
    losses = [table.loss("a", width) for width in range(16, 25)]
    assert all(a > b for a, b in itertools.pairwise(losses))


def test_what_is_predicted_of_a_level_is_what_was_measured_there() -> None:
    groups = make_groups(views_of("llama"), HALF, {})
    table = table_of(groups, levels_of(HALF.widths(), HALF.dim))
    for level, together in zip(table.levels, table.together, strict=True):
        assert table.predict({group.name: level for group in groups}) == pytest.approx(together, rel=1e-4)
    wide = {group.name: 40 for group in groups}
    assert table.predict({**wide, groups[0].name: 16}) > table.predict(wide)


@pytest.mark.parametrize("family", ["llama", "bert", "qwen3"])
@pytest.mark.parametrize("how", ["uniform", "table"])
def test_fifty_rates(family: str, how: str) -> None:
    views = views_of(family)
    for method, rates in ((HALF, RATES), (INTEGER, [5.5, 6.0, 7.25, 8.0])):
        groups = make_groups(views, method, {})
        table = table_of(groups, levels_of(method.widths(), method.dim))
        weights = sum(group.weights for group in groups)
        for bits in rates:
            choose = uniformly(method) if how == "uniform" else by_table(table)
            rate = cost(groups, allocate(groups, method, Rates(bits), choose)) / weights
            assert bits - 0.02 <= rate <= bits


def test_the_tables_choice_is_the_best_of_all() -> None:
    groups = make_groups(views_of("llama"), INTEGER, {})[:4]
    table = table_of(groups, tuple(INTEGER.widths()))
    for bits in (3.5, 4.2, 6.1):
        budget = bits * sum(group.weights for group in groups)
        chosen = allocate(groups, INTEGER, Rates(bits), by_table(table))
        every = (
            dict(zip((group.name for group in groups), widths, strict=True))
            for widths in itertools.product(INTEGER.widths(), repeat=len(groups))
        )
        best = min(table.sum(widths) for widths in every if cost(groups, widths) <= budget)
        assert table.sum(chosen) == pytest.approx(best, rel=1e-12)


def test_blocks_with_a_rate_of_their_own() -> None:
    groups = make_groups(views_of("llama"), HALF, {})
    table = table_of(groups, levels_of(HALF.widths(), HALF.dim))
    weights = sum(group.weights for group in groups)
    for choose in (uniformly(HALF), by_table(table)):
        widths = allocate(groups, HALF, Rates(2.5, first=4.0, last=3.0), choose)
        for block, rate in ((0, 4.0), (4, 3.0)):
            inside = [group for group in groups if group.block == block]
            assert rate - 0.05 <= cost(inside, widths) / sum(group.weights for group in inside) <= rate
        assert 2.48 <= cost(groups, widths) / weights <= 2.5


@pytest.mark.parametrize(
    ("rates", "message"),
    [
        (Rates(2.5, first=9.0), r"stores the first block in [\d.]+ to [\d.]+ bits a weight, not in 9"),
        (Rates(1.6, first=4.0), r"leave [\d.]+ bits a weight to the others"),
        (Rates(6.0), "the codec integer"),
    ],
)
def test_rates_that_cannot_be(rates: Rates, message: str) -> None:
    groups = make_groups(views_of("llama"), HALF, {})
    with pytest.raises(UsageError, match=message):
        allocate(groups, HALF, rates, uniformly(HALF))
