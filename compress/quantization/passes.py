"""Passes of one block over all batches: what its modules get as inputs, and its outputs, without running more of it
than must be.

A block that does not change is run once: the inputs of its modules are kept up to a budget, and its outputs go where
they are wanted. A block whose matrices are rounded between the passes must run again for the inputs of each; but where
all that an attention or an MLP hands back is the output of its last linear map, as in most models, that map's input
stands for all that lies before it, once that is final: a `Replay` takes its place. Everything that is kept is what
would be computed again, so results do not depend on the budget.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from compress.modeling.stack import Call
from compress.quantization.activations import States
from compress.quantization.inputs import inputs_of, routing_of


class Replay(nn.Module):
    """Stands in the place of a module whose output is that of the linear map `last`: maps the input that is kept."""

    def __init__(self, last: nn.Module, more: int) -> None:
        super().__init__()
        self.last, self._more = last, more
        self.input: Tensor | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The output; as a tuple with as many times None behind it as the module has (-1: no tuple)."""
        output = self.last(self.input)
        return output if self._more < 0 else (output, *([None] * self._more))


class Passes:
    """The passes of `block` over the batches of `hidden`; `names` are the modules whose inputs will be asked for, in
    the order of their calls, each for batch after batch.

    `tails` (see `Structure`) are given for a block that is rounded between; `outputs` is where those of a block that
    does not change are written. What open experts are called with does not depend on them, so it is kept for all.
    """

    def __init__(
        self,
        block: nn.Module,
        names: Sequence[str],
        hidden: States,
        calls: Sequence[Call],
        device: torch.device,
        budget: int,
        *,
        tails: Mapping[str, tuple[str, int]] | None = None,
        outputs: States | None = None,
    ) -> None:
        self._block, self._names, self._hidden, self._calls = block, list(names), hidden, calls
        self._device, self._left, self._outputs = device, budget, outputs
        self._kept: dict[tuple[str, int], Tensor] = {}
        self._routed: dict[tuple[str, int], tuple[Tensor, Tensor]] = {}
        self._changes = tails is not None
        self._tails = tails or {}
        if self._tails and self._calls and not self._replays_well():
            self._tails = {}

    def input(self, name: str, batch: int) -> Tensor | None:
        """The input of module `name` in `batch`; None when it is never called."""
        if self._changes:
            with self._replayed(batch):
                found, _ = inputs_of(self._block, [name], self._calls[batch], self._hidden.read(batch, self._device))
            if name in self._tails and name in found:
                self._keep(name, batch, found[name])
            return found.get(name)
        kept = self._kept.pop((name, batch), None)
        if kept is not None:
            self._left += kept.nbytes
            return kept
        return self._find(name, batch)

    @property
    def block(self) -> nn.Module:
        return self._block

    def routed(self, experts: str, batch: int) -> tuple[Tensor, Tensor]:
        """The hidden states [S, d] and choices int64 [S, k] that the open experts of that name get in `batch`."""
        if (experts, batch) in self._routed:
            return self._routed[experts, batch]
        with self._replayed(batch):
            found = routing_of(self._block, experts, self._calls[batch], self._hidden.read(batch, self._device))
        size = sum(tensor.nbytes for tensor in found)
        if size <= self._left:
            self._routed[experts, batch] = found
            self._left -= size
        return found

    @torch.no_grad()
    def output(self, batch: int) -> Tensor:
        """The block's output for `batch`."""
        with self._replayed(batch):
            return self._calls[batch].run(self._block, self._hidden.read(batch, self._device))

    def _find(self, name: str, batch: int) -> Tensor | None:
        """The input of a module of a block that does not change, by a pass that also finds those that follow."""
        hidden, rest = self._hidden.read(batch, self._device), self._names[self._names.index(name) :]
        writes = self._outputs if name == self._names[0] else None
        found, output = inputs_of(self._block, rest, self._calls[batch], hidden, to_the_end=writes is not None)
        if writes is not None and output is not None:
            writes.write(output)
        for other in rest[1:]:
            if other in found:
                self._keep(other, batch, found[other])
        return found.get(name)

    def _keep(self, name: str, batch: int, x: Tensor) -> None:
        if x.nbytes <= self._left:
            self._kept[name, batch] = x
            self._left -= x.nbytes

    def _replays_well(self) -> bool:
        """Whether the first batch comes out the same, bit for bit, with replays in place."""
        expected = self.output(0)
        found, _ = inputs_of(self._block, list(self._tails), self._calls[0], self._hidden.read(0, self._device))
        self._kept = {(name, 0): x for name, x in found.items()}
        try:
            return torch.equal(self.output(0), expected)
        except (AttributeError, TypeError):  # something else of the module is used
            return False
        finally:
            self._kept = {}

    @contextmanager
    def _replayed(self, batch: int) -> Iterator[None]:
        """The block with replays of what is known of `batch`."""
        before: dict[str, nn.Module] = {}
        try:
            for last, (name, more) in self._tails.items():
                x = self._kept.get((last, batch))
                if x is not None:
                    before[name] = self._block.get_submodule(name)
                    replay = Replay(self._block.get_submodule(last), more)
                    replay.input = x
                    self._block.set_submodule(name, replay)
            yield
        finally:
            for name, module in before.items():
                self._block.set_submodule(name, module)
