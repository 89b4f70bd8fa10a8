"""From a rate to the width of every group: the budget, blocks with a rate of their own, and the method for the rest."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from compress.codecs.base import Codec, CodecSpec
from compress.errors import UsageError
from compress.modeling.structure import MatrixView
from compress.quantization.allocation.groups import Group, budget_of, cost, make_groups, specs_of
from compress.quantization.allocation.knapsack import cheapest
from compress.quantization.allocation.table import Table
from compress.quantization.allocation.uniform import uniform_widths

Choose = Callable[[Sequence[Group], int], dict[str, int]]
"""The width of each group, by its name, for a budget in bits that holds all of them at the least width."""


@dataclass(frozen=True)
class Rates:
    """Bits a weight: of all matrices together, and of those in the `first` and in the `last` block where these have a
    rate of their own, which counts towards the whole. None: of all, the only rate of the codec; of a block, none of
    its own."""

    bits: float | None
    first: float | None = None
    last: float | None = None

    @property
    def text(self) -> str:
        """Of those that are given."""
        given = {"bits": self.bits, "first": self.first, "last": self.last}
        return " ".join(f"{name} {value!r}" for name, value in given.items() if value is not None)


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
    groups = make_groups(views, codec, mixing)
    return specs_of(groups, allocate(groups, codec, Rates(bits), uniformly(codec)), codec, mixing)


def uniformly(codec: Codec) -> Choose:
    """Nearly one width for all."""
    return lambda groups, budget: uniform_widths(groups, codec.widths(), budget)


def by_table(table: Table) -> Choose:
    """The least sum of what the groups lose by `table`, exactly."""
    return partial(least_loss, table=table)


def least_loss(groups: Sequence[Group], budget: int, table: Table, power: float = 1.0) -> dict[str, int]:
    """The widths of the least sum_g L_g(w_g)^`power` under the budget."""
    offered = [sorted(group.costs) for group in groups]
    costs = [[group.costs[width] for width in widths] for group, widths in zip(groups, offered, strict=True)]
    losses = [
        [table.loss(group.name, width) ** power for width in widths]
        for group, widths in zip(groups, offered, strict=True)
    ]
    picks = cheapest(costs, losses, budget)
    return {group.name: widths[pick] for group, widths, pick in zip(groups, offered, picks, strict=True)}


def allocate(groups: Sequence[Group], codec: Codec, rates: Rates, choose: Choose) -> dict[str, int]:
    """The width of each group, by its name, at most `rates.bits` a weight in all. Blocks with a rate of their own get
    it uniformly; `choose` says what the others get.

    Raises `UsageError` for a rate that the codec does not have, also for what those blocks leave to the others.
    """
    budget = budget_of(groups, codec, rates.bits)
    free = free_groups(groups, rates)
    names = {group.name for group in free}
    widths: dict[str, int] = {}
    for block, (rate, end) in _own_rates(groups, rates).items():
        inside = [group for group in groups if group.block == block and group.name not in names]
        own = budget_of(inside, codec, rate, f"the {end} block", f"--{end}-bits")
        widths |= uniform_widths(inside, codec.widths(), own)
    left = budget - cost((group for group in groups if group.name in widths), widths)
    least, most = (sum(pick(group.costs.values()) for group in free) for pick in (min, max))
    if left < least:
        weights = sum(group.weights for group in free)
        rest = max(left, 0) / max(weights, 1)
        raise UsageError(
            f"The rates of the first and the last block leave {rest:.3f} bits a weight to the others, and the "
            f"codec '{codec.config_type.name}' has no less than {least / max(weights, 1):.3f}.",
            remedy="Raise --bits, or lower --first-bits or --last-bits.",
        )
    return {**widths, **(choose(free, min(left, most)) if free else {})}


def free_groups(groups: Sequence[Group], rates: Rates) -> list[Group]:
    """The groups outside of the blocks that have a rate of their own."""
    own = _own_rates(groups, rates)
    return [group for group in groups if group.block not in own]


def _own_rates(groups: Sequence[Group], rates: Rates) -> dict[int, tuple[float, str]]:
    """The rate of each block that has its own, and which of the two it is."""
    blocks = [group.block for group in groups]
    named = ((min(blocks), rates.first, "first"), (max(blocks), rates.last, "last"))
    return {block: (rate, end) for block, rate, end in named if rate is not None}
