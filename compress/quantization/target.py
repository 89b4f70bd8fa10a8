"""What a checkpoint holds and what of it will be packed: read from headers and config, before any weight is.

`open_target` answers everything that a plan needs; `predict` adds the widths and knows the artifact's size to the byte,
because the same plan of entries is what the writer follows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from compress.codecs.base import Codec
from compress.errors import ModelError
from compress.modeling.io import Checkpoint
from compress.modeling.layout import Entry, plan_shards
from compress.modeling.loading import load_config, parameter_count, require_unquantized, skeleton
from compress.modeling.names import stored_names
from compress.modeling.structure import MatrixView, matrices, require_linear
from compress.modeling.writer import MAX_SHARD_BYTES


@dataclass(frozen=True)
class Target:
    """A checkpoint to be quantized. `stored` maps a parameter, as the model spells it, to the checkpoint's tensor;
    `ignore` names the embeddings and linear maps outside of the target set; `parameters` counts tied ones once."""

    source: Path
    checkpoint: Checkpoint
    views: tuple[MatrixView, ...]
    stored: Mapping[str, str]
    known: frozenset[str]
    ignore: tuple[str, ...]
    parameters: int

    @property
    def weights(self) -> int:
        """Weights of the target set."""
        return sum(view.weights for view in self.views)


@dataclass(frozen=True)
class Prediction:
    """The size of an artifact: bytes of all its weight files, headers included, and both bit figures."""

    model_bytes: int
    bits_per_weight: float
    model_bits_per_weight: float


def open_target(source: Path, trust_remote_code: bool = False) -> Target:
    """Read config and headers of the model in `source`.

    Raises `ModelError` for a model that is damaged, already quantized, of unknown structure, mixture-of-experts, or
    whose checkpoint lacks a matrix of the target set or has it in another shape.
    """
    config = load_config(source, trust_remote_code)
    require_unquantized(config, str(source))
    checkpoint = Checkpoint(source)
    model = skeleton(config, trust_remote_code)
    views = matrices(model)
    require_linear(views)
    target = Target(
        source=source,
        checkpoint=checkpoint,
        views=tuple(views),
        stored=stored_names(checkpoint.names(), model),
        known=frozenset(model.state_dict()),
        ignore=untouched(model, views),
        parameters=parameter_count(model),
    )
    for view in views:
        _check_view(target, view)
    return target


def untouched(model: nn.Module, views: list[MatrixView]) -> tuple[str, ...]:
    """Names of the embeddings and linear maps of `model` that are not among `views`."""
    packed = {view.module for view in views}
    return tuple(
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Embedding) and name not in packed
    )


def entries(target: Target, widths: Mapping[str, int], codec: Codec) -> list[Entry]:
    """Every tensor of the artifact, in the model's order: payloads for the target set, the rest as stored."""
    packed = {view.parameter: codec.bits(codec.spec(widths[view.name]), view.shape) // 8 for view in target.views}
    planned = []
    for name, stored in target.stored.items():
        info = target.checkpoint.info(stored)
        if name in packed:
            planned.append(Entry(name, "I8", (packed[name],)))
        else:
            planned.append(Entry(name, info.dtype, info.shape))
    return planned


def predict(
    target: Target, widths: Mapping[str, int], codec: Codec, max_shard_bytes: int = MAX_SHARD_BYTES
) -> Prediction:
    """The artifact's size for these `widths`, exact, without reading a weight."""
    size = sum(shard.nbytes for shard in plan_shards(entries(target, widths, codec), max_shard_bytes))
    bits = sum(codec.bits(codec.spec(widths[view.name]), view.shape) for view in target.views)
    return Prediction(size, bits / target.weights, 8 * size / target.parameters)


def _check_view(target: Target, view: MatrixView) -> None:
    name = target.stored.get(view.parameter)
    if name is None:
        raise ModelError(
            f"The checkpoint in '{target.source}' has no tensor '{view.parameter}', which its config.json asks for.",
            remedy="Correct 'architectures' and sizes in config.json, or save the model again.",
        )
    shape = target.checkpoint.info(name).shape
    if shape != view.shape:
        raise ModelError(
            f"Tensor '{name}' in '{target.source}' has shape {list(shape)}; config.json asks for {list(view.shape)}.",
            remedy="Config and weights are of different models; copy the whole folder again.",
        )
