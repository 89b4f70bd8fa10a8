"""The built-in models, and the figures that are promised of them: size, rate, round trip, ONNX Runtime."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

import compress
from compress.data import text_source, tokenize
from compress.evaluation.evaluate import evaluate
from compress.evaluation.generate import OnnxDecoder, generate_greedy, positions_of
from compress.formats.inspect import inspect_artifact
from compress.modeling.loading import load_model, load_tokenizer
from compress.modeling.resolve import resolve_model
from compress.recipe import make_recipe
from compress.storage import file_sha256

NAMES = ("teacher", "student")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """`compress quantize builtin:teacher --bits 3.25` and its ONNX export: the folder, and the report."""
    out = tmp_path_factory.mktemp("run") / "out"
    recipe = {"model": "builtin:teacher", "out": str(out), "quantize": {"bits": 3.25}, "export": [{"to": "onnx"}]}
    return out, compress.run(make_recipe(recipe))


@pytest.fixture(scope="module")
def prompt() -> torch.Tensor:
    tokenizer = load_tokenizer("builtin:teacher")
    return torch.tensor([tokenizer("import os\n\n\ndef main(")["input_ids"]])


def test_sizes_and_widths() -> None:
    folders = [resolve_model(f"builtin:{name}") for name in NAMES]
    assert sum(path.stat().st_size for folder in folders for path in folder.iterdir()) < 16_000_000
    parameters = []
    for folder in folders:
        with safe_open(folder / "model.safetensors", "pt") as stored:
            shapes = [stored.get_slice(name).get_shape() for name in stored.keys()]  # noqa: SIM118
            assert {stored.get_slice(name).get_dtype() for name in stored.keys()} == {"BF16"}  # noqa: SIM118
        assert all(size % 64 == 0 for shape in shapes for size in shape)
        parameters.append(sum(torch.Size(shape).numel() for shape in shapes))
    assert parameters[0] == pytest.approx(5.5e6, rel=0.02)
    assert parameters[1] == pytest.approx(parameters[0] / 5, rel=0.1)


def test_tokenizers_are_one_byte_level_bpe() -> None:
    contents = [(resolve_model(f"builtin:{name}") / "tokenizer.json").read_bytes() for name in NAMES]
    assert contents[0] == contents[1]
    tokenizer = load_tokenizer("builtin:teacher")
    assert len(tokenizer) == 4096
    text = "def f(x):\n\treturn 'naïve — 日本語 🙂'\r\n"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


@pytest.mark.parametrize(("name", "bound"), [("teacher", 1.30), ("student", 1.65)])
def test_bits_per_byte_on_validation(name: str, bound: float) -> None:
    figures = evaluate(f"builtin:{name}", data="builtin:python/val", context=512, limit=32_768)
    assert figures["bits_per_byte"] < bound


@pytest.mark.parametrize("name", NAMES)
def test_cards_say_how_they_were_made(name: str) -> None:
    card = (resolve_model(f"builtin:{name}") / "README.md").read_text(encoding="utf-8")
    for part in ("| data | builtin:python/train", "| training loss |", "| time |", "| bits_per_byte |", "## Recipe"):
        assert part in card
    assert card.count("continued") == 10


def test_every_stored_bit_is_counted(run: tuple[Path, dict[str, Any]]) -> None:
    out, report = run
    assert 3.23 <= report["bits_per_weight"] <= 3.25
    stored = weights = 0
    with safe_open(out / "quantized" / "model.safetensors", "pt") as file:
        for matrix in report["matrices"]:
            entry = file.get_slice(f"{matrix['name']}.weight")
            assert (entry.get_dtype(), len(entry.get_shape())) == ("I8", 1)
            stored += 8 * entry.get_shape()[0]
            weights += matrix["shape"][0] * matrix["shape"][1]
    assert len(report["matrices"]) == 7 * 6
    assert weights == 5_475_584 - 4096 * 256 - 13 * 256
    assert report["bits_per_weight"] == pytest.approx(stored / weights, rel=1e-12)
    assert inspect_artifact(out / "quantized").bits_per_weight == pytest.approx(stored / weights, rel=1e-12)


def test_loaded_logits_are_those_in_memory(run: tuple[Path, dict[str, Any]], prompt: torch.Tensor) -> None:
    loaded = load_model(str(run[0] / "quantized"))
    codec = loaded.config.quantization_config.to_dict()["default"]["codec"]
    in_memory = compress.quantize(load_model("builtin:teacher"), bits=3.25, codec=codec)
    with torch.no_grad():
        assert torch.equal(loaded(prompt).logits, in_memory(prompt).logits)


def test_unplugged_reader_refuses(run: tuple[Path, dict[str, Any]]) -> None:
    code = (
        "import sys; from transformers import AutoModelForCausalLM\n"
        f"AutoModelForCausalLM.from_pretrained({str(run[0] / 'quantized')!r})"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode != 0
    assert "compress" not in result.stdout
    assert "size" in result.stderr and "mismatch" in result.stderr


def test_onnx_runtime_writes_the_same_tokens(run: tuple[Path, dict[str, Any]], prompt: torch.Tensor) -> None:
    model, decoder = load_model(str(run[0] / "quantized")), OnnxDecoder(run[0] / "onnx")
    assert torch.equal(decoder.generate(prompt, 100), generate_greedy(model, prompt, 100))
    ids = tokenize(text_source("builtin:python/val"), load_tokenizer("builtin:teacher"), 4096).rows(256)[0][:4]
    mask = torch.ones_like(ids)
    logits, _ = decoder.step(ids, mask, positions_of(mask), None)
    with torch.no_grad():
        want = model(ids).logits
    assert ((logits - want).abs().max() / want.abs().max()).item() <= 1e-5


def test_container_bits_are_reported(run: tuple[Path, dict[str, Any]]) -> None:
    record = run[1]["export:onnx"]
    assert record["matrices"] == {"4 bit": 42}
    assert record["container_bits_per_weight"] == pytest.approx(4 + 32 / 16)
    assert record["model_bytes"] == (run[0] / "onnx" / "model.onnx").stat().st_size
    assert json.loads((run[0] / "report.json").read_text())["export:onnx"] == record


@pytest.mark.parametrize("name", NAMES)
def test_checksums_are_those_of_the_files(name: str) -> None:
    folder = resolve_model(f"builtin:{name}")
    files = json.loads((folder / "compress.json").read_text())["files"]
    assert {path.name for path in folder.iterdir()} == {"compress.json", *files}
    assert all(file_sha256(folder / file) == entry["sha256"] for file, entry in files.items())
