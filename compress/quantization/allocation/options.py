"""How the budget is spent: methods by name, with their options."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from compress.codecs.base import Option
from compress.errors import UsageError
from compress.quantization.methods import method_of, method_text


@dataclass(frozen=True)
class Uniform:
    """Nearly one width for all matrices. Needs no data."""

    name: ClassVar[str] = "uniform"

    @property
    def text(self) -> str:
        return self.name


@dataclass(frozen=True)
class Sensitivity:
    """The least predicted loss, from a table of what each group of matrices loses at each width.

    rows: of the data that the table is measured on, besides those for calibration.
    """

    name: ClassVar[str] = "sensitivity"
    rows: int = 16

    def __post_init__(self) -> None:
        _check(self.name, rows=self.rows)

    @property
    def text(self) -> str:
        """As on the command line, with what differs from the defaults."""
        return method_text(self)


@dataclass(frozen=True)
class Evolve:
    """A search from there, by evolution, for widths of which the whole model loses least (EvoPress: Sieberling et al.
    2025, arXiv 2410.14649).

    rows: as for `Sensitivity`. sample: rows that a generation's best is compared on. offspring: mutants of a
    generation. generations: how many; 0 for as many as `seconds` hold on this machine. finalists: widths, those that
    the search ended with and optima of the table, with which the model is at last rounded as it will be, to take the
    best; each costs as much as the rounding of the result, and 1 is none.
    """

    name: ClassVar[str] = "evolve"
    rows: int = 16
    sample: int = 64
    offspring: int = 16
    generations: int = 0
    seconds: float = 180.0
    finalists: int = 3

    def __post_init__(self) -> None:
        _check(self.name, rows=self.rows, sample=self.sample, offspring=self.offspring, finalists=self.finalists)
        if self.generations < 0 or not 0 < self.seconds < float("inf"):
            raise UsageError(
                f"The allocation evolve has {self.generations} generations and {self.seconds} seconds.",
                remedy="Generations are 0 or more, seconds more than 0.",
            )

    @property
    def text(self) -> str:
        """As on the command line, with what differs from the defaults."""
        return method_text(self)


Allocation = Uniform | Sensitivity | Evolve
ALLOCATIONS: Mapping[str, type[Uniform] | type[Sensitivity] | type[Evolve]] = {
    "uniform": Uniform,
    "sensitivity": Sensitivity,
    "evolve": Evolve,
}


def allocation_of(name: str, options: Mapping[str, Option | None] | None = None) -> Allocation:
    """The allocation `name` with its options. Raises `UsageError` that names the nearest known name or option."""
    return method_of("allocation", ALLOCATIONS, name, options)


def _check(name: str, **counts: int) -> None:
    for option, count in counts.items():
        if count < 1:
            raise UsageError(f"The allocation {name} has {option}={count}.", remedy="Give a number of at least 1.")
