"""What a config.json may ask for, checked before anything is built or allocated by it.

transformers makes one module for each layer that the file asks for and tables as long as it says, and only then finds
that the weights are others. A single wrong digit, or malice, is an hour of waiting then, or all of the memory.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.errors import ModelError, quoted
from compress.modeling.layout import DTYPES

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from compress.modeling.weights import StoredWeights

MOST_LAYERS = 2048
"""Modules that are made one by one; no model that is known has half as many."""
MOST_LABELS = 2**22
"""Entries of tables that transformers fills when a config is read."""
COUNTED = re.compile(r"(^|_)(n_?|num_)?(hidden_|encoder_|decoder_)?(layers?|depths?|blocks|experts)($|_\d*$)")
LABELS = "num_labels"
BLOCKS = ("num_hidden_layers", "num_layers", "n_layers", "n_layer")


def check_counts(fields: Mapping[str, Any], path: Path) -> None:
    """Raise `ModelError`, naming the field, when the config `fields` of the file `path` asks for more layers, experts
    or labels than any model has, or for none of its blocks."""
    for name, value in _numbers(fields):
        if name in BLOCKS and value < 1:
            raise ModelError(
                f"'{path}' has {quoted(value)} as its {quoted(name)}.", remedy="Copy the file again, or correct it."
            )
        most = MOST_LABELS if name.endswith(LABELS) else MOST_LAYERS
        if value > most:
            raise ModelError(
                f"'{path}' has {quoted(value)} as its {quoted(name)}; no more than {most} are read.",
                remedy="Copy the file again, or correct it.",
            )


def check_kinds(fields: Mapping[str, Any], path: Path) -> None:
    """Raise `ModelError` when `architectures` is no list of names, or `quantization_config` no table."""
    named, quantized = fields.get("architectures"), fields.get("quantization_config")
    wrong = [("quantization_config", quantized)] if not isinstance(quantized, dict | None) else []
    if named is not None and (not isinstance(named, list) or not all(isinstance(name, str) for name in named)):
        wrong.append(("architectures", named))
    for name, value in wrong:
        raise ModelError(f"'{path}' has {quoted(value)} as its '{name}'.", remedy="Copy the file again, or correct it.")


def _numbers(fields: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """The counted fields, also those of configs inside the config and in lists, with their names."""
    pending: list[tuple[str, Any]] = list(fields.items())
    while pending:
        name, value = pending.pop()
        last = name.rpartition(".")[2]
        if isinstance(value, Mapping):
            pending += [(f"{name}.{key}", inner) for key, inner in value.items()]
        elif last == LABELS or COUNTED.search(last):
            values = value if isinstance(value, list) else [value]
            yield from ((name, number) for number in values if isinstance(number, (int, float)))


def check_tensors(model: PreTrainedModel, weights: StoredWeights, packed: Collection[str] = ()) -> None:
    """Raise `ModelError` when a tensor that is stored has not the shape that it has in `model`, which is on the meta
    device and as config.json says, or holds integers where the model has fractions. `packed` ones are left out."""
    for name, tensor in model.state_dict().items():
        if name in packed or name not in weights:
            continue
        entry, place = weights.entry(name), f"'{weights.checkpoint.folder}'"
        if entry.shape != tuple(tensor.shape):
            raise ModelError(
                f"Tensor {quoted(name)} in {place} has shape {quoted(list(entry.shape))}, and by config.json it is "
                f"{list(tensor.shape)}.",
                remedy="Config and weights are of different models: copy the whole folder again.",
            )
        if tensor.is_floating_point() and not DTYPES[entry.dtype].is_floating_point:
            raise ModelError(
                f"Tensor {quoted(name)} in {place} has dtype {entry.dtype}, and the model's is a floating one.",
                remedy="Name the original model: this one was quantized in a way that its config.json does not tell.",
            )


def check_complete(model: PreTrainedModel, weights: StoredWeights) -> None:
    """Raise `ModelError` when a parameter of `model` is not stored under any of the names that share it."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    made = model._keys_to_ignore_on_load_missing or ()
    for shared in names.values():
        if not any(name in weights or any(re.search(key, name) for key in made) for name in shared):
            raise ModelError(
                f"'{weights.checkpoint.folder}' has no tensor {quoted(shared[0])}, which its config.json asks for.",
                remedy="Copy the whole folder again.",
            )
