"""A model as an ONNX folder that stock ONNX Runtime runs: graph, weights, config, tokenizer, card.

The graph is traced by `torch.onnx.export(dynamo=True)` from the modules in `onnx_modules`; packed matrices become the
operator `MatMulNBits` without rounding (`containers`), packed embeddings `GatherBlockQuantized`, which reads the same
tensors, packed convolutions integers in front of a `Conv` (`blocked`), for which the opset is 21. Else opset 20 with
attention written out runs on the widest range of ONNX Runtimes; opset 23, with attention and norms as single operators,
decoded 3 to 5 % faster in a small Llama.
A weight that embedding and head share is stored once. Every export is then run in ONNX Runtime and compared with
torch (under the containers' weights, where they are not the model's: see `rounding_error` of the report); a folder that
fails, or is interrupted, does not appear.
"""

from __future__ import annotations

import importlib.metadata
import json
from collections import Counter
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from compress.errors import ExportError
from compress.evaluation.generate import MODEL_FILE
from compress.evaluation.ort import CPU, require_packages
from compress.events import Events
from compress.exporters.base import WHOLE, ExportReport
from compress.exporters.blocked import OPSET as BLOCKED_OPSET
from compress.exporters.blocked import Blocked, blocked_of
from compress.exporters.card import onnx_card
from compress.exporters.containers import Container, container_of
from compress.exporters.images import has_processor
from compress.exporters.interface import Interface, interface_of
from compress.exporters.onnx_modules import PackedKernel, PackedLookup, PackedProduct, with_weights
from compress.exporters.staging import write_whole
from compress.exporters.supported import part_of, require_exportable
from compress.exporters.trace import trace, unused_parameters
from compress.exporters.verification import verify
from compress.formats.companions import copy_companions
from compress.modeling.folders import CONFIG
from compress.modeling.loading import parameter_count
from compress.modeling.structure import MatrixView, find_stacks, matrices
from compress.quantization.embedding import PackedEmbedding
from compress.quantization.modules import PackedConvolution, PackedLinear, PackedMatrix, packed_modules
from compress.storage import disk_errors, write_json

if TYPE_CHECKING:
    from torch.onnx import ONNXProgram
    from transformers import PreTrainedModel

OPSET = 20
REPORT = "report.json"
CARD = "README.md"
GENERATION_CONFIG = "generation_config.json"
MEASURED = ("torch", "transformers", "onnx", "onnxscript", "onnxruntime")


@dataclass(frozen=True)
class OnnxOptions:
    """external_data_bytes: with more bytes of weights than this they go to a file of their own, `model.onnx.data`.
    An ONNX file cannot be larger than 2 GiB. image_size: height and width of an image model's images; None takes the
    size to which the model's image processor brings them, or that of its config."""

    external_data_bytes: int = 2**30
    image_size: tuple[int, int] | None = None


def export_onnx(
    model: PreTrainedModel,
    folder: Path,
    *,
    tokenizer_from: Path | None = None,
    options: OnnxOptions | None = None,
    overwrite: bool = False,
    events: Events | None = None,
) -> ExportReport:
    """Write `model` (float32, on the CPU) to `folder`, which appears whole or not at all; see `build_onnx`.

    Raises `UsageError` when the folder is taken, and what `build_onnx` raises.
    """
    return write_whole(
        folder,
        overwrite,
        lambda staged: build_onnx(model, staged, tokenizer_from=tokenizer_from, options=options, events=events),
    )


def build_onnx(
    model: PreTrainedModel,
    staged: Path,
    *,
    tokenizer_from: Path | None = None,
    options: OnnxOptions | None = None,
    events: Events | None = None,
) -> ExportReport:
    """Write the export into the new folder `staged` and verify it there; the caller publishes it.

    `tokenizer_from` is a model folder whose tokenizer and other small files are copied. Raises `DependencyError` when
    onnx, onnxscript or onnxruntime is missing, `ExportError` when the model cannot be exported exactly or the export
    does not agree with it, `WorkspaceError` on a full disk.
    """
    require_packages("onnx", "onnxscript", "onnxruntime")
    events, options = events or Events(), options or OnnxOptions()
    require_exportable(model)
    _require_float32_on_cpu(model)
    with events.stage("export", 3):
        views, towers = _target_set(model)
        interface = interface_of(model, tokenizer_from, options.image_size)
        containers = _containers(model, towers)
        _report_rounding(containers, events)
        part = part_of(model)
        if part is not None:
            events.emit("note", text=f"export: of {type(model).__name__} {part}")
        events.emit("note", text=f"export: tracing {type(model).__name__}")
        convolved = any(isinstance(one, Blocked) for one in containers.values())
        program = trace(model, interface, _products(model, containers), BLOCKED_OPSET if convolved else OPSET)
        left_out = unused_parameters(program)
        _step(events, 1, "traced", nodes=len(program.model.graph))
        with disk_errors(staged):
            staged.mkdir(parents=True)
            _save(program, staged, options)
            opset, ir_version = program.model.opset_imports[""], program.model.ir_version
            del program
            _copy_files(model, staged, tokenizer_from)
        _step(events, 2, "written")
        with with_weights(model, {name: one for name, one in containers.items() if one.error}):
            errors = verify(model, staged, interface)
        kept = {id(one): one.rows * one.columns for one in containers.values()}
        parameters = parameter_count(model) - left_out + sum(kept.values())
        report = ExportReport(
            **_figures(staged, views, containers, parameters),
            format="onnx",
            kind=interface.kind,
            part=part or WHOLE,
            opset=opset,
            ir_version=ir_version,
            versions={name: importlib.metadata.version(name) for name in MEASURED},
            provider=CPU,
            errors=errors,
        )
        _step(events, 3, "verified", relative_error=report.max_relative_error)
        with disk_errors(staged):
            write_json(staged / REPORT, report.to_dict())
            (staged / CARD).write_text(onnx_card(report, interface, _has_reader(staged, interface)), encoding="utf-8")
    return report


def _target_set(model: PreTrainedModel) -> tuple[list[MatrixView], tuple[str, ...]]:
    """The matrices of the blocks, as they are before any of them is packed, and the stacks that are towers. Raises
    `ModelError` without such blocks."""
    with torch.device("meta"):
        bare = type(model)(deepcopy(model.config))
    return matrices(bare), tuple(f"{stack.name}." for stack in find_stacks(bare) if stack.tower)


def _containers(model: PreTrainedModel, towers: tuple[str, ...]) -> dict[str, Container | Blocked]:
    """What the file holds of each packed module, by its name; those of towers are in no file."""
    packed = {name: one for name, one in packed_modules(model).items() if not name.startswith(towers)}
    made: dict[str, Container | Blocked] = {}
    shared: dict[PackedMatrix, Container] = {}
    for name, one in packed.items():
        if isinstance(one, PackedConvolution):
            made[name] = blocked_of(one.quantized())
        elif isinstance(one, PackedMatrix):
            if one.holder not in shared:
                shared[one.holder] = container_of(one.quantized())
            made[name] = shared[one.holder]
    return made


def _products(model: PreTrainedModel, containers: dict[str, Container | Blocked]) -> dict[str, nn.Module]:
    """What stands for each packed module while the model is traced."""
    made: dict[str, nn.Module] = {}
    for name, container in containers.items():
        module = model.get_submodule(name)
        if isinstance(module, PackedEmbedding):
            assert isinstance(container, Container)
            made[name] = PackedLookup(container, module.lookup)
        elif isinstance(container, Container):
            assert isinstance(module, PackedLinear)
            made[name] = PackedProduct(container, module.bias)
        else:
            assert isinstance(module, PackedConvolution)
            made[name] = PackedKernel(container, module)
    return made


def _report_rounding(containers: dict[str, Container | Blocked], events: Events) -> None:
    """No container carries groups of 8 weights exactly; that is said, not hidden."""
    rounded = [container.error for container in containers.values() if container.error]
    if rounded:
        text = (
            f"{len(rounded)} of {len(containers)} matrices are rounded once more, to 8-bit containers (squared error "
            f"{max(rounded):.1e} of the weights' energy at most): no container carries their codec exactly. "
            "--codec pyramid and half_pyramid:dim=16 need no rounding."
        )
        events.emit("warning", text=text)


def _step(events: Events, index: int, name: str, **metrics: int | float) -> None:
    events.emit("step", stage="export", index=index, total=3, name=name, seconds_left=None, **metrics)


def _require_float32_on_cpu(model: PreTrainedModel) -> None:
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.device.type != "cpu" or (tensor.is_floating_point() and tensor.dtype != torch.float32):
            raise ExportError(
                f"'{name}' is {tensor.dtype} on {tensor.device}; ONNX export takes float32 on the CPU.",
                remedy="Load the model with dtype=torch.float32, device='cpu'.",
            )


def _save(program: ONNXProgram, staged: Path, options: OnnxOptions) -> None:
    values = program.model.graph.initializers.values()
    nbytes = sum(value.const_value.nbytes for value in values if value.const_value is not None)
    program.save(staged / MODEL_FILE, external_data=nbytes > options.external_data_bytes)


def _copy_files(model: PreTrainedModel, staged: Path, tokenizer_from: Path | None) -> None:
    if tokenizer_from is not None:
        copy_companions(tokenizer_from, staged)
    config = json.loads(model.config.to_json_string())
    config.pop("quantization_config", None)  # the file holds the containers' own form, which needs no plugin
    write_json(staged / CONFIG, {**config, "architectures": [type(model).__name__]})
    if model.can_generate():
        write_json(staged / GENERATION_CONFIG, json.loads(model.generation_config.to_json_string()))


def _has_reader(folder: Path, interface: Interface) -> bool:
    """Whether a tokenizer, or an image processor, is beside the graph."""
    return has_processor(folder) if interface.kind == "image" else (folder / "tokenizer_config.json").is_file()


def _figures(
    staged: Path, views: list[MatrixView], containers: dict[str, Container | Blocked], parameters: int
) -> dict[str, Any]:
    """The figures of the report that are counted."""
    stored = sum(containers[view.name].stored_bits if view.name in containers else 32 * view.weights for view in views)
    kinds = Counter(containers[view.name].kind if view.name in containers else "float32" for view in views)
    files = {path.relative_to(staged).as_posix(): path.stat().st_size for path in sorted(staged.rglob("*.*"))}
    model_bytes = sum(size for name, size in files.items() if name.startswith(MODEL_FILE))
    return {
        "container_bits_per_weight": stored / sum(view.weights for view in views),
        "model_bits_per_weight": 8 * model_bytes / parameters,
        "matrices": dict(sorted(kinds.items())),
        "parameters": parameters,
        "model_bytes": model_bytes,
        "files": files,
        "rounding_error": max((container.error for container in containers.values()), default=0.0),
    }
