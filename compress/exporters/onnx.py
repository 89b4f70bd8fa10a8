"""A model as an ONNX folder that stock ONNX Runtime runs: graph, weights, config, tokenizer, card.

The graph is traced by `torch.onnx.export(dynamo=True)` from the modules in `onnx_modules`; packed matrices become the
operator `MatMulNBits` without rounding (`containers`). Opset 20 with attention written out runs on the widest range
of ONNX Runtimes; opset 23, with attention and norms as single operators, decoded 3 to 5 % faster in a small Llama.
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
from typing import TYPE_CHECKING

import torch

from compress.errors import ExportError
from compress.evaluation.generate import MODEL_FILE
from compress.evaluation.ort import CPU, require_packages
from compress.events import Events
from compress.exporters.base import ExportReport
from compress.exporters.card import onnx_card
from compress.exporters.containers import Container, container_of
from compress.exporters.interface import DecoderInterface, EncoderInterface, interface_of
from compress.exporters.onnx_modules import PackedProduct, ready_to_trace, with_weights
from compress.exporters.quiet import quiet
from compress.exporters.verification import verify_decoder, verify_encoder
from compress.formats.companions import copy_companions
from compress.modeling.loading import CONFIG, parameter_count
from compress.modeling.structure import MatrixView, matrices
from compress.quantization.modules import packed_modules
from compress.storage import check_free, discard_staged, disk_errors, publish, seal, stage_beside, write_json

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
    An ONNX file cannot be larger than 2 GiB."""

    external_data_bytes: int = 2**30


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
    check_free(folder, overwrite)
    staged = stage_beside(folder)
    try:
        report = build_onnx(model, staged, tokenizer_from=tokenizer_from, options=options, events=events)
        seal(staged)
        publish(staged, folder, overwrite)
    except BaseException:
        discard_staged(folder)
        raise
    return report


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
    events = events or Events()
    _require_float32_on_cpu(model)
    with events.stage("export", 3):
        views, interface = _target_set(model), interface_of(model)
        packed = packed_modules(model)
        containers = {name: container_of(module.quantized()) for name, module in packed.items()}
        _report_rounding(containers, events)
        products = {name: PackedProduct(containers[name], module.bias) for name, module in packed.items()}
        program = _trace(model, interface, products)
        del products
        _step(events, 1, "traced", nodes=len(program.model.graph))
        with disk_errors(staged):
            staged.mkdir(parents=True)
            _save(program, staged, options or OnnxOptions())
            opset, ir_version = program.model.opset_imports[""], program.model.ir_version
            del program
            _copy_files(model, staged, tokenizer_from)
        _step(events, 2, "written")
        with with_weights(model, {name: one for name, one in containers.items() if one.error}):
            if isinstance(interface, DecoderInterface):
                errors = verify_decoder(model, staged)
            else:
                errors = verify_encoder(model, staged / MODEL_FILE, interface)
        report = _report(model, staged, interface, views, containers, errors, opset, ir_version)
        _step(events, 3, "verified", relative_error=report.max_relative_error)
        with disk_errors(staged):
            write_json(staged / REPORT, report.to_dict())
            (staged / CARD).write_text(onnx_card(report, interface, _has_tokenizer(staged)), encoding="utf-8")
    return report


def _target_set(model: PreTrainedModel) -> list[MatrixView]:
    """The matrices of the blocks, as they are before any of them is packed. Raises `ModelError` without such blocks."""
    with torch.device("meta"):
        return matrices(type(model)(deepcopy(model.config)))


def _report_rounding(containers: dict[str, Container], events: Events) -> None:
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


def _trace(
    model: PreTrainedModel, interface: DecoderInterface | EncoderInterface, products: dict[str, PackedProduct]
) -> ONNXProgram:
    """The graph of `model` as an ONNX program with the interface's names, and without traces of this machine."""
    try:
        with ready_to_trace(model, products), torch.no_grad(), quiet():
            program = torch.onnx.export(
                interface.graph(model).eval(),
                interface.example(),
                dynamo=True,
                opset_version=OPSET,
                dynamic_shapes=interface.dynamic_shapes,
                input_names=interface.input_names,
                output_names=list(interface.output_shapes),
                verbose=False,
            )
    except torch.onnx.OnnxExporterError as error:
        raise ExportError(
            f"torch cannot export {type(model).__name__} to ONNX: {_reason(error)}",
            remedy="Supported are decoders like Llama, Mistral and Qwen, and encoders like BERT.",
        ) from error
    assert program is not None
    _tidy(program, interface)
    return program


def _reason(error: BaseException) -> str:
    """First line of what an error comes from; the exporter wraps the reason in pages about itself."""
    while error.__cause__ is not None:
        error = error.__cause__
    return str(error).strip().partition("\n")[0]


def _tidy(program: ONNXProgram, interface: DecoderInterface | EncoderInterface) -> None:
    """Drop the source locations that the exporter attaches to every node, and name the axes of the outputs."""
    import onnx_ir

    graph = program.model.graph
    for node in graph:
        node.metadata_props.clear()
        for value in node.outputs:
            value.metadata_props.clear()
    for value in (*graph.inputs, *graph.initializers.values()):
        value.metadata_props.clear()
    for value, shape in zip(graph.outputs, interface.output_shapes.values(), strict=True):
        value.shape = onnx_ir.Shape(shape)


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


def _has_tokenizer(folder: Path) -> bool:
    return (folder / "tokenizer_config.json").is_file()


def _report(
    model: PreTrainedModel,
    staged: Path,
    interface: DecoderInterface | EncoderInterface,
    views: list[MatrixView],
    containers: dict[str, Container],
    errors: dict[str, float],
    opset: int,
    ir_version: int,
) -> ExportReport:
    stored = sum(containers[view.name].stored_bits if view.name in containers else 32 * view.weights for view in views)
    kinds = Counter(containers[view.name].kind if view.name in containers else "float32" for view in views)
    files = {path.relative_to(staged).as_posix(): path.stat().st_size for path in sorted(staged.rglob("*.*"))}
    model_bytes = sum(size for name, size in files.items() if name.startswith(MODEL_FILE))
    parameters = parameter_count(model) + sum(container.rows * container.columns for container in containers.values())
    return ExportReport(
        format="onnx",
        kind="decoder" if isinstance(interface, DecoderInterface) else "encoder",
        container_bits_per_weight=stored / sum(view.weights for view in views),
        model_bits_per_weight=8 * model_bytes / parameters,
        matrices=dict(sorted(kinds.items())),
        parameters=parameters,
        model_bytes=model_bytes,
        files=files,
        opset=opset,
        ir_version=ir_version,
        versions={name: importlib.metadata.version(name) for name in MEASURED},
        provider=CPU,
        errors=errors,
        rounding_error=max((container.error for container in containers.values()), default=0.0),
    )
