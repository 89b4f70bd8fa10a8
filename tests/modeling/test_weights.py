"""Checkpoints in the model's terms, against what transformers loads from the same files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from compress.errors import ModelError
from compress.modeling.io import Checkpoint
from compress.modeling.layout import DTYPE_NAMES
from compress.modeling.weights import StoredWeights
from tests import families


def mixture(**changes: object) -> transformers.PreTrainedModel:
    return families.build("MixtralForCausalLM", "mixtral", num_hidden_layers=1, **changes)


def llava() -> transformers.PreTrainedModel:
    vision = families.config("clip_vision_model", image_size=16, patch_size=4)
    config = transformers.LlavaConfig(text_config=families.config("llama"), vision_config=vision, image_token_index=95)
    return transformers.LlavaForConditionalGeneration(config)


@pytest.mark.parametrize("kind", ["experts one by one", "fused experts", "old names", "as it is"])
def test_every_tensor_is_what_transformers_loads(kind: str, tmp_path: Path) -> None:
    model = {"old names": llava, "as it is": families.bert}.get(kind, mixture)()
    model.save_pretrained(tmp_path, save_original_format=kind != "fused experts")
    stored = set(load_file(tmp_path / "model.safetensors"))
    weights = StoredWeights(Checkpoint(tmp_path), model)
    expected = type(model).from_pretrained(tmp_path).state_dict()
    assert list(weights) == [name for name in expected if name in weights]
    assert {name for name in expected if "experts" in name} <= set(weights)
    for name in weights:
        assert torch.equal(weights.read(name), expected[name])
        assert weights.entry(name).shape == tuple(expected[name].shape)
        assert weights.entry(name).dtype == DTYPE_NAMES[expected[name].dtype]
        assert set(weights.sources(name)) <= stored
    if kind in ("experts one by one", "old names"):
        assert not stored & {name for name in expected if "experts" in name or "vision_tower" in name}


def test_experts_beyond_nine_stay_in_order(tmp_path: Path) -> None:
    model = mixture(num_local_experts=12, num_experts=12)
    model.save_pretrained(tmp_path)
    name = "model.layers.0.mlp.experts.down_proj"
    weights = StoredWeights(Checkpoint(tmp_path), model)
    assert weights.sources(name)[10].endswith("experts.10.w2.weight")
    assert torch.equal(weights.read(name), model.get_parameter(name))


def test_a_bare_backbone_and_unknown_tensors(tmp_path: Path) -> None:
    model = families.llama(num_hidden_layers=1)
    backbone = {f"{name.removeprefix('model.')}": tensor for name, tensor in model.state_dict().items()}
    backbone.pop("lm_head.weight")
    save_file({**backbone, "rotary.inv_freq": torch.ones(3)}, tmp_path / "model.safetensors", {"format": "pt"})
    weights = StoredWeights(Checkpoint(tmp_path), model)
    assert list(weights) == [*(f"model.{name}" for name in backbone), "rotary.inv_freq"]
    assert "lm_head.weight" not in weights
    with pytest.raises(ModelError, match=r"no tensor 'lm_head\.weight'"):
        weights.read("lm_head.weight")


def test_a_parameter_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    model = families.llama(num_hidden_layers=1)
    tensors = {**model.state_dict(), "norm.weight": torch.ones(32)}
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"'model\.norm\.weight' and 'norm\.weight'"):
        StoredWeights(Checkpoint(tmp_path), model)


@pytest.mark.parametrize("damage", ["a missing expert", "an expert of another shape"])
def test_experts_that_do_not_combine(damage: str, tmp_path: Path) -> None:
    model = mixture()
    model.save_pretrained(tmp_path)
    path, name = tmp_path / "model.safetensors", "model.layers.0.block_sparse_moe.experts.2.w1.weight"
    tensors = load_file(path)
    tensors[name] = tensors[name][:-1].clone()
    if damage == "a missing expert":
        del tensors[name]
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(ModelError, match=r"do not make a 'model\.layers\.0\.mlp\.experts\.gate_up_proj'"):
        StoredWeights(Checkpoint(tmp_path), model)
