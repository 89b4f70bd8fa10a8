"""Strategy "gradient": the gradients are made in the forward pass, and each logit is projected once.

    Z = h W^T of some rows;   (values, G) = pair(Z);   dh = G W;   dW += G^T h

For that it must be known beforehand what the value of each row will be multiplied by: a loss that is reduced to a
scalar. What is left for the backward pass is to multiply by the upstream gradient, which is 1 for a loss that nothing
else is done to.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from compress.losses.fused.plan import Logits, Piece, Plan, Tensors
from compress.losses.fused.projection import Gradients, once


@torch.no_grad()
def values_and_gradients(plan: Plan, tensors: Tensors, factors: Tensor) -> tuple[Tensor, Gradients]:
    """The values [K, n] of K terms, and the gradients of sum_ki factor_ki value_ki."""
    values = torch.empty_like(factors)
    sums = Gradients.zeros(plan.dtype, plan.wanted, *tensors[:3])
    columns = slice(plan.classes)
    with torch.autocast(tensors.hidden.device.type, enabled=False):
        for piece in Logits(plan, tensors).pieces():
            for part in piece.parts():
                if any(plan.wanted):
                    values[:, part.rows] = to_gradient(plan, part, factors[:, part.rows])
                else:
                    values[:, part.rows] = part_values(plan, part)
            hidden, weight = tensors.hidden[piece.rows], tensors.weight[columns]
            plan.student.back(piece.student, hidden, weight, sums.at(piece.rows, columns))
    return values, sums


def attach(total: Tensor, sums: Gradients, tensors: Tensors) -> Tensor:
    """`total` with these gradients."""
    inputs = tensors[:3]
    kept = [
        # float16 does not hold a gradient that a gradient scaler has not multiplied yet
        each if each is None or like is None or like.dtype == torch.float16 else each.to(like.dtype)
        for each, like in zip((sums.hidden, sums.weight, sums.bias), inputs, strict=True)
    ]
    attached: Tensor = _Attached.apply(total, kept, *inputs)
    return attached


def part_values(plan: Plan, part: Piece) -> Tensor:
    """The values [K, n]."""
    return torch.stack([term.loss.all_values(*part.seen_by(term)) for term in plan.terms])


def to_gradient(plan: Plan, part: Piece, factors: Tensor) -> Tensor:
    """The values [K, n]. The student's logits are overwritten with the gradient of sum_ki factor_ki value_ki with
    respect to what they were before scale and softcap."""
    values = torch.empty_like(factors)
    total: Tensor | None = None
    for each, factor, term in zip(values, factors, plan.terms, strict=True):
        each[:], gradient = term.loss.pair(*part.seen_by(term))
        gradient = gradient[:, : part.student.shape[-1]] * factor.unsqueeze(-1)
        if gradient.shape[-1] < part.student.shape[-1]:  # other terms see more classes than this one
            gradient = F.pad(gradient, (0, part.student.shape[-1] - gradient.shape[-1]))
        total = gradient if total is None else total.add_(gradient)
    assert total is not None
    part.student.copy_(plan.student.before_activation(total, part.student))
    return values


class _Attached(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, total: Tensor, kept: Sequence[Tensor | None], *inputs: Tensor | None) -> Tensor:
        ctx.dtypes = [None if each is None else each.dtype for each in inputs]
        ctx.save_for_backward(*kept)
        return total.clone()

    @staticmethod
    @once
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        kept = ctx.saved_tensors
        if upstream != 1:
            kept = [None if each is None else each * upstream for each in kept]
        found = (None if each is None else each.to(dtype) for each, dtype in zip(kept, ctx.dtypes, strict=True))
        return None, None, *found
