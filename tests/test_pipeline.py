"""The order of the stages, taking up where a run stopped, and what is refused because the parts no longer fit."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from compress import pipeline
from compress.errors import UsageError, WorkspaceError
from compress.events import Event, Events
from compress.recipe import Recipe, make_recipe
from tests.tiny_models import write_llama, write_text


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    write_llama(folder / "student", write_text(folder))
    return folder


@pytest.fixture
def recipe(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    shutil.copytree(models / "student", tmp_path / "student")
    shutil.copy(models / "text.txt", tmp_path)
    monkeypatch.chdir(tmp_path)
    evaluate = {"data": "text:text.txt", "context": 32, "limit": 320, "compare": ["student"]}
    return make_recipe({"model": "student", "out": "out", "quantize": {"bits": 3}, "evaluate": evaluate})


def run(recipe: Recipe, **how: Any) -> tuple[dict[str, Any], list[str]]:
    heard: list[Event] = []
    report = pipeline.run(recipe, events=Events([heard.append]), **how)
    return report, [str(event.data.get("text", event.kind)) for event in heard]


def test_stages_in_order_then_nothing_left_to_do(recipe: Recipe) -> None:
    report, heard = run(recipe)
    assert report["stages"] == ["quantize", "evaluate"]
    assert report["bits_per_weight"] <= 3
    assert list(report["evaluate"]["models"]) == ["student", "quantized"]
    assert (
        json.loads(Path("out/report.json").read_text())
        == json.loads(Path("out.work/report.json").read_text())
        == report
    )
    assert heard.count("stage_start") == 2
    again, heard = run(recipe)
    assert again == report
    assert heard == ["already finished: 'out'"]


def test_a_run_that_died_between_two_stages_goes_on(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    def die(task: pipeline.Task) -> dict[str, Any]:
        raise KeyboardInterrupt

    handler = pipeline.Handler(lambda stage: stage.name, die)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(pipeline, "HANDLERS", {**pipeline.HANDLERS, "evaluate": handler})
        run(recipe)
    written = Path("out/quantized/model.safetensors").stat().st_mtime_ns
    report, _ = run(recipe)
    assert "evaluate" in report
    assert Path("out/quantized/model.safetensors").stat().st_mtime_ns == written, "the first stage was not done again"


def test_a_result_that_others_were_built_on_must_stay(recipe: Recipe) -> None:
    run(recipe)
    card = Path("out/quantized/README.md")
    card.write_text(card.read_text() + "changed")
    with pytest.raises(WorkspaceError, match=r"'out/quantized', on which 'evaluate' was built.*--restart"):
        run(recipe)
    report, _ = run(recipe, restart=True)
    assert "changed" not in card.read_text()
    assert report["stages"] == ["quantize", "evaluate"]


def test_a_result_of_one_stage_that_was_removed_is_made_again(recipe: Recipe) -> None:
    alone = recipe.model_copy(update={"evaluate": None})
    run(alone)
    payload = Path("out/model.safetensors").read_bytes()
    shutil.rmtree("out")
    _, heard = run(alone)
    assert Path("out/model.safetensors").read_bytes() == payload
    assert "already finished: 'out'" not in heard


def test_other_files_under_the_same_name_are_refused(recipe: Recipe) -> None:
    run(recipe)
    os.utime("student/model.safetensors", (1, 1))
    with pytest.raises(WorkspaceError, match=r"model\.files was"):
        run(recipe)
    Path("text.txt").write_text("another text " * 1000)
    with pytest.raises(WorkspaceError, match=r"hash of text:text\.txt was"):
        run(recipe)


def test_a_place_that_is_taken_is_refused_before_any_work(recipe: Recipe) -> None:
    Path("out/quantized").mkdir(parents=True)
    Path("out/quantized/thesis.tex").touch()
    with pytest.raises(UsageError, match="'out/quantized' exists"):
        run(recipe)
    assert not Path("out.work").exists()


def test_a_stage_that_fails_leaves_no_half_result(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = recipe.model_copy(update={"evaluate": None})

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(WorkspaceError, match="no space left"):
        patch.setattr("compress.quantization.run.write_artifact", full)
        run(alone)
    assert {path.name for path in Path().iterdir()} == {"student", "text.txt", "out.work"}
    report, _ = run(alone)
    assert report["bits_per_weight"] <= 3


def test_the_log_has_every_event(recipe: Recipe) -> None:
    _, heard = run(recipe)
    logged = [json.loads(line) for line in Path("out.work/log.jsonl").read_text().splitlines()]
    assert [entry["kind"] for entry in logged if entry["kind"] in ("stage_start", "step", "stage_end")] == [
        kind for kind in heard if kind in ("stage_start", "step", "stage_end")
    ]
    assert all(entry["time"] > 1.7e9 for entry in logged)
