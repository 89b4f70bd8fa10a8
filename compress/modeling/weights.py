"""The tensors of a checkpoint as the model names and shapes them.

What a file holds need not be what a model has. A checkpoint of a bare backbone lacks the prefix of a model with a head;
older ones have other names; and many hold each expert of a mixture by itself, where transformers has all of a layer in
one parameter. transformers keeps the rules that lead from the one to the other, for loading; `StoredWeights` follows
the same rules for one tensor at a time, so that a model need not be loaded to be read in its own terms.

Shapes come from the headers alone: a conversion is tried on tensors without memory.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from compress.errors import ModelError
from compress.modeling.io import Checkpoint
from compress.modeling.layout import DTYPES, Entry, entry_of
from compress.modeling.names import align_name

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass
class _Source:
    """Where parameters come from: stored tensors with the patterns that they match, in the order of their names.
    Without a converter it is one tensor as it is."""

    converter: WeightConverter | None
    stored: list[tuple[str, str]]


class StoredWeights:
    """The tensors of `checkpoint` by the names of `model`, which may be on the meta device: in the model's order, then
    those that the model does not know under their own names. A tensor that the checkpoint lacks is not there.

    Raises `ModelError` when two stored tensors are the same parameter, or when tensors do not combine as they should.
    """

    def __init__(self, checkpoint: Checkpoint, model: PreTrainedModel) -> None:
        self.checkpoint = checkpoint
        self._model = model
        self._entries: dict[str, Entry] = {}
        self._last: tuple[_Source, dict[str, Tensor]] | None = None
        found: dict[str, tuple[_Source, str]] = {}
        for target, source in _sources(checkpoint, model).items():
            for name, tensor in self._convert(target, source, self._meta).items():
                if name in found:
                    raise _twice(checkpoint, found[name][0], source.stored[0][0], name)
                found[name] = (source, target)
                self._entries[name] = entry_of(name, tensor)
        order = [name for name in model.state_dict() if name in found]
        self._origin = {name: found.pop(name) for name in order} | found

    def __iter__(self) -> Iterator[str]:
        return iter(self._origin)

    def __contains__(self, name: object) -> bool:
        return name in self._origin

    def entry(self, name: str) -> Entry:
        """Name, dtype and shape of tensor `name`."""
        self._require(name)
        return self._entries[name]

    def sources(self, name: str) -> list[str]:
        """The stored tensors that `name` is made of."""
        self._require(name)
        return [stored for stored, _ in self._origin[name][0].stored]

    def read(self, name: str) -> Tensor:
        """Tensor `name` in its stored dtype. What several parameters are made of, or one slice after the other is asked
        for, is kept until another is read."""
        self._require(name)
        source, target = self._origin[name]
        if source.converter is None:
            return self.checkpoint.read(source.stored[0][0])
        if self._last is None or self._last[0] is not source:
            self._last = (source, self._convert(target, source, self.checkpoint.read))
        return self._last[1][name]

    def _require(self, name: str) -> None:
        if name not in self._origin:
            raise ModelError(
                f"The checkpoint in '{self.checkpoint.folder}' has no tensor '{name}', which its config.json asks for.",
                remedy="Correct 'architectures' and sizes in config.json, or save the model again.",
            )

    def _meta(self, stored: str) -> Tensor:
        info = self.checkpoint.info(stored)
        return torch.empty(info.shape, dtype=DTYPES[info.dtype], device="meta")

    def _convert(self, target: str, source: _Source, read: Callable[[str], Tensor]) -> dict[str, Tensor]:
        if source.converter is None:
            return {target: read(source.stored[0][0])}
        converter = copy.deepcopy(source.converter)
        for stored, pattern in source.stored:
            converter.add_tensor(target, stored, pattern, read(stored))  # type: ignore[arg-type]
        try:
            made: Mapping[str, Any] = converter.convert(target, model=self._model, config=self._model.config)
        except (RuntimeError, ValueError, IndexError, KeyError, TypeError) as error:
            raise ModelError(
                f"The tensors '{source.stored[0][0]}' and {len(source.stored) - 1} others in "
                f"'{self.checkpoint.folder}' do not make a '{target}': {error}",
                remedy="Copy the whole folder again, or save the model again.",
            ) from error
        return {name: made_of[0] if isinstance(made_of, list) else made_of for name, made_of in made.items()}


def _sources(checkpoint: Checkpoint, model: PreTrainedModel) -> dict[str, _Source]:
    """By the first parameter that each source makes, what a checkpoint's tensors become."""
    known = model.state_dict()
    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    sources: dict[str, _Source] = {}
    for stored in sorted(checkpoint.names(), key=_by_numbers):
        name = align_name(stored, known, model.base_model_prefix)
        pattern = None
        if name is None:
            name, pattern = rename_source_key(stored, renamings, converters, model.base_model_prefix, known)
            if pattern is None and name not in known:
                name = stored
        source = sources.get(name)
        if source is None:
            sources[name] = _Source(None if pattern is None else by_pattern[pattern], [(stored, pattern or stored)])
        elif pattern is not None and source.converter is not None:
            source.stored.append((stored, pattern))
        else:
            raise _twice(checkpoint, source, stored, name)
    return sources


def _twice(checkpoint: Checkpoint, first: _Source, second: str, parameter: str) -> ModelError:
    return ModelError(
        f"The checkpoint in '{checkpoint.folder}' holds '{first.stored[0][0]}' and '{second}', which are both the "
        f"parameter '{parameter}'.",
        remedy="Save the model again with save_pretrained, so that each parameter is there once.",
    )


def _by_numbers(name: str) -> list[tuple[int, str]]:
    """Sorts expert 10 behind expert 9."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in name.split(".")]


def keep_names(model: PreTrainedModel) -> None:
    """Have `save_pretrained` write the parameters of `model` under their own names: its rules to write them as older
    checkpoints had them would cut packed ones to pieces."""
    model._weight_conversions = []  # type: ignore[assignment]
