"""Rows of data on their way through a model's blocks, some of whose matrices are others.

Measured rows are dealt out to the processes, a batch at a time. What each row loses goes to all of them and is added up
in the order of the rows, so that the number of processes changes no bit of a loss.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from compress.codecs.base import Codec, QuantizedMatrix
from compress.data.calibration import Batch
from compress.distributed import world
from compress.modeling.stack import Call, record, returns_tuples
from compress.modeling.structure import MatrixView, find_blocks, module_matrix
from compress.quantization.allocation.divergence import Divergence, mean
from compress.quantization.allocation.source import Resident, changed
from compress.quantization.allocation.table import levels_of
from compress.quantization.blocks import by_block
from compress.quantization.options import Ldlq
from compress.transforms.signs import Signs

Values = Callable[[int, MatrixView, Tensor], Tensor]
"""What a matrix is, given the index of its block, its view, and what it is in the original."""


@dataclass(frozen=True)
class Subject:
    """The matrices `views` of a model, which `codec` rounds after mixing them by `signs`, to the nearest without
    `rounding`."""

    views: Sequence[MatrixView]
    codec: Codec
    signs: Mapping[str, Signs]
    rounding: Ldlq | None

    @property
    def levels(self) -> tuple[int, ...]:
        """The widths that are measured."""
        return levels_of(self.codec.widths(), self.codec.dim)

    def matrix(self, view: MatrixView, level: int, payload: Tensor) -> QuantizedMatrix:
        """What a payload without signs is."""
        spec = self.codec.spec(level)
        return QuantizedMatrix.from_payload(spec, view.shape, payload).mixed(self.signs[view.name])


class Rows:
    """Some batches of rows: what each block is called with for each of them, and the hidden states before the first."""

    def __init__(self, blocks: Resident, batches: Mapping[int, Batch]) -> None:
        first, device = blocks.block(0), blocks.model.device
        self.batches = {
            number: {name: tensor.to(device) for name, tensor in batch.items()} for number, batch in batches.items()
        }
        self.calls: dict[int, tuple[Call, ...]] = {}
        self.start: dict[int, Tensor] = {}
        recordings = record(blocks.model, list(self.batches.values()), first)
        for number, recording in zip(self.batches, recordings, strict=True):
            self.calls[number], self.start[number] = recording.calls, recording.hidden
        self.tuples = returns_tuples(blocks.model, next(iter(self.batches.values())), first)

    @torch.no_grad()
    def run(self, index: int, block: nn.Module, hidden: Mapping[int, Tensor]) -> dict[int, Tensor]:
        """The hidden states after block `index`, which is `block`, for those before it, by the number of the batch."""
        return {number: self.calls[number][index].run(block, before) for number, before in hidden.items()}

    def mask(self, number: int) -> Tensor | None:
        """Which tokens of a batch count; None: all."""
        mask = self.batches[number].get("attention_mask")
        return None if mask is None else mask.bool()


class Course:
    """What the model of `blocks` loses on the rows `batches` when some of its matrices `views` are others."""

    def __init__(self, blocks: Resident, views: Sequence[MatrixView], batches: Sequence[Batch]) -> None:
        mine = list(world().mine(len(batches))) or [0]
        self.blocks, self.count = blocks, len(batches)
        self.rows = Rows(blocks, {number: batches[number] for number in mine})
        self.views = by_block(views)
        self._prefixes = [name for name, _ in find_blocks(blocks.model)]
        end = self.rows.start
        for index in range(blocks.count):
            end = self.rows.run(index, blocks.block(index), end)
        self._divergence = Divergence(blocks.model, self.rows.batches, end, self.rows.tuples)

    @property
    def figure(self) -> str:
        """What a loss is."""
        return self._divergence.figure

    def place(self, index: int, view: MatrixView) -> Tensor:
        """The matrix of `view` in the original block `index`, sharing its memory."""
        return module_matrix(self.blocks.block(index).get_submodule(self.inside(index, view)))

    def inside(self, index: int, view: MatrixView) -> str:
        """The name of a matrix within its block."""
        return view.name.removeprefix(f"{self._prefixes[index]}.")

    def after(
        self, index: int, views: Iterable[MatrixView], values: Values, before: Mapping[int, Tensor]
    ) -> dict[int, Tensor]:
        """The hidden states after block `index` with other values of `views`, for those before it."""
        block = self.blocks.block(index)
        places = [(view, module_matrix(block.get_submodule(self.inside(index, view)))) for view in views]
        with changed([(place, values(index, view, place)) for view, place in places]):
            return self.rows.run(index, block, before)

    def loss(self, index: int, hidden: Mapping[int, Tensor]) -> float:
        """Of hidden states before block `index`, if that and all others are the original's."""
        for later in range(index, self.blocks.count):
            hidden = self.rows.run(later, self.blocks.block(later), hidden)
        found = {number: self._divergence.rows(number, one).tolist() for number, one in hidden.items()}
        all_rows: dict[int, list[list[float]]] = {}
        for part in world().gather([[number, rows] for number, rows in found.items()]):
            all_rows |= dict(part)
        return mean(torch.tensor([row for number in sorted(all_rows) for row in all_rows[number]], dtype=torch.float64))

    def loss_of(self, values: Values, batches: Iterable[int] | None = None) -> float:
        """Of the model with other values of all its matrices, on some of the batches, or on all."""
        chosen = set(range(self.count) if batches is None else batches)
        hidden = {number: start for number, start in self.rows.start.items() if number in chosen}
        for index, views in enumerate(self.views):
            hidden = self.after(index, views, values, hidden)
        return self.loss(self.blocks.count, hidden)
