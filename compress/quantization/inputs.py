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

from compress.modeling.stack import Call


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


@dataclass(frozen=True)
class Structure:
    """How a block uses its linear maps. `groups`: the maps in the order in which they are first called, those that get
    the very same tensor together, one that is never called last and alone. `tails`: a map whose output is all that a
    module around it hands back -> that module, the largest such, and how many None follow in a tuple (-1: no tuple)."""

    groups: tuple[tuple[str, ...], ...]
    tails: Mapping[str, tuple[str, int]]


@torch.no_grad()
def structure_of(block: nn.Module, names: Sequence[str], call: Call, hidden: Tensor) -> Structure:
    """The structure of `block` for its linear maps `names`, seen in a pass over `hidden`."""
    inputs: dict[str, Tensor] = {}
    groups: list[tuple[Tensor, list[str]]] = []
    outputs: dict[str, Tensor] = {}
    tails: dict[str, tuple[str, int]] = {}

    def hear(name: str, x: Tensor) -> None:
        if name in inputs:
            return
        inputs[name] = x
        group = next((group for tensor, group in groups if tensor is x), None)
        if group is None:
            groups.append((x, [name]))
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
    called = [tuple(group) for _, group in groups]
    return Structure((*called, *((name,) for name in names if name not in inputs)), tails)


def token_rows(x: Tensor, mask: Tensor | None) -> Tensor:
    """The activations [T', n] of the tokens that are there, of x [B, T, n] and the mask bool [B, T] (None: all)."""
    if mask is not None and x.shape[:2] == mask.shape:
        return x[mask]
    return x.reshape(-1, x.shape[-1])
