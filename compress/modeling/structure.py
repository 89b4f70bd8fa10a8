"""Where a model's blocks are, and which linear maps they hold.

A model is one or more *stacks*: an `nn.ModuleList` whose members are blocks of one kind, or where there is none, an
`nn.Sequential` of them. `find_stacks` finds them by that structure, whatever they are called (`model.layers`,
`encoder.layer`, `resnet.encoder.stages`). Most models are one stack; an encoder-decoder is two, a ResNet of torchvision
one for each size. Of a model with several modalities the stacks outside of its language model are *towers*, which are
left alone unless asked for: they are small, and lose more.

The *target set* of quantization is every linear map in the blocks:

- each `nn.Linear`, and each `Conv1D` of transformers, which stores its weight transposed;
- each convolution whose output channels read all input channels, as the matrix [out, in x kernel];
- each expert of a fused mixture, a slice of a 3-D parameter (`compress.modeling.experts`).

So a matrix is not always a module: a `MatrixView` names the parameter and, for an expert, the slice. A router, which
picks experts, is not in the set: it is a few rows, and an error in it sends a token to the wrong expert.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from compress.errors import ModelError
from compress.modeling.experts import is_experts, projections
from compress.modeling.names import group_of

Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d


@dataclass(frozen=True)
class MatrixView:
    """One linear map y = W x: where its weight `W [out, in]` lies, and what it belongs to.

    `parameter` is the full name of the stored tensor and `index` the slice of it (None: all of it); `transposed`: it
    holds W^T. `module` is the module that holds it, `block` the index of its block, `group` the matrices it shares a
    code width with.
    """

    name: str
    parameter: str
    index: int | None
    shape: tuple[int, int]
    block: int
    module: str
    group: str
    transposed: bool = False

    @property
    def weights(self) -> int:
        return self.shape[0] * self.shape[1]

    @property
    def place(self) -> str:
        """What a quantized parameter is listed as: the module, or the stacked parameter of all experts."""
        return self.module if self.index is None else self.parameter


@dataclass(frozen=True)
class Stack:
    """Blocks in order, each with its full name. `tower`: outside of the language model of a model that has one."""

    name: str
    blocks: tuple[tuple[str, nn.Module], ...]
    tower: bool


def find_stacks(model: nn.Module) -> list[Stack]:
    """All stacks of `model`, in its order. Raises `ModelError` when there is none."""
    found = _containers(model, nn.ModuleList) or _containers(model, nn.Sequential)
    # convolutions in front of a transformer turn a signal into tokens; they are its embedding
    found = [each for each in found if _is_linear_stack(each[1])] or found
    if not found:
        raise ModelError(
            f"{type(model).__name__} has no stack of blocks with linear maps.",
            remedy="Supported are models whose blocks are modules in an nn.ModuleList or nn.Sequential.",
        )
    towers = [_is_tower(model, name) for name, _ in found]
    return [
        Stack(name, tuple((f"{name}.{index}", block) for index, block in enumerate(stack)), tower and not all(towers))
        for (name, stack), tower in zip(found, towers, strict=True)
    ]


def _containers(
    model: nn.Module, kind: type[nn.ModuleList] | type[nn.Sequential]
) -> list[tuple[str, nn.ModuleList | nn.Sequential]]:
    """The outermost containers of that kind of which each member holds linear maps; of a Sequential, which may be all
    sorts of things, each is a module of several parts."""
    found: list[tuple[str, nn.ModuleList | nn.Sequential]] = []
    for name, module in model.named_modules():
        if not name or not isinstance(module, kind) or any(name.startswith(f"{outer}.") for outer, _ in found):
            continue
        whole = kind is nn.ModuleList or not any(is_map(block) for block in module)
        if len(module) and whole and all(_holds_maps(block) for block in module):
            found.append((name, module))
    return found


def find_blocks(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The blocks of the one stack of `model` that is no tower, in order, each with its full name. Raises `ModelError`
    when there are several."""
    stacks = [stack for stack in find_stacks(model) if not stack.tower]
    if len(stacks) != 1:
        found = " and ".join(repr(stack.name) for stack in stacks)
        raise ModelError(
            f"{type(model).__name__} is not one stack of blocks but several: {found}.",
            remedy="Quantize it without data and without a transform.",
        )
    return list(stacks[0].blocks)


def matrices(model: nn.Module, towers: bool = False) -> list[MatrixView]:
    """The target set, in the order of the blocks and of the modules within each; `towers` included if asked for. The
    model may be on meta. Raises `ModelError` for a model without blocks, and for experts of an unknown form."""
    stacks = [stack for stack in find_stacks(model) if towers or not stack.tower]
    blocks = [block for stack in stacks for block in stack.blocks]
    return [view for index, (prefix, block) in enumerate(blocks) for view in _views_of(prefix, block, index)]


def require_linear(views: Sequence[MatrixView], model: nn.Module) -> None:
    """Raise `ModelError` unless every view is a layer of the kind of `nn.Linear`: what a transform is learned for."""
    for view in views:
        module = model.get_submodule(view.module)
        if not isinstance(module, nn.Linear):
            raise ModelError(
                f"'{view.module}' is a {type(module).__name__}: transforms are learned for linear layers alone.",
                remedy="Use --transform none, or hadamard.",
            )


def require_one_stack(views: Sequence[MatrixView], model: nn.Module) -> None:
    """Raise `ModelError` unless the blocks of the views are those of one stack, which run one after the other."""
    inside = [name for name, _ in find_blocks(model)]
    for view in views:
        if not any(view.name.startswith(f"{name}.") for name in inside):
            raise ModelError(
                f"'{view.name}' is outside of the blocks that data can be run through, '{inside[0]}' to the last.",
                remedy="Quantize towers without data.",
            )


def as_matrix(tensor: Tensor, view: MatrixView) -> Tensor:
    """The matrix [out, in] of `view` in the stored `tensor` of its parameter, sharing its memory where it can."""
    stored = tensor if view.index is None else tensor[view.index]
    return stored.T if view.transposed else stored.flatten(1)


def module_matrix(module: nn.Module) -> Tensor:
    """The weight of a linear map as [out, in], sharing its memory."""
    weight: Tensor = module.weight  # type: ignore[assignment]
    return weight.detach().T if isinstance(module, Conv1D) else weight.detach().view(weight.shape[0], -1)


def is_map(module: nn.Module) -> bool:
    """Whether `module` is a linear map of the target set, but for routers and what a parent computes by itself."""
    if isinstance(module, Convolution):
        return module.groups == 1
    if isinstance(module, nn.Linear) and type(module).forward is not nn.Linear.forward:
        return _is_plain(module)
    return isinstance(module, nn.Linear | Conv1D)


def _is_plain(linear: nn.Linear) -> bool:
    """Whether a kind of `nn.Linear` with a forward of its own still computes x W^T + b, by trial on a small copy."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((4, 3), (2, 3), (2,))
    x, weight, bias = (torch.randn(shape, generator=generator, device="cpu") for shape in shapes)
    small: dict[int, nn.Parameter] = {id(linear.weight): nn.Parameter(weight)}
    if linear.bias is not None:
        small[id(linear.bias)] = nn.Parameter(bias)
    try:
        with torch.no_grad():
            found = copy.deepcopy(linear, small)(x)
            expected = nn.functional.linear(x, weight, None if linear.bias is None else bias)
            return bool((found - expected).abs().max() < 1e-5)
    except (RuntimeError, TypeError, ValueError, AttributeError, IndexError):
        return False


def _holds_maps(block: nn.Module) -> bool:
    return any(is_map(module) or is_experts(module) for module in block.modules())


def _is_linear_stack(stack: nn.Module) -> bool:
    return any(isinstance(module, nn.Linear | Conv1D) or is_experts(module) for module in stack.modules())


def _is_tower(model: nn.Module, stack: str) -> bool:
    """Whether a stack belongs to a part with another config than the language model's."""
    if not isinstance(model, PreTrainedModel) or model.config.get_text_config() is model.config:
        return False
    parts = [module for name, module in model.named_modules() if name and stack.startswith(f"{name}.")]
    owners = [part for part in parts if isinstance(part, PreTrainedModel)]
    return not any(type(owner.config) is type(model.config.get_text_config()) for owner in owners)


def _views_of(prefix: str, block: nn.Module, index: int) -> Iterator[MatrixView]:
    """The target set of one block."""
    skipped = _routers(prefix, block)
    for name, module in block.named_modules(prefix=prefix):
        if isinstance(module, nn.MultiheadAttention):  # multiplies with the weights of its children itself
            skipped |= {child for child, _ in module.named_modules(prefix=name)}
        if name not in skipped:
            yield from _views(name, module, index)


def _routers(prefix: str, block: nn.Module) -> set[str]:
    """Linear maps beside experts that have an output for each of them, or a single one."""
    found = set()
    for name, module in block.named_modules(prefix=prefix):
        if is_experts(module):
            parent = name.rpartition(".")[0]
            outputs = (1, module.get_parameter("down_proj").shape[0])
            for child, sibling in block.get_submodule(parent[len(prefix) :].lstrip(".")).named_modules(prefix=parent):
                if isinstance(sibling, nn.Linear) and sibling.out_features in outputs:
                    found.add(child)
    return found


def _views(name: str, module: nn.Module, block: int) -> Iterator[MatrixView]:
    if is_map(module):
        rows, columns = module_matrix(module).shape
        transposed = isinstance(module, Conv1D)
        yield MatrixView(name, f"{name}.weight", None, (rows, columns), block, name, group_of(name), transposed)
    elif is_experts(module):
        for each in projections(module, name):
            parameter = f"{name}.{each.name}"
            for expert in range(each.experts):
                matrix = f"{parameter}.{expert}"
                group = group_of(matrix)
                yield MatrixView(matrix, parameter, expert, each.shape, block, name, group, each.transposed)
