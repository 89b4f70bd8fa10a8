"""`compress transform`: a checkpoint in another basis, which is the same function and an ordinary checkpoint again.

Only what folds into the weights is done, nothing at run time, so any tool loads the result and can quantize it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from compress.codecs.base import Codec, CodecSpec
from compress.formats.companions import copy_companions
from compress.formats.native import write_weights
from compress.modeling.folders import CONFIG
from compress.modeling.layout import DTYPES
from compress.modeling.loading import read_config
from compress.modeling.writer import MAX_SHARD_BYTES
from compress.quantization.ost import learn_checkpoint
from compress.quantization.rounders import CalibrationOptions
from compress.quantization.run import check_finite, check_outside
from compress.quantization.target import Target, entries, open_target, require_folded
from compress.quantization.transforms import Hadamard, Ost
from compress.storage import check_free, disk_errors, seal, stage_beside, staged_path, write_json
from compress.workspace import Workspace

Stored = Literal["stored", "float32"]
"""The dtype that weights are written in: that of the original, or float32."""
UNIT = "transform/checkpoint"


def transform_checkpoint(
    source: Path,
    out: Path,
    transform: Hadamard | Ost,
    workspace: Workspace,
    *,
    codec: Codec,
    specs: Mapping[str, CodecSpec],
    calibration: CalibrationOptions | None = None,
    seed: int = 0,
    dtype: Stored = "stored",
    max_shard_bytes: int = MAX_SHARD_BYTES,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Write the model in `source`, with `transform` folded into its weights, to `out`, and return a record of it.

    `specs` say how `codec` rounds the matrices while `Ost` learns; `calibration` has its data. Every tensor is computed
    in float64 and rounded once to `dtype`. Raises `ModelError` for a model of which nothing can be folded, `UsageError`
    for one that is learned without data or an `out` that is taken; `out` then does not exist.
    """
    finished = workspace.published(UNIT, out)
    if finished is not None:
        return finished
    chosen = transform.folded(rounded=bool(specs)) if isinstance(transform, Ost) else transform
    started = time.monotonic()

    def opened() -> Target:
        check_outside(source, out, workspace)
        check_free(out, workspace.overwrite)
        target = open_target(source, trust_remote_code, chosen, seed)
        require_folded(target.fold, target.weights, str(source))
        return target

    target = workspace.world.together(opened)
    check_finite(target, workspace)
    record: dict[str, Any] = {"transform": target.transform, "not_folded": list(target.fold.reasons)}
    if isinstance(chosen, Ost):
        learned = learn_checkpoint(target, chosen, codec, specs, calibration, workspace, seed, trust_remote_code)
        target = target.learned(learned.tensors)
        record |= learned.figures

    def write() -> int:
        staged = stage_beside(out)
        staged.mkdir()
        planned = entries(target, {}, dtype)
        write_weights(staged, planned, _tensors(target, dtype), max_shard_bytes)
        copy_companions(source, staged)
        changes = {**target.fold.config_changes, **({"dtype": "float32"} if dtype == "float32" else {})}
        write_json(staged / CONFIG, {**read_config(source), **changes})
        seal(staged)
        return sum(path.stat().st_size for path in staged.glob("*.safetensors"))

    with disk_errors(out):
        model_bytes = workspace.world.on_first(write)
    record |= {"model_bytes": model_bytes, "original_bytes": target.original_bytes}
    record["seconds"] = time.monotonic() - started
    workspace.publish(UNIT, staged_path(out), out, record)
    return record


def _tensors(target: Target, dtype: Stored) -> Iterator[tuple[str, Tensor]]:
    for name in (*target.weights, *target.fold.added):
        like = target.fold.added.get(name, name)
        wide = dtype == "float32" and DTYPES[target.weights.entry(like).dtype].is_floating_point
        yield name, target.read(name, torch.float32 if wide else None)
