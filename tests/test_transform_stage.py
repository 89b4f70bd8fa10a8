"""The stage `transform` in recipes, plans and on the command line."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import transformers
from click.testing import CliRunner

from cli.main import main
from compress.errors import ModelError, RecipeError, UsageError
from compress.pipeline import run
from compress.plan import make_plan
from compress.recipe import make_recipe
from tests import families
from tests.tiny_models import write_llama, write_text

LEARN = "ost:steps=3,batch=2,activations=8,kv=8"


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return write_llama(tmp_path / "model", write_text(tmp_path))


def part(**changes: Any) -> dict[str, Any]:
    return {"transform": LEARN, "data": "text:text.txt", "rows": 4, "context": 16, **changes}


def test_transform_then_quantize_then_measure(model: Path, tmp_path: Path) -> None:
    recipe = make_recipe(
        {
            "model": "model",
            "out": "out",
            "transform": part(bits=5, codec="integer:group=16", dtype="float32"),
            "quantize": {"bits": 5, "codec": "integer:group=16"},
            "evaluate": {"data": "text:text.txt", "context": 16, "limit": 64, "reference": "model", "activations": 8},
        }
    )
    plan = make_plan(recipe)
    assert [stage.name for stage in plan.stages] == ["transform", "quantize", "evaluate"]
    assert plan.stages[0].text.startswith("learn 2 rotations and 5 scalings") and plan.stages[0].memory_bytes
    assert plan.stages[2].text.endswith("activations in 8 bits")
    report = run(recipe)
    assert report["transform"]["steps"] == 3 and report["transform"]["transform"].startswith("ost:steps=3")
    assert set(report["evaluate"]["models"]) >= {"transformed", "quantized"}
    assert (tmp_path / "out" / "transformed" / "config.json").is_file()
    weights = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*.safetensors")}
    assert run(recipe)["transform"] == report["transform"]
    assert weights == {path: path.read_bytes() for path in weights}


def test_on_the_command_line(model: Path, tmp_path: Path) -> None:
    given = ["--transform", LEARN, "--data", "text:text.txt", "--rows", "4", "--context", "16"]
    planned = CliRunner().invoke(main, ["plan", "transform", "model", *given, "--json"])
    assert planned.exit_code == 0, planned.stderr
    stages = json.loads(planned.stdout)["stages"]
    assert [stage["name"] for stage in stages] == ["transform"] and "an ordinary checkpoint" in stages[0]["text"]
    done = CliRunner().invoke(main, ["transform", "model", *given, "--out", "out", "--json"])
    assert done.exit_code == 0, done.stderr
    figures = json.loads(done.stdout)["transform"]
    assert set(figures["qsur"]["model.layers.0.mlp.down_proj"]) == {"weight", "input"}
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.config.tie_word_embeddings  # all gains of the last norm are equal


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"transform": "auto"}, "none that can be folded"),
        ({"transform": "hadamard"}, "the transform hadamard uses no data"),
        ({"data": None}, "the transform ost needs data"),
        ({"bits": 0}, "greater than 0"),
        ({"dtype": "half"}, "'stored' or 'float32'"),
    ],
)
def test_recipes_that_cannot_be(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        make_recipe({"model": "m", "out": "out", "transform": part(**changes)})


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"transform": "ost:stps=3"}, UsageError, "has no option 'stps'.*steps"),
        ({"transform": "ost:activations=9"}, UsageError, "9 bits"),
        ({"transform": "ost:tail=none"}, UsageError, "tail"),
        ({"context": 100_000}, UsageError, "transform.context asks for 100000"),
    ],
)
def test_plans_that_cannot_be(model: Path, changes: dict[str, Any], error: type[Exception], message: str) -> None:
    recipe = make_recipe({"model": "model", "out": "out", "transform": part(**changes)})
    with pytest.raises(error) as caught:
        make_plan(recipe)
    assert re.search(message, str(caught.value), re.DOTALL), str(caught.value)


def test_an_encoder_is_refused_when_it_is_planned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_text(tmp_path)
    families.build("BertForMaskedLM", "bert").save_pretrained(tmp_path / "bert")
    with pytest.raises(ModelError, match="has no place for a learned transform"):
        make_plan(make_recipe({"model": "bert", "out": "out", "transform": part()}))
