"""The target set of each family, against what a person reads off the architecture's parameters."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from compress.errors import ModelError
from compress.modeling.loading import parameter_count, skeleton
from compress.modeling.structure import find_blocks, matrices, read_view, require_linear
from tests import families

LLAMA_BLOCK = {
    "self_attn.q_proj": (32, 32),
    "self_attn.k_proj": (16, 32),
    "self_attn.v_proj": (16, 32),
    "self_attn.o_proj": (32, 32),
    "mlp.gate_proj": (48, 32),
    "mlp.up_proj": (48, 32),
    "mlp.down_proj": (32, 48),
}
BERT_BLOCK = {
    "attention.self.query": (32, 32),
    "attention.self.key": (32, 32),
    "attention.self.value": (32, 32),
    "attention.output.dense": (32, 32),
    "intermediate.dense": (48, 32),
    "output.dense": (32, 48),
}


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_decoders(family: str) -> None:
    model = skeleton(families.config(family, head_dim=8))
    assert next(model.parameters()).device.type == "meta"
    assert [prefix for prefix, _ in find_blocks(model)] == ["model.layers.0", "model.layers.1"]
    views = matrices(model)
    expected = {f"model.layers.{i}.{name}": shape for i in range(2) for name, shape in LLAMA_BLOCK.items()}
    assert {view.name: view.shape for view in views} == expected
    assert [view.block for view in views] == [0] * 7 + [1] * 7
    for view in views:
        assert view.parameter == f"{view.name}.weight"
        assert view.index is None
        assert tuple(model.get_parameter(view.parameter).shape) == view.shape
    require_linear(views)
    assert len({view.group for view in views}) == 2 * 4


@pytest.mark.parametrize(("architecture", "prefix"), [("BertModel", ""), ("BertForMaskedLM", "bert.")])
def test_encoder(architecture: str, prefix: str) -> None:
    views = matrices(families.bert(architecture))
    expected = {f"{prefix}encoder.layer.{i}.{name}": shape for i in range(2) for name, shape in BERT_BLOCK.items()}
    assert {view.name: view.shape for view in views} == expected
    assert len({view.group for view in views}) == 2 * 4


@pytest.mark.parametrize(("family", "inner"), [("mixtral", 48), ("qwen3_moe", 24)])
def test_fused_experts_are_views_of_slices(family: str, inner: int) -> None:
    model = skeleton(families.config(family))
    views = [view for view in matrices(model) if view.index is not None]
    assert len(views) == 2 * 2 * 4  # blocks x (gate_up, down) x experts
    first = views[1]
    assert first.name == "model.layers.0.mlp.experts.gate_up_proj.1"
    assert first.parameter == "model.layers.0.mlp.experts.gate_up_proj"
    assert first.module == "model.layers.0.mlp.experts"
    assert (first.index, first.shape) == (1, (2 * inner, 32))
    parameter = torch.arange(4 * 2 * inner * 32).reshape(4, 2 * inner, 32)
    assert torch.equal(read_view(parameter, first), parameter[1])
    assert {view.shape for view in views} == {(2 * inner, 32), (32, inner)}
    assert len({view.group for view in views}) == 2 * 2
    # the target set is the whole model but embeddings, head, norms and routers
    rest = [p for n, p in model.named_parameters() if "norm" in n or "mlp.gate." in n or "embed" in n or "lm_head" in n]
    assert sum(view.weights for view in matrices(model)) == parameter_count(model) - sum(p.numel() for p in rest)
    with pytest.raises(ModelError, match="fused experts, which cannot be quantized yet"):
        require_linear(matrices(model))


def test_experts_of_another_layout_are_refused() -> None:
    experts = nn.Module()
    experts.gate_up_proj = nn.Parameter(torch.empty(4, 32, 96))
    experts.down_proj = nn.Parameter(torch.empty(4, 48, 32))
    model = nn.Module()
    model.layers = nn.ModuleList([nn.ModuleDict({"experts": experts})])
    with pytest.raises(ModelError, match="unknown layout"):
        matrices(model)


def test_no_stack_and_several_stacks_are_refused() -> None:
    with pytest.raises(ModelError, match="found: none"):
        matrices(nn.Sequential(nn.Linear(4, 4)))
    two = nn.ModuleDict({name: nn.ModuleList([nn.Linear(4, 4)]) for name in ("encoder", "decoder")})
    with pytest.raises(ModelError, match="'encoder' and 'decoder'"):
        matrices(two)


def test_gpt2_of_conv1d_is_refused() -> None:
    model = skeleton(families.config("gpt2", n_embd=32, n_layer=2, n_head=4))
    with pytest.raises(ModelError, match="Llama-like"):
        matrices(model)


def test_tied_parameters_count_once() -> None:
    tied, untied = (skeleton(families.config("llama", tie_word_embeddings=tie)) for tie in (True, False))
    assert parameter_count(untied) - parameter_count(tied) == 96 * 32
