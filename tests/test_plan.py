"""A plan runs nothing, and what it says is what happens: names, bits, bytes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from compress.errors import CompressError, DataError, ModelError, RecipeError, UsageError
from compress.modeling.resolve import builtin_names
from compress.plan import Plan, make_plan
from compress.recipe import load_recipe, make_recipe, packaged_recipes
from tests.families import llama, save
from tests.tiny_models import VOCABULARY, write_llama, write_text


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    text = write_text(folder)
    write_llama(folder / "teacher", text, hidden=64, layers=2, seed=1)
    write_llama(folder / "student", text, hidden=64, seed=2)
    save(llama(), folder / "other")
    return folder


@pytest.fixture(autouse=True)
def inside(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(models)


def plan(**parts: Any) -> Plan:
    return make_plan(make_recipe({"model": "student", "out": "out", **parts}))


DISTILL = {"teacher": "teacher", "data": "text:text.txt", "losses": ["kl"], "steps": 10, "batch_size": 2, "context": 32}


def test_stages_in_order_with_what_each_reads_and_writes() -> None:
    made = plan(
        distill=DISTILL,
        quantize={"bits": 3.25},
        export=[{"to": "onnx"}],
        evaluate={"data": "text:text.txt", "compare": ["teacher"]},
    )
    assert [(stage.name, stage.source, stage.out) for stage in made.stages] == [
        ("distill", "student", "out/distilled"),
        ("quantize", "out/distilled", "out/quantized"),
        ("export:onnx", "out/quantized", "out/onnx"),
        ("evaluate", "out/quantized", None),
    ]
    assert made.work == "out.work"
    assert made.backend in ("native", "reference")
    assert not Path("out").exists()
    assert not Path("out.work").exists()


def test_one_stage_writes_to_out_itself_and_work_may_be_elsewhere() -> None:
    made = plan(quantize={"bits": 3}, work="elsewhere")
    assert [stage.out for stage in made.stages] == ["out"]
    assert made.work == "elsewhere"


def test_bits_are_the_sums_over_the_matrices() -> None:
    made = plan(quantize={"bits": 3.25}).quantization
    assert made is not None
    weights = sum(matrix.shape[0] * matrix.shape[1] for matrix in made.matrices)
    assert made.bits_per_weight == pytest.approx(sum(8 * matrix.bytes for matrix in made.matrices) / weights, abs=1e-12)
    assert 3.15 < made.bits_per_weight <= 3.25
    assert len({matrix.width for matrix in made.matrices if matrix.group.endswith("qkv")}) == 1
    assert {matrix.name.split(".")[-1] for matrix in made.matrices} == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"
    }  # fmt: skip


def test_original_bytes_and_parameters_are_those_of_the_files() -> None:
    made = plan(quantize={"bits": 3.25})
    assert made.original_bytes == Path("student/model.safetensors").stat().st_size
    hidden, vocabulary = 64, VOCABULARY
    block = 2 * hidden * hidden + 2 * hidden * hidden // 2 + 3 * 2 * hidden * hidden + 2 * hidden
    assert made.parameters == vocabulary * hidden + block + hidden
    assert made.quantization is not None
    stored = sum(matrix.bytes for matrix in made.quantization.matrices)
    rest = made.parameters - sum(matrix.shape[0] * matrix.shape[1] for matrix in made.quantization.matrices)
    assert made.quantization.model_bytes == pytest.approx(stored + 2 * rest, rel=0.05)


def test_plain_data_is_json_with_the_figures_on_top() -> None:
    figures = json.loads(json.dumps(plan(quantize={"bits": 3.25}).to_dict(), allow_nan=False))
    assert figures["bits_target"] == 3.25
    assert figures["recipe"]["quantize"]["bits"] == 3.25
    assert figures["memory_bytes"] == figures["stages"][0]["memory_bytes"] > 0
    assert len(figures["matrices"]) == 7


def test_distillation_names_tokens_memory_and_data() -> None:
    made = plan(distill={**DISTILL, "gradient_accumulation": 3, "max_seconds": 5})
    stage = made.stages[0]
    assert f"{10 * 2 * 3 * 32:,} tokens" in stage.text
    assert stage.memory_bytes is not None
    assert stage.memory_bytes > made.parameters * 16
    assert "not give the same bytes twice" in stage.notes[0]
    assert made.data[0]["spec"] == "text:text.txt"
    assert len(str(made.data[0]["sha256"])) == 64


def test_a_student_of_random_weights_is_planned_without_files() -> None:
    config = json.loads(Path("student/config.json").read_text())
    Path("student.json").write_text(json.dumps(config))
    made = plan(model=None, distill={**DISTILL, "student": {"config": "student.json"}}, quantize={"bits": 3.25})
    of_files = plan(quantize={"bits": 3.25})
    assert made.stages[0].source is None
    assert made.parameters == of_files.parameters
    assert made.quantization is not None
    assert of_files.quantization is not None
    assert made.quantization.model_bytes == pytest.approx(of_files.quantization.model_bytes, rel=0.05)


@pytest.mark.parametrize(
    ("parts", "error", "message"),
    [
        ({"quantize": {"bits": 0.5}}, UsageError, r"1\.\d+ to [34]\.\d+ bits a weight, not with 0\.5|not in 0\.5"),
        ({"quantize": {"bits": 31}}, UsageError, r"31"),
        ({"quantize": {"bits": 3, "codec": "pyramit"}}, UsageError, r"Did you mean 'pyramid'\?"),
        ({"quantize": {"bits": 3, "codec": "pyramid:dimm=16"}}, UsageError, r"Did you mean 'dim'\?"),
        ({"distill": {**DISTILL, "losses": ["kll"]}}, UsageError, r"Did you mean 'kl'\?"),
        ({"distill": {**DISTILL, "losses": ["kl:temprature=2"]}}, UsageError, r"Did you mean 'temperature'\?"),
        ({"distill": {**DISTILL, "teacher": None}}, UsageError, r"'kl' needs a teacher"),
        ({"distill": {**DISTILL, "teacher": "other"}}, ModelError, r"vocabulary"),
        ({"distill": {**DISTILL, "data": "text:nothing.txt"}}, DataError, r"nothing\.txt"),
        ({"distill": DISTILL, "evaluate": {"data": "text:nothing.txt"}}, DataError, r"nothing\.txt"),
        ({"quantize": {"bits": 3}, "evaluate": {"data": "python"}}, DataError, r"no known kind"),
        ({"model": "./nowhere", "quantize": {"bits": 3}}, ModelError, r"nowhere"),
        ({"model": None, "distill": {**DISTILL, "student": {"config": "no.json"}}}, ModelError, r"no\.json"),
        ({"model": None, "quantize": {"bits": 3}}, RecipeError, r"exactly one of"),
    ],
)
def test_what_cannot_work_is_found_before_it_runs(
    parts: dict[str, Any], error: type[CompressError], message: str
) -> None:
    with pytest.raises(error, match=message):
        plan(**parts)


@pytest.mark.parametrize("name", packaged_recipes())
def test_packaged_recipes_are_planned(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = load_recipe(name)
    if "builtin:" in recipe.model_dump_json(exclude={"distill": {"data"}, "evaluate": {"data"}}):
        try:
            builtin_names()
        except ModelError as error:
            pytest.skip(str(error))
    monkeypatch.chdir(packaged_recipes()["demo"].parents[1])
    made = make_plan(recipe)
    assert [stage.name for stage in made.stages] == list(recipe.stages)
