"""What names of modules mean: which matrices read the same input, and how a checkpoint spells a model's parameters.

Serving engines fuse some projections into one matrix multiplication: query, key and value; gate and up. Matrices that
are fused must be quantized alike, so they form a *group*, and a group gets one code width. The names below cover
Llama, Mistral, Qwen2, Qwen3 and their mixtures of experts, BERT and its relatives. A name that is not in the table
is a group of its own, which is always correct, only not always fusible.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING

from compress.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# last part of a module's name -> last part of its group's name; siblings under one parent share the group
FUSED: Mapping[str, str] = {
    "q_proj": "qkv",
    "k_proj": "qkv",
    "v_proj": "qkv",
    "query": "qkv",
    "key": "qkv",
    "value": "qkv",
    "q_lin": "qkv",
    "k_lin": "qkv",
    "v_lin": "qkv",
    "gate_proj": "gate_up",
    "up_proj": "gate_up",
}


def group_of(name: str) -> str:
    """The group a matrix belongs to: `model.layers.0.self_attn.q_proj` -> `model.layers.0.self_attn.qkv`.

    An expert's matrix `<experts>.gate_up_proj.<e>` belongs to `<experts>.gate_up_proj`: engines run all experts of a
    layer in one grouped multiplication.
    """
    parent, _, last = name.rpartition(".")
    if last.isdecimal():
        return parent
    fused = FUSED.get(last, last)
    return f"{parent}.{fused}" if parent else fused


def align_name(name: str, known: Collection[str], prefix: str) -> str | None:
    """`name` as the model spells it, or None. A checkpoint saved from a bare backbone lacks the prefix
    (`layers.0...` for `model.layers.0...`); one saved with a head carries it where a bare backbone does not."""
    if name in known:
        return name
    if prefix:
        if f"{prefix}.{name}" in known:
            return f"{prefix}.{name}"
        bare = name.removeprefix(f"{prefix}.")
        if bare in known:
            return bare
    return None


def align_names(stored: Iterable[str], known: Collection[str], prefix: str) -> dict[str, str]:
    """Map every stored tensor's name to the model's; a tensor that the model does not know keeps its own name.

    Raises `ModelError` when two stored tensors would be the same parameter.
    """
    aligned: dict[str, str] = {}
    owner: dict[str, str] = {}
    for name in stored:
        target = align_name(name, known, prefix) or name
        if target in owner:
            raise ModelError(
                f"The checkpoint holds '{owner[target]}' and '{name}', which are both the parameter '{target}'.",
                remedy="Save the model again with save_pretrained, so that each parameter is there once.",
            )
        owner[target] = name
        aligned[name] = target
    return aligned


def stored_names(names: Iterable[str], model: PreTrainedModel) -> dict[str, str]:
    """What a checkpoint with the tensors `names` calls each tensor of `model`: the model's name -> the checkpoint's.

    In the model's order; tensors that the model does not know come last, under their own names. A tensor that the
    checkpoint lacks is not in the result. Raises `ModelError` as `align_names` does.
    """
    order = list(model.state_dict())
    aligned = align_names(names, frozenset(order), model.base_model_prefix)
    present = {name: stored for stored, name in aligned.items()}
    return {name: present.pop(name) for name in order if name in present} | present
