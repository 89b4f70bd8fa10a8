"""The last layer of a language model, from hidden states to logits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from compress.errors import UsageError
from compress.losses.base import positive
from compress.losses.fused.projection import Gradients, Projection, once


@dataclass(frozen=True, eq=False)
class Head:
    """z = softcap * tanh(scale * (h W^T + b) / softcap); without `softcap`, z = scale * (h W^T + b).

    `weight` is [V, H], `bias` [V]. `scale` is what Cohere calls logit_scale and the inverse of Granite's
    logits_scaling; `softcap` is Gemma's final_logit_softcapping. Raises `UsageError` for shapes that do not fit and for
    a softcap that is not positive.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    def __post_init__(self) -> None:
        shape = tuple(self.weight.shape)
        if len(shape) != 2:
            raise UsageError(f"The weight of a head is {shape}.", remedy="Give one of shape [classes, width].")
        if self.bias is not None and self.bias.shape != shape[:1]:
            raise UsageError(
                f"The bias of a head is {tuple(self.bias.shape)}, its weight {shape}.",
                remedy=f"Give a bias of shape {shape[:1]}.",
            )
        if self.softcap is not None:
            positive(self.softcap, "softcap")

    @property
    def classes(self) -> int:
        return self.weight.shape[0]

    def __call__(self, hidden: Tensor) -> Tensor:
        """All logits [.., V] of hidden states [.., H], in float32 (float64 where an operand is); differentiable once.

        For what needs them whole, such as a loss that compares positions.
        """
        self.check(hidden)
        projection = Projection.of(hidden, self.weight, self.scale, self.softcap)
        rows = hidden.reshape(-1, hidden.shape[-1])
        logits: Tensor = _Logits.apply(projection, rows, self.weight, self.bias)
        return logits.reshape(*hidden.shape[:-1], self.classes)

    def check(self, hidden: Tensor) -> None:
        """Raise `UsageError` when this head cannot read the hidden states."""
        if hidden.shape[-1] != self.weight.shape[1]:
            raise UsageError(
                f"The hidden states are {hidden.shape[-1]} wide, and the head reads {self.weight.shape[1]}.",
                remedy="Pass the states that this head reads in its model: the last ones, after the final norm.",
            )


class _Logits(torch.autograd.Function):
    """The whole logits; what the backward pass keeps of them is what a softcap needs."""

    @staticmethod
    def forward(ctx: Any, projection: Projection, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.projection = projection
        with torch.autocast(weight.device.type, enabled=False):
            out = hidden.new_empty((len(hidden), len(weight)), dtype=projection.dtype)
            logits = projection.logits(hidden, weight, bias, out)
        ctx.save_for_backward(hidden, weight, bias, None if projection.softcap is None else logits)
        return logits

    @staticmethod
    @once
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        projection: Projection = ctx.projection
        hidden, weight, bias, logits = ctx.saved_tensors
        sums = Gradients.zeros(projection.dtype, ctx.needs_input_grad[1:], hidden, weight, bias)
        with torch.autocast(weight.device.type, enabled=False):
            gradient = projection.before_activation(upstream.clone(), logits)
            projection.back(gradient, hidden, weight, sums)
        return None, *sums.like(hidden, weight, bias)
