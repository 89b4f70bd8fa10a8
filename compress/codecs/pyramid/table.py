"""The shipped choice of pulses, bound and gain levels for every width.

A code of B bits holds an index below N(D, K, m) and one of L gains with N L <= 2^B. Which K, m and L are best, and the
L levels, depend on the source; `levels.json` holds those that `benchmarks/train_pyramid_levels.py` found for a Gaussian
source with rows of unit RMS. An artifact names its table by version, so a published version is never edited: a better
one gets a new number and the old one stays.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

VERSION = 1
"""The version of the table that new matrices use."""


@dataclass(frozen=True)
class Shape:
    """What a width means: D, K pulses, at most `limit` on one coordinate, gain levels relative to the row's scale."""

    dim: int
    pulses: int
    limit: int
    levels: tuple[float, ...]
    mse: float
    """Mean squared error per weight measured on the training source (N(0, 1), fresh sample)."""

    def level_tensor(self) -> Tensor:
        """The levels as float32 [L], ascending."""
        return torch.tensor(self.levels, dtype=torch.float32)


@lru_cache(maxsize=1)
def shipped_tables() -> Mapping[tuple[int, int, int], Mapping[int, Shape]]:
    """All tables of `levels.json`: (version, dim, max) -> width -> `Shape`."""
    data: dict[str, Any] = json.loads((files(__package__) / "levels.json").read_text(encoding="utf-8"))
    return MappingProxyType(
        {
            (int(table["version"]), int(table["dim"]), int(table["max"])): MappingProxyType(
                {int(width): _shape(int(table["dim"]), row) for width, row in table["widths"].items()}
            )
            for table in data["tables"]
        }
    )


def _shape(dim: int, row: Mapping[str, Any]) -> Shape:
    return Shape(dim, int(row["pulses"]), int(row["limit"]), tuple(row["levels"]), float(row["mse"]))
