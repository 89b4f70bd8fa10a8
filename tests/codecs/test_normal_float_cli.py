"""Codecs of one rate on the command line, in recipes and in Python: no rate need be named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import transformers
from click.testing import CliRunner, Result

import compress
from compress.cli.main import main
from compress.errors import RecipeError, UsageError
from compress.quantization.modules import packed_linears
from compress.recipe import make_recipe
from tests import families
from tests.tiny_models import write_llama, write_text


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("one-rate")
    return write_llama(folder / "model", write_text(folder), hidden=64)


def call(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments], catch_exceptions=False)


@pytest.mark.parametrize(("codec", "bits"), [("nf4", 4.5), ("fp4:block=32", 5.0), ("nf4:double=true", None)])
def test_plan_says_the_rate_and_quantize_keeps_it(model: Path, tmp_path: Path, codec: str, bits: float | None) -> None:
    planned = json.loads(call("plan", "quantize", model, "--codec", codec, "--json").stdout)
    assert planned["bits_target"] is None and planned["bits_per_weight"] == (bits or planned["bits_per_weight"])
    report = json.loads(call("quantize", model, "--codec", codec, "--out", tmp_path / "q", "--json").stdout)
    assert report["bits_per_weight"] == planned["bits_per_weight"]
    assert report["model_bytes"] == planned["model_bytes"] == (tmp_path / "q" / "model.safetensors").stat().st_size
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "q")
    assert {one.spec.codec for one in packed_linears(loaded).values()} == {codec.partition(":")[0]}


def test_the_word_quantize_may_be_left_out_and_the_rate_be_named(model: Path) -> None:
    assert "4.5000 (the codec's only rate)" in call("plan", model, "--codec", "nf4").stdout
    assert "4.5000 (asked: 4.5)" in call("plan", model, "--codec", "nf4", "--bits", 4.5).stdout


def test_rates_that_there_are_not(model: Path) -> None:
    other = call("plan", model, "--codec", "nf4", "--bits", 4)
    assert other.exit_code == 2 and "in 4.500 bits a weight, not in 4.0" in other.stderr
    several = call("plan", "quantize", model)
    assert several.exit_code == 2
    assert "bits a weight, and no rate is asked for" in several.stderr and "(--bits)" in several.stderr


def test_in_python() -> None:
    named, unnamed = families.llama(), families.llama()
    compress.quantize(unnamed, codec="nf4")
    compress.quantize(named, codec="nf4", bits=4.5)
    ids = families.token_ids()
    assert families.logits(named, ids).equal(families.logits(unnamed, ids))
    assert unnamed.config.quantization_config.bits_per_weight == 4.5
    with pytest.raises(UsageError, match="Leave out the rate"):
        compress.quantize(families.llama(), codec="nf4", bits=3.25)
    wide = families.llama(hidden_size=256, intermediate_size=256)
    assert 3.2 < compress.quantize(wide).config.quantization_config.bits_per_weight <= 3.25


def test_an_export_chooses_the_codec() -> None:
    def chosen(*formats: str) -> str:
        exports = [{"to": name} for name in formats]
        recipe = make_recipe({"model": "m", "out": "o", "quantize": {}, "export": exports})
        assert recipe.quantize is not None
        return str(recipe.quantize.codec)

    assert chosen("bitsandbytes") == "nf4" and chosen("onnx") == chosen("onnx", "bitsandbytes") == "pyramid"
    with pytest.raises(RecipeError, match="bitsandbites"):
        chosen("bitsandbites")


def test_export_to_bitsandbytes(model: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    call("quantize", model, "--codec", "int8", "--out", tmp_path / "q", "--quiet")
    done = call("export", tmp_path / "q", "--to", "bitsandbytes", "--out", tmp_path / "b", "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["export:bitsandbytes"]["matrices"] == {"int8": 7}
    names = {path.name for path in (tmp_path / "b").iterdir()}
    assert {"model.safetensors", "config.json", "tokenizer.json", "README.md", "report.json"} <= names
    config = json.loads((tmp_path / "b" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "bitsandbytes"
    refused = call("export", model, "--to", "bitsandbytes", "--out", tmp_path / "c")
    assert refused.exit_code != 0 and "no quantized matrix" in refused.stderr
