"""What names of modules mean: which matrices read the same input, and the prefix that a model with a head adds.

Serving engines fuse some projections into one matrix multiplication: query, key and value; gate and up. Matrices that
are fused must be quantized alike, so they form a *group*, and a group gets one code width. The names below cover
Llama, Mistral, Qwen2, Qwen3 and their mixtures of experts, BERT and its relatives, T5. A name that is not in the table
is a group of its own, which is always correct, only not always fusible.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

# last part of a module's name -> last part of its group's name; siblings under one parent share the group
FUSED: Mapping[str, str] = {
    "q_proj": "qkv",
    "k_proj": "qkv",
    "v_proj": "qkv",
    "query": "qkv",
    "key": "qkv",
    "value": "qkv",
    "q": "qkv",
    "k": "qkv",
    "v": "qkv",
    "q_lin": "qkv",
    "k_lin": "qkv",
    "v_lin": "qkv",
    "gate_proj": "gate_up",
    "up_proj": "gate_up",
    "wi_0": "gate_up",
    "wi_1": "gate_up",
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
