"""The model that goes through the stages: its skeleton on the meta device, and the headers of its files."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from compress.modeling.bounds import check_complete, check_tensors
from compress.modeling.io import Checkpoint
from compress.modeling.loading import (
    config_from_file,
    is_quantized,
    kind_of,
    load_config,
    parameter_count,
    positions_of,
    skeleton,
)
from compress.modeling.resolve import resolve_model
from compress.modeling.weights import StoredWeights

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from compress.recipe import Recipe


@dataclass(frozen=True)
class Subject:
    """A model without weights. `checkpoint` is None when training is to start from random weights."""

    name: str
    model: PreTrainedModel
    checkpoint: Checkpoint | None

    @property
    def parameters(self) -> int:
        return parameter_count(self.model)

    @property
    def folder(self) -> Path | None:
        return self.checkpoint.folder if self.checkpoint is not None else None

    @property
    def is_causal(self) -> bool:
        """Whether it predicts the next token."""
        return kind_of(self.model) == "causal"

    @property
    def positions(self) -> int | None:
        """Tokens that fit into its table of positions; None for a model that has no such bound."""
        return positions_of(self.model.config)

    @property
    def bytes(self) -> int:
        """Bytes of the weight files; those of the parameters in the config's dtype where there are no files yet."""
        if self.checkpoint is not None:
            return self.checkpoint.total_bytes
        return self.parameters * self.model.dtype.itemsize

    def read(self, parameter: str) -> Tensor:
        """An original parameter. Those of a model that is yet to be trained count as vectors without two equal numbers:
        nothing is to be hoped from them."""
        shape = self.model.get_parameter(parameter).shape
        if self.checkpoint is None:
            return torch.arange(shape.numel(), dtype=torch.float32).view(shape)
        return StoredWeights(self.checkpoint, self.model).read(parameter)


def read_subjects(recipe: Recipe, made: Collection[str]) -> dict[str, Subject]:
    """The models that `recipe` names, by that name, except those to measure that it makes itself, in folders `made`.

    Raises `ModelError` for one that cannot be read.
    """
    read = (recipe.model, recipe.distill.teacher if recipe.distill is not None else None)
    names = [model for model in recipe.models if model in read or str(Path(model)) not in made]
    return {name: read_subject(name, recipe.trust_remote_code) for name in names}


def subject_of(recipe: Recipe, subjects: Mapping[str, Subject]) -> Subject:
    """The model that `recipe` starts from. Raises `ModelError` for a config that cannot be read."""
    if recipe.distill is not None and recipe.distill.student is not None:
        return _from_config(recipe.distill.student.config, recipe.trust_remote_code)
    assert recipe.model is not None
    return subjects[recipe.model]


def read_subject(reference: str, trust_remote_code: bool) -> Subject:
    """The model `reference`, whose files exist. Raises `ModelError` when they do not fit each other."""
    folder = resolve_model(reference)
    config = load_config(folder, trust_remote_code)
    model, checkpoint = skeleton(config, trust_remote_code), Checkpoint(folder)
    if not is_quantized(config):
        weights = StoredWeights(checkpoint, model)
        check_tensors(model, weights)
        check_complete(model, weights)
    return Subject(reference, model, checkpoint)


def _from_config(path: str, trust_remote_code: bool) -> Subject:
    config = config_from_file(Path(path))
    return Subject(f"random weights of {path}", skeleton(config, trust_remote_code), None)
