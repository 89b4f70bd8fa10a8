"""The model that goes through the stages: its skeleton on the meta device, and the headers of its files."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from transformers import AutoConfig

from compress.errors import ModelError
from compress.modeling.io import Checkpoint
from compress.modeling.loading import load_config, parameter_count, skeleton
from compress.modeling.resolve import resolve_model

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
    def bytes(self) -> int:
        """Bytes of the weight files; those of the parameters in the config's dtype where there are no files yet."""
        if self.checkpoint is not None:
            return self.checkpoint.total_bytes
        return self.parameters * self.model.dtype.itemsize


def subject_of(recipe: Recipe) -> Subject:
    """The model that `recipe` starts from. Raises `ModelError` when it cannot be read."""
    if recipe.distill is not None and recipe.distill.student is not None:
        return _from_config(recipe.distill.student.config, recipe.trust_remote_code)
    assert recipe.model is not None
    return read_subject(recipe.model, recipe.trust_remote_code)


def read_subject(reference: str, trust_remote_code: bool) -> Subject:
    """The model `reference`, whose files exist."""
    folder = resolve_model(reference)
    model = skeleton(load_config(folder, trust_remote_code), trust_remote_code)
    return Subject(reference, model, Checkpoint(folder))


def _from_config(path: str, trust_remote_code: bool) -> Subject:
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
        config = AutoConfig.for_model(values.pop("model_type"), **values)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"The student's config '{path}' cannot be read: {error}.", remedy="Check the file.") from error
    return Subject(f"random weights of {path}", skeleton(config, trust_remote_code), None)
