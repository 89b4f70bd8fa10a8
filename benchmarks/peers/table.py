"""The figures of all contestants as rows of a table, and the table as a CSV file."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from peers.judge import mean_and_error, paired
from torch import Tensor

FIELDS = (
    "model",
    "peers_bits",
    "method",
    "bits_per_weight",
    "kl",
    "kl_stderr",
    "ratio_of_ours",
    "difference_of_ours",
    "deviations_of_ours",
    "seconds",
    "processor_seconds",
    "seconds_of_all",
    "version",
    "settings",
    "group",
    "rows",
    "windows",
    "context",
    "seed",
    "threads",
    "cpu",
    "cores",
    "torch",
)
SHOWN = ("bits_per_weight", "kl", "kl_stderr", "ratio_of_ours", "deviations_of_ours", "seconds", "processor_seconds")
WIDE = 50
Row = dict[str, Any]


def figures(kl: Tensor, ours: Tensor, answer: Mapping[str, Any]) -> Row:
    """The columns of one contestant: `kl` [W] its divergences, `ours` [W] those of the one it is compared with,
    `answer` what its script said (see `scripts/task.py`)."""
    mean, error = mean_and_error(kl)
    pair = paired(ours, kl)
    said = ("bits_per_weight", "seconds", "processor_seconds", "seconds_of_all", "version")
    return {
        "kl": mean,
        "kl_stderr": error,
        "ratio_of_ours": pair.ratio,
        "difference_of_ours": pair.difference,
        "deviations_of_ours": pair.deviations,
        **{name: answer[name] for name in said},
        "settings": json.dumps(answer["settings"], sort_keys=True),
    }


def write(path: Path, rows: Iterable[Row]) -> None:
    """One line a row, columns `FIELDS`; floats with six digits."""
    with path.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, FIELDS)
        writer.writeheader()
        for row in rows:
            writer.writerow(
                {name: f"{value:.6g}" if isinstance(value, float) else value for name, value in row.items()}
            )


def header(title: str) -> str:
    """The names of the columns `SHOWN` under a title."""
    return f"\n{title}\n{'':{WIDE}}" + "".join(f"{name:>20}" for name in SHOWN)


def line(row: Row) -> str:
    """The columns `SHOWN` of one method."""
    return f"{row['method']:{WIDE}}" + "".join(f"{row[name]:20.5g}" for name in SHOWN)
