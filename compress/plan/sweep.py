"""What each of several rates would come to, by the table of an allocation, and what was measured at some of them.

The table's folder also has what became of every run with it. Predicted are the bytes, exactly, and the loss; Spearman's
rank correlation of predicted and measured losses says how far the predictions can be trusted to order rates.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from compress.errors import UsageError, WorkspaceError
from compress.plan.checks import check_machine, check_models
from compress.plan.places import Places, places_of, table_folder
from compress.plan.quantize import draft_quantization, rates_of
from compress.plan.stamps import table_arguments
from compress.plan.subject import Subject, read_subjects, subject_of
from compress.quantization.allocation import Rates, Table, by_table, uniformly
from compress.quantization.allocation.checkpoint import MEASURED
from compress.quantization.allocation.store import TABLE
from compress.workspace import read_records

if TYPE_CHECKING:
    from compress.recipe import Recipe

MOST_RATES = 1000


@dataclass(frozen=True)
class Rate:
    """One rate: what was asked for, what it comes to, and the loss that is predicted for the allocation and for the
    same rate spent uniformly; `measured` is None where no run was made."""

    bits: float
    bits_per_weight: float
    model_bytes: int
    predicted: float
    predicted_uniform: float
    measured: float | None


@dataclass(frozen=True)
class Sweep:
    """`figure` is what losses are, `label` the same in words. `rank_correlation` of predicted and measured losses over
    the rates at which a run was made with the table, `runs` of them; None for fewer than three."""

    figure: str
    label: str
    rates: tuple[Rate, ...]
    runs: int
    rank_correlation: float | None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def parse_rates(text: str) -> list[float]:
    """The rates of FIRST:LAST:STEP, both ends included. Raises `UsageError` for anything else."""
    try:
        first, last, step = (float(part) for part in text.split(":"))
    except ValueError:
        first, last, step = math.nan, math.nan, math.nan
    if not (0 < first <= last < math.inf and 0 < step < math.inf) or (last - first) / step >= MOST_RATES:
        raise UsageError(f"The rates are {text!r}.", remedy="Give FIRST:LAST:STEP, ascending, such as 2:4.5:0.25.")
    count = math.floor((last - first) / step + 1e-9) + 1
    return [round(first + step * index, 10) for index in range(count)]


def sweep(recipe: Recipe, rates: Sequence[float]) -> Sweep:
    """`recipe`, which quantizes, at each of `rates` bits a weight.

    Raises `UsageError` where nothing is allocated by measurement, where there is no table yet, and for a rate that the
    codec does not have; `WorkspaceError` for a table of other arguments.
    """
    part = recipe.quantize
    if part is None or part.allocation.name == "uniform":
        raise UsageError("Rates are compared by the table of an allocation.", remedy="Add --allocation sensitivity.")
    places = places_of(recipe)
    check_machine(recipe)
    subjects = read_subjects(recipe, {str(place) for place in places.stages.values() if place is not None})
    subject = subject_of(recipe, subjects)
    check_models(recipe, subject, subjects)
    records = _records(recipe, subject, places)
    if records is None or TABLE not in records:
        raise UsageError(
            f"There is no table in '{table_folder(part, places.work)}' yet.",
            remedy="Quantize once with these options, at any rate, which measures it, or name its folder with --table.",
        )
    table, runs = Table.from_dict(records[TABLE]), _runs(records)
    found = []
    drafted = draft_quantization(part, subject, recipe.trust_remote_code, exported=bool(recipe.export))
    for bits in rates:
        draft = replace(drafted, recipe=part.model_copy(update={"bits": bits}))
        widths = draft.widths(by_table(table))
        specs = draft.specs(widths)
        found.append(
            Rate(
                bits,
                draft.bits_per_weight(specs),
                draft.model_bytes(specs),
                table.predict(widths),
                table.predict(draft.widths(uniformly(draft.codec))),
                _measured(runs, rates_of(draft.recipe), part.allocation.name),
            )
        )
    pairs = [(rate.predicted, rate.measured) for rate in found if rate.measured is not None]
    correlation = _rank_correlation(pairs) if len(pairs) > 2 else None
    return Sweep(table.figure, table.label, tuple(found), len(pairs), correlation)


def kept_table(recipe: Recipe, subject: Subject, places: Places) -> Table | None:
    """The table that a run of `recipe` will find; None where it is yet to be measured. A transform that is learned
    comes first, so of one no table is looked for."""
    part = recipe.quantize
    if part is None or part.allocation.name == "uniform" or part.transform.name == "ost":
        return None
    try:
        records = _records(recipe, subject, places)
    except WorkspaceError:
        if part.table is not None:
            raise
        return None  # the work folder itself belongs to another run, which it will say unless it is begun anew
    return None if records is None or TABLE not in records else Table.from_dict(records[TABLE])


def _records(recipe: Recipe, subject: Subject, places: Places) -> dict[str, Any] | None:
    """The records of the table's folder, if the model is there already whose table it is."""
    part = recipe.quantize
    if part is None or subject.checkpoint is None or recipe.model is None or recipe.stages[0] != "quantize":
        return None
    return read_records(table_folder(part, places.work), table_arguments(recipe, recipe.model))


def _runs(records: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [record for unit, record in records.items() if unit.startswith(MEASURED)]


def _measured(runs: Sequence[Mapping[str, Any]], rates: Rates, method: str) -> float | None:
    """What came of the last run with these rates."""
    for run in reversed(runs):
        same = all(run[name] == value for name, value in vars(rates).items())
        if same and run["method"].partition(":")[0] == method:
            return float(run["measured"])
    return None


def _rank_correlation(pairs: Sequence[tuple[float, float]]) -> float:
    """Spearman's: the correlation of the ranks, ties sharing their mean."""
    ranks = [
        [sum(other < value for other in values) + sum(other == value for other in values) / 2 for value in values]
        for values in zip(*pairs, strict=True)
    ]
    means = [sum(one) / len(one) for one in ranks]
    centred = [[rank - mean for rank in one] for one, mean in zip(ranks, means, strict=True)]
    squares = [math.fsum(value * value for value in one) for one in centred]
    product = math.fsum(a * b for a, b in zip(*centred, strict=True))
    return product / math.sqrt(squares[0] * squares[1]) if all(squares) else 0.0
