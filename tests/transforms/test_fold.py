"""The folded model is the same function: logits in float64, for every family that can be folded and many sizes."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from compress.modeling.sites import Sites, find_sites
from compress.modeling.structure import matrices
from compress.transforms.basis import Basis, hadamard_basis
from compress.transforms.fold import Fold, fold_model, make_fold
from compress.transforms.incoherence import online_mixing
from tests import families
from tests.transforms.exact import assert_same, double, exact_logits, mix_online

ODD = {"hidden_size": 172, "intermediate_size": 44, "num_attention_heads": 2, "num_key_value_heads": 1}
FOLDABLE: list[tuple[str, str, dict[str, Any]]] = [
    ("LlamaForCausalLM", "llama", {}),
    ("LlamaForCausalLM", "llama", {"tie_word_embeddings": True}),
    ("LlamaForCausalLM", "llama", {"attention_bias": True, "mlp_bias": True}),
    ("LlamaForCausalLM", "llama", ODD),
    ("LlamaForCausalLM", "llama", {"hidden_size": 96, "head_dim": 6, "num_key_value_heads": 4}),
    ("LlamaForCausalLM", "llama", {"hidden_size": 44, "intermediate_size": 352, "head_dim": 22}),
    ("MistralForCausalLM", "mistral", {}),
    ("Qwen2ForCausalLM", "qwen2", {"tie_word_embeddings": True}),
    ("Qwen3ForCausalLM", "qwen3", {"head_dim": 8, "attention_bias": True}),
    ("GemmaForCausalLM", "gemma", {"head_dim": 8}),
    ("GraniteForCausalLM", "granite", {"residual_multiplier": 0.3, "embedding_multiplier": 5.0}),
    ("SmolLM3ForCausalLM", "smollm3", {"pad_token_id": 0}),
]


def name_of(case: tuple[str, str, dict[str, Any]]) -> str:
    return f"{case[1]}-{'-'.join(case[2]) or 'plain'}"


def folded(model: Any, sites: Sites, seed: int = 0) -> Any:
    model = copy.deepcopy(model)
    fold_model(model, make_fold(hadamard_basis(sites, seed), model.get_parameter))
    return model


@pytest.mark.parametrize("case", FOLDABLE, ids=name_of)
def test_folded_model_has_the_same_logits(case: tuple[str, str, dict[str, Any]]) -> None:
    architecture, family, changes = case
    model = double(architecture, family, **changes)
    sites = find_sites(model)
    assert sites.residual is not None and len(sites.values) == 2 and not sites.reasons
    expected = exact_logits(model)
    for part in (sites, replace(sites, values=()), replace(sites, residual=None)):
        after = folded(model, part)
        assert_same(exact_logits(after), expected)
        changed = {
            name for name, value in after.named_parameters() if not torch.equal(value, model.get_parameter(name))
        }
        assert ("model.embed_tokens.weight" in changed) == (part.residual is not None)
        assert "model.layers.1.self_attn.o_proj.weight" in changed
    mix_online(after := folded(model, sites), online_mixing(matrices(model), sites))
    assert_same(exact_logits(after), expected)


def test_gains_become_one_and_the_tied_head_its_own() -> None:
    model = double("LlamaForCausalLM", "llama", tie_word_embeddings=True)
    fold = make_fold(hadamard_basis(find_sites(model), 0), model.get_parameter)
    assert fold.added == {"lm_head.weight": "model.embed_tokens.weight"}
    assert fold.config_changes == {"tie_word_embeddings": False}
    fold_model(model, fold)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            assert torch.equal(parameter, torch.ones_like(parameter)), name
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    assert not model.config.tie_word_embeddings


@pytest.mark.parametrize("gain", [1.0, 0.7])
def test_equal_gains_leave_the_head_tied(gain: float) -> None:
    model = double("LlamaForCausalLM", "llama", tie_word_embeddings=True)
    model.model.norm.weight.data.fill_(gain)
    fold = make_fold(hadamard_basis(find_sites(model), 0), model.get_parameter)
    assert not fold.added and not fold.config_changes
    expected = exact_logits(model)
    fold_model(model, fold)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert_same(exact_logits(model), expected)


@pytest.mark.parametrize("tied", [False, True])
def test_tensor_by_tensor_is_the_model_in_memory(tied: bool) -> None:
    """Streaming gives the same bits as folding in place, and asks for at most one norm besides the tensor."""
    model = families.llama(tie_word_embeddings=tied, attention_bias=True).to(torch.bfloat16)
    original = {name: tensor.clone() for name, tensor in model.named_parameters()}
    asked: list[str] = []

    def read(name: str) -> torch.Tensor:
        asked.append(name)
        return original[name]

    fold = make_fold(hadamard_basis(find_sites(model), 3), read)
    assert len(asked) == int(tied)
    streamed = {}
    for name in (*original, *fold.added):
        asked.clear()
        streamed[name] = fold.tensor(name, read)
        assert len(asked) <= 2 and all("norm" in other for other in asked[1:])
        assert streamed[name].dtype == torch.bfloat16
        assert fold.changes(name) or streamed[name] is original[name]
    fold_model(model, fold)
    state = dict(model.named_parameters())
    assert state.keys() == streamed.keys()
    for name, tensor in streamed.items():
        assert torch.equal(state[name], tensor), name
    wide = fold.tensor("model.layers.0.self_attn.v_proj.weight", read, torch.float32)
    assert torch.equal(wide.bfloat16(), streamed["model.layers.0.self_attn.v_proj.weight"])
    assert not torch.equal(wide, wide.bfloat16().float())


def test_folded_model_saved_and_loaded(tmp_path: Path) -> None:
    """Without the help of this package: an ordinary checkpoint, also when the head was untied."""
    model = families.llama(tie_word_embeddings=True)
    expected = families.logits(model, families.token_ids())
    fold_model(model, make_fold(hadamard_basis(find_sites(model), 0), model.get_parameter))
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert_same(families.logits(again, families.token_ids()), expected, 1e-5)


def test_seeds_and_nothing_to_fold() -> None:
    model = families.llama()
    sites = find_sites(model)
    name = "model.embed_tokens.weight"
    first, again, other = (Fold(hadamard_basis(sites, seed)).tensor(name, model.get_parameter) for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert Fold(Basis()).tensor(name, model.get_parameter) is model.get_parameter(name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_precision_of_a_low_precision_checkpoint(dtype: torch.dtype) -> None:
    """A folded tensor in float32 differs from the float64 one by roundings to float32 alone."""
    model = families.llama().to(dtype)
    fold = Fold(hadamard_basis(find_sites(model), 0))
    for name, parameter in model.named_parameters():
        if fold.changes(name):
            exact = fold.tensor(name, lambda name: model.get_parameter(name).detach().double())
            found = fold.tensor(name, model.get_parameter, torch.float32).double()
            torch.testing.assert_close(found, exact, rtol=0, atol=3e-7 * float(parameter.detach().abs().max() + 1))
