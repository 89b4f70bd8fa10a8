"""Exports for bitsandbytes: what plain transformers makes of the folder, against the artifact."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import compress
from compress.errors import DependencyError, ExportError, UsageError
from compress.exporters import ExportReport, export
from compress.exporters import bitsandbytes as exporter
from compress.exporters.containers import container_of
from compress.quantization.modules import packed_linears
from tests import families

WIDE = {"hidden_size": 64, "intermediate_size": 128}
CODECS = ["nf4", "fp4:block=32", "nf4:double=true", "fp4:block=128,double=true", "int8"]


@pytest.fixture(scope="module")
def functional() -> Any:
    return pytest.importorskip("bitsandbytes.functional")


def quantized(codec: str, **changes: Any) -> transformers.PreTrainedModel:
    model = families.llama(**{**WIDE, **changes})
    compress.quantize(model, codec=codec)
    return model


def plainly_loaded(folder: Path, **options: Any) -> transformers.PreTrainedModel:
    """As transformers loads it, with modules of bitsandbytes that neither repack weights nor round activations."""
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    architecture = json.loads((folder / "config.json").read_text())["architectures"][0]
    model = getattr(transformers, architecture).from_pretrained(folder, **options)
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False
        elif isinstance(module, Linear8bitLt):
            module.training = True
    return model


@pytest.mark.parametrize("codec", CODECS)
def test_logits_are_those_of_the_artifact(functional: Any, tmp_path: Path, codec: str) -> None:
    model = quantized(codec, tie_word_embeddings=True)
    report = export(model, tmp_path / "out", to="bitsandbytes")
    loaded = plainly_loaded(tmp_path / "out")
    expected = families.logits(model, families.token_ids())
    torch.testing.assert_close(families.logits(loaded, families.token_ids()), expected, rtol=1e-5, atol=1e-5)
    assert report.max_relative_error <= (0.1 if codec == "int8" else 1e-5)
    assert report.errors["products"] <= 1e-6 and report.errors["outputs"] <= 1e-5
    assert isinstance(report, ExportReport) and report.matrices == {codec.partition(":")[0]: 14}


@pytest.mark.parametrize("codec", CODECS)
def test_tensors_are_what_bitsandbytes_itself_saves(functional: Any, tmp_path: Path, codec: str) -> None:
    """Names, dtypes and shapes of the file that transformers writes of the original, quantized by bitsandbytes; and
    the same bytes, but for nested scales and the order of fields."""
    model = families.llama(**WIDE)
    families.save(model, tmp_path / "plain")
    name, double = codec.partition(":")[0], "double" in codec
    if name == "int8":
        settings = transformers.BitsAndBytesConfig(load_in_8bit=True)
    else:
        settings = transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type=name, bnb_4bit_use_double_quant=double
        )
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "plain", quantization_config=settings)
    theirs.save_pretrained(tmp_path / "theirs")
    export(quantized(codec), tmp_path / "ours", to="bitsandbytes")
    ours, expected = (load_file(tmp_path / side / "model.safetensors") for side in ("ours", "theirs"))
    assert ours.keys() == expected.keys()
    for key, tensor in ours.items():
        assert tensor.dtype == expected[key].dtype
        if "quant_state" in key:
            found, other = (json.loads(bytes(one[key].tolist())) for one in (ours, expected))
            assert found.keys() == other.keys() and found["shape"] == other["shape"]
            assert isinstance(found["blocksize"], int)
        elif "block" not in codec:
            assert tensor.shape == expected[key].shape
            # bitsandbytes takes int8 weights through float16
            if name != "int8" and not key.endswith(".absmax"):
                assert torch.equal(tensor, expected[key]), key


def test_an_encoder_keeps_what_is_outside_of_the_blocks(functional: Any, tmp_path: Path) -> None:
    model = families.bert("BertForSequenceClassification", **WIDE)
    compress.quantize(model, codec="nf4")
    export(model, tmp_path / "out", to="bitsandbytes")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["llm_int8_skip_modules"] == ["bert.pooler.dense", "classifier"]
    loaded = plainly_loaded(tmp_path / "out")
    ids = families.token_ids()
    torch.testing.assert_close(families.logits(loaded, ids), families.logits(model, ids), rtol=1e-5, atol=1e-5)
    assert type(loaded.classifier) is torch.nn.Linear


def test_rows_that_are_no_multiple_of_a_block(functional: Any, tmp_path: Path) -> None:
    model = quantized("nf4", hidden_size=40, intermediate_size=52, num_hidden_layers=1)
    export(model, tmp_path / "out", to="bitsandbytes")
    ids = families.token_ids()
    loaded = plainly_loaded(tmp_path / "out")
    torch.testing.assert_close(families.logits(loaded, ids), families.logits(model, ids), rtol=1e-5, atol=1e-5)


def test_other_weights_keep_their_dtype(functional: Any, tmp_path: Path) -> None:
    model = families.llama(**WIDE).to(torch.bfloat16)
    compress.quantize(model, codec="nf4")
    export(model, tmp_path / "out", to="bitsandbytes")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert stored["model.embed_tokens.weight"].dtype == torch.bfloat16
    assert stored["model.layers.0.mlp.up_proj.weight.absmax"].dtype == torch.float32
    loaded = plainly_loaded(tmp_path / "out")
    assert loaded.dtype == torch.bfloat16
    ids = families.token_ids()
    torch.testing.assert_close(families.logits(loaded, ids), families.logits(model, ids), rtol=0.02, atol=0.02)


def test_a_process_that_knows_nothing_of_this_package(functional: Any, tmp_path: Path) -> None:
    model = quantized("nf4", num_hidden_layers=1)
    export(model, tmp_path / "out", to="bitsandbytes")
    program = (
        "import sys, torch, transformers\n"
        "model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "for module in model.modules(): module.support_avx512bf16_for_cpu = False\n"
        "with torch.no_grad(): logits = model(torch.arange(8)[None]).logits\n"
        "assert 'compress' not in sys.modules\n"
        "torch.save(logits, sys.argv[2])\n"
    )
    subprocess.run([sys.executable, "-c", program, tmp_path / "out", tmp_path / "logits.pt"], check=True)
    found = torch.load(tmp_path / "logits.pt", weights_only=True)
    torch.testing.assert_close(found, families.logits(model, torch.arange(8)[None]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"codec": "integer", "bits": 4.5}, "integer, which bitsandbytes cannot hold"),
        ({"codec": "nf4", "transform": "hadamard"}, "mixed at run time, which bitsandbytes cannot hold"),
    ],
    ids=["codec", "transform"],
)
def test_what_bitsandbytes_cannot_hold(functional: Any, tmp_path: Path, options: Any, message: str) -> None:
    model = compress.quantize(families.llama(), **options)
    with pytest.raises(ExportError, match=message):
        export(model, tmp_path / "out", to="bitsandbytes")
    assert not list(tmp_path.iterdir())


def test_what_transformers_does_not_load_with_bitsandbytes(functional: Any, tmp_path: Path) -> None:
    """It keeps one matrix of each of T5's blocks in float32; and experts are one parameter, not linear maps."""
    sizes = {"vocab_size": 96, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": 4}
    t5 = transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes)).eval()
    for model in (t5, families.build("MixtralForCausalLM", "mixtral")):
        compress.quantize(model, codec="nf4")
        with pytest.raises(ExportError, match="Use the artifact itself"):
            export(model, tmp_path / "out", to="bitsandbytes")
        assert not list(tmp_path.iterdir())


def test_transposed_weights(functional: Any, tmp_path: Path) -> None:
    """GPT-2 has `Conv1D`, which transformers replaces by the same modules."""
    sizes = {"vocab_size": 96, "n_embd": 48, "n_layer": 1, "n_head": 4, "bos_token_id": 1, "eos_token_id": 2}
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)).eval()
    compress.quantize(model, codec="nf4")
    export(model, tmp_path / "out", to="bitsandbytes")
    ids = families.token_ids()
    expected = families.logits(model, ids)
    torch.testing.assert_close(families.logits(plainly_loaded(tmp_path / "out"), ids), expected, rtol=1e-5, atol=1e-5)


def test_models_that_are_not_of_one_form(functional: Any, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="no quantized matrix"):
        export(families.llama(), tmp_path / "out", to="bitsandbytes")
    model, other = quantized("nf4"), quantized("nf4:block=32")
    name = "model.layers.1.mlp.up_proj"
    model.set_submodule(name, other.get_submodule(name))
    with pytest.raises(ExportError, match=r"of one form.*up_proj"):
        export(model, tmp_path / "out", to="bitsandbytes")


def test_a_folder_that_disagrees_does_not_appear(
    functional: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A damaged scale, and a damaged norm: each is found by what transformers loads."""
    model, write = quantized("nf4", num_hidden_layers=1), exporter._write_weights
    for key in ("model.layers.0.self_attn.q_proj.weight.absmax", "model.norm.weight"):

        def damaged(one: Any, packed: Any, staged: Path, key: str = key) -> int:
            bits = write(one, packed, staged)
            tensors = load_file(staged / "model.safetensors")
            tensors[key][0] *= 1.01
            save_file(tensors, staged / "model.safetensors", {"format": "pt"})
            return bits

        monkeypatch.setattr(exporter, "_write_weights", damaged)
        with pytest.raises(ExportError, match="is not the model"):
            export(model, tmp_path / "out", to="bitsandbytes")
        assert not list(tmp_path.iterdir())


def test_the_package_is_asked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(exporter.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DependencyError, match=r"bitsandbytes.*model-compress\[bnb\]"):
        export(quantized("nf4", num_hidden_layers=1), tmp_path / "out", to="bitsandbytes")


def test_a_taken_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    with pytest.raises(UsageError):
        export(quantized("nf4", num_hidden_layers=1), tmp_path / "out", to="bitsandbytes")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]


@pytest.mark.parametrize(("codec", "exact"), [("nf4", False), ("fp4", False), ("int8", True)])
def test_in_a_container_of_integers(codec: str, exact: bool) -> None:
    """Values of a table are rounded once more there, which the container says; int8 is exact."""
    for one in packed_linears(quantized(codec)).values():
        container = container_of(one.quantized())
        assert container.bits == 8 and (container.error == 0) == exact and container.error < 1e-4
        assert container.weight().equal(one.quantized().dequantize()) == exact


def test_report_and_card(functional: Any, tmp_path: Path) -> None:
    model = quantized("nf4")
    report = export(model, tmp_path / "out", to="bitsandbytes")
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == report.to_dict()
    card = (tmp_path / "out" / "README.md").read_text()
    assert "LlamaForCausalLM.from_pretrained" in card and "14 in nf4" in card
    weights = sum(one.out_features * one.in_features for one in packed_linears(model).values())
    parts = load_file(tmp_path / "out" / "model.safetensors")
    bits = sum(8 * tensor.nbytes for key, tensor in parts.items() if ".weight." in key or tensor.dtype == torch.uint8)
    assert report.container_bits_per_weight == pytest.approx(bits / weights)
