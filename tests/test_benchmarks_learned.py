"""What `benchmarks/learned_transforms.py` does beside measuring: the trials, their rates, and the table."""

from __future__ import annotations

import csv
import importlib
import itertools
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import compress
from compress.codecs import codec
from compress.errors import DataError, UsageError
from compress.modeling.loading import load_model
from compress.quantization.modules import packed_modules
from compress.quantization.transforms import parse_transform
from tests.tiny_models import write_llama, write_text

FOLDER = Path(__file__).parents[1] / "benchmarks"
Import = Callable[[str], ModuleType]


@pytest.fixture
def part(monkeypatch: pytest.MonkeyPatch) -> Iterator[Import]:
    """Imports modules of the benchmark; afterwards none of them is known."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(FOLDER)
    yield importlib.import_module
    for name in set(sys.modules) - before:
        if name.split(".")[0] in ("learned", "peers", "outliers"):
            del sys.modules[name]


@pytest.mark.parametrize(("name", "group"), [("integer", 0), ("integer", 16)])
def test_a_width_everywhere(part: Import, tmp_path: Path, name: str, group: int) -> None:
    """Every matrix has codes of 4 bits and its scales, counted from the shapes; none is wider for the slack."""
    model = load_model(write_llama(tmp_path / "model", write_text(tmp_path), hidden=64, layers=2))
    rounder = codec(name, group=group, symmetric=True)
    rate = part("peers.scripts.width").rate_of(model, rounder, 4)
    shapes = [(m.out_features, m.in_features) for name, m in model.named_modules() if name.endswith("_proj")]
    stored = sum(4 * o * n + 16 * o * math.ceil(n / (group or n)) for o, n in shapes)
    compress.quantize(model, bits=rate, codec=rounder, transform="none")
    assert sum(8 * module.weight.nbytes for module in packed_modules(model).values()) == stored
    assert 0 < rate - stored / sum(o * n for o, n in shapes) < 0.005


def test_every_trial_is_compared_with_the_first_of_its_block(part: Import) -> None:
    """Trials of a block come together, are different ones, and ask for transforms that there are."""
    trials = part("learned.trials")
    for name in trials.PARTS:
        found = list(trials.trials(name, ["outliers", "teacher"], 10, 4096))
        assert all(parse_transform(trial.quantization.transform) for trial in found)
        blocks = [trial.comparison for trial in found]
        assert len({(trial.comparison, trial.label) for trial in found}) == len(found) > 1
        assert sum(one != other for one, other in itertools.pairwise(blocks)) == len(set(blocks)) - 1
    assert all(trial.mix_keys == (trial.label != "none") for trial in trials.trials("w4a4kv4", ["teacher"], 10, 9))


def test_a_vocabulary_below_k_has_fewer_variants(part: Import) -> None:
    trials = part("learned.trials")
    assert len(list(trials.trials("kl_top", ["babyllama"], 10, 105))) == 7
    assert len(list(trials.trials("kl_top", ["teacher"], 10, 4096))) == 10


def test_an_unknown_part(part: Import) -> None:
    with pytest.raises(UsageError, match="w4a8"):
        list(part("learned.trials").trials("w4a8", ["teacher"], 10, 9))


def small_row(**fields: Any) -> dict[str, Any]:
    row = {"part": "weight_only", "model": "teacher", "weights": "integer", "label": "ost", "bits_per_weight": 4.05}
    return {**row, "kl": 0.01, "kl_stderr": 0.0003, "rows": 128, "windows": 128, "context": 256, **fields}


def test_peers_of_as_many_bits_are_put_beside(part: Import, tmp_path: Path) -> None:
    report = part("learned.report")
    peers = [
        small_row(method="peer", kl=0.02, kl_stderr=0.0008, bits_per_weight=4.04),
        small_row(method="larger", bits_per_weight=4.3),
        small_row(method="other windows", windows=64),
        small_row(method="ours already"),
    ]
    with (tmp_path / "peers.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, peers[0])
        writer.writeheader()
        writer.writerows(peers)
    rows = [small_row(), small_row(part="w4a4kv4", label="not this")]
    (found,) = report.beside_peers(rows, report.read_peers(tmp_path / "peers.csv"))
    error = 0.5 * math.sqrt(0.03**2 + 0.04**2)
    assert "integer ost" in found and " peer " in found and found.endswith(f"0.500 +- {error:.3f}")
    with pytest.raises(DataError):
        report.read_peers(tmp_path / "none.csv")


def test_a_row_is_the_comparison_with_the_first(part: Import, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ratio and deviations by hand from divergences that differ by 0.01 and 0.03, and seconds by their difference."""
    bench, trials = part("learned.bench"), part("learned.trials")
    first, second = list(trials.trials("cost", ["teacher"], 10, 4096))
    kl = torch.tensor([0.1, 0.2], dtype=torch.float64)
    measured = {
        first: bench.Measured(kl, None, 4.0, 3.0, 2.0),
        second: bench.Measured(kl - torch.tensor([0.01, 0.03]), 0.001, 4.0, 10.0, 8.0),
    }
    runner = bench.Bench(None, 16, 2, 32)
    monkeypatch.setattr(runner, "measure", lambda trial, seeds: measured[trial])
    base, row = runner.row(first, [0, 1]), runner.row(second, [0, 1])
    assert (base["ratio"], base["deviations"], base["seconds_beyond_first"]) == (1.0, 0.0, 0.0)
    assert row["ratio"] == pytest.approx(0.13 / 0.15)
    assert row["deviations"] == pytest.approx(-0.02 / 0.01, rel=1e-5)
    assert (row["seconds_beyond_first"], row["kl_seeds"], row["seeds"]) == (7.0, 0.001, 2)
