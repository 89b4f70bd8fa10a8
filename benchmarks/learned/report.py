"""The figures of all trials as a table, as a CSV file, and beside those of other projects."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from learned.bench import Row

from compress.errors import DataError

SHOWN = {
    "bits_per_weight": ".4f",
    "kl": ".6f",
    "kl_stderr": ".6f",
    "kl_seeds": ".6f",
    "ratio": ".3f",
    "deviations": ".1f",
    "seconds": ".1f",
    "processor_seconds": ".1f",
    "seconds_beyond_first": ".1f",
}
NAMES = ("model", "weights", "activations", "kv", "label")
WIDTHS = (11, 32, 12, 4, 31)
CLOSE = 0.1
"""Bits a weight that two may differ by and still be put side by side."""
SAME = ("rows", "windows", "context")


def write(path: Path, rows: Sequence[Row]) -> None:
    """One line a row; floats with six digits, nothing where there is nothing."""
    with path.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        for row in rows:
            writer.writerow(
                {name: f"{value:.6g}" if isinstance(value, float) else value for name, value in row.items()}
            )


def header(part: str) -> str:
    """The names of the columns under the name of a part."""
    names = "".join(f"{name:<{width}}" for name, width in zip(NAMES, WIDTHS, strict=True))
    return f"\n{part}\n{names}" + "".join(f"{name:>22}" for name in SHOWN)


def line(row: Row) -> str:
    """The columns that are shown; `-` where there is nothing."""
    names = "".join(
        f"{'-' if row[name] is None else row[name]:<{width}}" for name, width in zip(NAMES, WIDTHS, strict=True)
    )
    return names + "".join(
        f"{'-':>22}" if (value := row[name]) is None else f"{value:>22{form}}" for name, form in SHOWN.items()
    )


def read_peers(path: Path) -> list[dict[str, str]]:
    """The lines of a table of `quantize_peers.py` but for this project's own. Raises `DataError` if there is none."""
    if not path.is_file():
        raise DataError(f"There is no table '{path}'.", remedy="Write it with quantize_peers.py --out.")
    with path.open(encoding="utf-8", newline="") as stream:
        return [row for row in csv.DictReader(stream) if not row["method"].startswith("ours")]


def beside_peers(rows: Iterable[Row], peers: Sequence[dict[str, str]]) -> Iterator[str]:
    """Of every weight-only row and every peer of about as many bits on the same model, rows and windows, a line: both
    divergences, the ratio of ours to theirs, and its standard error as if the two were independent."""
    for row in rows:
        if row["part"] != "weight_only":
            continue
        name, kl, error = f"{row['weights']} {row['label']}", float(row["kl"] or 0), float(row["kl_stderr"] or 0)
        for peer in peers:
            bits = float(peer["bits_per_weight"])
            same = peer["model"] == row["model"] and all(int(peer[field]) == row[field] for field in SAME)
            if not same or abs(bits - float(row["bits_per_weight"] or 0)) > CLOSE:
                continue
            theirs, spread = float(peer["kl"]), float(peer["kl_stderr"])
            ratio = kl / theirs
            yield (
                f"{row['model']}  {name} ({row['bits_per_weight']:.4f} bits, {kl:.6f}) by {peer['method']} "
                f"({bits:.4f} bits, {theirs:.6f}): {ratio:.3f} +- {ratio * math.hypot(error / kl, spread / theirs):.3f}"
            )
