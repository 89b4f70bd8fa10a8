"""A model as a folder that plain transformers loads with bitsandbytes: weights, config, tokenizer, card.

A model quantized with `nf4`, `fp4` or `int8` is stored in the tensors of bitsandbytes (`bitsandbytes_format`), and no
weight is rounded again. Other weights keep their dtype. Every export is loaded again, by transformers, and compared
with the model (`bitsandbytes_check`): a folder that fails, or is interrupted, does not appear.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from compress.codecs.normal_float.config import BITSANDBYTES
from compress.errors import DependencyError, ExportError
from compress.events import Events
from compress.exporters.base import ExportReport
from compress.exporters.bitsandbytes_card import bitsandbytes_card
from compress.exporters.bitsandbytes_check import check_export
from compress.exporters.bitsandbytes_format import common_spec, quantization_config, tensors_of
from compress.formats.companions import copy_companions
from compress.modeling.folders import CONFIG
from compress.modeling.layout import entry_of
from compress.modeling.loading import kind_of, parameter_count
from compress.modeling.writer import ShardWriter
from compress.quantization.modules import PackedLinear, packed_linears, packed_modules
from compress.storage import disk_errors, write_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel

REPORT = "report.json"
CARD = "README.md"
GENERATION_CONFIG = "generation_config.json"
MEASURED = ("torch", "transformers", BITSANDBYTES)
STEPS = 2


def require_bitsandbytes() -> None:
    """Raise `DependencyError` unless bitsandbytes, which checks an export, is installed."""
    if importlib.util.find_spec(BITSANDBYTES) is None:
        raise DependencyError(BITSANDBYTES, "bnb")


def build_bitsandbytes(
    model: PreTrainedModel, staged: Path, *, tokenizer_from: Path | None = None, events: Events | None = None
) -> ExportReport:
    """Write the export into the new folder `staged` and check it there; the caller publishes it.

    `tokenizer_from` is a model folder whose tokenizer and other small files are copied. Raises `DependencyError`
    without bitsandbytes, `ExportError` for a model that bitsandbytes cannot hold or an export that does not agree with
    it, `WorkspaceError` on a full disk.
    """
    require_bitsandbytes()
    events = events or Events()
    packed = packed_linears(model)
    for name, module in packed_modules(model).items():
        if name not in packed:
            raise ExportError(
                f"'{name}' is a {type(module).__name__}; bitsandbytes holds linear maps alone.",
                remedy="Use the artifact itself, which loads after `import compress`.",
            )
    spec = common_spec({name: module.spec for name, module in packed.items()})
    with events.stage("export", STEPS):
        config = json.loads(model.config.to_json_string())
        config["quantization_config"] = quantization_config(spec, model.dtype, _skipped(model, packed))
        with disk_errors(staged):
            staged.mkdir(parents=True)
            if tokenizer_from is not None:
                copy_companions(tokenizer_from, staged)
            write_json(staged / CONFIG, {**config, "architectures": [type(model).__name__]})
            if model.can_generate():
                write_json(staged / GENERATION_CONFIG, json.loads(model.generation_config.to_json_string()))
            stored_bits = _write_weights(model, packed, staged)
        _step(events, 1, "written")
        errors = check_export(model, staged)
        report = _report(model, staged, spec.codec, packed, stored_bits, errors)
        _step(events, 2, "verified", relative_error=report.max_relative_error)
        with disk_errors(staged):
            write_json(staged / REPORT, report.to_dict())
            (staged / CARD).write_text(bitsandbytes_card(report, spec, type(model).__name__), encoding="utf-8")
    return report


def _step(events: Events, index: int, name: str, **metrics: int | float) -> None:
    events.emit("step", stage="export", index=index, total=STEPS, name=name, seconds_left=None, **metrics)


def _skipped(model: PreTrainedModel, packed: Mapping[str, PackedLinear]) -> list[str]:
    """The linear maps that stay as they are. Raises `ExportError` where such a name is also the end of one that is
    packed: transformers takes names as ends."""
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)]
    for name in names:
        for other in packed:
            if other.endswith(name) or other.startswith(f"{name}."):
                raise ExportError(
                    f"'{name}' is not quantized and '{other}' is; transformers cannot tell them apart by their names.",
                    remedy="Use the artifact itself, which loads after `import compress`.",
                )
    return names


def _write_weights(model: PreTrainedModel, packed: Mapping[str, PackedLinear], staged: Path) -> int:
    """Write all tensors; the bits of those that hold the packed matrices."""
    entries = [entry_of(name, tensor) for name, tensor in _tensors(model, packed)]
    with ShardWriter(staged, entries) as writer:
        for name, tensor in _tensors(model, packed):
            writer.add(name, tensor)
    others = model.state_dict().keys() - {f"{name}.weight" for name in packed}
    return sum(8 * entry.nbytes for entry in entries if entry.name not in others)


def _tensors(model: PreTrainedModel, packed: Mapping[str, PackedLinear]) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the export; of those that share memory the first, since the config says what is tied."""
    seen: set[tuple[int, torch.Size]] = set()
    for key, tensor in model.state_dict().items():
        module, _, name = key.rpartition(".")
        if module in packed and name == "weight":
            for part, stored in tensors_of(packed[module].quantized(), model.dtype).items():
                yield f"{module}.{part}", stored
            continue
        place = (tensor.data_ptr(), tensor.shape)
        if place not in seen or not tensor.numel():
            seen.add(place)
            yield key, tensor


def _report(
    model: PreTrainedModel,
    staged: Path,
    kind: str,
    packed: Mapping[str, PackedLinear],
    stored_bits: int,
    errors: dict[str, float],
) -> ExportReport:
    rows = {name: module.out_features * module.in_features for name, module in packed.items()}
    files = {path.relative_to(staged).as_posix(): path.stat().st_size for path in sorted(staged.rglob("*.*"))}
    model_bytes = sum(size for name, size in files.items() if name.startswith("model") and "/" not in name)
    parameters = parameter_count(model) + sum(rows.values())
    version = importlib.metadata.version(BITSANDBYTES)
    return ExportReport(
        format=BITSANDBYTES,
        kind="image" if kind_of(model) == "image" else "decoder" if model.can_generate() else "encoder",
        container_bits_per_weight=stored_bits / sum(rows.values()),
        model_bits_per_weight=8 * model_bytes / parameters,
        matrices={kind: len(packed)},
        parameters=parameters,
        model_bytes=model_bytes,
        files=files,
        versions={name: importlib.metadata.version(name) for name in MEASURED},
        provider=f"{BITSANDBYTES} {version} on the CPU",
        errors=errors,
    )
