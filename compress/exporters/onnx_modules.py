"""The modules that `torch.onnx.export` traces: a model seen from outside, and the packed maps inside it.

A decoder is exported as a function of tensors only:

    input_ids [B, T], attention_mask [B, P + T], position_ids [B, T], past_key_values.i.key|value [B, H_kv, P, d]
        -> logits [B, T, V], present.i.key|value [B, H_kv, P + T, d]

with every axis but H_kv, d and V dynamic, P = 0 (prefill) included. An encoder takes input_ids, attention_mask and,
where the model has them, token_type_ids, all [B, T]; an image model takes pixel_values [B, C, H, W].
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from compress.exporters.blocked import Blocked, dequantized
from compress.exporters.containers import Container
from compress.modeling.tables import Lookup
from compress.quantization.embedding import PackedEmbedding
from compress.quantization.modules import PackedConvolution

if TYPE_CHECKING:
    from transformers import PreTrainedModel

EXACT = 0
"""`accuracy_level` of MatMulNBits at which activations stay in float32; 4 would round them to 8 bits."""


class PackedProduct(nn.Module):
    """y = x W^T + b that exports itself as `com.microsoft.MatMulNBits`; only for tracing, it computes nothing."""

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    bias: Tensor | None

    def __init__(self, container: Container, bias: Tensor | None) -> None:
        super().__init__()
        self.container = container
        self.register_buffer("codes", container.codes)
        self.register_buffer("scales", container.scales)
        self.register_buffer("zeros", container.zeros)
        self.register_buffer("bias", None if bias is None else bias.detach())

    def forward(self, x: Tensor) -> Tensor:
        shape = self.container
        attributes: dict[str, Any] = {
            "K": shape.columns,
            "N": shape.rows,
            "bits": shape.bits,
            "block_size": shape.block,
        }
        inputs: tuple[Tensor | None, ...] = (x, self.codes, self.scales)
        if self.bias is not None:  # the input between is an order of columns: none
            inputs = (*inputs, self.zeros, None, self.bias)
        elif self.zeros is not None:
            inputs = (*inputs, self.zeros)
        return torch.onnx.ops.symbolic(
            "com.microsoft::MatMulNBits",
            inputs,
            {**attributes, "accuracy_level": EXACT},
            dtype=x.dtype,
            shape=(*x.shape[:-1], shape.rows),
            version=1,
        )


class PackedLookup(nn.Module):
    """Rows of W [V, d] for ids that export themselves as `com.microsoft.GatherBlockQuantized`, which decodes these rows
    alone; for tracing, it computes nothing. It reads the tensors of `MatMulNBits`: codes, scales and zero points."""

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None

    def __init__(self, container: Container, lookup: Lookup) -> None:
        super().__init__()
        self.container, self.lookup = container, lookup
        self.register_buffer("codes", container.codes)
        self.register_buffer("scales", container.scales)
        self.register_buffer("zeros", container.zeros)

    def forward(self, ids: Tensor) -> Tensor:
        shape = self.container
        inputs = [self.codes.view(shape.rows, -1), ids, self.scales, *([] if self.zeros is None else [self.zeros])]
        attributes: dict[str, Any] = {
            "bits": shape.bits,
            "block_size": shape.block,
            "gather_axis": 0,
            "quantize_axis": 1,
        }
        rows: Tensor = torch.onnx.ops.symbolic(
            "com.microsoft::GatherBlockQuantized",
            inputs,
            attributes,
            dtype=torch.float32,
            shape=(*ids.shape, shape.scales.shape[1] * shape.block),
            version=1,
        )
        return self.lookup(rows[..., : shape.columns])


class PackedKernel(nn.Module):
    """A convolution that exports itself as the operators of `blocked`; only for tracing, it computes nothing."""

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None

    def __init__(self, blocked: Blocked, convolution: PackedConvolution) -> None:
        super().__init__()
        self.convolution, self.block = convolution, blocked.block
        self.register_buffer("codes", blocked.codes)
        self.register_buffer("scales", blocked.scales)
        self.register_buffer("zeros", blocked.zeros)

    def forward(self, x: Tensor) -> Tensor:
        return self.convolution.convolve(x, dequantized(self.codes, self.scales, self.zeros, self.block))


class DecoderGraph(nn.Module):
    """A causal model with its cache as plain tensors: `past` is key and value of layer 0, of layer 1, ...

    The cache given to the model is one that keeps everything: a layer with a sliding window masks what lies outside.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, past: list[Tensor]
    ) -> tuple[Tensor, ...]:
        cache = DynamicCache(ddp_cache_data=list(zip(past[0::2], past[1::2], strict=True)))
        output = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
        )
        presents = [tensor for layer in output.past_key_values.layers for tensor in (layer.keys, layer.values)]
        return (output.logits, *presents)


class EncoderGraph(nn.Module):
    """A model without a cache as a function of the tensors called `inputs`; returns its output called `output`."""

    def __init__(self, model: PreTrainedModel, inputs: tuple[str, ...], output: str) -> None:
        super().__init__()
        self.model, self.inputs, self.output = model, inputs, output

    def forward(self, *values: Tensor) -> Tensor:
        result: Mapping[str, Tensor] = self.model(**dict(zip(self.inputs, values, strict=True)))
        return result[self.output]


@contextmanager
def with_weights(model: PreTrainedModel, containers: Mapping[str, Container | Blocked]) -> Iterator[None]:
    """`model` with the weights of `containers` in the modules of these names; as before when the block is left."""
    before = {name: model.get_submodule(name) for name in containers}
    try:
        for name, container in containers.items():
            packed, weight = before[name], container.weight()
            if isinstance(packed, PackedConvolution):
                module = packed.to_module(torch.float32)
                weight = weight.view(module.get_parameter("weight").shape)
            elif isinstance(packed, PackedEmbedding):
                module = packed.to_module(torch.float32)
            else:
                module = nn.Linear(container.columns, container.rows, bias=False, device="meta")
                module.register_parameter("bias", cast("nn.Parameter | None", packed.bias))
            module.register_parameter("weight", nn.Parameter(weight, requires_grad=False))
            model.set_submodule(name, module)
        yield
    finally:
        for name, module in before.items():
            model.set_submodule(name, module)


@contextmanager
def ready_to_trace(model: PreTrainedModel, products: Mapping[str, nn.Module]) -> Iterator[None]:
    """`model` with `products` in place of the modules of these names, in eval mode, with attention written out (the
    fused form traces to more nodes and runs slower); all as before when the block is left."""
    training, attention = model.training, model.config._attn_implementation
    before = {name: model.get_submodule(name) for name in products}
    try:
        for name, product in products.items():
            model.set_submodule(name, product)
        model.train(False)
        model.set_attn_implementation("eager")
        yield
    finally:
        model.set_attn_implementation(attention)
        for name, module in before.items():
            model.set_submodule(name, module)
        model.train(training)
