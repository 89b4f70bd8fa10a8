"""The shipped choice of pulses, levels, gains and shift for every width.

`tables.json` holds what `benchmarks/train_half_pyramid.py` found for a Gaussian source with rows of unit RMS. An
artifact names its table by version, so a published version is never edited: a better one gets a new number and the old
one stays.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from types import MappingProxyType
from typing import Any

from compress.codecs.worthwhile import worthwhile
from compress.ops.half_pyramid.shape import HalfShape

VERSION = 1
"""The version of the tables that new matrices use."""

Key = tuple[int, int, bool, str]
"""Version, dim, coset, levels."""


@dataclass(frozen=True)
class Entry:
    """One width: its shape, and the mean squared error per weight of N(0, 1) that was measured for it."""

    shape: HalfShape
    mse: float


@lru_cache(maxsize=1)
def shipped_tables() -> Mapping[Key, Mapping[int, Entry]]:
    """All tables of `tables.json`, by key and width."""
    data: dict[str, Any] = json.loads((files(__package__) / "tables.json").read_text(encoding="utf-8"))
    return MappingProxyType({_key(table): MappingProxyType(_widths(table)) for table in data["tables"]})


def _key(table: Mapping[str, Any]) -> Key:
    return int(table["version"]), int(table["dim"]), bool(table["coset"]), str(table["levels"])


def _widths(table: Mapping[str, Any]) -> dict[int, Entry]:
    """The widths worth offering, ascending."""
    entries = {int(width): _entry(int(table["dim"]), row) for width, row in table["widths"].items()}
    return {width: entries[width] for width in worthwhile(entries)}


def _entry(dim: int, row: Mapping[str, Any]) -> Entry:
    gains = tuple(float(gain) for gain in row["gains"])
    return Entry(HalfShape(dim, row["pulses"], tuple(row["levels"]), gains, row["shift"]), row["mse"])
