"""The graph of a model, by `torch.onnx.export`, with the interface's names and without traces of this machine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import nn

from compress.errors import ExportError
from compress.exporters.blocked import store_four_bits
from compress.exporters.interface import Interface
from compress.exporters.onnx_modules import ready_to_trace
from compress.exporters.quiet import quiet

if TYPE_CHECKING:
    from torch.onnx import ONNXProgram
    from transformers import PreTrainedModel


def trace(model: PreTrainedModel, interface: Interface, products: Mapping[str, nn.Module], opset: int) -> ONNXProgram:
    """`model`, with `products` in place of the modules of these names, as an ONNX program. Raises `ExportError` for
    what torch cannot export."""
    try:
        with ready_to_trace(model, products), torch.no_grad(), quiet():
            program = torch.onnx.export(
                interface.graph(model).eval(),
                interface.example(),
                dynamo=True,
                opset_version=opset,
                dynamic_shapes=interface.dynamic_shapes,
                input_names=interface.input_names,
                output_names=list(interface.output_shapes),
                verbose=False,
            )
    except torch.onnx.OnnxExporterError as error:
        raise ExportError(
            f"torch cannot export {type(model).__name__} to ONNX: {_reason(error)}",
            remedy="Supported are decoders like Llama, Mistral and Qwen, encoders like BERT, and image models like "
            "ViT and ResNet.",
        ) from error
    assert program is not None
    store_four_bits(program.model.graph)
    _tidy(program, interface)
    return program


def unused_parameters(program: ONNXProgram) -> int:
    """How many numbers of the traced model's parameters the graph does not read: what belongs to another input."""
    exported = program.exported_program
    assert exported is not None
    signature = exported.graph_signature
    names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}  # a bias of packed weights is a buffer
    nodes = [node for node in exported.graph.nodes if node.name in names]
    tensors = {**exported.constants, **exported.state_dict}
    read = {tensors[names[node.name]].data_ptr() for node in nodes if node.users}
    unread = [node.name for node in nodes if not node.users and node.name in signature.inputs_to_parameters]
    others = [exported.state_dict[names[name]] for name in unread]
    return sum({one.data_ptr(): one.numel() for one in others if one.data_ptr() not in read}.values())


def _reason(error: BaseException) -> str:
    """First line of what an error comes from; the exporter wraps the reason in pages about itself."""
    while error.__cause__ is not None:
        error = error.__cause__
    return str(error).strip().partition("\n")[0]


def _tidy(program: ONNXProgram, interface: Interface) -> None:
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
