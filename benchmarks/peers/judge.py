"""How far a quantized model is from the original, window by window, and which of two is nearer.

With p the original's distribution and q the quantized one's, window w of T tokens has d_w = mean over its T - 1 scored
positions of KL(p || q), in nats per token. A contestant's figure is the mean of d over W windows, its error
s / sqrt(W) with s the standard deviation over windows. Windows differ far more than contestants do, and all are judged
on the same ones: so two are compared by the paired differences d_w - d'_w, whose mean in units of its own standard
error says whether one is nearer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from compress.errors import ModelError
from compress.losses import KL

BATCH = 8


@dataclass(frozen=True)
class Paired:
    """`ratio`: mean(ours) / mean(theirs). `difference`: mean(ours - theirs), nats per token. `deviations`: that mean in
    its own standard errors; negative where ours is nearer to the original, and 0 where the two are the same."""

    ratio: float
    difference: float
    deviations: float


def mean_and_error(values: Tensor) -> tuple[float, float]:
    """Mean of `values` [W] and the standard error of that mean, W > 1."""
    return float(values.mean()), float(values.std() / len(values) ** 0.5)


def paired(ours: Tensor, theirs: Tensor) -> Paired:
    """Two contestants on the same windows, KL divergences float64 [W] each."""
    difference, error = mean_and_error(ours - theirs)
    return Paired(float(ours.mean() / theirs.mean()), difference, difference / error if error else 0.0)


class Judge:
    """Measures models against `reference` on windows `ids` [W, T]. The reference's logits are computed once and kept:
    4 W T V bytes for a vocabulary of V."""

    def __init__(self, reference: nn.Module, ids: Tensor) -> None:
        self._batches = [(batch, _logits(reference, batch)) for batch in ids.split(BATCH)]

    def window_kl(self, model: nn.Module) -> Tensor:
        """d [W] of `model`, float64."""
        divergence = KL(reduction="none")
        means = []
        for batch, target in self._batches:
            values: Tensor = divergence(_logits(model, batch), target)
            means.append(values.double().view(len(batch), -1).mean(1))
        return torch.cat(means)


def _logits(model: nn.Module, ids: Tensor) -> Tensor:
    """Those of the scored positions [B, T - 1, V], float32."""
    with torch.no_grad():
        logits: Tensor = model(input_ids=ids, use_cache=False).logits
    return logits[:, :-1].float()


def linear_maps(model: nn.Module) -> dict[str, nn.Linear]:
    """What is quantized: every linear map but the language head, by module name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not name.endswith("lm_head")
    }


def put(model: nn.Module, weights: Mapping[str, Tensor]) -> nn.Module:
    """Gives every linear map of `model` its weight of `weights`, in place. Raises `ModelError` unless these are exactly
    the maps there are, each with its shape and finite."""
    maps = linear_maps(model)
    if odd := sorted(maps.keys() ^ weights.keys()):
        raise ModelError(
            f"The quantized weights and the model differ in '{odd[0]}'.", remedy="Check the peer's script."
        )
    for name, module in maps.items():
        weight = weights[name]
        if weight.shape != module.weight.shape or not bool(weight.isfinite().all()):
            raise ModelError(f"The quantized weight of '{name}' is not usable.", remedy="Check the peer's script.")
        module.weight.data.copy_(weight)
    return model
