"""What a checkpoint holds and what of it will be packed: read from headers and config, before any weight is.

`open_target` answers everything that a plan needs; `predict` adds the specs and knows the artifact's size to the byte,
because the same plan of entries is what the writer follows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from compress.codecs.base import Codec, CodecSpec
from compress.codecs.registry import codec_of
from compress.errors import ModelError
from compress.modeling.io import Checkpoint
from compress.modeling.layout import Entry, plan_shards
from compress.modeling.loading import load_config, parameter_count, require_unquantized, skeleton
from compress.modeling.names import stored_names
from compress.modeling.sites import Sites
from compress.modeling.structure import MatrixView, matrices, require_linear
from compress.modeling.writer import MAX_SHARD_BYTES
from compress.transforms.fold import Fold, Read, make_fold
from compress.transforms.incoherence import online_mixing, view_signs
from compress.transforms.probe import proven_sites
from compress.transforms.signs import Signs

Transform = Literal["auto", "none", "hadamard"]
"""What is done to a model before it is rounded: nothing, or mixing of its matrices, folded where it can be; "auto"
mixes unless that would untie a head."""
AUTO_CODECS = ("half_pyramid",)
"""Codecs that are not chosen for the stock containers that hold them, which no mixed matrix fits."""


def chosen_transform(transform: Transform, codec: Codec, calibrated: bool, exported: bool = False) -> Transform:
    """`transform`, where "auto" stays for calibrated rounding with a codec of `AUTO_CODECS` of a model that is not
    exported, and is "none" for everything else."""
    mixes = calibrated and not exported and codec.config_type.name in AUTO_CODECS
    return transform if transform != "auto" or mixes else "none"


@dataclass(frozen=True)
class Target:
    """A checkpoint to be quantized. `stored` maps a parameter, as the model spells it, to the checkpoint's tensor;
    `ignore` names the embeddings and linear maps outside of the target set; `parameters` counts tied ones once.

    `fold` is what a transform makes of the parameters before they are rounded, `mixing` which sides of each matrix, by
    its name, are mixed at run time, with signs from `seed`.
    """

    source: Path
    checkpoint: Checkpoint
    views: tuple[MatrixView, ...]
    stored: Mapping[str, str]
    known: frozenset[str]
    ignore: tuple[str, ...]
    parameters: int
    fold: Fold
    mixing: Mapping[str, str]
    seed: int

    @property
    def transform(self) -> Transform:
        """What was chosen."""
        return "none" if all(word == "none" for word in self.mixing.values()) else "hadamard"

    def read_original(self, parameter: str) -> Tensor:
        """The tensor of the checkpoint for `parameter`, a name of the model's."""
        return self.checkpoint.read(self.stored[parameter])

    def read(self, parameter: str, dtype: torch.dtype | None = None) -> Tensor:
        """`parameter` after the transform, in `dtype` (None: the stored one)."""
        tensor = self.fold.tensor(parameter, self.read_original, dtype)
        return tensor if dtype is None else tensor.to(dtype)

    def signs(self, view: MatrixView) -> Signs:
        """Those of a matrix of the target set."""
        return view_signs(view, self.mixing[view.name], self.seed)

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


def open_target(source: Path, trust_remote_code: bool = False, transform: Transform = "none", seed: int = 0) -> Target:
    """Read config and headers of the model in `source`, which `transform` is to change with signs from `seed`.

    Raises `ModelError` for a model that is damaged, already quantized, of unknown structure, mixture-of-experts, or
    whose checkpoint lacks a matrix of the target set or has it in another shape.
    """
    config = load_config(source, trust_remote_code)
    require_unquantized(config, str(source))
    checkpoint = Checkpoint(source)
    model = skeleton(config, trust_remote_code)
    views = matrices(model)
    require_linear(views)
    stored = stored_names(checkpoint.names(), model)
    fold, mixing = transformed(model, views, transform, seed, lambda name: checkpoint.read(stored[name]))
    target = Target(
        source=source,
        checkpoint=checkpoint,
        views=tuple(views),
        stored=stored,
        known=frozenset(model.state_dict()),
        ignore=untouched(model, views),
        parameters=parameter_count(model),
        fold=fold,
        mixing=mixing,
        seed=seed,
    )
    for view in views:
        _check_view(target, view)
    return target


def transformed(
    model: PreTrainedModel, views: Sequence[MatrixView], transform: Transform, seed: int, read: Read
) -> tuple[Fold, dict[str, str]]:
    """What `transform` folds into `model`, which may be on the meta device, and which sides of the matrices `views` it
    mixes at run time. `read` gives the original tensor of a parameter."""
    nothing = Fold(Sites()), {view.name: "none" for view in views}
    if transform == "none":
        return nothing
    sites = proven_sites(model)
    fold = make_fold(sites, seed, read)
    return nothing if transform == "auto" and fold.added else (fold, online_mixing(views, sites))


def untouched(model: nn.Module, views: list[MatrixView]) -> tuple[str, ...]:
    """Names of the embeddings and linear maps of `model` that are not among `views`."""
    packed = {view.module for view in views}
    return tuple(
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Embedding) and name not in packed
    )


def entries(target: Target, specs: Mapping[str, CodecSpec]) -> list[Entry]:
    """Every tensor of the artifact, in the model's order: payloads for the target set, the rest as stored."""
    packed = {view.parameter: _bits(specs[view.name], view) // 8 for view in target.views}
    planned = []
    for name, stored in target.stored.items():
        info = target.checkpoint.info(stored)
        if name in packed:
            planned.append(Entry(name, "I8", (packed[name],)))
        else:
            planned.append(Entry(name, info.dtype, info.shape))
    for name, like in target.fold.added.items():
        info = target.checkpoint.info(target.stored[like])
        planned.append(Entry(name, info.dtype, info.shape))
    return planned


def predict(target: Target, specs: Mapping[str, CodecSpec], max_shard_bytes: int = MAX_SHARD_BYTES) -> Prediction:
    """The artifact's size for these `specs`, exact, without reading a weight."""
    size = sum(shard.nbytes for shard in plan_shards(entries(target, specs), max_shard_bytes))
    bits = sum(_bits(specs[view.name], view) for view in target.views)
    return Prediction(size, bits / target.weights, 8 * size / target.parameters)


def _bits(spec: CodecSpec, view: MatrixView) -> int:
    return codec_of(spec).bits(spec, view.shape)


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
