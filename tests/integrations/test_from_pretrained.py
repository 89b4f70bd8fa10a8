"""Artifacts through transformers: the same logits to the bit, there and back, and an error without the plug-in."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM

import compress
from compress.errors import ArtifactError, UsageError
from compress.modeling.io import WEIGHTS, Checkpoint
from compress.modeling.loading import load_tokenizer
from compress.quantization.modules import packed_modules
from tests import families

ROOT = Path(__file__).parents[2]


def auto(model: Any) -> Any:
    return AutoModelForMaskedLM if "Masked" in type(model).__name__ else AutoModelForCausalLM


@pytest.fixture(scope="module")
def llama() -> Any:
    return compress.quantize(families.llama(tie_word_embeddings=True, attention_bias=True), bits=3.25)


@pytest.fixture(scope="module")
def folder(llama: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return families.save(llama, tmp_path_factory.mktemp("llama"))


@pytest.mark.parametrize(
    ("architecture", "family"),
    [("Qwen2ForCausalLM", "qwen2"), ("Qwen3ForCausalLM", "qwen3"), ("BertForMaskedLM", "bert"), ("BertModel", "bert")],
)
def test_logits_are_those_of_the_model_in_memory(tmp_path: Path, architecture: str, family: str) -> None:
    model = compress.quantize(families.build(architecture, family, num_hidden_layers=1))
    ids = families.token_ids()
    expected = families.logits(model, ids)
    families.save(model, tmp_path)
    loaded = compress.load(tmp_path)
    assert type(loaded) is type(model)
    assert torch.equal(families.logits(loaded, ids), expected)


def test_save_load_save(llama: Any, folder: Path, tmp_path: Path) -> None:
    ids = families.token_ids()
    first = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(families.logits(first, ids), families.logits(llama, ids))
    first.save_pretrained(tmp_path)
    assert (tmp_path / WEIGHTS).read_bytes() == (folder / WEIGHTS).read_bytes()
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["quantization_config"] == json.loads((folder / "config.json").read_text())["quantization_config"]
    second = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(families.logits(second, ids), families.logits(llama, ids))


def test_payload_is_a_flat_int8_tensor_under_the_original_name(folder: Path) -> None:
    checkpoint = Checkpoint(folder)
    names = [f"{name}.weight" for name in packed_modules(compress.load(folder))]
    assert len(names) == 14
    for name in names:
        assert checkpoint.info(name).dtype == "I8"
        assert len(checkpoint.info(name).shape) == 1
    assert not any("_packed" in name or "scale" in name for name in checkpoint.names())


def test_bfloat16(llama: Any, folder: Path) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    assert loaded.model.norm.weight.dtype == torch.bfloat16
    packed, original = packed_modules(loaded), packed_modules(llama)
    for name, module in packed.items():
        assert torch.equal(module.weight, original[name].weight)
        assert module.bias is None or module.bias.dtype == torch.bfloat16
    ids = families.token_ids()
    found = families.logits(loaded, ids)
    assert found.dtype == torch.bfloat16
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).dequantize()
    assert plain.model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16
    # a product with packed weights does not round them to bfloat16 first
    torch.testing.assert_close(found, families.logits(plain, ids), rtol=0, atol=2.0**-6 * float(found.abs().max()))


def test_dequantize(llama: Any, folder: Path) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    plain = loaded.dequantize()
    assert not packed_modules(plain)
    assert isinstance(plain.model.layers[0].mlp.up_proj, nn.Linear)
    assert "quantization_config" not in plain.config.to_dict()
    ids = families.token_ids()
    assert torch.equal(families.logits(plain, ids), families.logits(llama, ids))


def test_device_map_and_generate(llama: Any, folder: Path) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(folder, device_map="auto")
    ids = families.token_ids(5, 1).to(loaded.device)
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    found = loaded.generate(ids, **options)
    assert found.shape == (1, 11)
    assert torch.equal(found.cpu(), llama.generate(ids.cpu(), **options))


def test_backbone_of_a_model_with_a_head(llama: Any, folder: Path, tmp_path: Path) -> None:
    """AutoModel strips the prefix `model.` from the names in the configuration; saved again, it still loads."""
    backbone = AutoModel.from_pretrained(folder)
    assert len(packed_modules(backbone)) == 14
    ids = families.token_ids()
    expected = families.logits(llama.model, ids)
    assert torch.equal(families.logits(backbone, ids), expected)
    backbone.save_pretrained(tmp_path)
    assert torch.equal(families.logits(AutoModel.from_pretrained(tmp_path), ids), expected)


UNPLUGGED = """
import sys, transformers
assert "compress" not in sys.modules
transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])
"""


def test_without_the_plugin_loading_fails(folder: Path, tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-c", UNPLUGGED, str(folder)], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert run.returncode != 0
    assert "size mismatch" in run.stderr or "mismatch" in run.stderr.lower()


def test_unknown_module_in_the_configuration(folder: Path, tmp_path: Path) -> None:
    model = compress.load(folder)
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["modules"] = {"model.layers.9.mlp.up_proj": {"width": 40}}
    path.write_text(json.dumps(config))
    with pytest.raises(ArtifactError, match=r"layers\.9.*which the model does not have"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_newer_format_is_refused(folder: Path, tmp_path: Path) -> None:
    compress.load(folder).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["format_version"] = 2
    path.write_text(json.dumps(config))
    with pytest.raises(ArtifactError, match="format version 2"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_quantizing_while_loading_is_refused(tmp_path: Path) -> None:
    from compress.integrations.transformers import CompressConfig

    families.save(families.llama(num_hidden_layers=1), tmp_path)
    for asked in (CompressConfig(), {"quant_method": "compress"}):
        with pytest.raises(UsageError, match=r"while it is loaded\. .*compress\.quantize\(model\)"):
            AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=asked)


def test_real_model(real_data: Path, tmp_path: Path) -> None:
    source = real_data / "models" / "stories260k"
    model = compress.quantize(source, bits=3.5)
    families.save(model, tmp_path)
    story = json.loads((real_data / "text" / "tinystories_1000.json").read_text())[0]
    text = story if isinstance(story, str) else str(next(iter(story.values())))
    ids = load_tokenizer(source)(text, return_tensors="pt").input_ids[:, :256]
    found = families.logits(compress.load(tmp_path), ids)
    assert torch.equal(found, families.logits(model, ids))
    original = families.logits(compress.load(source), ids)
    assert (found.argmax(-1) == original.argmax(-1)).float().mean() > 0.75
