"""The embedding and the head of a checkpoint, rounded before the blocks: a unit of the work folder like each of these.

Before, because calibration runs the blocks on what the rounded embedding puts out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from torch import Tensor

from compress.codecs.base import QuantizedMatrix
from compress.errors import WorkspaceError
from compress.modeling.io import stream_tensors
from compress.modeling.tables import Table
from compress.modeling.writer import write_tensors
from compress.quantization.tables import round_table
from compress.quantization.target import Target
from compress.storage import disk_errors
from compress.workspace import Workspace

UNIT: Final = "quantize/tables"


def round_tables(target: Target, workspace: Workspace) -> Mapping[str, Any]:
    """Round the tables of `target` and commit them, or take them as they are committed; the record, which has a report
    of each under `matrices`. Raises what `round_table` raises, and `ModelError` for a table that is stored twice with
    different values."""
    if not target.tables:
        return {"matrices": []}
    record = workspace.done(UNIT)
    if record is not None:
        return record
    path = _file(workspace)

    def rounded() -> list[dict[str, Any]]:
        rows, payloads = [], {}
        for table, spec in target.tables:
            matrix, report = round_table(table, target.read_table(table), spec)
            payloads[table.view.parameter] = matrix.payload()
            rows.append(report.to_dict())
            for text in report.doubts():
                workspace.events.emit("warning", text=text)
        write_tensors(path, payloads)
        return rows

    with disk_errors(path):
        record = {"matrices": workspace.world.on_first(rounded)}
    workspace.commit(UNIT, [path], record)
    return record


def table_files(target: Target, workspace: Workspace) -> list[Path]:
    """Where the payloads are."""
    return [_file(workspace)] if target.tables else []


def decoded_tables(target: Target, workspace: Workspace) -> Iterator[tuple[Table, Tensor]]:
    """Each table that was rounded as it will be read, float32 [V, d]."""
    payloads = {name: tensor for path in table_files(target, workspace) for name, tensor in _read(path)}
    for table, spec in target.tables:
        payload = payloads[table.view.parameter]
        yield table, QuantizedMatrix.from_payload(spec, table.view.shape, payload).dequantize()


def _read(path: Path) -> Iterator[tuple[str, Tensor]]:
    return stream_tensors(path, WorkspaceError)


def _file(workspace: Workspace) -> Path:
    return workspace.path("blocks", "tables.safetensors")
