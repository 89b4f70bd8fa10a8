"""Experts one by one, against the fused modules of transformers."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from compress.codecs import codec
from compress.modeling.experts import OpenExperts, is_experts, open_experts, projections
from compress.modeling.structure import matrices
from compress.quantization.modules import PackedExperts, pack, packed_modules, unpack
from tests import families

FAMILIES = {"mixtral": "Mixtral", "qwen3_moe": "Qwen3Moe", "gpt_oss": "GptOss"}


def model_of(family: str) -> transformers.PreTrainedModel:
    return families.build(f"{FAMILIES[family]}ForCausalLM", family, num_hidden_layers=1)


def experts_of(model: nn.Module) -> tuple[str, nn.Module]:
    return next((name, module) for name, module in model.named_modules() if is_experts(module))


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("family", FAMILIES)
def test_open_experts_compute_the_same(family: str, implementation: str) -> None:
    model = model_of(family)
    model.set_experts_implementation(implementation)
    name, fused = experts_of(model)
    generator = torch.Generator().manual_seed(0)
    hidden, weights = torch.randn(9, 32, generator=generator), torch.rand(9, 2, generator=generator)
    chosen = torch.stack([torch.randperm(4, generator=generator)[:2] for _ in range(9)])
    opened = OpenExperts(copy.deepcopy(fused), name)
    with torch.no_grad():
        torch.testing.assert_close(opened(hidden, chosen, weights), fused(hidden, chosen, weights))


def test_open_experts_share_the_memory_of_the_block() -> None:
    model = model_of("mixtral")
    fused = experts_of(model)[1]
    block = model.get_submodule("model.layers.0")
    opened = open_experts(block)
    assert opened is not block
    assert experts_of(model)[1] is fused
    linear = opened.get_submodule("mlp.experts.down_proj.3")
    assert isinstance(linear, nn.Linear)
    with torch.no_grad():
        linear.weight.zero_()
    assert not fused.get_parameter("down_proj")[3].any()
    assert fused.get_parameter("down_proj")[2].any()
    plain = families.llama().get_submodule("model.layers.0")
    assert open_experts(plain) is plain


def test_an_index_beyond_the_experts_is_no_expert() -> None:
    name, fused = experts_of(model_of("mixtral"))
    opened = OpenExperts(fused, name)
    with torch.no_grad():
        out = opened(torch.randn(3, 32), torch.full((3, 2), 4), torch.ones(3, 2))
    assert not out.any()


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_experts_are_their_decoded_matrices(family: str) -> None:
    model = model_of(family)
    rounder = codec("integer", group=16)
    spec = rounder.spec(4)
    decoded = copy.deepcopy(model)
    rounded: list[Any] = []
    for view in matrices(model):
        if view.index is None:
            continue
        stored = model.get_parameter(view.parameter).detach()[view.index]
        matrix = rounder.quantize(stored.T if family == "gpt_oss" else stored, spec)
        rounded.append((view, matrix))
        value = matrix.dequantize()
        with torch.no_grad():
            decoded.get_parameter(view.parameter)[view.index] = value.T if family == "gpt_oss" else value
    name, _ = experts_of(model)
    expected_bits = sum(matrix.bits for _, matrix in rounded)
    pack(model, rounded[::-1])
    packed = model.get_submodule(name)
    assert isinstance(packed, PackedExperts)
    assert sum(8 * packed.get_buffer(each.name).nbytes for each in (packed.up, packed.down)) == expected_bits
    ids = families.token_ids()
    expected = families.logits(decoded, ids)
    torch.testing.assert_close(families.logits(model, ids), expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(families.logits(copy.deepcopy(model), ids), families.logits(model, ids))
    state = model.state_dict()
    unpack(model, torch.float32)
    assert not packed_modules(model)
    assert torch.equal(families.logits(model, ids), expected)
    for each in (packed.up, packed.down):
        parameter = f"{name}.{each.name}"
        assert torch.equal(model.get_parameter(parameter), decoded.get_parameter(parameter))
        assert state[parameter].dtype == torch.int8


def test_projections_of_transposed_experts() -> None:
    name, fused = experts_of(model_of("gpt_oss"))
    up, down = projections(fused, name)
    width = fused.get_parameter("down_proj").shape[1]
    assert (up.shape, up.transposed, up.bias) == ((2 * width, 32), True, "gate_up_proj_bias")
    assert (down.shape, down.experts) == ((32, width), 4)
