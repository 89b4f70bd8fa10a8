"""Where a model's blocks are, and which linear maps they hold.

A transformer is a stack: one `nn.ModuleList` whose members are blocks of the same kind. `find_blocks` finds it by that
structure, whatever it is called (`model.layers`, `encoder.layer`). The *target set* of quantization is every linear
map in the blocks: each `nn.Linear`, and each expert of a fused mixture of experts. transformers stores the latter as
3-D parameters, `gate_up_proj [E, 2I, H]` and `down_proj [E, H, I]`, so a matrix is not always a module: a `MatrixView`
names the parameter and, for an expert, the slice. A router, which picks experts, is not in the set: it is a few rows,
and an error in it sends a token to the wrong expert.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from compress.errors import ModelError
from compress.modeling.names import group_of


@dataclass(frozen=True)
class MatrixView:
    """One linear map y = W x: where its weight `W [out, in]` lies, and what it belongs to.

    `parameter` is the full name of the stored tensor and `index` the slice of it (None: all of it). `module` is the
    module that holds it, `block` the index of its block, `group` the matrices it shares a code width with.
    """

    name: str
    parameter: str
    index: int | None
    shape: tuple[int, int]
    block: int
    module: str
    group: str

    @property
    def weights(self) -> int:
        return self.shape[0] * self.shape[1]


def find_blocks(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The blocks in order, each with its full name. Raises `ModelError` when there is not exactly one stack."""
    stacks: list[tuple[str, nn.ModuleList]] = []
    for name, module in model.named_modules():
        if any(name.startswith(f"{outer}.") for outer, _ in stacks):
            continue
        if isinstance(module, nn.ModuleList) and len(module) and all(_holds_maps(block) for block in module):
            stacks.append((name, module))
    if len(stacks) != 1:
        found = " and ".join(repr(name) for name, _ in stacks) or "none"
        raise ModelError(
            f"{type(model).__name__} is not one stack of blocks with linear layers (found: {found}).",
            remedy="Supported are Llama-like decoders and BERT-like encoders.",
        )
    name, stack = stacks[0]
    return [(f"{name}.{index}", block) for index, block in enumerate(stack)]


def matrices(model: nn.Module) -> list[MatrixView]:
    """The target set, in the order of the blocks and of the modules within each. The model may be on meta."""
    return [
        view
        for index, (prefix, block) in enumerate(find_blocks(model))
        for name, module in block.named_modules(prefix=prefix)
        for view in _views(name, module, index)
    ]


def read_view(tensor: Tensor, view: MatrixView) -> Tensor:
    """The matrix `[out, in]` of `view` in the stored `tensor` of its parameter."""
    return tensor if view.index is None else tensor[view.index]


def require_linear(views: list[MatrixView]) -> None:
    """Raise `ModelError` when a view is an expert: packing fused experts is not supported yet."""
    for view in views:
        if view.index is not None:
            raise ModelError(
                f"'{view.module}' holds fused experts, which cannot be quantized yet (first: '{view.name}').",
                remedy="Quantize a dense model.",
            )


def _holds_maps(block: nn.Module) -> bool:
    return any(isinstance(module, nn.Linear) or _is_experts(module) for module in block.modules())


def _is_experts(module: nn.Module) -> bool:
    own = dict(module.named_parameters(recurse=False))
    return {"gate_up_proj", "down_proj"} <= own.keys() and own["gate_up_proj"].ndim == own["down_proj"].ndim == 3


def _views(name: str, module: nn.Module, block: int) -> Iterator[MatrixView]:
    if isinstance(module, nn.Linear):
        shape = (module.out_features, module.in_features)
        yield MatrixView(name, f"{name}.weight", None, shape, block, name, group_of(name))
    elif _is_experts(module):
        yield from _expert_views(name, module, block)


def _expert_views(name: str, module: nn.Module, block: int) -> Iterator[MatrixView]:
    gate_up, down = module.get_parameter("gate_up_proj"), module.get_parameter("down_proj")
    experts, hidden, inner = down.shape
    if tuple(gate_up.shape) != (experts, 2 * inner, hidden):
        raise ModelError(
            f"The experts '{name}' have an unknown layout: gate_up_proj {tuple(gate_up.shape)}, down_proj "
            f"{tuple(down.shape)}.",
            remedy="Supported is [experts, out, in], as in Mixtral and Qwen3-MoE.",
        )
    for last, parameter in (("gate_up_proj", gate_up), ("down_proj", down)):
        for expert in range(experts):
            matrix = f"{name}.{last}.{expert}"
            shape = (parameter.shape[1], parameter.shape[2])
            yield MatrixView(matrix, f"{name}.{last}", expert, shape, block, name, group_of(matrix))
