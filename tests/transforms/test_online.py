"""Matrices mixed at run time: the same function for every architecture, and what it costs."""

from __future__ import annotations

import copy

import pytest

from compress.modeling.sites import Sites, find_sites
from compress.modeling.structure import matrices
from compress.transforms.incoherence import OnlineCost, online_cost, online_mixing, view_signs
from tests import families
from tests.transforms.exact import assert_same, double, exact_logits, mix_online

MODELS = [
    ("BertForMaskedLM", "bert", {}),
    ("BertForMaskedLM", "bert", {"hidden_size": 172, "intermediate_size": 352, "num_attention_heads": 4}),
    ("BertModel", "bert", {}),
    ("LlamaForCausalLM", "llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    ("MistralForCausalLM", "mistral", {"hidden_size": 96, "intermediate_size": 44}),
    ("Qwen2ForCausalLM", "qwen2", {}),
    ("Qwen3ForCausalLM", "qwen3", {"head_dim": 8}),
    ("Gemma2ForCausalLM", "gemma2", {"head_dim": 8}),
    ("CohereForCausalLM", "cohere", {}),
    ("Olmo2ForCausalLM", "olmo2", {}),
    ("StableLmForCausalLM", "stablelm", {}),
    ("Phi3ForCausalLM", "phi3", {"pad_token_id": 0}),
]


@pytest.mark.parametrize(("architecture", "family", "changes"), MODELS)
def test_both_sides_of_every_matrix(architecture: str, family: str, changes: dict[str, int]) -> None:
    model = double(architecture, family, **changes)
    views = matrices(model)
    mixing = online_mixing(views, Sites())
    assert set(mixing.values()) == {"both"}
    expected = exact_logits(model)
    mixed = copy.deepcopy(model)
    mix_online(mixed, mixing)
    assert_same(exact_logits(mixed), expected)


def test_what_a_fold_leaves_to_run_time() -> None:
    model = families.llama()
    views, sites = matrices(model), find_sites(model)
    last = {view.name: view.name.rpartition(".")[2] for view in views}
    whole = online_mixing(views, sites)
    assert {last[name]: word for name, word in whole.items()} == {
        **dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj"), "none"),
        "down_proj": "input",
    }
    values = online_mixing(views, Sites(values=sites.values))
    assert {last[name]: word for name, word in values.items()} == {
        **dict.fromkeys(("q_proj", "k_proj", "gate_proj", "up_proj", "down_proj"), "both"),
        "v_proj": "input",
        "o_proj": "output",
    }
    residual = online_mixing(views, Sites(residual=sites.residual))
    assert {last[name] for name, word in residual.items() if word == "input"} == {"o_proj", "down_proj"}


def test_cost() -> None:
    """By hand: hidden 32 = 2^5, intermediate 48 = 2^4 3, keys and values 16 = 2^4; two blocks."""
    model = families.llama()
    views, sites = matrices(model), find_sites(model)
    weights = 2 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 48 * 32)
    assert online_cost(views, online_mixing(views, sites)) == OnlineCost(2 * 48 * (4 + 3), weights)
    hidden, inner, keys = 32 * 5, 48 * (4 + 3), 16 * 4
    block = 2 * (hidden + hidden) + 2 * (hidden + keys) + 3 * (hidden + inner)
    cost = online_cost(views, online_mixing(views, Sites()))
    assert cost == OnlineCost(2 * block, weights) and cost.relative == 2 * block / weights


def test_matrices_that_share_an_input_share_its_signs() -> None:
    views = {view.name.rpartition(".")[2]: view for view in matrices(families.bert()) if view.block == 0}
    signs = {name: view_signs(view, "both", 0) for name, view in views.items()}
    query, key = signs["query"], signs["key"]
    assert query.input is not None and key.input is not None and query.output is not None and key.output is not None
    assert query.input.equal(key.input) and not query.output.equal(key.output)
    elsewhere = next(view for view in matrices(families.bert()) if view.block == 1)
    other = view_signs(elsewhere, "both", 0)
    assert other.input is not None and not other.input.equal(query.input)
