"""What the exported graph takes and gives: names, shapes, dynamic axes, and example inputs to trace with."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicLayer

from compress.data.pixels import channels_of
from compress.errors import ExportError
from compress.exporters.images import image_size_of
from compress.exporters.onnx_modules import DecoderGraph, EncoderGraph
from compress.modeling.loading import kind_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Kind = Literal["decoder", "encoder", "image"]
ENCODER_INPUTS = ("input_ids", "attention_mask", "token_type_ids")
# a batch of one would be taken for a constant, and so would two equal lengths be taken for the same axis
BATCH, FRESH, PAST = 2, 3, 5
ANY_SIZES = ((64, 96), (96, 64))
"""Images that a model of images of any size is traced and verified with."""


@dataclass(frozen=True)
class DecoderInterface:
    """A decoder's tensors. `caches` has (heads, width) of the keys and of the values of each layer, in that order."""

    caches: tuple[tuple[int, int], ...]
    vocab_size: int
    kind: Kind = "decoder"

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
    kind: Kind = "encoder"

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


@dataclass(frozen=True)
class ImageInterface:
    """An image model's tensors: images of `channels` and of one `size` (height, width), None for any; the name and
    shape of its one output."""

    channels: int
    size: tuple[int, int] | None
    output: str
    output_shape: list[str | int]
    input_names: tuple[str, ...] = ("pixel_values",)
    kind: Kind = "image"

    @property
    def output_shapes(self) -> dict[str, list[str | int]]:
        return {self.output: self.output_shape}

    @property
    def dynamic_shapes(self) -> tuple[Any, ...]:
        free = {0: "batch"} if self.size else {0: "batch", 2: "height", 3: "width"}
        return ((free,),)

    def graph(self, model: PreTrainedModel) -> nn.Module:
        return EncoderGraph(model, self.input_names, self.output)

    def example(self) -> tuple[Tensor, ...]:
        return (torch.zeros(BATCH, self.channels, *(self.size or ANY_SIZES[0])),)


Interface = DecoderInterface | EncoderInterface | ImageInterface


def interface_of(
    model: PreTrainedModel, folder: Path | None = None, image_size: tuple[int, int] | None = None
) -> Interface:
    """The interface of `model`, read off its forward function and one small run. Images have `image_size` (height,
    width), or what `image_size_of` finds. Raises `ExportError`."""
    accepted = set(inspect.signature(model.forward).parameters)
    kind = kind_of(model)
    if kind == "image":
        return _image(model, image_size or image_size_of(model, folder))
    return _decoder(model, accepted) if kind == "causal" else _encoder(model, accepted)


@torch.no_grad()
def _image(model: PreTrainedModel, size: tuple[int, int] | None) -> ImageInterface:
    channels = channels_of(model.config)
    result = _small_run(model, pixel_values=torch.zeros(1, channels, *(size or ANY_SIZES[0])))
    tensors = {name: value for name, value in result.items() if isinstance(value, Tensor)}
    logits = tensors.get("logits")
    if logits is not None and (logits.ndim == 2 or list(tensors) == ["logits"]):
        output = "logits"
    elif logits is None and "last_hidden_state" in tensors:
        output = "last_hidden_state"
    else:
        raise ExportError(
            f"{type(model).__name__} returns {', '.join(result)}: neither classes nor hidden states.",
            remedy="Supported are image classifiers, and models that return a last_hidden_state.",
        )
    shape = tensors[output].shape[1:]
    free = ["rows", "columns"] if size is None and len(shape) == 3 else []
    return ImageInterface(channels, size, output, ["batch", *shape[: len(shape) - len(free)], *free])


def _small_run(model: PreTrainedModel, **inputs: Tensor) -> Mapping[str, Any]:
    """What `model` makes of `inputs`. Raises `ExportError` where it needs others."""
    try:
        result: Mapping[str, Any] = model(**inputs)
    except (AttributeError, RuntimeError, TypeError, ValueError) as error:
        given = ", ".join(f"{name} {list(value.shape)}" for name, value in inputs.items())
        raise ExportError(
            f"{type(model).__name__} does not run on {given} alone: {str(error).strip().partition(chr(10))[0]}",
            remedy="Supported are models of text alone or of images alone, with image sizes as in config.json.",
        ) from error
    return result


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
            remedy="Supported are decoders like Llama encoders like BERT, image models like ViT.",
        )
    result = _small_run(model, input_ids=torch.zeros(1, 2, dtype=torch.int64))
    output = "logits" if "logits" in result else "last_hidden_state"
    shape: list[str | int] = ["batch", "sequence", result[output].shape[-1]]
    facts = model.config.to_dict()
    pooled = result[output].ndim == 2
    return EncoderInterface(
        names, output, [shape[0], shape[2]] if pooled else shape, facts.get("type_vocab_size", 1), facts["vocab_size"]
    )
