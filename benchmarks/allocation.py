"""How much a bit budget buys when it is spent by what the model loses: three models at one rate, and a sweep of rates.

For each model: `uniform`, `sensitivity` and `evolve` at `--bits`, calibrated by the same rows, measured on other text
against the original, with the seconds of the whole run; then `sensitivity` at the rates of `--sweep` with the table
that is there already, predicted and measured losses, their rank correlation, and how long the second run took relative
to the first. Ratios are to `uniform` in the same run. Models of --data are babyllama and, with --minilm, a sentence
encoder.

    python benchmarks/allocation.py --out results.csv --data DIR --minilm FOLDER
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import compress
from compress.plan.sweep import parse_rates, sweep
from compress.recipe import make_recipe

METHODS = ("uniform", "sensitivity", "evolve")


@dataclass(frozen=True)
class Case:
    """A model, the text that it is calibrated with, and the text that it is measured on."""

    name: str
    model: str
    calibration: str
    text: str
    limit: int = 60_000


def cases(data: Path | None, minilm: Path | None, folder: Path) -> list[Case]:
    """Those for which there are data; a text that is made of a JSON list of stories is written into `folder`."""
    found = [Case("teacher", "builtin:teacher", "builtin:python/train", "builtin:python/val")]
    if data is not None:
        stories = json.loads((data / "text" / "tinystories_1000.json").read_text(encoding="utf-8"))
        (folder / "stories.txt").write_text("\n".join(stories), encoding="utf-8")
        texts = f"text:{data}/text/tinystories_train.txt", f"text:{folder}/stories.txt"
        found.append(Case("babyllama", f"{data}/models/babyllama", *texts))
        if minilm is not None:
            pairs = (f"csv:{data}/text/stsb-en-{part}.csv#0,1" for part in ("train", "dev"))
            found.append(Case("minilm", str(minilm), *pairs))
    return found


def recipe_of(case: Case, method: str, bits: float, out: Path, table: Path) -> dict[str, Any]:
    part: dict[str, Any] = {"bits": bits, "data": [case.calibration], "allocation": {"name": method}}
    if method != "uniform":
        part["table"] = str(table)
    return {"model": case.model, "out": str(out), "quantize": part}


def run(case: Case, method: str, bits: float, folder: Path, name: str) -> dict[str, Any]:
    """One row: what came of a quantization."""
    out = folder / name
    started, processor = time.monotonic(), time.process_time()
    report = compress.run(make_recipe(recipe_of(case, method, bits, out, folder / "table")))
    seconds, processor = time.monotonic() - started, time.process_time() - processor
    figures = compress.evaluate(str(out), data=case.text, reference=case.model, limit=case.limit)
    cosine = "cosine" in figures
    spent = report.get("allocation", {})
    return {
        "model": case.name, "method": method, "bits": bits, "bits_per_weight": report["bits_per_weight"],
        "figure": "1 - cosine" if cosine else "KL",
        "loss": 1 - figures["cosine"] if cosine else figures["kl_divergence"],
        "stderr": figures["cosine_stderr" if cosine else "kl_stderr"],
        "predicted": spent.get("predicted"), "measured": spent.get("measured"), "seconds": round(seconds, 1),
        "processor_seconds": round(processor, 1),
    }  # fmt: skip


def measure(
    case: Case, bits: float, rates: list[float], methods: list[str], folder: Path, rows: list[dict[str, Any]]
) -> None:
    base: dict[str, Any] = {}
    for method in methods:
        row = run(case, method, bits, folder, method)
        base = base or row
        error = math.hypot(row["stderr"], base["stderr"])
        rows.append({**row, "ratio": row["loss"] / base["loss"], "errors_below": (base["loss"] - row["loss"]) / error})
        show(rows[-1])
    for rate in rates:
        rows.append({**run(case, "sensitivity", rate, folder, f"at-{rate}"), "ratio": None, "errors_below": None})
        show(rows[-1])
    if rates:
        recipe = make_recipe(recipe_of(case, "sensitivity", bits, folder / "none", folder / "table"))
        found = sweep(recipe, rates)
        ours = [row for row in rows if row["model"] == case.name and row["method"] == "sensitivity"]
        second = statistics.median(row["processor_seconds"] for row in ours[1:]) / ours[0]["processor_seconds"]
        print(f"{case.name}: rank correlation of predicted and measured {found.rank_correlation:.4f} over {found.runs} "
              f"runs; another rate takes {second:.3f} of the first run's processor time", flush=True)  # fmt: skip


def show(row: dict[str, Any]) -> None:
    print(" ".join(f"{value:.5g}" if isinstance(value, float) else str(value) for value in row.values()), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--data", type=Path, metavar="DIR", help="real models and texts")
    parser.add_argument("--minilm", type=Path, metavar="FOLDER", help="a sentence encoder")
    parser.add_argument("--models", default="teacher,babyllama,minilm")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--bits", type=float, default=2.5)
    parser.add_argument("--sweep", default="2:4.5:0.25")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    rates = parse_rates(options.sweep) if options.sweep else []
    with tempfile.TemporaryDirectory() as texts:
        for case in cases(options.data, options.minilm, Path(texts)):
            if case.name not in options.models.split(","):
                continue
            with tempfile.TemporaryDirectory() as folder:
                others = [rate for rate in rates if rate != options.bits]
                measure(case, options.bits, others, options.methods.split(","), Path(folder), rows)
            with options.out.open("w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, fieldnames=list(rows[0]))
                writer.writeheader()
                writer.writerows(rows)


if __name__ == "__main__":
    main()
