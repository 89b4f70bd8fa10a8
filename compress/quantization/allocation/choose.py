"""Spending a budget by what the model loses: measure, allocate, search on if asked to, and say what is expected."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any

from compress.data.calibration import Batch
from compress.events import Events
from compress.quantization.allocation.allocate import (
    Choose,
    Rates,
    allocate,
    by_table,
    free_groups,
    least_loss,
    uniformly,
)
from compress.quantization.allocation.course import Course, Subject
from compress.quantization.allocation.evolve import Assembly, State, Widths, evolve
from compress.quantization.allocation.groups import Group, budget_of, cost, specs_of
from compress.quantization.allocation.measure import measure
from compress.quantization.allocation.options import Evolve, Sensitivity
from compress.quantization.allocation.source import Resident
from compress.quantization.allocation.store import TABLE, Store
from compress.quantization.allocation.table import Table
from compress.quantization.allocation.trial import trial_loss

TRIALS = "trials"
FINALISTS = (0.7, 1.25, 0.5)
"""Powers of losses, whose optima are tried besides the search's end and the table's optimum."""


@dataclass(frozen=True)
class Choice:
    """The width of each group by its name, and `figures` for a report."""

    widths: dict[str, int]
    figures: dict[str, Any]


@dataclass(frozen=True)
class Data:
    """Batches for `calibration`, those that the table is `measured` on, and a `sample` for a search; made when they are
    needed, since of a table that is there already none are."""

    calibration: Callable[[], Sequence[Batch]]
    measured: Callable[[], Sequence[Batch]]
    sample: Callable[[], Sequence[Batch]]


@dataclass(frozen=True)
class Problem:
    """Which widths the `groups` of a model get by `method`, under `rates`: `blocks` and `subject` are what is measured
    on `data`, `store` has what was measured before, and `seed` draws mutants."""

    blocks: Resident
    subject: Subject
    groups: Sequence[Group]
    rates: Rates
    method: Sensitivity | Evolve
    data: Data
    store: Store
    seed: int
    events: Events

    def solve(self) -> Choice:
        """The widths that cost at most `rates` and by which the model loses least.

        Raises `UsageError` for rates that the codec does not have, `NumericsError` for inputs without a factor.
        """
        plain = self._allocated(uniformly(self.subject.codec))  # which refuses before anything is measured
        table = self._table()
        widths = self._allocated(by_table(table))
        more: dict[str, Any] = {}
        if isinstance(self.method, Evolve):
            widths, more = self._searched(self.method, table, widths, plain)
        figures: dict[str, Any] = {
            "method": self.method.text,
            "figure": table.figure,
            "predicted": table.predict(widths),
            "predicted_uniform": table.predict(plain),
        }
        text = f"{self.method.name}: a {table.label} of {figures['predicted']:.4g} is predicted, and of "
        text += f"{figures['predicted_uniform']:.4g} for the same rate spent uniformly"
        self.events.emit("note", text=text)
        return Choice(widths, {**figures, **more})

    def _allocated(self, choose: Choose) -> Widths:
        return allocate(self.groups, self.subject.codec, self.rates, choose)

    def _table(self) -> Table:
        """The table that is in the store already, or a new one."""
        fact = self.store.fact(TABLE)
        if fact is not None:
            return Table.from_dict(fact)
        batches = self.data.calibration(), self.data.measured()
        table = measure(self.blocks, self.subject, *batches, self.store, self.events)
        self.store.put_fact(TABLE, table.to_dict())
        return table

    def _searched(self, method: Evolve, table: Table, widths: Widths, plain: Widths) -> tuple[Widths, dict[str, Any]]:
        """What evolution makes of the table's optimum, or what a trial finds better, and its figures. The store has its
        state after every generation, under a name that no other search has."""
        unit = f"search/{self.rates.text} {method.text}"
        free = free_groups(self.groups, self.rates)
        if not free:
            return widths, {}
        names = {group.name for group in free}
        fixed = {name: width for name, width in widths.items() if name not in names}
        inside = [group for group in self.groups if group.name in fixed]
        budget = budget_of(self.groups, self.subject.codec, self.rates.bits) - cost(inside, fixed)
        course = cache(lambda: Course(self.blocks, self.subject.views, self.data.sample()))
        fact = self.store.fact(unit)
        state = None if fact is None else State(**fact)
        if state is None or state.generation < state.generations:
            assembly = Assembly(course(), self.subject, table, self.store)
            starts = [{name: plain[name] for name in names}]
            state = evolve(
                assembly, free, budget, fixed, starts, table, method, self.seed, self.events, state,
                lambda reached: self.store.put_fact(unit, reached.to_dict()),
            )  # fmt: skip
        figures = {"generations": state.generation, "fitness": state.fitness, "fitness_uniform": state.start}
        found = {**fixed, **state.widths}
        if self.subject.rounding is None or method.finalists == 1:
            return found, figures
        bent = {f"L^{power}": {**fixed, **least_loss(free, budget, table, power)} for power in FINALISTS}
        finalists = dict(list({"search": found, "table": widths, **bent}.items())[: method.finalists])
        losses = self._trials(finalists, unit, course)
        taken = min(losses, key=losses.__getitem__)
        return finalists[taken], {**figures, "finalists": losses, "taken": taken}

    def _trials(self, finalists: Mapping[str, Widths], unit: str, course: Callable[[], Course]) -> dict[str, float]:
        """What the model loses with each of some widths, rounded as it will be."""
        facts = {name: self.store.fact(f"{unit} finalist {name}") for name in finalists}
        mixing = {name: signs.mixing for name, signs in self.subject.signs.items()}
        missing = [name for name, fact in facts.items() if fact is None]
        with self.events.stage(TRIALS, len(missing)) if missing else nullcontext():
            for number, name in enumerate(missing, 1):
                specs = specs_of(self.groups, finalists[name], self.subject.codec, mixing)
                loss = trial_loss(self.blocks, self.subject, specs, self.data.calibration(), course())
                facts[name] = {"loss": loss}
                self.store.put_fact(f"{unit} finalist {name}", {"loss": loss})
                self.events.emit(
                    "step", stage=TRIALS, index=number, total=len(missing), name=name, seconds_left=None, loss=loss
                )
        return {name: float(fact["loss"]) for name, fact in facts.items() if fact is not None}
