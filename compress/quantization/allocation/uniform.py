"""Nearly one width for all matrices, so that the whole is as large as allowed and no larger.

A codec offers integer widths (bits of one group's code); a budget of 3.25 bits a weight lies between two of them once
row scales and padding are counted. So most groups get one of two neighbouring widths, B and B + 1. Choosing which is a
subset-sum problem: the extra bits of the widened groups must come as near to the rest of the budget as they can. It is
solved exactly, with one big integer as the set of reachable sums for each group (bit s set: sum s can be reached by
this group and those after it), and walked in an order that says who is served first:

    distance of the block to the nearer end of the stack, then fewest weights, then position in the model.

Blocks at the ends lose most when they are rounded (what the first one breaks, all the others inherit, and nothing
repairs the last one), and of two groups with the same gain per bit the smaller leaves more of the budget to others.
Where two widths come no closer than `CLOSE`, wider spreads (B - 1 ... B + 2, and so on) are tried: in a model of few
groups they reach sums that two widths cannot.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from compress.quantization.allocation.groups import Group

CLOSE = 0.005
"""Bits a weight below the budget that are close enough to stop looking."""

MAX_SPREAD = 3
"""Widths tried on either side of the budget's place."""

MAX_UNITS = 1 << 20
"""Longest big integer, in bits: sums are counted in units of at least (budget / MAX_UNITS) bits, rounded up."""


def uniform_widths(groups: Sequence[Group], widths: Sequence[int], budget: int) -> dict[str, int]:
    """A width for each group, all nearly the same, that cost at most `budget` bits, which holds the groups at the first
    of `widths`."""
    last = max(group.block for group in groups)
    served = sorted(groups, key=lambda group: (min(group.block, last - group.block), group.weights))
    base = max(index for index, width in enumerate(widths) if _total(served, width) <= budget)
    weights = sum(group.weights for group in served)
    best = [widths[base]] * len(served)
    for spread in range(1, MAX_SPREAD + 1):
        offered = _by_preference(widths, base, spread)
        chosen = _closest(served, offered, budget)
        if _cost(served, chosen) > _cost(served, best):
            best = chosen
        if budget - _cost(served, best) <= CLOSE * weights:
            break
    return {group.name: width for group, width in zip(served, best, strict=True)}


def _total(groups: Sequence[Group], width: int) -> int:
    return sum(group.costs[width] for group in groups)


def _cost(groups: Sequence[Group], widths: Sequence[int]) -> int:
    return sum(group.costs[width] for group, width in zip(groups, widths, strict=True))


def _by_preference(widths: Sequence[int], base: int, spread: int) -> list[int]:
    """The widths within `spread` of the budget's place: B + 1, B, then B + 2, B - 1, and so on."""
    order = [index for step in range(spread) for index in (base + 1 + step, base - step)]
    return [widths[index] for index in order if 0 <= index < len(widths)]


def _closest(groups: Sequence[Group], offered: Sequence[int], budget: int) -> list[int]:
    """One `offered` width for each group: the largest reachable sum <= budget, earlier groups choosing first."""
    floor = [min(group.costs[width] for width in offered) for group in groups]
    extras = [[group.costs[width] - low for width in offered] for group, low in zip(groups, floor, strict=True)]
    room = budget - sum(floor)
    unit = max(math.gcd(*(extra for row in extras for extra in row)), -(-room // MAX_UNITS), 1)
    steps = [[-(-extra // unit) for extra in row] for row in extras]
    room //= unit
    mask = (1 << (room + 1)) - 1
    reachable = [1]  # of no groups: the sum 0
    for row in reversed(steps):
        sums = 0
        for step in set(row):
            sums |= reachable[-1] << step
        reachable.append(sums & mask)
    left = reachable.pop().bit_length() - 1
    chosen = []
    for row in steps:
        after = reachable.pop()
        pick = next(i for i, step in enumerate(row) if step <= left and after >> (left - step) & 1)
        chosen.append(offered[pick])
        left -= row[pick]
    return chosen
