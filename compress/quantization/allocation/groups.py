"""What there is to choose: groups of matrices that share a width, what each width costs, and a budget in whole bits."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from compress.codecs.base import Codec, CodecSpec
from compress.errors import UsageError
from compress.modeling.structure import MatrixView


@dataclass(frozen=True)
class Group:
    """Matrices that share a width; `costs[w]` is what they cost together at width w, in bits."""

    name: str
    names: tuple[str, ...]
    block: int
    weights: int
    costs: Mapping[int, int]


def make_groups(views: Sequence[MatrixView], codec: Codec, mixing: Mapping[str, str]) -> list[Group]:
    """The groups of `views` in the order of the model. Every bit that `codec.bits` counts is counted: scales, padding,
    and the signs of `mixing`, which sides of each matrix are mixed, by its name."""
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
    return [
        Group(
            name,
            tuple(view.name for view in group),
            group[0].block,
            sum(view.weights for view in group),
            {width: sum(costs[view.shape, sides[view.name], width] for view in group) for width in specs},
        )
        for name, group in members.items()
    ]


def specs_of(
    groups: Iterable[Group], widths: Mapping[str, int], codec: Codec, mixing: Mapping[str, str]
) -> dict[str, CodecSpec]:
    """The spec of each matrix by its name, given the width of its group."""
    return {
        name: replace(codec.spec(widths[group.name]), mixing=mixing.get(name, "none"))
        for group in groups
        for name in group.names
    }


def cost(groups: Iterable[Group], widths: Mapping[str, int]) -> int:
    """What the groups take at these widths, in bits."""
    return sum(group.costs[widths[group.name]] for group in groups)


def budget_of(
    groups: Sequence[Group], codec: Codec, bits: float | None, what: str = "this model", option: str = "--bits"
) -> int:
    """The budget in whole bits: the most of which `bits` a weight are not exceeded; of a codec of one width, what that
    costs. Raises `UsageError` when `bits` is outside of what the codec offers, and without `bits` when it offers
    several rates."""
    if not isinstance(bits, int | float | None):
        raise UsageError(f"The rate is {bits!r}.", remedy="Give a number of bits a weight.")
    name, widths = codec.config_type.name, list(codec.widths())
    if not widths:
        raise UsageError(f"The codec '{name}' has no code with these options.", remedy="compress list codecs")
    weights, only = sum(group.weights for group in groups), len(widths) == 1
    least, most = (sum(group.costs[width] for group in groups) for width in (widths[0], widths[-1]))
    if bits is None and only:
        return least
    budget = whole_bits(bits, weights) if bits is not None and math.isfinite(bits) else -1
    if not least <= budget <= most:
        rates = f"{least / weights:.3f}" if only else f"{least / weights:.3f} to {most / weights:.3f}"
        asked = "and no rate is asked for" if bits is None else f"not in {bits}"
        raise UsageError(
            f"The codec '{name}' stores {what} in {rates} bits a weight, {asked}.",
            remedy="Leave out the rate: there is no other."
            if only
            else _other_rate(name, bits, most / weights, option),
        )
    return budget


def _other_rate(name: str, asked: float | None, most: float, option: str) -> str:
    if name != "integer" and asked is not None and most < asked <= 8:
        return f"Name a rate between the two ({option}), or the codec integer (--codec), which has up to 8 bits."
    return f"Name a rate between the two ({option})."


def whole_bits(bits: float, weights: int) -> int:
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
