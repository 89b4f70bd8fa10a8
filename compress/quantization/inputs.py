"""What the linear maps of a block get as inputs.

A hook on a module ends the block's pass once its input is known, so that the moments of one input cost no more of the
block than lies before it. Maps that get the very same tensor (query, key and value) share its moments.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from compress.errors import UsageError
from compress.modeling.stack import Call
from compress.modeling.structure import Convolution, module_matrix


class _Reached(Exception):
    """Raised by a hook to end a block's forward pass."""


@contextmanager
def _hooks(block: nn.Module, names: Sequence[str], hear: Callable[[str, Tensor], None]) -> Iterator[None]:
    """`hear` is told each of the modules `names` with its input when it is called."""

    def hook_of(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        return lambda module, args: hear(name, args[0])

    handles = [block.get_submodule(name).register_forward_pre_hook(hook_of(name)) for name in names]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def inputs_of(
    block: nn.Module, names: Sequence[str], call: Call, hidden: Tensor, *, to_the_end: bool = False
) -> tuple[dict[str, Tensor], Tensor | None]:
    """The inputs of the modules `names` when the block is run on `hidden`, without those that are never called; of one
    that is called several times the first. The block is run as far as the last of them, or `to_the_end`, for its output
    too."""
    found: dict[str, Tensor] = {}
    output: Tensor | None = None

    def hear(name: str, x: Tensor) -> None:
        found.setdefault(name, x)
        if len(found) == len(names) and not to_the_end:
            raise _Reached

    with _hooks(block, names, hear), suppress(_Reached):
        output = call.run(block, hidden)
    return found, output


@torch.no_grad()
def routing_of(block: nn.Module, experts: str, call: Call, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """The hidden states [S, d] and the choices int64 [S, k] that the module `experts` gets when the block is run on
    `hidden`."""
    found: dict[str, Tensor] = {}

    def hear(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        found.update(zip(("hidden_states", "top_k_index", "top_k_weights"), args, strict=False))
        found.update(kwargs)
        raise _Reached

    handle = block.get_submodule(experts).register_forward_pre_hook(hear, with_kwargs=True)
    try:
        with suppress(_Reached):
            call.run(block, hidden)
    finally:
        handle.remove()
    return found["hidden_states"], found["top_k_index"]


@dataclass(frozen=True)
class Structure:
    """How a block uses its linear maps. `groups`: the maps in the order in which they are first called, those that get
    the very same vectors together, one that is never called last and alone. `tails`: a map whose output is all that a
    module around it hands back -> that module, the largest such, and how many None follow in a tuple (-1: no tuple)."""

    groups: tuple[tuple[str, ...], ...]
    tails: Mapping[str, tuple[str, int]]


@torch.no_grad()
def structure_of(block: nn.Module, names: Sequence[str], call: Call, hidden: Tensor) -> Structure:
    """The structure of `block` for its linear maps `names`, seen in a pass over `hidden`."""
    inputs: dict[str, Tensor] = {}
    groups: list[tuple[Tensor, object, list[str]]] = []
    outputs: dict[str, Tensor] = {}
    tails: dict[str, tuple[str, int]] = {}

    def hear(name: str, x: Tensor) -> None:
        if name in inputs:
            return
        inputs[name] = x
        window = _window(block.get_submodule(name))
        group = next((group for tensor, other, group in groups if tensor is x and other == window), None)
        if group is None:
            groups.append((x, window, [name]))
        else:
            group.append(name)

    def see(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            first, rest = (output[0], output[1:]) if isinstance(output, tuple) else (output, ())
            if name in names:
                outputs[name] = first
                return
            for last, tensor in outputs.items():
                if tensor is first and last.startswith(f"{name}.") and all(one is None for one in rest):
                    tails[last] = name, len(rest) if isinstance(output, tuple) else -1

        return hook

    handles = [module.register_forward_hook(see(name)) for name, module in block.named_modules() if name]
    try:
        with _hooks(block, names, hear):
            call.run(block, hidden)
    finally:
        for handle in handles:
            handle.remove()
    called = [tuple(group) for *_, group in groups]
    return Structure((*called, *((name,) for name in names if name not in inputs)), tails)


def input_rows(module: nn.Module, x: Tensor, mask: Tensor | None) -> Tensor:
    """The vectors [R, in] that the matrix of `module` is multiplied with when its input is x: of a convolution the
    patches [B x places, in x kernel] of x [B, in, *sizes], else the activations of the tokens that are there, of
    x [B, T, in] and the mask bool [B, T] (None: all)."""
    if isinstance(module, Convolution):
        return _patches(module, x)
    if mask is not None and x.shape[:2] == mask.shape:
        return x[mask]
    return x.reshape(-1, x.shape[-1])


def _window(module: nn.Module) -> object:
    """What of an input a matrix reads at once: convolutions of one window read the same vectors."""
    if isinstance(module, Convolution):
        return module.kernel_size, module.stride, module.padding, module.dilation
    return None


def _patches(convolution: Convolution, x: Tensor) -> Tensor:
    if convolution.padding_mode != "zeros" or isinstance(convolution.padding, str):
        raise UsageError(
            f"A convolution with padding {convolution.padding!r} of {convolution.padding_mode!r} cannot be calibrated.",
            remedy="Quantize this model without data.",
        )
    sizes = zip(convolution.kernel_size, convolution.stride, convolution.padding, convolution.dilation, strict=True)
    patches = functional.pad(x, [side for pad in reversed(convolution.padding) for side in (pad, pad)])
    places = len(convolution.kernel_size)
    for axis, (kernel, stride, _, dilation) in enumerate(sizes, 2):
        windows = patches.unfold(axis, dilation * (kernel - 1) + 1, stride)
        patches = windows[..., ::dilation]
    # [B, in, *places, *kernel] -> [B, *places, in, *kernel]
    return patches.movedim(1, 1 + places).reshape(-1, module_matrix(convolution).shape[1])
