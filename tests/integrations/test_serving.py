"""What people do with a loaded model: places, types, copies, other formats, generation and pipelines."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM, pipeline

import compress
from compress.data.sources import text_source
from compress.data.tokenizer import train_byte_bpe
from compress.modeling.loading import load_tokenizer
from compress.quantization.modules import packed_linears, packed_modules
from tests import families
from tests.integrations.conftest import Artifact
from tests.tiny_models import write_llama, write_text

ON_DISK = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
ON_DISK |= {"model.layers.0": "cpu", "model.layers.1": "disk"}
GREEDY = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def tensors(folder: Path) -> dict[str, tuple[str, list[int], bytes]]:
    """Type, shape and bytes of every stored tensor, in however many files."""
    found = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 the file is no mapping
                tensor = file.get_tensor(name)
                data = tensor.contiguous().view(torch.uint8).numpy().tobytes()
                found[name] = (str(tensor.dtype), list(tensor.shape), data)
    return found


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}])
def test_device_map(mixed: Artifact, device_map: Any) -> None:
    assert torch.equal(families.logits(mixed.load(device_map=device_map), mixed.ids), mixed.logits)


@pytest.mark.parametrize("offload_buffers", [False, True])
def test_a_block_on_the_disk(mixed: Artifact, tmp_path: Path, offload_buffers: bool) -> None:
    """Payloads are buffers, which stay in memory unless they are asked to leave it too."""
    model = mixed.load(device_map=ON_DISK, offload_folder=tmp_path, offload_buffers=offload_buffers)
    assert model.model.layers[1].input_layernorm.weight.is_meta
    assert model.model.layers[1].mlp.up_proj.weight.is_meta == offload_buffers
    assert torch.equal(families.logits(model, mixed.ids), mixed.logits)
    assert torch.equal(families.logits(model, mixed.ids), mixed.logits)


@pytest.mark.parametrize(
    ("dtype", "unit"),
    [("auto", 0.0), ("float32", 0.0), (torch.bfloat16, 2.0**-8), (torch.float16, 2.0**-11)],
    ids=str,
)
def test_dtype(mixed: Artifact, dtype: Any, unit: float) -> None:
    """Payloads, scales included, stay as they are; logits are off by some units in the last place of the type."""
    model, stored = mixed.load(dtype=dtype), tensors(mixed.folder)
    for name, module in packed_modules(model).items():
        assert module.weight.dtype == torch.int8
        assert module.weight.numpy().tobytes() == stored[f"{name}.weight"][2]
    spread = float(mixed.logits.abs().max())
    found = families.logits(model, mixed.ids)
    torch.testing.assert_close(found.float(), mixed.logits, rtol=0, atol=16 * unit * spread)


@pytest.mark.parametrize("shard", ["10GB", "8KB"])
def test_saved_again(mixed: Artifact, tmp_path: Path, shard: str) -> None:
    mixed.load().save_pretrained(tmp_path, max_shard_size=shard)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shard == "8KB")
    assert tensors(tmp_path) == tensors(mixed.folder)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(families.logits(again, mixed.ids), mixed.logits)


def test_dequantized_is_an_ordinary_checkpoint(mixed: Artifact, tmp_path: Path) -> None:
    model = mixed.load().dequantize()
    expected = families.logits(model, mixed.ids)
    model.save_pretrained(tmp_path)
    assert "quant" not in (tmp_path / "config.json").read_text().replace("dequant", "")
    assert {dtype for dtype, _, _ in tensors(tmp_path).values()} == {"torch.float32"}
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not again.config.to_dict().get("quantization_config")
    assert not packed_modules(again)
    assert torch.equal(families.logits(again, mixed.ids), expected)
    assert next(again.half().parameters()).dtype == torch.float16
    assert packed_modules(compress.quantize(tmp_path))  # and so it can be quantized


@pytest.mark.parametrize("options", [{}, {"use_cache": False}, {"num_beams": 3}, {"cache_implementation": "static"}])
def test_generate(mixed: Artifact, options: dict[str, Any]) -> None:
    found = mixed.load().generate(mixed.ids, **GREEDY, **options)
    assert torch.equal(found, mixed.load().dequantize().generate(mixed.ids, **GREEDY, **options))
    assert found.shape == (2, 20)


def test_copies(mixed: Artifact) -> None:
    model = mixed.load()
    families.logits(model, mixed.ids)  # so that there is something prepared to be copied
    twin = copy.deepcopy(model)
    assert torch.equal(families.logits(twin, mixed.ids), mixed.logits)
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    other = compress.quantize(families.llama(num_hidden_layers=2), transform="hadamard", seed=3)
    assert not torch.equal(families.logits(other, mixed.ids), mixed.logits)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(families.logits(other, mixed.ids), mixed.logits)


def casts() -> list[Callable[[Any], Any]]:
    return [lambda model: model.half(), lambda model: model.float()]


@pytest.mark.parametrize("cast", casts(), ids=["half", "float"])
def test_casts_that_transformers_refuses(mixed: Artifact, cast: Callable[[Any], Any]) -> None:
    with pytest.raises(ValueError, match="not supported for quantized model"):
        cast(mixed.load())


def test_cast_of_all_but_the_payloads(mixed: Artifact) -> None:
    model = mixed.load()
    before = {name: module.weight.clone() for name, module in packed_linears(model).items()}
    model.to(torch.bfloat16)
    assert model.dtype == torch.bfloat16
    assert all(torch.equal(module.weight, before[name]) for name, module in packed_linears(model).items())
    found, spread = families.logits(model, mixed.ids), float(mixed.logits.abs().max())
    torch.testing.assert_close(found.float(), mixed.logits, rtol=0, atol=2.0**-4 * spread)


def test_text_generation(tmp_path: Path) -> None:
    source = write_llama(tmp_path / "model", write_text(tmp_path))
    packed = compress.quantize(source)
    tokenizer = load_tokenizer(source)
    packed.save_pretrained(tmp_path / "packed")
    tokenizer.save_pretrained(tmp_path / "packed")
    write = pipeline("text-generation", model=str(tmp_path / "packed"))
    assert packed_modules(write.model)
    (found,) = write("def value", max_new_tokens=5, do_sample=False)
    ids = packed.generate(**tokenizer("def value", return_tensors="pt"), max_new_tokens=5, do_sample=False)
    assert found["generated_text"] == tokenizer.decode(ids[0], skip_special_tokens=True)


def test_pipelines_of_an_encoder(tmp_path: Path) -> None:
    tokenizer = train_byte_bpe(text_source(f"text:{write_text(tmp_path)}"), 300, 64)
    tokenizer.add_special_tokens({"mask_token": "<mask>", "pad_token": "<pad>"})
    packed = compress.quantize(families.bert(vocab_size=len(tokenizer)))
    packed.save_pretrained(tmp_path / "packed")
    tokenizer.save_pretrained(tmp_path / "packed")
    folder, text = str(tmp_path / "packed"), "def <mask> value"
    encoded = tokenizer(text, return_tensors="pt")
    fill = pipeline("fill-mask", model=folder)
    assert isinstance(fill.model, type(AutoModelForMaskedLM.from_pretrained(folder)))
    with torch.no_grad():
        at_mask = packed(**encoded).logits[0, encoded.input_ids[0] == tokenizer.mask_token_id][0]
        hidden = AutoModel.from_pretrained(folder)(**encoded)[0]
    assert [one["token"] for one in fill(text)] == at_mask.topk(5).indices.tolist()
    features = pipeline("feature-extraction", model=folder, tokenizer=tokenizer)(text)
    assert torch.allclose(torch.tensor(features), hidden, atol=1e-6)
