"""The two ways in which the blocks of a checkpoint are rounded: each matrix by itself, or with calibration."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from compress.codecs.base import Codec, CodecSpec, QuantizedMatrix
from compress.data.calibration import Batch
from compress.data.pixels import load_image_processor
from compress.distributed import World
from compress.modeling.experts import open_experts
from compress.modeling.loading import (
    empty_parameters,
    fill_parameters,
    hollow,
    load_config,
    load_tokenizer,
    tensor_names,
)
from compress.modeling.structure import MatrixView, as_matrix, find_blocks
from compress.quantization.calibrated import BlockInputs, Calibration
from compress.quantization.data import CalibrationData, calibration_batches, sample_text
from compress.quantization.groups import Scheme
from compress.quantization.matrix import MatrixReport, quantize_matrix
from compress.quantization.options import Ldlq, Rounding
from compress.quantization.pieces import share_matrices
from compress.quantization.table_stage import decoded_tables
from compress.quantization.target import Target

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from compress.workspace import Workspace

Committed = dict[str, tuple[Sequence[Path], Mapping[str, Any]]]
"""Units of a work folder: files and record by the unit's name."""
INPUTS = "quantize/inputs"


class Rounder(Protocol):
    """Blocks are rounded in order: `round_block`, `carry_on`, and when that is on disk, `committed`."""

    text: str
    """How, for the report."""

    def first(self, done: Sequence[bool]) -> int:
        """The first block to round, given which are done: all before it must be."""
        ...

    def round_block(
        self, index: int, views: Sequence[MatrixView]
    ) -> Iterator[tuple[MatrixView, QuantizedMatrix, MatrixReport]]:
        """The matrices of block `index`, as they are stored, with their reports."""
        ...

    def carry_on(self, index: int) -> Committed:
        """What the next block needs, to be committed with block `index`."""
        ...

    def committed(self, index: int) -> None:
        """Block `index` is on disk; what led to it may go."""
        ...

    def close(self) -> None:
        """All blocks are done."""
        ...


def _first_undone(done: Sequence[bool]) -> int:
    return next((index for index, finished in enumerate(done) if not finished), len(done))


class NearestRounder:
    """Each matrix by itself to the nearest; processes share those of a block."""

    text = "nearest"

    def __init__(self, target: Target, codec: Codec, specs: Mapping[str, CodecSpec], world: World) -> None:
        self._target, self._codec, self._specs, self._world = target, codec, specs, world
        self._stack = ("", torch.empty(0))

    def first(self, done: Sequence[bool]) -> int:
        return _first_undone(done)

    def round_block(
        self, index: int, views: Sequence[MatrixView]
    ) -> Iterator[tuple[MatrixView, QuantizedMatrix, MatrixReport]]:
        def rounded(view: MatrixView) -> tuple[QuantizedMatrix, MatrixReport]:
            weight = as_matrix(self._read(view), view).to(torch.float32)
            signs = self._target.signs(view)
            return quantize_matrix(view.name, weight, self._codec, self._specs[view.name], signs)

        return share_matrices(views, self._specs, rounded, self._world, torch.device("cpu"))

    def _read(self, view: MatrixView) -> Tensor:
        """The parameter of `view`; that of stacked experts is read once and kept, in the form in which it is stored."""
        if view.index is None:
            return self._target.read(view.parameter, torch.float32)
        if self._stack[0] != view.parameter:
            self._stack = (view.parameter, self._target.read(view.parameter))
        return self._stack[1]

    def carry_on(self, index: int) -> Committed:
        return {}

    def committed(self, index: int) -> None:
        return

    def close(self) -> None:
        return


@dataclass(frozen=True)
class CalibrationOptions:
    """data and how many `rows` of `context` tokens to draw from it with `seed`, for the rounding `options` and for a
    transform that is learned; `budget`: bytes of hidden states that
    stay in memory; `device`: where blocks run and are rounded."""

    data: CalibrationData
    options: Rounding
    rows: int = 128
    context: int | None = None
    seed: int = 0
    budget: int = 2 << 30
    device: str = "cpu"

    def batches(
        self, model: PreTrainedModel, source: Path, trust_remote_code: bool, rows: int | None = None, draw: int = 0
    ) -> list[Batch]:
        """Batches for `model`, whose tokenizer or image processor is in the folder `source`: of `rows` (None: its own
        number), which each `draw` draws anew."""
        return calibration_batches(
            model,
            self.data,
            lambda: load_tokenizer(source, trust_remote_code),
            rows=self.rows if rows is None else rows,
            context=self.context,
            seed=self.seed + draw,
            processor=lambda: load_image_processor(source, trust_remote_code),
        )


class CalibratedRounder:
    """Block after block with `Calibration`, weights read one block at a time, hidden states in the work folder."""

    def __init__(
        self,
        target: Target,
        codec: Codec,
        specs: Mapping[str, CodecSpec],
        options: CalibrationOptions,
        workspace: Workspace,
        trust_remote_code: bool,
    ) -> None:
        self._target, self._workspace = target, workspace
        self._device = torch.device(options.device)
        self._model: PreTrainedModel = hollow(load_config(target.source, trust_remote_code), trust_remote_code)
        assert isinstance(options.options, Ldlq)
        drawn = sample_text(self._model, options.data, options.rows, options.context, options.seed)
        self.text = f"{options.options.text}, {drawn}"
        self._blocks = [name for name, _ in find_blocks(self._model)]
        batches = options.batches(self._model, target.source, trust_remote_code)
        signs = {view.name: target.signs(view).to(self._device) for view in target.views}
        scheme = Scheme(codec, specs, signs, options.options)
        self._calibration = Calibration(self._model, batches, scheme, self._device, options.budget, self._file)
        self._inputs: BlockInputs | None = None
        self._block: nn.Module | None = None
        self._before: BlockInputs | None = None

    def first(self, done: Sequence[bool]) -> int:
        """The block whose inputs are on disk, if all before it are done; without these, the first of all."""
        finished = _first_undone(done)
        if finished == len(done):
            return finished
        self._record()
        assert self._inputs is not None
        stored = self._workspace.done(INPUTS) if finished else None
        index = 0
        if stored is not None and stored["block"] <= finished:
            index = int(stored["block"])
            self._inputs = self._calibration.reopen(index, stored["shapes"])
        elif finished:
            self._workspace.events.emit("note", text="The hidden states of the last run are gone: begun anew.")
        self._remove_files(keep=self._calibration.files(index))
        return index

    def round_block(
        self, index: int, views: Sequence[MatrixView]
    ) -> Iterator[tuple[MatrixView, QuantizedMatrix, MatrixReport]]:
        assert self._inputs is not None
        self._block = self._workspace.world.together(lambda: self._load(index))
        yield from self._calibration.round_block(index, self._block, views, self._inputs)

    def carry_on(self, index: int) -> Committed:
        assert self._inputs is not None
        assert self._block is not None
        self._before = self._inputs
        self._inputs = self._calibration.carry_on(index, self._block, self._before)
        empty_parameters(self._model, self._names(index))
        self._block = None
        if self._inputs is None:
            return {}
        shapes = self._calibration.all_shapes(self._inputs)
        return {INPUTS: (self._inputs.files, {"block": index + 1, "shapes": shapes})}

    def committed(self, index: int) -> None:
        if self._before is not None:
            self._before.discard()

    def close(self) -> None:
        self._workspace.drop(INPUTS)
        self._remove_files()

    def _remove_files(self, keep: Sequence[Path] = ()) -> None:
        """Remove hidden states but those to `keep`: a run that was killed may leave some that no unit names."""

        def remove() -> None:
            for path in set(self._workspace.path("inputs", "any").parent.iterdir()).difference(keep):
                path.unlink()

        self._workspace.world.on_first(remove)

    def _record(self) -> None:
        """What the blocks are called with, and the inputs of the first one."""
        inside = {name for index in range(len(self._blocks)) for name in self._names(index)}
        body = self._model.base_model_prefix if self._model.base_model is not self._model else ""
        before = [name for name in tensor_names(self._model, body) if name not in inside]
        first = self._workspace.world.together(lambda: self._load_first(before))

        def swap() -> None:
            for table, weight in decoded_tables(self._target, self._workspace):
                names = [name for name in table.parameters if name in before]
                fill_parameters(self._model, names, lambda _, weight=weight: weight.to(self._device))  # type: ignore[misc]

        self._inputs = self._calibration.record_inputs(first, swap if self._target.tables else None)
        empty_parameters(self._model, [*before, *self._names(0)])

    def _load_first(self, before: Sequence[str]) -> nn.Module:
        fill_parameters(self._model, before, self._read)
        return self._load(0)

    def _load(self, index: int) -> nn.Module:
        """Block `index` with its weights in float32, each expert a map of its own."""
        fill_parameters(self._model, self._names(index), self._read)
        return open_experts(self._model.get_submodule(self._blocks[index]))

    def _names(self, index: int) -> list[str]:
        return tensor_names(self._model, self._blocks[index])

    def _read(self, name: str) -> Tensor:
        return self._target.read(name, torch.float32).to(self._device)

    def _file(self, index: int, stream: str, chunk: int) -> Path:
        return self._workspace.path("inputs", f"{index:05d}.{stream}.{chunk:02d}")
