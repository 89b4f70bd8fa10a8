"""The least loss under a budget: brute force over all choices, and the bound of the dual for large problems."""

from __future__ import annotations

import itertools
import math
import random

import pytest

from compress.quantization.allocation.knapsack import cheapest

Problem = tuple[list[list[int]], list[list[float]], int]


def problem(draw: random.Random, groups: int, options: int, ties: bool) -> Problem:
    sizes = [draw.randint(1, options) for _ in range(groups)]
    costs = [[draw.randint(1, 30) for _ in range(size)] for size in sizes]
    losses = [[float(draw.randint(0, 4)) if ties else draw.random() for _ in range(size)] for size in sizes]
    return costs, losses, draw.randint(sum(map(min, costs)), sum(map(max, costs)))


def total(table: list[list[float]] | list[list[int]], picks: list[int]) -> float:
    return math.fsum(row[pick] for row, pick in zip(table, picks, strict=True))


@pytest.mark.parametrize("ties", [False, True])
def test_no_choice_is_better(ties: bool) -> None:
    draw = random.Random(ties)
    for _ in range(300):
        costs, losses, budget = problem(draw, draw.randint(1, 5), 5, ties)
        picks = cheapest(costs, losses, budget)
        assert total(costs, picks) <= budget
        every = itertools.product(*(range(len(row)) for row in costs))
        best = min(total(losses, list(one)) for one in every if total(costs, list(one)) <= budget)
        assert total(losses, picks) == pytest.approx(best, abs=1e-12)


def test_the_dual_bound_of_a_large_problem_is_met() -> None:
    """For any price l, sum_g min_o (loss + l cost) - l budget is below the optimum: the best of many prices is close
    to a choice of 200 groups with 29 options each."""
    draw = random.Random(0)
    weights = [draw.choice([1 << 20, 3 << 20, 5 << 20]) for _ in range(200)]
    costs = [[weight // 8 * width + 512 * 13 for width in range(12, 41)] for weight in weights]
    losses = [
        [scale * 2.0 ** (-width / 4) for width in range(12, 41)]
        for scale in (math.exp(draw.gauss(0, 2)) for _ in weights)
    ]
    budget = int(2.5 * sum(weights))
    picks = cheapest(costs, losses, budget)
    assert total(costs, picks) <= budget
    bounds = []
    for price in (10 ** (-12 + step / 100) for step in range(800)):
        least = math.fsum(
            min(loss + price * cost for loss, cost in zip(*rows, strict=True))
            for rows in zip(losses, costs, strict=True)
        )
        bounds.append(least - price * budget)
    assert max(bounds) <= total(losses, picks) <= max(bounds) * 1.001


def test_a_budget_below_the_cheapest_is_refused() -> None:
    with pytest.raises(ValueError, match="not even the cheapest"):
        cheapest([[3, 4], [5]], [[1.0, 0.5], [1.0]], 7)
