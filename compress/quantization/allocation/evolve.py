"""A search for the widths of which the whole model loses least, by mutation and selection.

EvoPress (Sieberling et al. 2025, arXiv 2410.14649): one parent, the widths of all groups. A generation makes mutants of
it, each by some *level switches*: one group gets a wider code, others narrower ones until the budget holds again, and
what is left over goes where the table says it buys most. Mutants are compared by the model's divergence from the
original on few rows, the better part of them on more, and the best with its parent on all; the better of the two is the
next parent.

A model of some widths is put together from the payloads of the table. For a width between two levels the matrix of the
nearest level takes its place, with its error scaled to that of the width:

    W(w) = W + sqrt(e(w) / e(l)) (W(l) - W),     e: relative squared errors by the table

Mutants are compared by the geometric mean of two predictions: what such an assembled model loses, and what the table
predicts. The first knows how errors act together, and takes them for worse than they will be: when a model is rounded
block after block, each block makes good part of the errors before it. The second leaves all of that out.

The search begins with the best of the uniform widths and the table's optima (the sum of L_g^p for a few p), so that it
is never worse than these on its rows.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from compress.distributed import world
from compress.events import Events, seconds_left
from compress.modeling.structure import MatrixView
from compress.quantization.allocation.allocate import least_loss
from compress.quantization.allocation.course import Course, Subject
from compress.quantization.allocation.groups import Group, cost
from compress.quantization.allocation.measure import payload_name
from compress.quantization.allocation.options import Evolve
from compress.quantization.allocation.store import Store
from compress.quantization.allocation.table import Table

STAGE = "evolve"
POWERS = (0.6, 0.8, 1.0, 1.25)
SURVIVORS = 4
"""Of a generation's mutants, how many are compared on more rows."""
KEPT_WEIGHTS = 1 << 28
"""Decoded weights that are kept."""
REACH = 4
"""Widths by which a mutation changes a group at most."""

Widths = dict[str, int]


class Assembly:
    """Models put together from the payloads in `store`, and what they lose on the rows of `course`."""

    def __init__(self, course: Course, subject: Subject, table: Table, store: Store) -> None:
        self._course, self._subject, self._table, self._store = course, subject, table, store
        self._kept: dict[tuple[str, int], Tensor] = {}
        self._left = KEPT_WEIGHTS
        self.batches = course.count

    def loss(self, widths: Mapping[str, int], batches: Iterable[int]) -> float:
        """Of the model with these widths of its groups, on some of the batches."""
        return self._course.loss_of(
            lambda index, view, original: self._matrix(index, view, widths[view.group], original), batches
        )

    def fitness(self, widths: Mapping[str, int], batches: Iterable[int]) -> float:
        """What mutants are compared by; less is better."""
        return math.sqrt(self.loss(widths, batches) * self._table.predict(widths))

    def _matrix(self, index: int, view: MatrixView, width: int, original: Tensor) -> Tensor:
        if (view.name, width) in self._kept:
            return self._kept[view.name, width]
        level = min(self._subject.levels, key=lambda level: (abs(level - width), level))
        payload = self._store.payloads(index)[payload_name(view, level)]
        value = self._subject.matrix(view, level, payload).dequantize()
        if level != width:
            ratio = self._table.error(view.name, width) / self._table.error(view.name, level)
            value = original + ratio**0.5 * (value - original)
        if view.weights <= self._left:
            self._kept[view.name, width] = value
            self._left -= view.weights
        return value


@dataclass(frozen=True)
class State:
    """The parent after so many of all generations, its fitness on the sample, and that of the first start."""

    generation: int
    generations: int
    widths: Widths
    fitness: float
    start: float

    def to_dict(self) -> dict[str, Any]:
        return dict(vars(self))


def evolve(
    assembly: Assembly,
    groups: Sequence[Group],
    budget: int,
    fixed: Mapping[str, int],
    start: Sequence[Widths],
    table: Table,
    options: Evolve,
    seed: int,
    events: Events,
    stopped: State | None = None,
    save: Callable[[State], None] = lambda state: None,
) -> State:
    """The search among the widths of `groups` under `budget`, the others being `fixed`; it goes on from `stopped`.

    `start` are widths to begin with, besides the table's optima. `save` is told of every generation. The generations
    are drawn each by its number and the seed, so a search that was stopped ends like an unbroken one.
    """
    everything, state = range(assembly.batches), stopped
    if state is None:
        starts = [*start, *(least_loss(groups, budget, table, power) for power in POWERS)]
        losses = [assembly.fitness({**fixed, **one}, everything) for one in starts]
        best = min(range(len(starts)), key=losses.__getitem__)
        state = State(0, options.generations, starts[best], losses[best], losses[0])
    first, began = state.generation, time.monotonic()
    with events.stage(STAGE, state.generations or 1):
        while state.generation < (state.generations or 1):
            state = _generation(assembly, groups, budget, fixed, state, table, options, seed)
            if not state.generations:
                many = int(options.seconds / max(time.monotonic() - began, 1e-9))
                state = replace(state, generations=max(1, world().gather(many)[0]))
            save(state)
            events.emit(
                "step",
                stage=STAGE,
                index=state.generation,
                total=state.generations,
                name=f"generation {state.generation}",
                seconds_left=seconds_left(began, state.generation - first, state.generations - first),
                fitness=state.fitness,
            )
    return state


def _generation(
    assembly: Assembly,
    groups: Sequence[Group],
    budget: int,
    fixed: Mapping[str, int],
    state: State,
    table: Table,
    options: Evolve,
    seed: int,
) -> State:
    """The state after one more generation."""
    draw = random.Random(f"{seed} {state.generation}")
    order = draw.sample(range(assembly.batches), assembly.batches)
    few, more = order[:1], order[: max(1, assembly.batches // 4)]
    mutants: list[Widths] = []
    for _ in range(options.offspring):
        mutant = mutated(state.widths, groups, budget, table, draw)
        if mutant != state.widths and mutant not in mutants:
            mutants.append(mutant)
    for batches, survivors in ((few, SURVIVORS), (more, 1)):
        mutants.sort(key=lambda mutant: assembly.fitness({**fixed, **mutant}, batches))
        mutants = mutants[:survivors]
    widths, fitness = state.widths, state.fitness
    for mutant in mutants:
        found = assembly.fitness({**fixed, **mutant}, range(assembly.batches))
        if found < fitness:
            widths, fitness = mutant, found
    return replace(state, generation=state.generation + 1, widths=widths, fitness=fitness)


def mutated(
    widths: Mapping[str, int], groups: Sequence[Group], budget: int, table: Table, draw: random.Random
) -> Widths:
    """`widths` after one to three level switches, within `budget`."""
    offered = {group.name: sorted(group.costs) for group in groups}
    made = dict(widths)
    raised: set[str] = set()
    for _ in range(draw.choice((1, 1, 2, 3))):
        group = draw.choice(groups)
        wider = [width for width in offered[group.name] if width > made[group.name]][:REACH]
        if wider:
            made[group.name] = draw.choice(wider)
            raised.add(group.name)
    while cost(groups, made) > budget:
        others = [group for group in groups if group.name not in raised and made[group.name] > offered[group.name][0]]
        if not others:
            return dict(widths)
        group = draw.choice(others)
        narrower = [width for width in offered[group.name] if width < made[group.name]][-REACH:]
        made[group.name] = draw.choice(narrower)
    return filled(made, groups, budget, table)


def filled(widths: Widths, groups: Sequence[Group], budget: int, table: Table) -> Widths:
    """`widths` with what is left of the budget spent step by step, each where the table says a bit buys most."""
    made, left = dict(widths), budget - cost(groups, widths)
    while True:
        steps = []
        for group in groups:
            now = made[group.name]
            wider = min((width for width in group.costs if width > now), default=None)
            if wider is None or group.costs[wider] - group.costs[now] > left:
                continue
            price = group.costs[wider] - group.costs[now]
            gain = table.loss(group.name, now) - table.loss(group.name, wider)
            steps.append((gain / price, group.name, wider, price))
        if not steps:
            return made
        _, name, width, price = max(steps)
        made[name] = width
        left -= price
