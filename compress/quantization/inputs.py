"""What the linear maps of a block get as inputs.

A hook on a module ends the block's pass once its input is known, so that the moments of one input cost no more of the
block than lies before it. Maps that get the very same tensor (query, key and value) share its moments.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
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
def inputs_of(block: nn.Module, names: Sequence[str], call: Call, hidden: Tensor) -> dict[str, Tensor]:
    """The inputs of the modules `names` when the block is run on `hidden`, as far as the last of them; without those
    that are never called."""
    found: dict[str, Tensor] = {}

    def hear(name: str, x: Tensor) -> None:
        found[name] = x
        if len(found) == len(names):
            raise _Reached

    with _hooks(block, names, hear), suppress(_Reached):
        call.run(block, hidden)
    return found


@torch.no_grad()
def shared_inputs(block: nn.Module, names: Sequence[str], call: Call, hidden: Tensor) -> list[list[str]]:
    """The modules `names` in the order in which the block calls them, those with the same input tensor together; one
    that is never called comes last and alone."""
    seen: list[tuple[Tensor, list[str]]] = []

    def hear(name: str, x: Tensor) -> None:
        group = next((group for tensor, group in seen if tensor is x), None)
        if group is None:
            seen.append((x, [name]))
        elif name not in group:
            group.append(name)

    with _hooks(block, names, hear):
        call.run(block, hidden)
    groups = [group for _, group in seen]
    called = {name for group in groups for name in group}
    return [*groups, *([name] for name in names if name not in called)]


def token_rows(x: Tensor, mask: Tensor | None) -> Tensor:
    """The activations [T', n] of the tokens that are there, of x [B, T, n] and the mask bool [B, T] (None: all)."""
    if mask is not None and x.shape[:2] == mask.shape:
        return x[mask]
    return x.reshape(-1, x.shape[-1])
