"""How large a model folder is, counted from the headers of its files: the same two figures for every model.

bits_per_weight: bits stored for the target set (every linear map in the blocks) over its weights, packed or not.
model_bits_per_weight: 8 x bytes of all weight files / parameters of the model, a tied weight counted once.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from compress.modeling.io import Checkpoint
from compress.modeling.loading import load_config, parameter_count, skeleton
from compress.modeling.structure import matrices
from compress.modeling.weights import StoredWeights


@dataclass(frozen=True)
class ModelSize:
    """`bytes` are those of the weight files."""

    parameters: int
    bytes: int
    bits_per_weight: float
    model_bits_per_weight: float


def model_size(folder: Path, trust_remote_code: bool = False) -> ModelSize:
    """Sizes of the model in `folder`, quantized by us or not. Raises `ModelError` for a folder that cannot be read."""
    checkpoint = Checkpoint(folder)
    model = skeleton(load_config(folder, trust_remote_code), trust_remote_code)
    weights = StoredWeights(checkpoint, model)
    views = matrices(model)
    bits = sum(8 * weights.entry(name).nbytes for name in {view.parameter for view in views})
    parameters = parameter_count(model)
    return ModelSize(
        parameters=parameters,
        bytes=checkpoint.total_bytes,
        bits_per_weight=bits / sum(view.weights for view in views),
        model_bits_per_weight=8 * checkpoint.total_bytes / parameters,
    )
