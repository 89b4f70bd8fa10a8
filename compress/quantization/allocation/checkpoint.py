"""Spending the budget of a checkpoint, with the table in a work folder of its own.

The rates play no part in the table, so the folder serves any other rate of the same model, codec, transform and data:
what was measured is read, and only the search and the rounding are done again. What a run came to is noted there
beside what was predicted.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress.codecs.base import Codec, CodecSpec, QuantizedMatrix
from compress.data.calibration import Batch
from compress.errors import ArtifactError, WorkspaceError
from compress.modeling.io import read_tensors
from compress.modeling.loading import hollow, load_config
from compress.modeling.structure import MatrixView
from compress.quantization.allocation.allocate import Rates
from compress.quantization.allocation.choose import Data, Problem
from compress.quantization.allocation.course import Course, Subject
from compress.quantization.allocation.groups import make_groups, specs_of
from compress.quantization.allocation.options import Evolve, Sensitivity
from compress.quantization.allocation.source import BlocksOfCheckpoint, Resident
from compress.quantization.allocation.store import StoreInFolder
from compress.quantization.options import Ldlq
from compress.quantization.rounders import CalibrationOptions
from compress.quantization.target import Target
from compress.workspace import Workspace, read_records

MEASURED = "measured/"
"""Units of a table's folder: what became of a run with some rates."""


@dataclass(frozen=True)
class Spending:
    """How the budget of a checkpoint is spent: `rates` by `method`, with rows drawn as `calibration` says. `folder` has
    the table, which depends on `arguments`."""

    rates: Rates
    method: Sensitivity | Evolve
    codec: Codec
    calibration: CalibrationOptions
    folder: Path
    arguments: Mapping[str, Any]
    trust_remote_code: bool = False

    def specs(self, target: Target, workspace: Workspace) -> tuple[dict[str, CodecSpec], dict[str, Any]]:
        """The spec of every matrix of `target`, and figures for the report. Progress is told to the events of
        `workspace`."""
        started = time.monotonic()
        with self._opened(target, workspace) as (blocks, subject, table):
            groups = make_groups(target.views, self.codec, target.mixing)
            data = Data(
                cache(lambda: self._batches(target, blocks, self.calibration.rows, 0)),
                lambda: self._batches(target, blocks, self.method.rows, 1),
                lambda: self._batches(target, blocks, self.method.sample if isinstance(self.method, Evolve) else 1, 2),
            )
            choice = Problem(
                blocks, subject, groups, self.rates, self.method, data, StoreInFolder(table), self.calibration.seed,
                workspace.events,
            ).solve()  # fmt: skip
        specs = specs_of(groups, choice.widths, self.codec, target.mixing)
        return specs, {**choice.figures, "table": str(self.folder), "seconds": time.monotonic() - started}

    def measured(
        self,
        target: Target,
        specs: Mapping[str, CodecSpec],
        files: Sequence[Path],
        figures: Mapping[str, Any],
        workspace: Workspace,
    ) -> float:
        """What the model has lost whose payloads are in `files`, one for each block, on the rows of the table."""
        with self._opened(target, workspace) as (blocks, _, table):
            unit = f"{MEASURED}{self.rates.text} {self.method.name}"
            course = Course(blocks, target.views, self._batches(target, blocks, self.method.rows, 1))
            loss = course.loss_of(Payloads(files, specs).matrix)
            bits = sum(self.codec.bits(specs[view.name], view.shape) for view in target.views)
            record = {"predicted": figures["predicted"], "measured": loss, "method": self.method.text}
            rate = bits / sum(view.weights for view in target.views)
            table.commit(unit, [], {**record, "bits_per_weight": rate, **vars(self.rates)})
        return loss

    @contextmanager
    def _opened(self, target: Target, workspace: Workspace) -> Iterator[tuple[Resident, Subject, Workspace]]:
        """The model's blocks, what is measured of them, and the folder of the table."""
        inside = self.folder.parent == workspace.folder
        begins_anew = inside and workspace.overwrite and workspace.on_first(self._is_other)
        with Workspace.open(self.folder, self.arguments, begins_anew, workspace.events) as table:
            device = torch.device(self.calibration.device)
            model = hollow(load_config(target.source, self.trust_remote_code), self.trust_remote_code)
            rounding = self.calibration.options
            signs = {view.name: target.signs(view).to(device) for view in target.views}
            subject = Subject(target.views, self.codec, signs, rounding if isinstance(rounding, Ldlq) else None)
            yield Resident(BlocksOfCheckpoint(target, model, device), self.calibration.budget), subject, table

    def _is_other(self) -> bool:
        """Whether the folder has a table of other arguments."""
        try:
            read_records(self.folder, self.arguments)
        except WorkspaceError:
            return True
        return False

    def _batches(self, target: Target, blocks: Resident, rows: int, draw: int) -> list[Batch]:
        return self.calibration.batches(blocks.model, target.source, self.trust_remote_code, rows, draw)


class Payloads:
    """Matrices as they are in files of payloads, one for each block."""

    def __init__(self, files: Sequence[Path], specs: Mapping[str, CodecSpec]) -> None:
        self._files, self._specs = files, specs
        self._read: tuple[int, dict[str, Tensor]] = (-1, {})

    def matrix(self, index: int, view: MatrixView, original: Tensor) -> Tensor:
        """A matrix of block `index`."""
        if self._read[0] != index:
            self._read = index, read_tensors(self._files[index], ArtifactError)
        stored = self._read[1][view.parameter]
        payload = stored if view.index is None else stored[view.index]
        return (
            QuantizedMatrix.from_payload(self._specs[view.name], view.shape, payload).dequantize().to(original.device)
        )
