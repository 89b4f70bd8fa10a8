"""Where an orthogonal change of basis can be folded into a model's weights, so that it costs nothing at run time.

Two places are known, both in pre-norm decoders:

- *The residual stream.* Embedding, attention and MLP write to it; through a norm, the projections and the head read
  from it. RMSNorm divides by a length, which no rotation changes, so h -> h R goes through the stack once the norm's
  gain has moved into the matrices that read it. LayerNorm subtracts a mean, which is another direction after R, and a
  norm behind a block (post-norm) has a gain that cannot move past the addition.
- *Values.* Attention averages the values of a head over positions, so v -> v R_h comes out as an average times R_h and
  is undone by the output projection. Heads that share keys and values share R_h.

Sites are recognised by structure: which children block, attention and MLP have (an unknown child, or a parameter of
their own, might do anything), which widths agree, and what the norm does to random numbers. A model that does not fit
has no such site, and `Sites.reasons` says why; it may still have its matrices mixed at run time.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from compress.errors import ModelError
from compress.modeling.structure import find_blocks

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BLOCK = ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp")
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
HARMLESS = frozenset({"q_norm", "k_norm", "rotary_emb", "act_fn", "dropout", "resid_attn_dropout", "resid_mlp_dropout"})
"""Children that change neither what is written to the residual stream nor what becomes of values, in eval mode."""


@dataclass(frozen=True)
class Residual:
    """The residual stream of `width` numbers, by the full names of modules.

    `readers` maps a linear map to the norm in front of it, the head to the last norm. Embedding and `writers` add to
    the stream. `tied`: head and embedding are one tensor. A norm multiplies with `offset` + its weight, offset 0 or 1.
    """

    width: int
    embedding: str
    head: str
    tied: bool
    readers: Mapping[str, str]
    writers: tuple[str, ...]
    offset: float


@dataclass(frozen=True)
class ValueSite:
    """Value and output projection of one attention. Query head i reads the values of head i // (heads / kv_heads)."""

    value: str
    output: str
    heads: int
    kv_heads: int
    head_dim: int


@dataclass(frozen=True)
class Sites:
    """What of a model can be folded; `reasons` says what cannot, a sentence each."""

    residual: Residual | None = None
    values: tuple[ValueSite, ...] = ()
    reasons: tuple[str, ...] = ()


class NoSite(Exception):
    """The model does not fit; the text says why."""


def find_sites(model: PreTrainedModel) -> Sites:
    """The sites of a model, which may be on the meta device. Never raises for a model that has none."""
    try:
        blocks = find_blocks(model)
    except ModelError as error:
        return Sites(reasons=(error.message,))
    reasons = []
    values: tuple[ValueSite, ...] = ()
    residual = None
    try:
        values = tuple(_values(model, prefix, block) for prefix, block in blocks)
    except NoSite as reason:
        reasons.append(f"Values cannot be rotated in the weights: {reason}")
    try:
        residual = _residual(model, blocks)
    except NoSite as reason:
        reasons.append(f"The residual stream cannot be rotated in the weights: {reason}")
    return Sites(residual, values, tuple(reasons))


def _values(model: PreTrainedModel, prefix: str, block: nn.Module) -> ValueSite:
    attention = f"{prefix}.self_attn"
    linear = linears(block, "self_attn", ATTENTION, attention)
    heads, kv_heads, head_dim = attention_heads(model, linear, attention)
    return ValueSite(f"{attention}.v_proj", f"{attention}.o_proj", heads, kv_heads, head_dim)


def attention_heads(model: PreTrainedModel, linear: Mapping[str, nn.Linear], where: str) -> tuple[int, int, int]:
    """Heads, heads of keys and values, and the width of each, by config and the projections; `NoSite` if these do not
    agree."""
    config = model.config.get_text_config().to_dict()
    heads, kv_heads = config.get("num_attention_heads"), config.get("num_key_value_heads")
    if not isinstance(heads, int) or not isinstance(kv_heads, int) or heads % kv_heads:
        raise NoSite(f"config.json has {heads!r} heads for {kv_heads!r} heads of keys and values.")
    query, key, value, output = (linear[name] for name in ATTENTION)
    head_dim = value.out_features // kv_heads
    widths = (query.out_features, key.out_features, value.out_features, output.in_features)
    if widths != (heads * head_dim, kv_heads * head_dim, kv_heads * head_dim, heads * head_dim):
        raise NoSite(f"the projections of '{where}' have widths {list(widths)}, not those of {heads} equal heads.")
    return heads, kv_heads, head_dim


def _residual(model: PreTrainedModel, blocks: list[tuple[str, nn.Module]]) -> Residual:
    if model.main_input_name != "input_ids":
        raise NoSite("no tokens are embedded.")
    stack = blocks[0][0].rpartition(".")[0]
    base, _, layers = stack.rpartition(".")
    prefix = f"{base}." if base else ""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if not isinstance(head, nn.Linear) or not base or base != model.base_model_prefix:
        raise NoSite("no language head reads the last norm.")
    if not isinstance(embedding, nn.Embedding) or embedding.max_norm is not None:
        raise NoSite("the embedding is no table of rows.")
    names = {module: name for name, module in model.named_modules()}
    _require_children(model, "", (base, names[head]))
    _require_children(model.get_submodule(base), base, ("embed_tokens", layers, "norm"))
    if names[embedding] != f"{prefix}embed_tokens":
        raise NoSite(f"the embedding is '{names[embedding]}'.")
    readers: dict[str, str] = {}
    writers, norms = [], [f"{prefix}norm"]
    for name, block in blocks:
        _require_children(block, name, BLOCK)
        linears(block, "self_attn", ATTENTION, f"{name}.self_attn")
        linears(block, "mlp", MLP, f"{name}.mlp")
        readers |= {f"{name}.self_attn.{last}": f"{name}.input_layernorm" for last in ATTENTION[:3]}
        readers |= {f"{name}.mlp.{last}": f"{name}.post_attention_layernorm" for last in MLP[:2]}
        writers += [f"{name}.self_attn.o_proj", f"{name}.mlp.down_proj"]
        norms += [f"{name}.input_layernorm", f"{name}.post_attention_layernorm"]
    readers[names[head]] = f"{prefix}norm"
    width = embedding.embedding_dim
    for name in (*readers, *writers):
        linear = model.get_submodule(name)
        side = linear.in_features if name in readers else linear.out_features
        if side != width:
            raise NoSite(f"'{name}' has {side} channels on the side of the residual stream of {width}.")
    offset = _common_offset({name: model.get_submodule(name) for name in norms})
    tied = head.weight is embedding.weight
    return Residual(width, names[embedding], names[head], tied, readers, tuple(writers), offset)


def _common_offset(norms: Mapping[str, nn.Module]) -> float:
    """The offset of all `norms`, of which one of each class is tried."""
    offsets: dict[type[nn.Module], float] = {}
    for name, norm in norms.items():
        if type(norm) not in offsets:
            offset = gain_offset(norm)
            if offset is None:
                raise NoSite(f"'{name}' ({type(norm).__name__}) is not RMSNorm with a gain.")
            offsets[type(norm)] = offset
    if len(set(offsets.values())) > 1:
        raise NoSite("its norms are of different kinds.")
    return next(iter(offsets.values()))


def linears(block: nn.Module, child: str, names: tuple[str, ...], where: str) -> dict[str, nn.Linear]:
    """The linear maps `names` of a block's child that has no others and nothing unknown."""
    parent = dict(block.named_children()).get(child)
    if parent is None:
        raise NoSite(f"there is no '{where}'.")
    children = _require_children(parent, where, names)
    found = {name: module for name in names if isinstance(module := children[name], nn.Linear)}
    if len(found) != len(names):
        wrong = next(name for name in names if name not in found)
        raise NoSite(f"'{where}.{wrong}' is a {type(children[wrong]).__name__}, not a linear map.")
    return found


def _require_children(module: nn.Module, where: str, names: Iterable[str]) -> dict[str, nn.Module]:
    """The children of a module that has `names`, perhaps harmless ones, no others, and no parameter of its own."""
    children, wanted = dict(module.named_children()), set(names)
    place = where or type(module).__name__
    missing = sorted(wanted - children.keys())
    unknown = sorted(children.keys() - wanted - HARMLESS)
    if missing or unknown:
        what = f"no '{missing[0]}'" if missing else f"an unknown part '{unknown[0]}'"
        raise NoSite(f"'{place}' has {what}.")
    own = [name for name, _ in module.named_parameters(recurse=False)]
    if own:
        raise NoSite(f"'{place}' has a parameter '{own[0]}' of its own.")
    return children


def gain_offset(norm: nn.Module) -> float | None:
    """c, 0 or 1, of a norm that computes x / sqrt(mean x^2) * (c + weight); None for one that computes anything else.

    Its own code is run on random rows of non-zero mean, so long that the small number it adds to the mean is nothing.
    """
    parameters = dict(norm.named_parameters())
    if list(parameters) != ["weight"] or parameters["weight"].ndim != 1 or any(True for _ in norm.buffers()):
        return None
    width = parameters["weight"].numel()
    generator = torch.Generator().manual_seed(0)
    gain = torch.randn(width, generator=generator, dtype=torch.float64)
    x = 1e3 * (torch.randn(4, width, generator=generator, dtype=torch.float64) + 0.5)
    trial = copy.deepcopy(norm).to_empty(device="cpu").to(torch.float64)
    with torch.no_grad():
        trial.get_parameter("weight").copy_(gain)
        try:
            found = trial(x)
        except (TypeError, RuntimeError, ValueError):
            return None
    plain = x * x.square().mean(1, keepdim=True).rsqrt()
    if not isinstance(found, torch.Tensor):
        return None
    fits = [offset for offset in (0.0, 1.0) if torch.allclose(found.double(), plain * (offset + gain), 1e-4, 1e-5)]
    return fits[0] if fits else None
