"""Groups and name alignment, against a table written by hand."""

from __future__ import annotations

import pytest

from compress.modeling.names import align_name, group_of


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.qkv"),
        ("model.layers.0.self_attn.k_proj", "model.layers.0.self_attn.qkv"),
        ("model.layers.0.self_attn.v_proj", "model.layers.0.self_attn.qkv"),
        ("model.layers.0.self_attn.o_proj", "model.layers.0.self_attn.o_proj"),
        ("model.layers.0.mlp.gate_proj", "model.layers.0.mlp.gate_up"),
        ("model.layers.0.mlp.up_proj", "model.layers.0.mlp.gate_up"),
        ("model.layers.0.mlp.down_proj", "model.layers.0.mlp.down_proj"),
        ("encoder.layer.3.attention.self.query", "encoder.layer.3.attention.self.qkv"),
        ("encoder.layer.3.attention.self.value", "encoder.layer.3.attention.self.qkv"),
        ("encoder.layer.3.output.dense", "encoder.layer.3.output.dense"),
        ("model.layers.0.mlp.experts.gate_up_proj.3", "model.layers.0.mlp.experts.gate_up_proj"),
        ("encoder.block.0.layer.0.SelfAttention.k", "encoder.block.0.layer.0.SelfAttention.qkv"),
        ("encoder.block.0.layer.1.DenseReluDense.wi_1", "encoder.block.0.layer.1.DenseReluDense.gate_up"),
        ("q_proj", "qkv"),
    ],
)
def test_group(name: str, group: str) -> None:
    assert group_of(name) == group


@pytest.mark.parametrize(
    ("stored", "expected"),
    [("model.a", "model.a"), ("a", "model.a"), ("head", "head"), ("model.head", "head"), ("other", None)],
)
def test_align_adds_or_strips_the_prefix(stored: str, expected: str | None) -> None:
    assert align_name(stored, {"model.a", "head"}, "model") == expected
