"""What `benchmarks/quantize_peers.py` does without any peer: counting bits, comparing two, writing the table."""

from __future__ import annotations

import csv
import importlib
import importlib.util
import json
import math
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from compress.errors import DependencyError, ModelError, UsageError
from compress.evaluation.causal import evaluate_causal
from compress.modeling.loading import load_model
from tests.tiny_models import write_llama, write_text

FOLDER = Path(__file__).parents[1] / "benchmarks"
Import = Callable[[str], ModuleType]


@pytest.fixture
def part(monkeypatch: pytest.MonkeyPatch) -> Iterator[Import]:
    """Imports modules of the benchmark; afterwards neither they nor their folders are known."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(FOLDER / "peers" / "scripts")
    monkeypatch.syspath_prepend(FOLDER)
    yield importlib.import_module
    for name in set(sys.modules) - before:
        if name in ("task", "width", "run_compress") or name.split(".")[0] in ("peers", "quantize_peers"):
            del sys.modules[name]


def bits_in_file(path: Path) -> int:
    """8 x the bytes of all tensors in a safetensors file: what it has beyond its header."""
    with safe_open(path, "pt") as file:
        assert list(file.keys())
    size = path.stat().st_size
    header = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    return 8 * (size - header)


@pytest.mark.parametrize(("bits", "group"), [(3, 64), (4, 64), (3, 32), (4, 32)])
@pytest.mark.parametrize("symmetric", [False, True])
def test_true_bits_are_those_of_a_packed_file(
    part: Import, tmp_path: Path, bits: int, group: int, symmetric: bool
) -> None:
    """GPTQ's layout: codes and zero points dense in 32-bit words, float16 scales [groups, out]."""
    task, out, columns = part("task"), 96, 320
    tensors = {
        "qweight": torch.zeros(columns * bits // 32, out, dtype=torch.int32),
        "scales": torch.zeros(columns // group, out, dtype=torch.float16),
    }
    if not symmetric:
        tensors["qzeros"] = torch.zeros(columns // group, out * bits // 32, dtype=torch.int32)
    save_file(tensors, tmp_path / "packed.safetensors")
    given = task.Task(tmp_path, torch.zeros(1, 1), tmp_path, bits, group, symmetric, {})
    assert given.true_bits() == bits_in_file(tmp_path / "packed.safetensors") / (out * columns)


def test_true_bits_of_two_levels_of_scales(part: Import, tmp_path: Path) -> None:
    """As in bitsandbytes with nested statistics: a byte to 64 weights, a float32 to 256 such bytes."""
    weights = 64 * 256 * 5
    tensors = {
        "weight": torch.zeros(weights // 2, dtype=torch.uint8),
        "absmax": torch.zeros(weights // 64, dtype=torch.uint8),
        "nested_absmax": torch.zeros(weights // 64 // 256),
    }
    save_file(tensors, tmp_path / "packed.safetensors")
    given = part("task").Task(tmp_path, torch.zeros(1, 1), tmp_path, 4, 64, False, {})
    assert given.true_bits(scale=8 + 32 / 256, zero=0) == bits_in_file(tmp_path / "packed.safetensors") / weights


@pytest.mark.parametrize("data", ["rows", "none"])
def test_our_script_counts_the_bits_that_are_saved(
    part: Import, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], data: str
) -> None:
    """Its answer against the file of its artifact, which is a model that the judge can put beside the original."""
    folder = write_llama(tmp_path / "model", write_text(tmp_path))
    ids = torch.randint(0, 300, (8, 32), generator=torch.Generator().manual_seed(0))
    np.save(tmp_path / "rows.npy", ids.numpy())
    words = [str(folder), str(tmp_path / "rows.npy"), str(tmp_path / "out"), "--bits", "3", "--group", "64"]
    monkeypatch.setattr("sys.argv", ["run_compress.py", *words, "--setting", "rate=4", "--setting", f"data={data}"])
    part("run_compress")
    answer = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    judge, original = part("peers.judge"), load_model(folder)
    maps = judge.linear_maps(original)
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        stored = sum(8 * file.get_tensor(f"{name}.weight").nbytes for name in maps)
    assert answer["bits_per_weight"] == stored / sum(module.weight.numel() for module in maps.values())
    assert answer["settings"]["calibrated"] is (data == "rows")
    divergence = judge.Judge(original, ids).window_kl(load_model(tmp_path / "out"))
    assert 0 < float(divergence.mean()) < 0.01


def closed_form(ours: list[float], theirs: list[float]) -> tuple[float, float, float]:
    """Ratio of the means, mean difference, and Student's paired t."""
    differences = [a - b for a, b in zip(ours, theirs, strict=True)]
    mean = math.fsum(differences) / len(differences)
    error = statistics.stdev(differences) / math.sqrt(len(differences))
    return math.fsum(ours) / math.fsum(theirs), mean, mean / error


def test_paired_statistics_are_the_closed_forms(part: Import) -> None:
    judge = part("peers.judge")
    generator = torch.Generator().manual_seed(3)
    common = torch.rand(40, generator=generator, dtype=torch.float64)
    ours, theirs = (common + 0.1 * torch.rand(40, generator=generator, dtype=torch.float64) for _ in range(2))
    found = judge.paired(ours, theirs + 0.02)
    wanted = closed_form(ours.tolist(), (theirs + 0.02).tolist())
    assert (found.ratio, found.difference, found.deviations) == pytest.approx(wanted, rel=1e-12)
    assert judge.paired(ours, ours) == judge.Paired(1.0, 0.0, 0.0)


def test_pairing_sees_what_the_spread_over_windows_hides(part: Import) -> None:
    """Windows that differ by 1 and contestants that differ by 0.01 on each of them: by hand, 16 windows alternately 1
    and 2, differences alternately 0.01 and 0.02, so mean 0.015, s = 0.005 sqrt(16 / 15), t = 0.015 sqrt(15) / 0.005."""
    judge = part("peers.judge")
    windows = torch.tensor([1.0, 2.0], dtype=torch.float64).repeat(8)
    found = judge.paired(windows * 1.01, windows)
    assert found.deviations == pytest.approx(3 * math.sqrt(15))
    assert judge.mean_and_error(windows)[1] > 0.1


def perturbed(scale: float) -> torch.nn.Module:
    model = load_model("builtin:student")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(scale * parameter.std() * torch.randn(parameter.shape, generator=generator))
    return model


def test_the_judge_measures_what_the_evaluation_measures(part: Import) -> None:
    judge = part("peers.judge")
    ids = torch.randint(0, 4096, (11, 24), generator=torch.Generator().manual_seed(0))
    reference, model = load_model("builtin:student"), perturbed(0.1)
    mean, error = judge.mean_and_error(judge.Judge(reference, ids).window_kl(model))
    wanted = evaluate_causal(model, ids, torch.ones_like(ids), reference)
    assert (mean, error) == pytest.approx((wanted["kl_divergence"], wanted["kl_stderr"]), rel=1e-6)


def test_weights_are_put_where_they_belong_or_refused(part: Import) -> None:
    judge = part("peers.judge")
    model = load_model("builtin:student")
    weights = {name: module.weight * 2 for name, module in judge.linear_maps(model).items()}
    embedding = model.get_input_embeddings().weight.clone()
    judge.put(model, weights)
    assert all(torch.equal(module.weight, weights[name]) for name, module in judge.linear_maps(model).items())
    assert torch.equal(model.get_input_embeddings().weight, embedding)
    name = next(iter(weights))

    def damaged(weight: Tensor | None) -> dict[str, Tensor]:
        return {key: value for key, value in {**weights, name: weight}.items() if value is not None}

    for other in (None, weights[name].T[:1], weights[name] * float("nan")):
        with pytest.raises(ModelError):
            judge.put(model, damaged(other))


def test_a_model_of_other_people_needs_its_folder(part: Import) -> None:
    with pytest.raises(UsageError):
        part("peers.subjects").subject("babyllama", None)


def test_stories_for_calibration_are_others_than_those_for_evaluation(part: Import, real_data: Path) -> None:
    chosen = part("peers.subjects").subject("babyllama", real_data)
    texts = [{document.text for document in source.documents()} for source in (chosen.calibration, chosen.evaluation)]
    assert len(texts[0]) > 400 and len(texts[1]) > 400
    assert not texts[0] & texts[1]


def test_the_table_is_read_back_as_it_was_written(part: Import, tmp_path: Path) -> None:
    table = part("peers.table")
    kl, ours = (torch.tensor(values, dtype=torch.float64) for values in ([0.2, 0.4, 0.9], [0.1, 0.2, 0.3]))
    answer = {"bits_per_weight": 3.296875, "seconds": 1.5, "processor_seconds": 2.5, "seconds_of_all": 9.0}
    answer |= {"version": "peer 1.0", "settings": {"symmetric": False, "damping": 0.05}}
    setting = dict.fromkeys(("model", "method", "cpu", "torch"), 'a "name", quoted')
    setting |= dict.fromkeys(("peers_bits", "group", "rows", "windows", "context", "seed", "threads", "cores"), 7)
    table.write(tmp_path / "table.csv", [{**setting, **table.figures(kl, ours, answer)}])
    with (tmp_path / "table.csv").open(encoding="utf-8", newline="") as stream:
        (row,) = csv.DictReader(stream)
    assert tuple(row) == table.FIELDS
    assert row["model"] == 'a "name", quoted' and row["rows"] == "7"
    assert json.loads(row["settings"]) == answer["settings"]
    assert [float(row[name]) for name in ("bits_per_weight", "kl", "ratio_of_ours")] == pytest.approx(
        [3.296875, 0.5, 0.4], rel=1e-5
    )


def test_every_contestant_has_its_script_and_its_own_name(part: Import) -> None:
    contestants = part("peers.contestants")
    for bits in (3, 4):
        found = [
            *contestants.ours(contestants.OURS + contestants.LEARNED, bits, 64),
            *contestants.theirs(contestants.PEERS, bits, 200, 64),
        ]
        assert all(who.path().is_file() for who in found)
        assert len({who.name for who in found}) == len(found)
        assert {who.script for who in found} >= set(contestants.PEERS) - (
            {"bitsandbytes", "rotations"} if bits == 3 else set()
        )


def test_the_plot_has_a_panel_for_each_model(part: Import, tmp_path: Path) -> None:
    plot = part("peers.plot")
    rows = [
        {"model": model, "method": method, "bits_per_weight": bits, "kl": 2.0**-bits, "kl_stderr": 0.001}
        for model in ("first", "second")
        for method in ("ours", "peer")
        for bits in (3.25, 4.0)
    ]
    if importlib.util.find_spec("matplotlib") is None:
        with pytest.raises(DependencyError, match="matplotlib"):
            plot.draw(rows, tmp_path / "plot.png")
        return
    sizes = []
    for number in (4, 8):
        plot.draw(rows[:number], tmp_path / "plot.png")
        payload = (tmp_path / "plot.png").read_bytes()
        assert payload.startswith(b"\x89PNG")
        sizes.append(int.from_bytes(payload[16:20], "big"))
    assert sizes[1] == 2 * sizes[0]
