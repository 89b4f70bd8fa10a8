"""The blocks of a model, one at a time in float32, and whatever lies outside of them."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn

from compress.modeling.experts import open_experts
from compress.modeling.loading import empty_parameters, fill_parameters, tensor_names
from compress.modeling.structure import find_blocks
from compress.quantization.target import Target

if TYPE_CHECKING:
    from transformers import PreTrainedModel


RECENT = 2
"""Blocks that are in memory beyond the budget: one that is measured, and one that is run behind it."""


class Blocks(Protocol):
    """`model` has its weights outside of the blocks; `count` blocks."""

    model: PreTrainedModel
    count: int

    def load(self, index: int) -> nn.Module:
        """A copy of block `index` of its own: weights in float32 that need no gradient, each expert a map of its
        own."""
        ...


class BlocksInMemory:
    """Those of a model that is all there, which is left as it is."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._blocks = [block for _, block in find_blocks(model)]
        self.count = len(self._blocks)
        inside = {id(tensor) for block in self._blocks for tensor in (*block.parameters(), *block.buffers())}
        self.model: PreTrainedModel = copy.deepcopy(model, {id(block): block for block in self._blocks})
        for tensor in (*self.model.parameters(), *self.model.buffers()):
            if id(tensor) not in inside and tensor.is_floating_point():
                tensor.data = tensor.data.float()

    def load(self, index: int) -> nn.Module:
        return open_experts(copy.deepcopy(self._blocks[index]).float().requires_grad_(False))


class BlocksOfCheckpoint:
    """Those of `target`, after its transform, read when they are asked for; `model` is hollow but for what lies outside
    of the blocks, which is read at once."""

    def __init__(self, target: Target, model: PreTrainedModel, device: torch.device) -> None:
        self._target, self.model, self._device = target, model, device
        self._names = [name for name, _ in find_blocks(model)]
        self.count = len(self._names)
        inside = {name for prefix in self._names for name in tensor_names(model, prefix)}
        stored = [*target.weights, *target.fold.added]
        fill_parameters(model, [name for name in stored if name in target.known and name not in inside], self._read)
        if not target.fold.added:
            model.tie_weights()

    def load(self, index: int) -> nn.Module:
        names = tensor_names(self.model, self._names[index])
        fill_parameters(self.model, names, self._read)
        block = copy.deepcopy(self.model.get_submodule(self._names[index]))
        empty_parameters(self.model, names)
        return open_experts(block)

    def _read(self, name: str) -> Tensor:
        return self._target.read(name, torch.float32).to(self._device)


class Resident:
    """`blocks`, of which as many as fit into `budget` bytes stay in memory, and of the others the two last ones. What
    it hands out is not to be changed but within `changed`."""

    def __init__(self, blocks: Blocks, budget: int) -> None:
        self._blocks, self._left = blocks, budget
        self.model, self.count = blocks.model, blocks.count
        self._kept: dict[int, nn.Module] = {}
        self._recent: dict[int, nn.Module] = {}

    def block(self, index: int) -> nn.Module:
        """Block `index`: see `Blocks.load`."""
        if index in self._kept:
            return self._kept[index]
        block = self._recent.pop(index, None)
        if block is None:
            if len(self._recent) == RECENT:
                del self._recent[next(iter(self._recent))]
            block = self._blocks.load(index)
        size = sum(parameter.nbytes for parameter in block.parameters())
        if size <= self._left:
            self._kept[index] = block
            self._left -= size
        else:
            self._recent[index] = block
        return block


@contextmanager
def changed(matrices: Sequence[tuple[Tensor, Tensor]]) -> Iterator[None]:
    """Within this, each matrix, a view of a parameter, holds other values: [(matrix, values), ...]."""
    before = [(matrix, matrix.clone()) for matrix, _ in matrices]
    try:
        for matrix, values in matrices:
            matrix.copy_(values)
        yield
    finally:
        for matrix, values in before:
            matrix.copy_(values)
