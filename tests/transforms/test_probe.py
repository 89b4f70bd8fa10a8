"""Only what keeps the logits of a small copy is folded."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from compress.modeling.loading import skeleton
from compress.modeling.sites import find_sites
from compress.transforms.probe import proven_sites
from tests import families


class Clipping(nn.Linear):
    """Bounds what it computes, out of sight of the structure."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).clamp(-50, 50)


class ClippedLlama(transformers.LlamaForCausalLM):
    def __init__(self, config: transformers.LlamaConfig) -> None:
        super().__init__(config)
        for layer in self.model.layers:
            layer.self_attn.v_proj = Clipping(config.hidden_size, layer.self_attn.v_proj.out_features, bias=False)


class BentLlama(transformers.LlamaForCausalLM):
    """Squashes the embeddings coordinate by coordinate on their way into the residual stream."""

    def __init__(self, config: transformers.LlamaConfig) -> None:
        super().__init__(config)
        self.model.embed_tokens.register_forward_hook(lambda module, arguments, output: torch.tanh(output))


class OddLlama(transformers.LlamaForCausalLM):
    def __init__(self, config: transformers.LlamaConfig) -> None:
        if config.hidden_size % 5:
            raise ValueError("only widths that I like")
        super().__init__(config)


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {}),
        ("llama", {"tie_word_embeddings": True, "attention_bias": True}),
        ("qwen3", {"head_dim": 16}),
        ("gemma", {"head_dim": 8}),
        ("granite", {"residual_multiplier": 0.3}),
        ("llama", {"hidden_size": 8192, "num_attention_heads": 64, "num_hidden_layers": 80}),
    ],
)
def test_what_is_right_stays(family: str, changes: dict[str, Any]) -> None:
    """Also of a model far too large to be run."""
    model = skeleton(families.config(family, **changes))
    state = torch.get_rng_state()
    sites = proven_sites(model)
    assert sites == find_sites(model) and sites.residual is not None and not sites.reasons
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("family", ["bert", "gpt_neox", "phi3"])
def test_models_without_sites(family: str) -> None:
    sites = proven_sites(skeleton(families.config(family, pad_token_id=0)))
    assert sites.residual is None and not sites.values and len(sites.reasons) == 2


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("gemma2", "unknown part 'post_feedforward_layernorm'"),
        ("olmo2", "no 'input_layernorm'"),
        ("cohere", "no 'post_attention_layernorm'"),
        ("stablelm", r"LayerNorm\) is not RMSNorm"),
        ("mixtral", "no 'down_proj'"),
    ],
)
def test_values_alone(family: str, reason: str) -> None:
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(families.config(family))
    sites = proven_sites(model)
    assert sites.residual is None and len(sites.values) == 2
    assert len(sites.reasons) == 1 and re.search(reason, sites.reasons[0])


def test_clipped_values_are_found_out() -> None:
    model = ClippedLlama(families.config("llama"))
    assert find_sites(model).values
    sites = proven_sites(model)
    assert not sites.values and sites.residual is not None
    assert "the logits of ClippedLlama change" in sites.reasons[0]
    clipped = skeleton(families.config("olmo", clip_qkv=8.0))
    assert find_sites(clipped).values and not proven_sites(clipped).values


def test_a_bent_residual_stream_is_found_out() -> None:
    model = BentLlama(families.config("llama"))
    assert find_sites(model).residual is not None
    sites = proven_sites(model)
    assert sites.residual is None and len(sites.values) == 2
    assert "the logits of BentLlama change" in sites.reasons[0]


def test_a_model_that_cannot_be_tried_is_not_folded() -> None:
    sites = proven_sites(OddLlama(families.config("llama", hidden_size=40, head_dim=8)))
    assert sites.residual is None and not sites.values
    assert "only widths that I like" in sites.reasons[0]


def test_a_bare_backbone_has_no_head() -> None:
    sites = find_sites(transformers.LlamaModel(families.config("llama")))
    assert sites.residual is None and len(sites.values) == 2
    assert "no language head" in sites.reasons[0]
