"""Fused mixtures of experts: what transformers keeps in 3-D parameters, as linear maps one by one.

A layer's experts are a module with the parameters `gate_up_proj` (or `up_proj`, without a gate) and `down_proj`, all
experts stacked along the first axis, [E, out, in] or transposed [E, in, out]. Its function of the hidden states x_s,
for the experts e in the choice of token s with the router's weights r_se, is the same for all architectures:

    y_s = sum_e r_se norm(down_e(gate(up_e(x_s)))),    gate(a) the module's own, such as silu(a_1) a_2

`Experts` computes that with any linear maps in the place of slices: with `OpenExperts` they are modules of their own,
which can be watched and changed one by one; packed ones are in `compress.quantization.modules`. The module that is
replaced stays as the one who knows its gate; its stacked weights may be on the meta device.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from compress.errors import ModelError

UP, DOWN = ("gate_up_proj", "up_proj"), "down_proj"


@dataclass(frozen=True)
class Projection:
    """The parameter `name` of a module of experts: a matrix `shape` [out, in] for each; `transposed`: stored [in, out].
    `bias` [E, out] is the parameter of that name, if there is one."""

    name: str
    experts: int
    shape: tuple[int, int]
    transposed: bool
    bias: str | None


def is_experts(module: nn.Module) -> bool:
    """Whether `module` holds stacked experts."""
    own = dict(module.named_parameters(recurse=False))
    return DOWN in own and own[DOWN].ndim == 3 and any(name in own and own[name].ndim == 3 for name in UP)


def projections(module: nn.Module, where: str) -> tuple[Projection, Projection]:
    """What maps up and what maps down. Raises `ModelError` for stacked experts that are not computed as above."""
    facts: dict[str, Any] = vars(module)
    if not isinstance(facts.get("is_transposed"), bool):
        raise ModelError(
            f"The experts '{where}' are a {type(module).__name__}, whose function is not known.",
            remedy="Supported are stacked experts that transformers runs by its experts interface.",
        )
    own = dict(module.named_parameters(recurse=False))
    found = []
    for name in (next(name for name in UP if name in own), DOWN):
        experts, first, second = own[name].shape
        shape = (second, first) if facts["is_transposed"] else (first, second)
        bias = f"{name}_bias" if facts.get("has_bias") else None
        found.append(Projection(name, experts, shape, facts["is_transposed"], bias))
    up, down = found
    if (
        up.experts != down.experts
        or up.shape[1] != down.shape[0]
        or up.shape[0] not in (down.shape[1], 2 * down.shape[1])
    ):
        raise ModelError(
            f"The experts '{where}' have an unknown layout: {up.name} {list(own[up.name].shape)}, {DOWN} "
            f"{list(own[DOWN].shape)}.",
            remedy="Supported is [experts, out, in], as in Mixtral and Qwen3-MoE, and its transposed form.",
        )
    return up, down


class Experts(nn.Module):
    """The experts of a layer in the place of the module `fused`, with the linear maps of `expert`.

    Its state is that of `fused` but for the stacked weights.
    """

    def __init__(self, fused: nn.Module, where: str) -> None:
        super().__init__()
        self.up, self.down = projections(fused, where)
        stacked = {self.up.name, self.down.name}
        for name, parameter in fused.named_parameters(recurse=False):
            if name not in stacked:
                self.register_parameter(name, parameter)
        for name, buffer in fused.named_buffers(recurse=False):
            self.register_buffer(name, buffer, persistent=name not in fused._non_persistent_buffers_set)
        for name, child in fused.named_children():
            self.add_module(name, child)
        # in a tuple, so that its parameters are not this module's
        self._fused = (fused,)
        self._normed = bool(vars(fused).get("has_post_expert_norm"))
        self._gated = bool(vars(fused).get("has_gate", True))

    def expert(self, projection: Projection, index: int) -> Callable[[Tensor], Tensor]:
        """x [R, in] -> x W^T [R, out] of expert `index`."""
        raise NotImplementedError

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states [S, d], top_k_index int64 [S, k], top_k_weights [S, k] -> [S, d]. Index E means no expert."""
        result = torch.zeros_like(hidden_states)
        for index in top_k_index.unique().tolist():
            if index >= self.up.experts:
                continue
            tokens, places = torch.where(top_k_index == index)
            x = self._gate(self._map(self.up, index, hidden_states[tokens]))
            y = self._map(self.down, index, x)
            if self._normed:
                y = self.get_submodule("post_expert_norm")(y)
            y = y * top_k_weights[tokens, places, None]
            result.index_add_(0, tokens, y.to(result.dtype))
        return result

    def _gate(self, x: Tensor) -> Tensor:
        fused: Any = self._fused[0]
        gated: Tensor = fused._apply_gate(x) if self._gated else fused.act_fn(x)
        return gated

    def _map(self, projection: Projection, index: int, x: Tensor) -> Tensor:
        y = self.expert(projection, index)(x)
        return y if projection.bias is None else y + self.get_parameter(projection.bias)[index]


class OpenExperts(Experts):
    """Experts as modules `<projection>.<index>`, each an `nn.Linear` that shares the memory of its slice."""

    def __init__(self, fused: nn.Module, where: str) -> None:
        super().__init__(fused, where)
        for projection in (self.up, self.down):
            stacked = fused.get_parameter(projection.name)
            self.add_module(projection.name, nn.ModuleList(_linear(slice_, projection) for slice_ in stacked))
        self._fused = (without(fused, self.up.name, self.down.name),)

    def expert(self, projection: Projection, index: int) -> Callable[[Tensor], Tensor]:
        return self.get_submodule(f"{projection.name}.{index}")

    def inputs(self, projection: str, index: int, hidden: Tensor) -> Tensor:
        """What the map `projection` of expert `index` gets for the hidden states [S, d] of its tokens, [S, in]."""
        return hidden if projection == self.up.name else self._gate(self._map(self.up, index, hidden))


def open_experts(block: nn.Module) -> nn.Module:
    """`block` with its experts open; the same block when it has none, else another that shares its tensors."""
    names = [name for name, module in block.named_modules() if is_experts(module)]
    if not names:
        return block
    tensors = (*block.parameters(), *block.buffers())
    opened = copy.deepcopy(block, {id(tensor): tensor for tensor in tensors})
    for name in names:
        opened.set_submodule(name, OpenExperts(opened.get_submodule(name), name))
    return opened


def without(module: nn.Module, *parameters: str) -> nn.Module:
    """`module`, whose `parameters` have no memory any more."""
    for name in parameters:
        empty = torch.empty_like(module.get_parameter(name), device="meta")
        module.register_parameter(name, nn.Parameter(empty, requires_grad=False))
    return module


def _linear(weight: Tensor, projection: Projection) -> nn.Linear:
    matrix = weight.detach().T if projection.transposed else weight.detach()
    rows, columns = projection.shape
    linear = nn.Linear(columns, rows, bias=False, device="meta")
    linear.weight = nn.Parameter(matrix, requires_grad=False)
    return linear
