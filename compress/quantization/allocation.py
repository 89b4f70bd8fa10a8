"""Spending a bit budget: which code width each matrix gets, so that the whole is as large as allowed and no larger.

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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from compress.codecs.base import Codec, CodecSpec
from compress.errors import UsageError
from compress.modeling.structure import MatrixView

CLOSE = 0.005
"""Bits a weight below the budget that are close enough to stop looking."""

MAX_SPREAD = 3
"""Widths tried on either side of the budget's place."""

MAX_UNITS = 1 << 20
"""Longest big integer, in bits: sums are counted in units of at least (budget / MAX_UNITS) bits, rounded up."""


@dataclass(frozen=True)
class Group:
    """Matrices that share a width; `costs[w]` is what they cost together at width w, in bits."""

    names: tuple[str, ...]
    weights: int
    costs: dict[int, int]


def uniform(
    views: Sequence[MatrixView], codec: Codec, bits: float | None, mixing: Mapping[str, str] | None = None
) -> dict[str, CodecSpec]:
    """Specs by matrix name with sum(bits of the payloads) <= `bits` * sum(weights), as near as the widths allow.

    Every bit that `codec.bits` counts is counted here, scales, padding and the signs of `mixing` (which sides of each
    matrix are mixed, by its name) included. The matrices of a group share a width. A codec of one width needs no
    `bits`. Raises `UsageError` when `bits` is outside of what the codec offers for these matrices, and without `bits`
    when it offers several rates.
    """
    mixing = mixing or {}
    groups = _groups(views, codec, mixing)
    widths = list(codec.widths())
    if not isinstance(bits, int | float | None):
        raise UsageError(f"The rate is {bits!r}.", remedy="Give a number of bits a weight.")
    if not widths:
        raise UsageError(
            f"The codec '{codec.config_type.name}' has no code with these options.", remedy="compress list codecs"
        )
    budget = _checked_budget(groups, widths, codec, bits)
    base = max(index for index, width in enumerate(widths) if _total(groups, width) <= budget)
    weights = sum(group.weights for group in groups)
    best: list[int] = [widths[base]] * len(groups)
    for spread in range(1, MAX_SPREAD + 1):
        offered = _by_preference(widths, base, spread)
        chosen = _closest(groups, offered, budget)
        if _cost(groups, chosen) > _cost(groups, best):
            best = chosen
        if budget - _cost(groups, best) <= CLOSE * weights:
            break
    return {
        name: replace(codec.spec(width), mixing=mixing.get(name, "none"))
        for group, width in zip(groups, best, strict=True)
        for name in group.names
    }


def _groups(views: Sequence[MatrixView], codec: Codec, mixing: Mapping[str, str]) -> list[Group]:
    """Groups in the order in which they are served."""
    members: dict[str, list[MatrixView]] = {}
    for view in views:
        members.setdefault(view.group, []).append(view)
    specs = {width: codec.spec(width) for width in codec.widths()}
    sides = {view.name: mixing.get(view.name, "none") for view in views}
    costs = {
        (shape, word, width): codec.bits(replace(spec, mixing=word), shape)
        for shape, word in {(view.shape, sides[view.name]) for view in views}
        for width, spec in specs.items()
    }
    last = max(view.block for view in views)

    def priority(group: list[MatrixView]) -> tuple[int, int]:
        block = group[0].block
        return min(block, last - block), sum(view.weights for view in group)

    return [
        Group(
            tuple(view.name for view in group),
            sum(view.weights for view in group),
            {width: sum(costs[view.shape, sides[view.name], width] for view in group) for width in specs},
        )
        for group in sorted(members.values(), key=priority)
    ]


def _total(groups: Sequence[Group], width: int) -> int:
    return sum(group.costs[width] for group in groups)


def _cost(groups: Sequence[Group], widths: Sequence[int]) -> int:
    return sum(group.costs[width] for group, width in zip(groups, widths, strict=True))


def _checked_budget(groups: Sequence[Group], widths: Sequence[int], codec: Codec, bits: float | None) -> int:
    """The budget in whole bits: the most of which `bits` a weight are not exceeded; of one width, what it costs."""
    weights, only = sum(group.weights for group in groups), len(widths) == 1
    least, most = _total(groups, widths[0]), _total(groups, widths[-1])
    if bits is None and only:
        return least
    budget = _whole_bits(bits, weights) if bits is not None and math.isfinite(bits) else -1
    if not least <= budget <= most:
        rates = f"{least / weights:.3f}" if only else f"{least / weights:.3f} to {most / weights:.3f}"
        asked = "and no rate is asked for" if bits is None else f"not in {bits}"
        raise UsageError(
            f"The codec '{codec.config_type.name}' stores this model in {rates} bits a weight, {asked}.",
            remedy="Leave out the rate: there is no other." if only else "Name a rate between the two (--bits).",
        )
    return budget


def _whole_bits(bits: float, weights: int) -> int:
    """The largest integer B with B / `weights` <= `bits`, where the quotient is rounded as a report rounds it.

    The floor of the product alone is at times one too small: asked for exactly the rate of an artifact, this is its
    size again.
    """
    budget = math.floor(bits * weights)
    while budget / weights > bits:
        budget -= 1
    while (budget + 1) / weights <= bits:
        budget += 1
    return budget


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
