"""A budget spent by measurement, from folder to folder: what is kept, what is said, what another rate costs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch.nn import functional

import compress
from cli.main import main
from compress.data.calibration import calibration_rows
from compress.data.sources import text_source
from compress.errors import UsageError, WorkspaceError
from compress.events import Event, Events
from compress.modeling.loading import load_model, load_tokenizer
from compress.plan.sweep import parse_rates, sweep
from compress.recipe import Recipe, make_recipe
from tests.tiny_models import write_llama, write_text

CONTEXT = 32


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("spending")
    write_llama(folder / "model", write_text(folder), layers=3, hidden=32)
    return folder


def recipe(place: Path, out: Path, bits: float = 3.0, **more: Any) -> Recipe:
    part = {
        "bits": bits,
        "data": [f"text:{place / 'text.txt'}"],
        "rows": 8,
        "context": CONTEXT,
        "transform": {"name": "none"},
        "allocation": {"name": "sensitivity", "options": {"rows": 6}},
        **more,
    }
    return make_recipe({"model": str(place / "model"), "out": str(out), "quantize": part})


def stages(found: list[Event]) -> list[str]:
    return [str(event.data["stage"]) for event in found if event.kind == "stage_start"]


@pytest.fixture(scope="module")
def first(place: Path) -> tuple[dict[str, Any], list[Event]]:
    heard: list[Event] = []
    report = compress.run(recipe(place, place / "first"), events=Events([heard.append]))
    return report, heard


def kl_on(place: Path, name: str, rows: int, draw: int) -> float:
    """Mean KL(original || artifact) on drawn rows, from float64 softmax."""
    tokenizer = load_tokenizer(place / "model")
    source = text_source([f"text:{place / 'text.txt'}"])
    ids = calibration_rows(source, tokenizer, rows=rows, context=CONTEXT, seed=draw)
    with torch.no_grad():
        p, q = (
            functional.log_softmax(load_model(place / one, dtype=torch.float32)(ids).logits.double(), -1)
            for one in ("model", name)
        )
    return float((p.exp() * (p - q)).sum(-1).mean())


def test_what_is_measured_is_the_artifacts_loss(place: Path, first: tuple[dict[str, Any], list[Event]]) -> None:
    figures = first[0]["allocation"]
    assert figures["measured"] == pytest.approx(kl_on(place, "first", 6, 1), rel=1e-3)
    assert figures["predicted"] <= figures["predicted_uniform"]
    assert first[0]["bits_per_weight"] <= 3.0
    assert {row["bits_per_weight"] for row in first[0]["matrices"]} != {3.0}


def test_another_rate_measures_nothing_again(place: Path, first: tuple[dict[str, Any], list[Event]]) -> None:
    assert "measure" in stages(first[1])
    heard: list[Event] = []
    table = place / "first.work" / "table"
    again = compress.run(recipe(place, place / "second", 4.0, table=str(table)), events=Events([heard.append]))
    assert "measure" not in stages(heard)
    assert again["allocation"]["measured"] < first[0]["allocation"]["measured"]
    own = compress.run(recipe(place, place / "own", 4.0))
    assert [row["bits_per_weight"] for row in own["matrices"]] == [row["bits_per_weight"] for row in again["matrices"]]


def test_a_restart_keeps_the_table(place: Path, first: tuple[dict[str, Any], list[Event]]) -> None:
    """Another rate in the same place: what was made is discarded, what was measured stays."""
    heard: list[Event] = []
    place_again = place / "again"
    compress.run(recipe(place, place_again))
    with pytest.raises(WorkspaceError, match=r"bits was 3\.0 and is now 3\.5"):
        compress.run(recipe(place, place_again, 3.5))
    report = compress.run(recipe(place, place_again, 3.5), restart=True, events=Events([heard.append]))
    assert "measure" not in stages(heard)
    assert report["bits_target"] == 3.5
    other = recipe(place, place_again, 3.5, rows=6)
    compress.run(other, restart=True, events=Events([heard.append]))
    assert "measure" in stages(heard)


def test_a_table_of_something_else_is_refused(place: Path, first: tuple[dict[str, Any], list[Event]]) -> None:
    table = str(place / "first.work" / "table")
    with pytest.raises(WorkspaceError, match="rows was 8 and is now 6"):
        compress.run(recipe(place, place / "third", table=table, rows=6))
    assert not (place / "third").exists()


def test_a_plan_shows_the_widths_that_there_will_be(place: Path, first: tuple[dict[str, Any], list[Event]]) -> None:
    from compress.plan import make_plan

    before = make_plan(recipe(place, place / "planned"))
    assert any("chosen when it is measured" in note for note in before.stages[0].notes)
    after = make_plan(recipe(place, place / "planned", table=str(place / "first.work" / "table")))
    assert after.quantization is not None
    planned = [row.bits_per_weight for row in after.quantization.matrices]
    assert planned == [row["bits_per_weight"] for row in first[0]["matrices"]]
    assert any("predicts a KL divergence" in note for note in after.stages[0].notes)


def test_a_sweep(place: Path, first: tuple[dict[str, Any], list[Event]]) -> None:
    table = str(place / "first.work" / "table")
    for bits in (2.5, 5.0):
        compress.run(recipe(place, place / f"at-{bits}", bits, table=table))
    found = sweep(recipe(place, place / "first", table=table), parse_rates("2.5:5:0.5"))
    assert [rate.bits for rate in found.rates] == [2.5, 3.0, 3.5, 4.0, 4.5, 5.0]
    assert all(rate.bits - 0.2 <= rate.bits_per_weight <= rate.bits for rate in found.rates)
    predicted = [rate.predicted for rate in found.rates]
    assert predicted == sorted(predicted, reverse=True)
    by_rate = {rate.bits: rate for rate in found.rates}
    assert by_rate[3.0].measured == first[0]["allocation"]["measured"]
    assert by_rate[4.5].measured is None
    assert by_rate[3.0].model_bytes == first[0]["model_bytes"]
    assert found.runs == 4
    assert found.rank_correlation == pytest.approx(1.0)
    ends = sweep(recipe(place, place / "first", table=table, last_bits=4.0), parse_rates("2.5:3.5:0.5"))
    assert [rate.measured for rate in ends.rates] == [None] * 3
    assert ends.rank_correlation is None


@pytest.mark.parametrize("text", ["", "2", "2:4", "4:2:1", "2:4:0", "2:4:x", "0:4:1", "2:4:1e-9", "1:inf:1"])
def test_rates_that_are_none(text: str) -> None:
    with pytest.raises(UsageError, match="Give FIRST:LAST:STEP"):
        parse_rates(text)


def test_rates_hold_both_ends() -> None:
    assert parse_rates("2:4.5:0.25")[-1] == 4.5
    assert parse_rates("1.5:2.1:0.2") == [1.5, 1.7, 1.9, 2.1]


def test_the_command(place: Path, first: tuple[dict[str, Any], list[Event]]) -> None:
    options = [
        "plan", "quantize", str(place / "model"), "--data", f"text:{place / 'text.txt'}", "--rows", "8", "--context",
        str(CONTEXT), "--transform", "none", "--allocation", "sensitivity:rows=6", "--out", str(place / "first"),
    ]  # fmt: skip
    shown = CliRunner().invoke(main, [*options, "--sweep", "3:5:1"])
    assert shown.exit_code == 0, shown.output
    assert [line.split()[0] for line in shown.stdout.splitlines()[:4]] == ["bits", "3", "4", "5"]
    plain = json.loads(CliRunner().invoke(main, [*options, "--sweep", "3:5:1", "--json"]).stdout)
    assert plain["rates"][0]["measured"] == first[0]["allocation"]["measured"]


def test_evolution_ends_where_it_would_have_ended(place: Path, first: tuple[dict[str, Any], list[Event]]) -> None:
    """A finished search is not made again for the same rate, and its report is the same."""
    asked = {"name": "evolve", "options": {"rows": 6, "sample": 6, "generations": 2, "offspring": 4, "finalists": 2}}
    table = str(place / "first.work" / "table")
    one = compress.run(recipe(place, place / "evolved", allocation=asked, table=table))
    heard: list[Event] = []
    two = compress.run(
        recipe(place, place / "evolved-again", allocation=asked, table=table), events=Events([heard.append])
    )
    assert "evolve" not in stages(heard)
    assert one["matrices"] == two["matrices"]
    assert one["allocation"]["generations"] == 2
    assert one["allocation"]["fitness"] <= one["allocation"]["fitness_uniform"]
    assert "trials" not in stages(heard)


def test_a_trial_is_the_loss_of_the_result(place: Path, first: tuple[dict[str, Any], list[Event]]) -> None:
    """The finalist that is taken loses on the sample what the artifact, loaded, loses there; none loses less."""
    asked = {"name": "evolve", "options": {"rows": 6, "sample": 5, "generations": 1, "offspring": 2}}
    table = str(place / "first.work" / "table")
    figures = compress.run(recipe(place, place / "tried", 2.6, allocation=asked, table=table))["allocation"]
    assert len(figures["finalists"]) == 3
    assert kl_on(place, "tried", 5, 2) == pytest.approx(min(figures["finalists"].values()), rel=1e-3)
    assert figures["finalists"][figures["taken"]] == min(figures["finalists"].values())


def test_in_memory_it_is_the_same(place: Path, first: tuple[dict[str, Any], list[Event]]) -> None:
    model = compress.quantize(
        load_model(place / "model"), bits=3.0, data=f"text:{place / 'text.txt'}", rows=8, context=CONTEXT,
        allocation="sensitivity:rows=6", transform="none",
    )  # fmt: skip
    widths = {row["name"]: row["bits_per_weight"] for row in first[0]["matrices"]}
    found = {
        name: module.weight.numel() * 8
        for name, module in model.named_modules()
        if type(module).__name__ == "PackedLinear"
    }
    assert found.keys() == widths.keys()
    shapes = {row["name"]: row["shape"] for row in first[0]["matrices"]}
    assert {name: bits / (shapes[name][0] * shapes[name][1]) for name, bits in found.items()} == widths


def test_blocks_with_rates_of_their_own(place: Path) -> None:
    report = compress.run(
        recipe(place, place / "ends", 3.7, allocation={"name": "uniform"}, first_bits=4.8, last_bits=2.5)
    )
    rates: dict[str, list[float]] = {}
    for row in report["matrices"]:
        rates.setdefault(row["name"].split(".")[2], []).append(row["bits_per_weight"])
    assert min(rates["0"]) > max(rates["2"])
    assert report["bits_per_weight"] <= 3.7
