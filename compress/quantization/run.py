"""Quantizing a checkpoint block by block, from folder to folder.

    for each block: read -> round each matrix -> measure it -> keep its payload; write the block's file; commit
    then: copy everything else and the payloads into the artifact, tensor by tensor; publish

In memory are, without calibration, one matrix with its codes and what they decode to, and one block's payloads; with
calibration what `compress.quantization.calibrated` says; of the tensors that are copied, one. A block that was
committed is not done again: killed at any moment, the next run with the same work folder continues and ends with the
same bytes. Several processes (`compress.distributed`) share the matrices of a block, and the calibration data; all have
all results, and the first one writes.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from compress.codecs.base import Codec, CodecSpec
from compress.errors import ArtifactError, ModelError, UsageError
from compress.events import Events, seconds_left
from compress.formats.config import QuantizationConfig
from compress.formats.native import write_artifact, write_weights
from compress.modeling.io import stream_tensors
from compress.modeling.structure import MatrixView
from compress.modeling.writer import MAX_SHARD_BYTES, write_tensors
from compress.ops import backend
from compress.quantization.allocation.checkpoint import Spending
from compress.quantization.blocks import by_block, mean_error, stacked
from compress.quantization.calibrated import UNSEEN
from compress.quantization.matrix import MatrixReport, require_finite
from compress.quantization.options import Ldlq
from compress.quantization.ost import learn_checkpoint
from compress.quantization.rounders import CalibratedRounder, CalibrationOptions, NearestRounder, Rounder
from compress.quantization.table_stage import round_tables, table_files
from compress.quantization.tables import NO_TABLES, TableBits
from compress.quantization.target import NOTHING, Target, entries, open_target, predict
from compress.quantization.transforms import Ost, Transform
from compress.storage import check_free, disk_errors, stage_beside, staged_path
from compress.workspace import Workspace

STAGE = "quantize"


def quantize_checkpoint(
    source: Path,
    out: Path,
    specs: Mapping[str, CodecSpec],
    codec: Codec,
    workspace: Workspace,
    events: Events,
    *,
    calibration: CalibrationOptions | None = None,
    transform: Transform = NOTHING,
    seed: int = 0,
    towers: bool = False,
    tables: TableBits = NO_TABLES,
    spending: Spending | None = None,
    bits_target: float | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Quantize the model in `source` into the artifact `out` and return its report, which is also `out/report.json`.

    `specs` gives each matrix of the target set what it is stored as; with `spending` that is chosen by what the model
    loses, and `specs` are those that a transform is learned for. Without `calibration` each is rounded to the
    nearest, and no transform can be learned. `towers` are quantized too if asked for, `tables` to the bits that they
    are given. Units of `workspace` named `quantize/...` are used.
    Raises `ModelError`, `NumericsError` or `CodecError` for what cannot be quantized, `UsageError` when `out` is
    taken or, like the work folder, inside `source`, `WorkspaceError` on a full disk; `out` then does not exist.
    """
    finished = workspace.published(f"{STAGE}/artifact", out)
    if finished is not None:
        report: dict[str, Any] = finished["report"]
        return report
    world = workspace.world

    def opened() -> Target:
        check_outside(source, out, workspace)
        check_free(out, workspace.overwrite)
        target = open_target(source, trust_remote_code, transform, seed, towers, tables)
        _check_specs(target, specs)
        return target

    target = world.together(opened)
    check_finite(target, workspace)
    blocks = by_block(target.views)
    how: dict[str, Any] = {"transform": target.transform}
    if isinstance(transform, Ost):
        learned = learn_checkpoint(target, transform, codec, specs, calibration, workspace, seed, trust_remote_code)
        target = target.learned(learned.tensors)
        how["learning"] = learned.figures
    for name, like in target.fold.added.items():
        workspace.events.emit("note", text=f"'{like}' no longer stands for '{name}', which is a tensor of its own.")
    if spending is not None:
        specs, how["allocation"] = spending.specs(target, workspace)
    of_tables = round_tables(target, workspace)
    rounder: Rounder = NearestRounder(target, codec, specs, world)
    if calibration is not None and isinstance(calibration.options, Ldlq):
        options = calibration
        rounder = world.together(lambda: CalibratedRounder(target, codec, specs, options, workspace, trust_remote_code))
    with events.stage(STAGE, len(blocks)):
        records = _quantize_blocks(blocks, rounder, workspace, events)
    files = [_unit_file(workspace, index) for index in range(len(blocks))]
    if spending is not None:
        how["allocation"]["measured"] = spending.measured(target, specs, files, how["allocation"], workspace)
    report = {
        **_report(target, specs, [*records, of_tables], bits_target, max_shard_bytes),
        "rounding": rounder.text,
        **how,
        **({"processes": world.size} if world.size > 1 else {}),
    }
    started = time.monotonic()

    def assemble() -> dict[str, Any]:
        staged = stage_beside(out)
        staged.mkdir()
        tensors = _assemble(target, [*table_files(target, workspace), *files])
        write_weights(staged, entries(target, specs), tensors, max_shard_bytes)
        stored = {view.place: specs[view.name] for view in target.views}
        config = QuantizationConfig.from_specs(stored, target.ignore, report["bits_per_weight"], target.tables)
        report["seconds"] = sum(record["seconds"] for record in records) + time.monotonic() - started
        report["peak_rss_bytes"] = max(peak_rss_bytes(), *(record["peak_rss_bytes"] for record in records))
        write_artifact(staged, source, config, report, target.fold.config_changes)
        return report

    with disk_errors(out):
        report = world.on_first(assemble)
    workspace.publish(f"{STAGE}/artifact", staged_path(out), out, {"report": report})
    return report


def peak_rss_bytes() -> int:
    """The largest resident memory of this process so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _quantize_blocks(
    blocks: Sequence[list[MatrixView]], rounder: Rounder, workspace: Workspace, events: Events
) -> list[dict[str, Any]]:
    """The record of every block, done now or in an earlier run."""
    records: list[dict[str, Any]] = []
    first = rounder.first([workspace.done(_unit(index)) is not None for index in range(len(blocks))])
    started = time.monotonic()
    for index, views in enumerate(blocks):
        record = workspace.done(_unit(index)) if index < first else None
        if record is None:
            record = _quantize_one(index, views, rounder, workspace)
        records.append(record)
        events.emit(
            "step",
            stage=STAGE,
            index=index + 1,
            total=len(blocks),
            name=f"block {index}",
            seconds_left=seconds_left(started, index + 1 - first, len(blocks) - first),
            relative_error=mean_error([MatrixReport.from_dict(row) for row in record["matrices"]]),
        )
    rounder.close()
    return records


def _quantize_one(index: int, views: Sequence[MatrixView], rounder: Rounder, workspace: Workspace) -> dict[str, Any]:
    """Quantize one block and commit it; its record."""
    started = time.monotonic()
    path = _unit_file(workspace, index)
    rounded, reports = [], []
    for view, matrix, report in rounder.round_block(index, views):
        rounded.append((view, matrix.payload()))
        reports.append(report.to_dict())
        for text in report.doubts():
            workspace.events.emit("warning", text=text)
    unseen = [row["name"] for row in reports if row["status"] == UNSEEN]
    if unseen:
        text = f"{len(unseen)} matrices of experts got no token and were calibrated with all of their layer's, such as"
        workspace.events.emit("warning", text=f"{text} '{unseen[0]}'. report.json lists them.")
    with disk_errors(path):
        workspace.world.on_first(lambda: write_tensors(path, stacked(rounded)))
    carried = rounder.carry_on(index)
    peak = max(workspace.world.gather(peak_rss_bytes()))
    record = {"matrices": reports, "seconds": time.monotonic() - started, "peak_rss_bytes": peak}
    workspace.commit_all({_unit(index): ([path], record), **carried})
    rounder.committed(index)
    return record


def _assemble(target: Target, unit_files: Sequence[Path]) -> Iterator[tuple[str, Tensor]]:
    """All tensors of the artifact, one at a time: first those that are not packed, then each block's payloads."""
    packed = {view.parameter for view in target.views}
    packed |= {name for table, _ in target.tables for name in table.parameters}
    for name in (*target.weights, *target.fold.added):
        if name not in packed:
            yield name, target.read(name)
    for path in unit_files:
        yield from stream_tensors(path, ArtifactError)


def _report(
    target: Target,
    specs: Mapping[str, CodecSpec],
    records: Sequence[Mapping[str, Any]],
    bits_target: float | None,
    max_shard_bytes: int,
) -> dict[str, Any]:
    size = predict(target, specs, max_shard_bytes)
    return {
        "bits_target": bits_target,
        "bits_per_weight": size.bits_per_weight,
        "model_bits_per_weight": size.model_bits_per_weight,
        "model_bytes": size.model_bytes,
        "original_bytes": target.original_bytes,
        "parameters": target.parameters,
        "backend": backend(),
        "unseen_experts": [row["name"] for record in records for row in record["matrices"] if row["status"] == UNSEEN],
        "matrices": [row for record in records for row in record["matrices"]],
        **({"tables": [table.view.name for table, _ in target.tables]} if target.tables else {}),
    }


def check_finite(target: Target, workspace: Workspace) -> None:
    """Read every parameter once before the work begins: a NaN should not be found after hours of it."""
    unit = f"{STAGE}/checked"
    if workspace.done(unit) is None:
        names = [name for name in target.weights if name in target.known]

        def check() -> None:
            for index in workspace.world.mine(len(names)):
                require_finite(target.weights.sources(names[index])[0], target.weights.read(names[index]))

        workspace.world.together(check)
        workspace.commit(unit, [], {})


def check_outside(source: Path, out: Path, workspace: Workspace) -> None:
    """Refuse to write into the model that is being read: a result would lie in what it was made from."""
    model = source.resolve()
    for option, folder in (("--out", out), ("--work", workspace.folder)):
        if folder.resolve().is_relative_to(model):
            raise UsageError(f"'{folder}' is inside the model's folder '{source}'.", remedy=f"Name another {option}.")


def _check_specs(target: Target, specs: Mapping[str, CodecSpec]) -> None:
    names = {view.name for view in target.views}
    if names != specs.keys():
        wrong = sorted(names ^ specs.keys())
        raise ModelError(
            f"The plan and the model in '{target.source}' differ in {len(wrong)} matrices, such as '{wrong[0]}'.",
            remedy="Plan again for this model.",
        )


def _unit(index: int) -> str:
    return f"{STAGE}/{index:05d}"


def _unit_file(workspace: Workspace, index: int) -> Path:
    return workspace.path("blocks", f"{index:05d}.safetensors")
