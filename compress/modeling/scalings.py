"""Where channels can be scaled in the weights of a model: what one matrix gives less of, another takes more of.

- *Gated MLP.* y = D (act(G x) * (U x)): a row of U divided by s_j, the column j of D multiplied with it.
- *Queries and keys.* Only their product counts, so a channel of the keys may be s times as large where that of the
  queries is 1 / s. RoPE, which lies between, turns pairs of channels by an angle; that commutes with a scaling if both
  of a pair have the same s. Which channels are a pair (i and i + d/2, or 2i and 2i + 1) no config says: it is found by
  trial (`compress.transforms.probe`). A norm of each head (Qwen3, Gemma 3) undoes any scaling before it; then s goes
  into the weights of the two norms, which all heads share.

The outputs of a norm, a third place, are those of `compress.modeling.sites.Residual`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeVar

import torch
from torch import Tensor, nn

from compress.errors import ModelError
from compress.modeling.sites import ATTENTION, MLP, NoSite, attention_heads, gain_offset, linears
from compress.modeling.structure import find_blocks

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Pairs = Literal["halves", "neighbours"]
"""The channels that RoPE turns together: i and i + d/2, or 2i and 2i + 1."""
Site = TypeVar("Site")


@dataclass(frozen=True)
class GateSite:
    """The up projection of a gated MLP and the down projection that reads the product, over `width` channels."""

    up: str
    down: str
    width: int


@dataclass(frozen=True)
class QuerySite:
    """Query and key projection of one attention, or, if it has them, the norms of each head of queries and of keys.

    A norm multiplies with `offset` + its weight.
    """

    query: str
    key: str
    heads: int
    kv_heads: int
    head_dim: int
    norms: tuple[str, str] | None
    offset: float
    pairs: Pairs = "halves"

    @property
    def groups(self) -> int:
        """Heads that have a scaling of their own."""
        return self.kv_heads if self.norms is None else 1

    def spread(self, logs: Tensor) -> Tensor:
        """From one number for each pair of channels, [.., d/2], to the channels, [.., d]."""
        return torch.cat([logs, logs], -1) if self.pairs == "halves" else logs.repeat_interleave(2, -1)


@dataclass(frozen=True)
class Scalings:
    """What of a model can be scaled; `reasons` says what cannot, a sentence each."""

    gates: tuple[GateSite, ...] = ()
    queries: tuple[QuerySite, ...] = ()
    reasons: tuple[str, ...] = ()


def find_scalings(model: PreTrainedModel) -> Scalings:
    """The scalings of a model, which may be on the meta device, by its structure alone. Never raises for a model that
    has none."""
    reasons: list[str] = []

    def each(what: str, find: Callable[[str, nn.Module], Site]) -> tuple[Site, ...]:
        try:
            return tuple(find(prefix, block) for prefix, block in find_blocks(model))
        except NoSite as reason:
            reasons.append(f"{what} cannot be scaled in the weights: {reason}")
        except ModelError as error:
            reasons.append(error.message)
        return ()

    gates = each("The products of gate and up projection", _gate)
    queries = each("Queries and keys", lambda prefix, block: _query(model, prefix, block))
    return Scalings(gates, queries, tuple(dict.fromkeys(reasons)))


def _gate(prefix: str, block: nn.Module) -> GateSite:
    found = linears(block, "mlp", MLP, f"{prefix}.mlp")
    gate, up, down = (found[name] for name in MLP)
    if not gate.out_features == up.out_features == down.in_features:
        raise NoSite(f"the projections of '{prefix}.mlp' have different widths.")
    return GateSite(f"{prefix}.mlp.up_proj", f"{prefix}.mlp.down_proj", up.out_features)


def _query(model: PreTrainedModel, prefix: str, block: nn.Module) -> QuerySite:
    where = f"{prefix}.self_attn"
    found = linears(block, "self_attn", ATTENTION, where)
    heads, kv_heads, head_dim = attention_heads(model, found, where)
    if head_dim % 2:
        raise NoSite(f"the heads of '{where}' have {head_dim} channels, which are no pairs.")
    children = dict(block.get_submodule("self_attn").named_children())
    norms, offset = None, 0.0
    if "q_norm" in children or "k_norm" in children:
        offset = _shared_offset(children, head_dim, where)
        norms = (f"{where}.q_norm", f"{where}.k_norm")
    return QuerySite(f"{where}.q_proj", f"{where}.k_proj", heads, kv_heads, head_dim, norms, offset)


def _shared_offset(children: dict[str, nn.Module], head_dim: int, where: str) -> float:
    """The offset of the norms of queries and keys, which must be RMSNorm over each head."""
    offsets = set()
    for name in ("q_norm", "k_norm"):
        norm = children.get(name)
        offset = None if norm is None else gain_offset(norm)
        weight = None if norm is None else dict(norm.named_parameters()).get("weight")
        if offset is None or weight is None or weight.numel() != head_dim:
            raise NoSite(f"'{where}.{name}' is not RMSNorm over {head_dim} channels with a gain.")
        offsets.add(offset)
    if len(offsets) > 1:
        raise NoSite(f"the norms of '{where}' are of different kinds.")
    return offsets.pop()
