"""Groups and name alignment, against a table written by hand."""

from __future__ import annotations

import pytest

from compress.errors import ModelError
from compress.modeling.names import align_name, align_names, group_of, stored_names
from tests import families


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


def test_align_keeps_unknown_names() -> None:
    assert align_names(["a", "rotary.inv_freq"], {"model.a"}, "model") == {
        "a": "model.a",
        "rotary.inv_freq": "rotary.inv_freq",
    }


def test_align_refuses_a_parameter_that_is_there_twice() -> None:
    with pytest.raises(ModelError, match=r"'a' and 'model\.a'"):
        align_names(["a", "model.a"], {"model.a"}, "model")


def test_stored_names_follow_the_model() -> None:
    model = families.llama(num_hidden_layers=1)
    backbone = [name.removeprefix("model.") for name in model.state_dict() if name.startswith("model.")]
    found = stored_names(["rotary.inv_freq", *sorted(backbone)], model)
    assert list(found) == [*(f"model.{name}" for name in backbone), "rotary.inv_freq"]
    assert [found[name] for name in found] == [*backbone, "rotary.inv_freq"]
