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
from compress.plan import arguments, make_plan
from compress.plan.stamps import model_stamp
from compress.recipe import Recipe, make_recipe
from compress.storage import reserve, tree_sha256
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
    _, heard = run(recipe)
    assert heard == ["already finished: 'out'"], "the same content, only touched"
    config = Path("student/generation_config.json")
    config.write_text(config.read_text() + "\n")
    Path("text.txt").write_text("another text " * 1000)
    with pytest.raises(WorkspaceError, match=r"the files of student changed; the hash of text:text\.txt changed"):
        run(recipe)


def test_what_decides_a_result_is_an_argument(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree("student", "other")
    assert recipe.evaluate is not None
    evaluate = recipe.evaluate.model_copy(update={"reference": "other"})
    distill = {"data": "text:text.txt", "losses": ["cross_entropy"], "context": 32}
    student = {"config": "student/config.json", "tokenizer": "student"}
    from_scratch = make_recipe({"out": "out", "distill": {**distill, "student": student}})

    def decide() -> tuple[dict[str, Any], dict[str, Any]]:
        plans = (make_plan(recipe.model_copy(update={"evaluate": evaluate})), make_plan(from_scratch))
        return arguments(plans[0]), arguments(plans[1])

    before = decide()
    assert {"backend", "compress", "torch", "transformers", "files of other"} <= before[0].keys()
    for file in ("other/tokenizer.json", "student/config.json"):
        Path(file).write_text(Path(file).read_text() + " ")
    monkeypatch.setattr("torch.__version__", "0.1")
    changed = [{name for name in old if old[name] != new[name]} for old, new in zip(before, decide(), strict=True)]
    assert changed == [
        {"torch", "files of other", "files of student"},
        {"torch", "files of student", "distill.student.config"},
    ]


def test_a_large_file_is_known_by_size_and_time(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("compress.plan.stamps.HASHED_BYTES", 1000)
    before = model_stamp("student")
    os.utime("student/model.safetensors", (1, 1))
    assert model_stamp("student") != before


def test_a_place_that_is_taken_is_refused_before_any_work(recipe: Recipe) -> None:
    Path("out/quantized").mkdir(parents=True)
    Path("out/quantized/thesis.tex").touch()
    with pytest.raises(UsageError, match="'out/quantized' exists"):
        run(recipe)
    assert not Path("out.work").exists()


def test_a_restart_that_is_refused_destroys_nothing(recipe: Recipe) -> None:
    run(recipe)
    before = tree_sha256(Path("out.work"))
    Path("out/quantized/compress.json").unlink()
    with pytest.raises(UsageError, match="compress did not write"):
        run(recipe, restart=True)
    assert tree_sha256(Path("out.work")) == before


def test_a_report_in_the_way_is_no_less_a_result(recipe: Recipe) -> None:
    Path("out").mkdir()
    Path("out/report.json").write_text('{"stages": "of grief"}')
    for restart in (False, True):
        with pytest.raises(UsageError, match=r"'out/report\.json' is no report of compress"):
            run(recipe, restart=restart)
    Path("out/report.json").write_text('{"recipe": {}, "stages": []}')
    with pytest.raises(UsageError, match=r"'out/report\.json' exists.*--restart"):
        run(recipe)
    assert not Path("out.work").exists()
    report, _ = run(recipe, restart=True)
    assert json.loads(Path("out/report.json").read_text()) == report


def test_a_restart_takes_the_old_report_away_first(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    run(recipe)

    def die(task: pipeline.Task) -> dict[str, Any]:
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "HANDLERS", {**pipeline.HANDLERS, "evaluate": pipeline.Handler(lambda _: "-", die)})
    with pytest.raises(KeyboardInterrupt):
        run(recipe, restart=True)
    assert not Path("out/report.json").exists()


def test_one_run_at_a_time_makes_a_result(recipe: Recipe) -> None:
    other = recipe.model_copy(update={"work": "elsewhere"})
    with reserve(Path("out")), pytest.raises(WorkspaceError, match=r"Another process \(pid \d+\) makes 'out'"):
        run(other)
    assert not Path("elsewhere").exists()


def test_what_an_interrupted_replacement_left_is_removed(recipe: Recipe) -> None:
    run(recipe)
    shutil.copytree("out/quantized", "out/.quantized.compress-old")
    run(recipe)
    assert {path.name for path in Path("out").iterdir()} == {"quantized", "report.json"}


@pytest.mark.parametrize(
    ("quantize", "compare", "columns"),
    [
        (None, ["student", "other"], ["other", "student"]),
        ({"bits": 3}, ["student", "other"], ["student", "other", "quantized"]),
        ({"bits": 3}, ["./quantized"], ["./quantized", "quantized"]),
        ({"bits": 3}, ["quantized"], ["quantized", "quantized (result)"]),
    ],
)
def test_the_result_is_the_last_column(
    recipe: Recipe, quantize: dict[str, float] | None, compare: list[str], columns: list[str]
) -> None:
    shutil.copytree("student", "other")
    shutil.copytree("student", "quantized")
    evaluate = {"data": "text:text.txt", "context": 32, "limit": 320, "compare": compare, "samples": 1}
    changed = {"model": "student", "out": "out", "quantize": quantize, "evaluate": evaluate}
    report, _ = run(make_recipe(changed))
    models = report["evaluate"]["models"]
    assert list(models) == columns
    assert [name for name in models if "samples" in models[name]] == columns[-1:]


def test_an_export_is_built_once_and_sealed(recipe: Recipe) -> None:
    exported = make_recipe({"model": "student", "out": "out", "export": [{"to": "onnx"}]})
    _, heard = run(exported)
    assert heard.count("stage_start") == 1
    assert "model.onnx" in json.loads(Path("out/compress.json").read_text())["files"]
    assert {path.name for path in Path().iterdir()} == {"student", "text.txt", "out", "out.work"}
    _, heard = run(exported)
    assert heard == ["already finished: 'out'"]


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
