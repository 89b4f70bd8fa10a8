"""The least loss under a budget, exactly: one option for each group, a sum of costs that is bounded, a sum of losses
that is least (a multiple-choice knapsack).

    minimise  sum_g loss_g(o_g)   with   sum_g cost_g(o_g) <= budget,   o_g one of the options of group g

Groups are added one by one to a list of states (cost so far, loss so far). A state stays if nothing cheaper is as good
(Nemhauser and Ullmann 1969), and if it can still beat the best solution known: what the other groups must at least lose
with what is left of the budget is the convex relaxation of their options, whose minimum is found by taking steps along
their lower hulls in the order of gain per cost, and which is an upper bound on what any state can reach. The best
solution known at the start is that walk's last whole step, filled up. With losses like those of rounded matrices few
states remain: 320 groups of 30 options take a second.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

TOLERANCE = 1e-12
"""Of losses, relative to their sum: rounding errors of the bounds must not cut off the optimum."""


@dataclass(frozen=True)
class _Steps:
    """Steps along the lower hulls of some groups, steepest first: the relaxation as a polygon of losses over costs."""

    costs: Floats
    losses: Floats

    def least(self, budgets: Floats) -> Floats:
        """The relaxed loss for each budget; infinite below the cheapest options."""
        found: Floats = np.interp(budgets, self.costs, self.losses, left=np.inf)
        return found


def cheapest(costs: Sequence[Sequence[int]], losses: Sequence[Sequence[float]], budget: int) -> list[int]:
    """The option of each group: the least sum of `losses` whose sum of `costs` is at most `budget`. Of equal sums the
    one found first. Raises `ValueError` when not even the cheapest options fit."""
    groups = [
        _undominated(np.asarray(c, np.int64), np.asarray(v, np.float64)) for c, v in zip(costs, losses, strict=True)
    ]
    if sum(int(group[1][0]) for group in groups) > budget:
        raise ValueError("The budget holds not even the cheapest options.")
    hulls = [_hull(group_costs, group_losses) for _, group_costs, group_losses in groups]
    best = _walk(groups, hulls, budget)
    ceiling = sum(float(group[2][pick]) for group, pick in zip(groups, best, strict=True))
    margin = TOLERANCE * sum(float(np.abs(group[2]).max()) for group in groups)
    rest = [_relaxed(groups[index + 1 :], hulls[index + 1 :]) for index in range(len(groups))]
    cost, loss = np.zeros(1, np.int64), np.zeros(1)
    trace: list[tuple[Integers, Integers]] = []
    for (_, group_costs, group_losses), bound in zip(groups, rest, strict=True):
        all_costs = (cost[:, None] + group_costs[None, :]).ravel()
        all_losses = (loss[:, None] + group_losses[None, :]).ravel()
        reach = all_losses + bound.least((budget - all_costs).astype(np.float64))
        kept = np.flatnonzero(reach <= ceiling + margin)
        kept = kept[np.lexsort((all_losses[kept], all_costs[kept]))]
        lowest = np.minimum.accumulate(all_losses[kept])
        better = np.ones(len(kept), bool)
        better[1:] = lowest[1:] < lowest[:-1]
        kept = kept[better]
        trace.append((kept // len(group_costs), kept % len(group_costs)))
        cost, loss = all_costs[kept], all_losses[kept]
    if len(loss) and float(loss.min()) < ceiling:
        state = int(loss.argmin())
        for index in reversed(range(len(groups))):
            parents, picks = trace[index]
            best[index], state = int(picks[state]), int(parents[state])
    return [int(group[0][pick]) for group, pick in zip(groups, best, strict=True)]


Group = tuple[Integers, Integers, Floats]
"""The numbers of the options that are worth taking, by ascending cost, their costs and their losses."""


def _undominated(costs: Integers, losses: Floats) -> Group:
    order = np.lexsort((losses, costs))
    lowest = np.minimum.accumulate(losses[order])
    better = np.ones(len(order), bool)
    better[1:] = lowest[1:] < lowest[:-1]
    kept = order[better].astype(np.int64)
    return kept, costs[kept], losses[kept]


def _hull(costs: Integers, losses: Floats) -> list[int]:
    """The options on the lower convex hull, by ascending cost."""
    hull: list[int] = []
    for point in range(len(costs)):
        while len(hull) > 1:
            a, b = hull[-2], hull[-1]
            before = (losses[b] - losses[a]) * (costs[point] - costs[a])
            if before >= (losses[point] - losses[a]) * (costs[b] - costs[a]):
                hull.pop()
            else:
                break
        hull.append(point)
    return hull


def _hull_steps(groups: Sequence[Group], hulls: Sequence[list[int]]) -> list[tuple[float, int, int, int, float]]:
    """(slope, group, option arrived at, cost, loss) of every step, steepest fall first."""
    steps = []
    for index, ((_, costs, losses), hull) in enumerate(zip(groups, hulls, strict=True)):
        for a, b in pairwise(hull):
            cost, loss = int(costs[b] - costs[a]), float(losses[b] - losses[a])
            steps.append((loss / cost, index, b, cost, loss))
    return sorted(steps)


def _relaxed(groups: Sequence[Group], hulls: Sequence[list[int]]) -> _Steps:
    steps = _hull_steps(groups, hulls)
    start = sum(int(costs[0]) for _, costs, _ in groups), sum(float(losses[0]) for _, _, losses in groups)
    return _Steps(
        start[0] + np.cumsum([0.0, *(step[3] for step in steps)]),
        start[1] + np.cumsum([0.0, *(step[4] for step in steps)]),
    )


def _walk(groups: Sequence[Group], hulls: Sequence[list[int]], budget: int) -> list[int]:
    """A good solution: steps that fit, steepest first, then for each group the best option that still fits."""
    picks = [0] * len(groups)
    left = budget - sum(int(costs[0]) for _, costs, _ in groups)
    blocked: set[int] = set()
    for _, index, option, cost, _ in _hull_steps(groups, hulls):
        if index not in blocked and cost <= left:
            picks[index] = option
            left -= cost
        else:
            blocked.add(index)
    for index, (_, costs, _) in enumerate(groups):
        room = int(costs[picks[index]]) + left
        option = int(np.searchsorted(costs, room, side="right")) - 1
        left = room - int(costs[option])
        picks[index] = option
    return picks
