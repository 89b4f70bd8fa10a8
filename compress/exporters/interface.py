"""What the exported graph takes and gives: names, shapes, dynamic axes, and example inputs to trace with."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicLayer

from compress.errors import ExportError
from compress.exporters.onnx_modules import DecoderGraph, EncoderGraph

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ENCODER_INPUTS = ("input_ids", "attention_mask", "token_type_ids")
# a batch of one would be taken for a constant, and so would two equal lengths be taken for the same axis
BATCH, FRESH, PAST = 2, 3, 5


@dataclass(frozen=True)
class DecoderInterface:
    """A decoder's tensors. `caches` has (heads, width) of the keys and of the values of each layer, in that order."""

    caches: tuple[tuple[int, int], ...]
    vocab_size: int

    @property
    def past_names(self) -> list[str]:
        return [f"past_key_values.{i // 2}.{('key', 'value')[i % 2]}" for i in range(len(self.caches))]

    @property
    def input_names(self) -> list[str]:
        return ["input_ids", "attention_mask", "position_ids", *self.past_names]

    @property
    def output_shapes(self) -> dict[str, list[str | int]]:
        presents = [name.replace("past_key_values", "present") for name in self.past_names]
        shapes: dict[str, list[str | int]] = {"logits": ["batch", "sequence", self.vocab_size]}
        for name, (heads, width) in zip(presents, self.caches, strict=True):
            shapes[name] = ["batch", heads, "total", width]
        return shapes

    @property
    def dynamic_shapes(self) -> tuple[Any, ...]:
        fresh, total = {0: "batch", 1: "sequence"}, {0: "batch", 1: "total"}
        return (fresh, total, fresh, [{0: "batch", 2: "past"} for _ in self.caches])

    def graph(self, model: PreTrainedModel) -> nn.Module:
        return DecoderGraph(model)

    def example(self) -> tuple[Any, ...]:
        ids = torch.zeros(BATCH, FRESH, dtype=torch.int64)
        mask = torch.ones(BATCH, PAST + FRESH, dtype=torch.int64)
        positions = torch.arange(PAST, PAST + FRESH).repeat(BATCH, 1)
        return (ids, mask, positions, [torch.zeros(BATCH, heads, PAST, width) for heads, width in self.caches])


@dataclass(frozen=True)
class EncoderInterface:
    """An encoder's tensors: the names of its inputs, and the name and shape of its one output."""

    input_names: list[str]
    output: str
    output_shape: list[str | int]
    token_types: int
    vocab_size: int

    @property
    def output_shapes(self) -> dict[str, list[str | int]]:
        return {self.output: self.output_shape}

    @property
    def dynamic_shapes(self) -> tuple[Any, ...]:
        return (tuple({0: "batch", 1: "sequence"} for _ in self.input_names),)

    def graph(self, model: PreTrainedModel) -> nn.Module:
        return EncoderGraph(model, tuple(self.input_names), self.output)

    def example(self) -> tuple[Tensor, ...]:
        values = {name: torch.zeros(BATCH, FRESH, dtype=torch.int64) for name in self.input_names}
        return tuple({**values, "attention_mask": torch.ones(BATCH, FRESH, dtype=torch.int64)}.values())


def interface_of(model: PreTrainedModel) -> DecoderInterface | EncoderInterface:
    """The interface of `model`, read off its forward function and one small run. Raises `ExportError`."""
    accepted = inspect.signature(model.forward).parameters
    return _decoder(model, set(accepted)) if model.can_generate() else _encoder(model, set(accepted))


@torch.no_grad()
def _decoder(model: PreTrainedModel, accepted: set[str]) -> DecoderInterface:
    missing = {"input_ids", "attention_mask", "position_ids", "past_key_values"} - accepted
    if missing:
        raise ExportError(
            f"{type(model).__name__} does not take {', '.join(sorted(missing))}.",
            remedy="Supported are decoders like Llama, Mistral and Qwen.",
        )
    output = model(input_ids=torch.zeros(1, 2, dtype=torch.int64), use_cache=True)
    caches = []
    for index, layer in enumerate(output.past_key_values.layers):
        if not isinstance(layer, DynamicLayer):
            raise ExportError(
                f"Layer {index} of {type(model).__name__} keeps a {type(layer).__name__}, not keys and values.",
                remedy="Supported are models whose every layer is attention.",
            )
        caches += [(tensor.shape[1], tensor.shape[3]) for tensor in (layer.keys, layer.values) if tensor is not None]
    return DecoderInterface(tuple(caches), output.logits.shape[2])


@torch.no_grad()
def _encoder(model: PreTrainedModel, accepted: set[str]) -> EncoderInterface:
    names = [name for name in ENCODER_INPUTS if name in accepted]
    if names[:2] != ["input_ids", "attention_mask"]:
        raise ExportError(
            f"{type(model).__name__} does not take input_ids and attention_mask.",
            remedy="Supported are decoders like Llama and encoders like BERT.",
        )
    result = model(input_ids=torch.zeros(1, 2, dtype=torch.int64))
    output = "logits" if "logits" in result else "last_hidden_state"
    shape: list[str | int] = ["batch", "sequence", result[output].shape[-1]]
    facts = model.config.to_dict()
    pooled = result[output].ndim == 2
    return EncoderInterface(
        names, output, [shape[0], shape[2]] if pooled else shape, facts.get("type_vocab_size", 1), facts["vocab_size"]
    )
