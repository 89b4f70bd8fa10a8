"""Recipes: what is read is what was written, and what is wrong is named with its line and what would be right."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from compress.errors import RecipeError
from compress.recipe import (
    Method,
    QuantizeRecipe,
    Recipe,
    flatten,
    load_recipe,
    make_recipe,
    packaged_recipes,
    with_overrides,
)
from compress.recipe.schema import parse_bytes

TEXT = """\
version: 1
model: builtin:student
out: result
distill:
  teacher: builtin:teacher
  data: builtin:python/train
  losses:
    - kl:temperature=2,weight=0.5
    - {name: cross_entropy, options: {weight: 0.5}}
  steps: 20
  learning_rate: 1e-3
quantize:
  bits: 3.25
export:
  - to: onnx
evaluate:
  data: [builtin:python/val]
"""


def write(folder: Path, text: str) -> str:
    path = folder / "recipe.yaml"
    path.write_text(text)
    return str(path)


def change(old: str, new: str) -> str:
    assert old in TEXT
    return TEXT.replace(old, new)


def test_a_full_recipe(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, TEXT))
    assert recipe.stages == ("distill", "quantize", "export:onnx", "evaluate")
    assert recipe.distill is not None
    assert recipe.distill.data == ["builtin:python/train"]
    assert recipe.distill.losses[0] == Method(name="kl", options={"temperature": 2, "weight": 0.5})
    assert recipe.distill.learning_rate == 0.001
    assert recipe.quantize is not None
    assert str(recipe.quantize.codec) == "pyramid"


def test_dump_and_read_is_the_identity(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, TEXT))
    text = yaml.safe_dump(recipe.model_dump(mode="json"))
    assert load_recipe(write(tmp_path, text)) == recipe


@pytest.mark.parametrize(
    ("text", "options"),
    [
        ("kl", {}),
        ("kl:temperature=2", {"temperature": 2}),
        ("kl:weight=1e-3,t2=true,kind=top_k", {"weight": 0.001, "t2": True, "kind": "top_k"}),
        ("pyramid:dim=16,max=7", {"dim": 16, "max": 7}),
    ],
)
def test_method_text(text: str, options: dict[str, Any]) -> None:
    method = Method.model_validate(text)
    assert method.options == options
    assert [type(value) for value in method.options.values()] == [type(value) for value in options.values()]
    assert Method.model_validate(str(method)) == method


@pytest.mark.parametrize("text", ["", ":", "kl:", "kl:x", "kl:x=", "kl:x=1,", "kl:x=1,x=2", "kl x=1", "kl:=1"])
def test_method_text_that_is_none(text: str) -> None:
    with pytest.raises(RecipeError, match=r"distill\.losses\.0"):
        make_recipe({"model": "m", "out": "o", "distill": {"data": "d", "losses": [text]}})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (change("  steps:", "  step:"), r"recipe\.yaml:10: unknown key 'distill\.step'\. Did you mean 'steps'\?"),
        (change("export:", "exprot:"), r"recipe\.yaml:14: unknown key 'exprot'\. Did you mean 'export'\?"),
        (change("  - to: onnx", "  - to: onnx\n    qqq: 1"), r":16: unknown key 'export\.0\.qqq'\. Known here: to\."),
        (change("options: {w", "option: {w"), r":9: unknown key 'distill\.losses\.1\.option'\. Did you mean 'options'"),
        (change("steps: 20", "steps: 0"), r":10: 'distill\.steps' is 0\. Allowed: greater than or equal to 1"),
        (change("steps: 20", "steps: many"), r":10: 'distill\.steps' is 'many'\. Allowed: a valid integer"),
        (change("steps: 20", "steps: '20'"), r":10: 'distill\.steps' is '20'"),
        (change("bits: 3.25", "bits: -1"), r":13: 'quantize\.bits' is -1\. Allowed: greater than 0"),
        (change("bits: 3.25", "bits: .nan"), r":13: 'quantize\.bits' is nan"),
        (change("to: onnx", "to: onyx"), r":15: 'export\.0\.to' is 'onyx'\. Allowed: 'onnx'"),
        (change("weight: 0.5", "weight: [1]"), r":9: 'distill\.losses\.1\.options'"),
        (change("out: result\n", ""), r"the key 'out' is missing"),
        (change("version: 1", "version: 7"), r":1: 'version' is 7\. Allowed: 1"),
        (change("steps: 20", "steps: 20\n  steps: 30"), r":11: the key 'steps' is already given in line 10"),
        (change("out: result", "out: [result"), r"no YAML"),
        (
            change("out: result", "out: !!python/object/apply:os.system [id]"),
            r":3: this is a value of the kind 'python/object/apply:os\.system'",
        ),
        (change("out: result", "out: \x07"), r"no YAML"),
        (change("model: builtin:student\n", ""), r"exactly one of `model` and `distill\.student`"),
        ("- 1\n", r"a recipe is a mapping"),
        ("", r"a recipe is a mapping"),
        ("model: m\nout: o\n", r"at least one of distill, transform, quantize, export, evaluate"),
        (change("  - to: onnx", "  - to: onnx\n  - to: onnx"), r"names a format twice"),
        ("model: &a [*a]\nout: o\n", r":1: an alias refers to this"),
        ("model: m\nout: &a [x]\nwork: *a\n", r":2: an alias refers to this"),
    ],
)
def test_what_is_wrong_is_named_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message) as caught:
        load_recipe(write(tmp_path, text))
    assert caught.value.exit_code == 2


def test_all_errors_come_at_once(tmp_path: Path) -> None:
    text = change("steps: 20", "step: 20").replace("bits: 3.25", "bits: three")
    with pytest.raises(RecipeError) as caught:
        load_recipe(write(tmp_path, text))
    assert len(str(caught.value).splitlines()) == 2


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", None])
def test_unreadable_files(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content) if content is not None else path.mkdir()
    with pytest.raises(RecipeError, match=r"recipe\.yaml"):
        load_recipe(str(path))
    with pytest.raises(RecipeError, match="There is no recipe"):
        load_recipe(str(tmp_path / "nothing.yaml"))


def test_overrides(tmp_path: Path) -> None:
    recipe = load_recipe(
        write(tmp_path, TEXT),
        [
            "quantize.bits=2.5",
            "distill.losses.0=kl",
            "distill=null",
            "evaluate.limit=1000",
            "quantize.codec=pyramid:dim=16",
        ],
    )
    assert recipe.stages == ("quantize", "export:onnx", "evaluate")
    assert recipe.quantize is not None
    assert recipe.quantize.bits == 2.5
    assert recipe.quantize.codec.options == {"dim": 16}
    assert recipe.evaluate is not None
    assert recipe.evaluate.limit == 1000


def test_an_override_makes_the_mappings_on_its_way() -> None:
    base: dict[str, Any] = {"model": "m", "quantize": None}
    assert with_overrides(base, ["quantize.bits=3", "out=o"]) == {"model": "m", "quantize": {"bits": 3}, "out": "o"}
    assert base == {"model": "m", "quantize": None}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("quantize.bitz=3", r"--set quantize\.bitz=3: unknown key 'quantize\.bitz'\. Did you mean 'bits'\?"),
        ("quantize.bits=x", r"--set quantize\.bits=x: 'quantize\.bits' is 'x'"),
        ("quantize", r"sets nothing"),
        ("=3", r"sets nothing"),
        ("distill.losses.7=kl", r"no entry '7' in a list of 2"),
        ("model.name=x", r"nothing below 'builtin:student'"),
        ("out=[", r"no YAML"),
    ],
)
def test_wrong_overrides(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe(write(tmp_path, TEXT), [override])


def test_arguments_are_flat_and_leave_the_work_folder_out(tmp_path: Path) -> None:
    arguments = load_recipe(write(tmp_path, TEXT), ["work=w"]).arguments()
    assert arguments["quantize.bits"] == 3.25
    assert arguments["distill.losses.0.options.temperature"] == 2
    assert "work" not in arguments
    assert flatten({"a": [1, {"b": None}], "c": {}, "d": []}) == {"a.0": 1, "a.1.b": None, "c": {}, "d": []}


def test_the_config_of_a_student_lies_beside_its_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "out: o\ndistill: {data: d, losses: [kl], student: {config: sub/s.json}}\n"
    where = write(tmp_path, text)
    monkeypatch.chdir("/")

    def config(*overrides: str) -> str:
        distill = load_recipe(where, overrides).distill
        assert distill is not None
        assert distill.student is not None
        return distill.student.config

    assert Path(config()) == tmp_path / "sub" / "s.json"
    assert config("distill.student.config=mine.json") == "mine.json"
    write(tmp_path, text.replace("sub/s.json", "/else/where.json"))
    assert config() == "/else/where.json"
    write(tmp_path, text.replace("sub/s.json", "[1]"))
    with pytest.raises(RecipeError, match=r"'distill\.student\.config' is \[1\]"):
        config()


CALIBRATED: dict[str, Any] = {"bits": 3, "data": "text:a.txt", "rows": 4, "context": 32}


def quantized(**parts: Any) -> QuantizeRecipe:
    part = make_recipe({"model": "m", "out": "o", "quantize": {"bits": 3, **parts}}).quantize
    assert part is not None
    return part


def test_data_make_a_quantization_calibrated() -> None:
    free = quantized()
    assert (free.data, free.rounding, free.calibration) == (None, None, None)
    assert quantized(rounding="nearest").calibration is None
    asked = quantized(**CALIBRATED)
    assert asked.data == ["text:a.txt"]
    assert asked.calibration == Method(name="ldlq")
    assert quantized(data=["a", "b"], rounding="ldlq:sweeps=4").calibration == Method(
        name="ldlq", options={"sweeps": 4}
    )
    assert (free.rows, free.context, free.transform, free.memory) == (128, None, Method(name="auto"), "2GB")


@pytest.mark.parametrize(
    ("text", "count"),
    [("0", 0), ("64000000", 64_000_000), ("12B", 12), ("1.5 GB", 1_500_000_000), ("500MB", 5 * 10**8), (" 3kB", 3000)],
)
def test_bytes_are_decimal(text: str, count: int) -> None:
    assert parse_bytes(text) == count
    assert quantized(memory=text).memory == text


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"memory": "much"}, r"'quantize\.memory' is 'much'.*500MB"),
        ({"memory": "-1GB"}, r"'quantize\.memory' is '-1GB'"),
        ({"memory": "1GiB"}, r"'quantize\.memory' is '1GiB'"),
        ({"rows": 0}, r"'quantize\.rows' is 0\. Allowed: greater than or equal to 1"),
        ({"context": 1}, r"'quantize\.context' is 1\. Allowed: greater than or equal to 2"),
        ({"data": []}, r"'quantize\.data'"),
        ({"transform": "ost"}, "the transform ost needs data"),
        ({"rounding": "ldlq"}, r"the rounding ldlq needs data"),
        ({"rounding": "nearest", "data": "d"}, r"the rounding nearest uses no data"),
        ({"row": 3}, r"unknown key 'quantize\.row'\. Did you mean 'rows'\?"),
    ],
)
def test_what_a_quantization_cannot_be(parts: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        quantized(**parts)


def test_models_are_named_once() -> None:
    evaluate = {"data": "d", "reference": "t", "compare": ["m", "t", "x"]}
    distill = {"data": "d", "losses": ["kl"], "teacher": "t"}
    assert make_recipe({"model": "m", "out": "o", "distill": distill, "evaluate": evaluate}).models == ("m", "t", "x")
    assert make_recipe({"model": "m", "out": "o", "quantize": {"bits": 3}}).models == ("m",)


def test_json_schema_agrees_with_the_reader() -> None:
    schema = Recipe.json_schema()
    assert schema["additionalProperties"] is False
    assert set(schema["properties"]) == set(Recipe.model_fields)
    text, mapping = schema["$defs"]["Method"]["anyOf"]
    assert text["type"] == "string"
    assert mapping["type"] == "object"


@pytest.mark.parametrize("name", packaged_recipes())
def test_packaged_recipes_are_valid(name: str) -> None:
    assert load_recipe(name).stages


def test_a_packaged_recipe_is_suggested() -> None:
    with pytest.raises(RecipeError, match=r"Did you mean 'demo'\?"):
        load_recipe("demoo")


def test_options_are_read_as_they_are_written() -> None:
    text = "name:count=3,rate=0.5,on=true,off=false,limit=none,kind=hard"
    method = Method.model_validate(text)
    assert method.options == {"count": 3, "rate": 0.5, "on": True, "off": False, "limit": None, "kind": "hard"}
    assert str(method) == text
