"""`benchmarks/outliers.py`: the outliers are there, and the function is what it was."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertLMHeadModel, Gemma2Config, Gemma2ForCausalLM, GemmaConfig, GemmaForCausalLM

from compress.errors import ModelError
from compress.modeling.loading import load_model, load_tokenizer
from tests.tiny_models import write_llama, write_text

FOLDER = Path(__file__).parents[1] / "benchmarks"
SMALL = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}


@pytest.fixture
def outliers(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(FOLDER)
    yield importlib.import_module("outliers")
    del sys.modules["outliers"]


def logits(model: nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=ids, use_cache=False).logits
    return found


def inputs_of(model: nn.Module, name: str, ids: Tensor) -> Tensor:
    """What the linear map `name` reads, [tokens, channels]."""
    seen: list[Tensor] = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _, given: seen.append(given[0].detach()))
    logits(model, ids)
    handle.remove()
    return seen[0].flatten(0, 1)


def test_the_teacher_is_the_same_function_with_eight_loud_channels(outliers: ModuleType) -> None:
    model = load_model("builtin:teacher").double()
    ids = torch.randint(0, 4096, (2, 40), generator=torch.Generator().manual_seed(0))
    name = "model.layers.3.mlp.gate_proj"
    before, quiet, last = logits(model, ids), inputs_of(model, name, ids), model.model.norm.weight.clone()
    outliers.with_outliers(model)
    difference = (logits(model, ids) - before).abs().max() / before.abs().max()
    assert float(difference) <= 1e-12
    ratio = (inputs_of(model, name, ids) / quiet).median(0).values
    assert ((ratio - 30).abs() < 1e-6).sum() == 8 and ((ratio - 1).abs() < 1e-6).sum() == 248
    assert torch.equal(model.model.norm.weight, last)


def test_a_gain_of_one_plus_the_weight(outliers: ModuleType) -> None:
    """Its norm multiplies in float32."""
    torch.manual_seed(0)
    model = GemmaForCausalLM(GemmaConfig(**SMALL, num_key_value_heads=2, head_dim=8)).double().eval()
    ids = torch.randint(0, 50, (2, 20))
    before, quiet = logits(model, ids), inputs_of(model, "model.layers.0.self_attn.q_proj", ids)
    outliers.with_outliers(model, channels=3, factor=10.0, seed=1)
    assert torch.allclose(logits(model, ids), before, rtol=1e-5, atol=1e-6)
    ratio = inputs_of(model, "model.layers.0.self_attn.q_proj", ids) / quiet
    assert sorted(ratio[0].round(decimals=4).tolist())[-4:] == [1.0, 10.0, 10.0, 10.0]


def test_the_folder_is_an_ordinary_checkpoint(outliers: ModuleType, tmp_path: Path) -> None:
    source = write_llama(tmp_path / "model", write_text(tmp_path))
    out = outliers.write_outliers(str(source), tmp_path / "out", channels=4)
    ids = torch.randint(0, 300, (2, 16), generator=torch.Generator().manual_seed(0))
    found, wanted = load_model(out), load_model(source)
    assert found.dtype == torch.float32
    assert torch.allclose(logits(found, ids), logits(wanted, ids), rtol=1e-4, atol=1e-5)
    raised = found.model.layers[0].input_layernorm.weight / wanted.model.layers[0].input_layernorm.weight
    assert (raised > 29.9).sum() == 4
    assert load_tokenizer(out).get_vocab() == load_tokenizer(source).get_vocab()


@pytest.mark.parametrize("build", ["gemma2", "bert"])
def test_models_without_the_site_are_refused(outliers: ModuleType, build: str) -> None:
    model = (
        Gemma2ForCausalLM(Gemma2Config(**SMALL, num_key_value_heads=2, head_dim=8))
        if build == "gemma2"
        else BertLMHeadModel(BertConfig(**SMALL))
    )
    with pytest.raises(ModelError, match="no norms for outliers"):
        outliers.with_outliers(model)
