"""A plan runs nothing, and what it says is what happens: names, bits, bytes."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from compress.codecs import codec
from compress.errors import CompressError, DataError, DependencyError, ModelError, RecipeError, UsageError
from compress.modeling.resolve import builtin_names
from compress.pipeline import run
from compress.plan import Plan, make_plan
from compress.quantization.target import open_target
from compress.recipe import load_recipe, make_recipe, packaged_recipes
from tests.families import bert, llama, save
from tests.tiny_models import VOCABULARY, write_llama, write_text


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    text = write_text(folder)
    write_llama(folder / "teacher", text, hidden=64, layers=2, seed=1)
    write_llama(folder / "student", text, hidden=64, seed=2)
    save(llama(), folder / "other")
    save(bert(), folder / "encoder")
    text.with_name("numbers.txt").write_text(" ".join(str(7 * number) for number in range(2000)))
    write_llama(folder / "foreign", text.with_name("numbers.txt"), hidden=64)
    return folder


@pytest.fixture(autouse=True)
def inside(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(models)


def plan(**parts: Any) -> Plan:
    return make_plan(make_recipe({"model": "student", "out": "out", **parts}))


EVALUATE = {"data": "text:text.txt", "context": 32}
ENCODER = {**EVALUATE, "reference": "encoder"}
DISTILL = {"teacher": "teacher", "data": "text:text.txt", "losses": ["kl"], "steps": 10, "batch_size": 2, "context": 32}


def test_stages_in_order_with_what_each_reads_and_writes() -> None:
    made = plan(
        distill=DISTILL,
        quantize={"bits": 3.25},
        export=[{"to": "onnx"}],
        evaluate={**EVALUATE, "compare": ["teacher"]},
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


CALIBRATED = {"bits": 3.25, "data": "text:text.txt", "rows": 8, "context": 32, "transform": "none"}


def test_a_quantization_says_how_it_rounds_and_what_it_knows() -> None:
    free, calibrated = plan(quantize={"bits": 3.25}).quantization, plan(quantize=CALIBRATED).quantization
    asked = plan(quantize={**CALIBRATED, "rounding": "ldlq:sweeps=3,damping=0.05"}).quantization
    assert free is not None
    assert calibrated is not None
    assert asked is not None
    assert (free.data_free, free.rounding) == (True, "nearest")
    assert len(free.notes) == 1
    assert "data-free" in free.notes[0]
    assert (calibrated.data_free, calibrated.rounding, calibrated.notes) == (False, "ldlq", ())
    assert asked.rounding == "ldlq:sweeps=3,damping=0.05"
    assert free.matrices == calibrated.matrices, "what is stored does not depend on how it was rounded"
    assert {matrix.mixing for matrix in free.matrices} == {"none"}
    assert calibrated.memory_bytes > free.memory_bytes


def test_a_mixed_model_pays_for_its_signs_and_says_what_is_folded() -> None:
    plain = plan(quantize=CALIBRATED).quantization
    made = plan(quantize={**CALIBRATED, "transform": "hadamard"}).quantization
    assert plain is not None
    assert made is not None
    signed = [matrix for matrix in made.matrices if matrix.mixing != "none"]
    assert signed
    assert made.containers == ()
    assert any(f"{len(signed)} of {len(made.matrices)} matrices are mixed at run time" in note for note in made.notes)
    assert 3.1 < made.bits_per_weight <= 3.25
    method = codec("half_pyramid")
    for matrix in made.matrices:
        rows, columns = matrix.shape
        sides = {"none": 0, "input": columns, "output": rows, "both": rows + columns}[matrix.mixing]
        assert 8 * matrix.bytes == method.bits(method.spec(matrix.width), matrix.shape) + sides  # multiples of eight


def test_mixing_is_chosen_where_it_costs_nothing_else() -> None:
    """For calibrated half pyramids, but not of what is exported or would get an untied head, nor for other codecs."""

    def chosen(model: str, **more: Any) -> str:
        parts = {"quantize": {**CALIBRATED, "transform": "auto"}, **more}
        made = make_plan(make_recipe({"model": model, "out": "out", **parts})).quantization
        assert made is not None
        return made.transform

    assert chosen("encoder") == "hadamard"
    assert chosen("builtin:student") == "none", "its head is tied, and its last norm's gains differ"
    assert chosen("encoder", quantize={"bits": 3.25}) == "none"
    assert chosen("encoder", quantize={**CALIBRATED, "transform": "auto", "codec": "pyramid"}) == "none"
    assert chosen("encoder", export=[{"to": "onnx"}]) == "none"


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


@pytest.mark.parametrize("bits", [0.5, 31.0])
def test_a_rate_out_of_reach_names_the_reach(bits: float) -> None:
    shapes = [(64, 64), (32, 64), (32, 64), (64, 64), (128, 64), (128, 64), (64, 128)]
    method = codec("half_pyramid")
    reach = [
        sum(method.bits(method.spec(width), shape) for shape in shapes)
        / sum(rows * columns for rows, columns in shapes)
        for width in (min(method.widths()), max(method.widths()))
    ]
    message = f"{reach[0]:.3f} to {reach[1]:.3f} bits a weight, not in {bits}."
    with pytest.raises(UsageError, match=re.escape(message)):
        plan(quantize={"bits": bits})


@pytest.mark.parametrize("max_shard_bytes", [5_000_000_000, 30_000])
def test_the_predicted_size_is_that_of_the_files(tmp_path: Path, max_shard_bytes: int) -> None:
    recipe = {"out": str(tmp_path / "q"), "quantize": {"bits": 2.75, "max_shard_bytes": max_shard_bytes}}
    made = make_plan(make_recipe({"model": "student", **recipe}))
    run(made.recipe)
    sizes = [path.stat().st_size for path in (tmp_path / "q").glob("*.safetensors")]
    assert made.quantization is not None
    assert made.quantization.model_bytes == sum(sizes)
    assert (len(sizes) > 1) == (max_shard_bytes == 30_000)


@pytest.mark.parametrize("out", [".", "./", "/", "..", "../", "deep/..", "deep/../../.."])
def test_a_result_takes_a_folder_of_its_own(out: str, tmp_path: Path, models: Path) -> None:
    (models / "deep").mkdir(exist_ok=True)
    with pytest.raises(UsageError, match=r"cannot be the result.*--out result"):
        plan(quantize={"bits": 3}, out=out)


@pytest.mark.parametrize("out", ["q", "./q", "q/", "q/."])
def test_spellings_of_a_folder_are_one(out: str) -> None:
    made = plan(quantize={"bits": 3}, out=out)
    assert (made.out, made.work, made.stages[0].out) == ("q", "q.work", "q")


def test_packages_of_an_export_are_missed_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "onnxscript" else object())
    with pytest.raises(DependencyError, match="onnxscript"):
        plan(export=[{"to": "onnx"}])
    with pytest.raises(DependencyError, match="onnxscript"):
        plan(evaluate={**EVALUATE, "tokens_per_second": True})
    assert plan(quantize={"bits": 3}).stages


def test_code_of_a_model_is_trusted_everywhere_or_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def watch(folder: Path, trust_remote_code: bool = False, *others: Any, **more: Any) -> Any:
        asked.append(trust_remote_code)
        return open_target(folder, trust_remote_code, *others, **more)

    monkeypatch.setattr("compress.plan.quantize.open_target", watch)
    plan(quantize={"bits": 3}, trust_remote_code=True)
    plan(quantize={"bits": 3})
    assert asked == [True, False]


@pytest.mark.parametrize(
    ("parts", "error", "message"),
    [
        ({"quantize": {"bits": 3, "codec": "pyramit"}}, UsageError, r"Did you mean 'pyramid'\?"),
        ({"quantize": {"bits": 3, "codec": "pyramid:dimm=16"}}, UsageError, r"Did you mean 'dim'\?"),
        ({"distill": {**DISTILL, "losses": ["kll"]}}, UsageError, r"Did you mean 'kl'\?"),
        ({"distill": {**DISTILL, "losses": ["kl:temprature=2"]}}, UsageError, r"Did you mean 'temperature'\?"),
        ({"distill": {**DISTILL, "teacher": None}}, UsageError, r"'kl' needs a teacher"),
        ({"distill": {**DISTILL, "teacher": "other"}}, ModelError, r"vocabulary"),
        ({"distill": {**DISTILL, "data": "text:nothing.txt"}}, DataError, r"nothing\.txt"),
        ({"distill": DISTILL, "evaluate": {**EVALUATE, "data": "text:nothing.txt"}}, DataError, r"nothing\.txt"),
        ({"quantize": {"bits": 3}, "evaluate": {**EVALUATE, "data": "python"}}, DataError, r"no known kind"),
        ({"model": "./nowhere", "quantize": {"bits": 3}}, ModelError, r"nowhere"),
        ({"model": None, "distill": {**DISTILL, "student": {"config": "no.json"}}}, ModelError, r"no\.json"),
        ({"model": None, "quantize": {"bits": 3}}, RecipeError, r"exactly one of"),
        ({"distill": {**DISTILL, "context": 65}}, UsageError, r"'student' takes 64 tokens, and distill\.context"),
        ({"model": "encoder", "distill": DISTILL}, ModelError, r"not a causal language model"),
        ({"evaluate": {**EVALUATE, "reference": "./nowhere"}}, ModelError, r"nowhere"),
        ({"evaluate": {**EVALUATE, "compare": ["teacher", "./nowhere"]}}, ModelError, r"nowhere"),
        ({"evaluate": {**EVALUATE, "reference": "other"}}, ModelError, r"vocabulary"),
        ({"evaluate": {**EVALUATE, "reference": "foreign"}}, ModelError, r"different tokenizers"),
        ({"distill": {**DISTILL, "teacher": "foreign"}}, ModelError, r"different tokenizers"),
        (
            {
                "model": None,
                "distill": {**DISTILL, "student": {"config": "teacher/config.json", "tokenizer": "foreign"}},
            },
            ModelError,
            r"different tokenizers",
        ),
        ({"evaluate": {**EVALUATE, "reference": "encoder"}}, ModelError, r"'encoder' is an encoder"),
        ({"quantize": {**CALIBRATED, "context": 65}}, UsageError, r"quantize\.context asks for 65.*--context 64"),
        ({"evaluate": {**EVALUATE, "context": 65}}, UsageError, r"evaluate\.context asks for 65.*--context 64"),
        ({"model": "encoder", "evaluate": EVALUATE}, UsageError, r"evaluate\.reference"),
        ({"model": "encoder", "evaluate": {**ENCODER, "samples": 1}}, UsageError, r"Remove evaluate\.samples"),
        ({"model": "encoder", "evaluate": {**ENCODER, "tokens_per_second": True}}, UsageError, r"tokens_per_second"),
        ({"quantize": {**CALIBRATED, "rounding": "gptq"}}, UsageError, r"no rounding 'gptq'"),
        ({"quantize": {**CALIBRATED, "rounding": "ldlq:swep=2"}}, UsageError, r"Did you mean 'sweeps'\?"),
        ({"quantize": {**CALIBRATED, "rounding": "ldlq:gain=long"}}, UsageError, r"gain is 'long'"),
        ({"quantize": {**CALIBRATED, "rounding": "nearest"}}, RecipeError, r"nearest uses no data"),
        ({"quantize": {"bits": 3, "rounding": "ldlq"}}, RecipeError, r"ldlq needs data"),
        ({"quantize": {**CALIBRATED, "data": "text:nothing.txt"}}, DataError, r"nothing\.txt"),
        ({"quantize": {"bits": 3}, "device": "warp"}, UsageError, r"'warp'"),
        ({"quantize": {"bits": 3}, "device": "cuda:99"}, UsageError, r"'cuda:99'"),
        ({"quantize": {"bits": 3}, "out": "student"}, UsageError, r"The model 'student' and the result"),
        ({"quantize": {"bits": 3}, "out": "text.txt"}, UsageError, r"no folder"),
        ({"quantize": {"bits": 3}, "work": "out/work"}, UsageError, r"'out/work' and the result 'out' overlap"),
        ({"quantize": {"bits": 3}, "work": "out"}, UsageError, r"overlap"),
    ],
)
def test_what_cannot_work_is_found_before_it_runs(
    parts: dict[str, Any], error: type[CompressError], message: str
) -> None:
    with pytest.raises(error, match=message):
        plan(**parts)


@pytest.mark.parametrize("name", packaged_recipes())
def test_packaged_recipes_are_planned_in_any_folder(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = load_recipe(name)
    if "builtin:" in recipe.model_dump_json(exclude={"distill": {"data"}, "evaluate": {"data"}}):
        try:
            builtin_names()
        except ModelError as error:
            pytest.skip(str(error))
    monkeypatch.chdir(tmp_path)
    made = make_plan(recipe)
    assert [stage.name for stage in made.stages] == list(recipe.stages)
