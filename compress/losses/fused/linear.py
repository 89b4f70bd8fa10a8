"""Losses of hidden states: the logits are projected, used and forgotten piece by piece.

With a vocabulary of 150,000 and 8,000 positions, the logits of two models in float32, their log-softmax and its
gradients are 20 to 30 GB, beside heads of 1 GB. Here a few hundred rows exist at a time. What is computed is what

    loss(head(hidden), teacher_head(teacher_hidden), labels, weights, denominator)

computes, whatever the size of the pieces; positions that do not count are not even projected.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from compress.errors import UsageError
from compress.losses.base import TokenLoss, one_of, positive
from compress.losses.fused import checkpoint, gradient, tiles
from compress.losses.fused.head import Head
from compress.losses.fused.inputs import Given, check_values, connected_zero, counted_rows, planned_terms
from compress.losses.fused.plan import Plan, Tensors, Term, default_memory
from compress.losses.fused.projection import Projection

Strategy = Literal["auto", "gradient", "tiles", "checkpoint"]


def linear_loss(
    loss: TokenLoss,
    hidden: Tensor,
    head: Head,
    teacher_hidden: Tensor | None = None,
    teacher_head: Head | None = None,
    labels: Tensor | None = None,
    weights: Tensor | None = None,
    *,
    denominator: Tensor | float | None = None,
    strategy: Strategy = "auto",
    memory: int | None = None,
) -> Tensor:
    """`loss(head(hidden), teacher_head(teacher_hidden), labels, weights, denominator)`, without the logits whole.

    `hidden` [.., H] and `teacher_hidden` [.., H'] are the last hidden states of both models, shifted like the logits
    would be; `labels` and `weights` are [..]. Gradients go to `hidden` and to the head's weight and bias, once (double
    backward is refused); the teacher gets none. Sums are in float32, or float64 where the student is.

    Three strategies give the same numbers:

    - "gradient": the gradient is made in the forward pass; each model is projected once. For a reduction to a scalar.
    - "checkpoint": projected again in the backward pass. For any reduction, and for losses with own parameters.
    - "tiles": projected again in the backward pass, in tiles of rows x vocabulary. For divergences, any reduction.

    "auto" takes "gradient" where it can, else "checkpoint", and "tiles" for a divergence of which the memory holds less
    than 64 rows. `memory` bounds the logits that exist at one time, in bytes, both models' together: by default 256
    rows or 256 MiB on a CPU, whichever is less, and 1 GiB elsewhere. What the loss itself needs comes on top: little on
    a CPU, as much again elsewhere. The results do not depend on it, roundings apart.
    A loss that draws random numbers may draw others for pieces of another size.

    Raises `UsageError` for a loss that compares positions or reads more than logits and labels, for a strategy that
    cannot serve the loss, for a gradient that is to be differentiated again, and for whatever the loss itself refuses.
    """
    total, _ = linear_losses(
        [(1.0, loss)],
        hidden,
        head,
        teacher_hidden,
        teacher_head,
        labels,
        weights,
        denominator=denominator,
        strategy=strategy,
        memory=memory,
    )
    return total


def linear_losses(
    terms: Sequence[tuple[float, TokenLoss]],
    hidden: Tensor,
    head: Head,
    teacher_hidden: Tensor | None = None,
    teacher_head: Head | None = None,
    labels: Tensor | None = None,
    weights: Tensor | None = None,
    *,
    denominator: Tensor | float | None = None,
    strategy: Strategy = "auto",
    memory: int | None = None,
) -> tuple[Tensor, Tensor]:
    """sum_k weight_k loss_k for pairs (weight_k, loss_k) that share the projections; and the losses [K, ..], detached.

    All arguments are those of `linear_loss`. The losses may have different options, vocabularies included; either all
    or none of them have the reduction "none". Each position's mask and weight hold for all of them.
    """
    given = Given(hidden, head, teacher_hidden, teacher_head, labels, weights)
    planned = planned_terms(terms, given)
    if not any(term.teacher_classes for term in planned):
        given = given._replace(teacher_hidden=None, teacher_head=None)
    tensors, weights = counted_rows(given)
    check_values(planned, tensors)
    plan = _plan(planned, tensors, head, teacher_head, memory)
    chosen = _choose(strategy, plan, tensors, weights)
    if len(tensors.hidden) == 0 and planned[0].loss.reduction != "none":
        zero = connected_zero(planned, tensors)
        return zero, zero.detach().expand(len(planned))

    def reduced(values: Tensor) -> Tensor:
        parts = [term.loss.reduce(each, weights, denominator) for term, each in zip(planned, values, strict=True)]
        return torch.stack(parts)

    def total(parts: Tensor) -> Tensor:
        return torch.stack([term.weight * part for term, part in zip(planned, parts, strict=True)]).sum(0)

    if chosen == "gradient":
        values, sums = gradient.values_and_gradients(
            plan, tensors, _factors(plan, tensors, lambda v: total(reduced(v)))
        )
        parts = reduced(values)
        return gradient.attach(total(parts), sums, tensors), parts
    parts = reduced(tiles.values(plan, tensors) if chosen == "tiles" else checkpoint.values(plan, tensors))
    return total(parts), parts.detach()


def _factors(plan: Plan, tensors: Tensors, total: Callable[[Tensor], Tensor]) -> Tensor:
    """What each value [K, n] is multiplied by in the total: a reduction is linear, so its gradient says it."""
    values = tensors.hidden.new_zeros((len(plan.terms), len(tensors.hidden)), dtype=plan.dtype)
    if not any(plan.wanted):
        return values  # nobody asks
    with torch.enable_grad():
        (factors,) = torch.autograd.grad(total(values.requires_grad_()), values)
    return factors


def _plan(terms: tuple[Term, ...], tensors: Tensors, head: Head, teacher_head: Head | None, memory: int | None) -> Plan:
    student = Projection.of(tensors.hidden, tensors.weight, head.scale, head.softcap)
    teacher = None
    if tensors.teacher_hidden is not None and tensors.teacher_weight is not None and teacher_head is not None:
        operands = tensors.teacher_hidden, tensors.teacher_weight
        teacher = Projection.of(*operands, teacher_head.scale, teacher_head.softcap, student.dtype)
    classes, teacher_classes = max(term.classes for term in terms), max(term.teacher_classes for term in terms)
    if memory is None:
        memory = default_memory(tensors.hidden.device, (classes + teacher_classes) * student.dtype.itemsize)
    positive(memory, "memory")
    wanted = [torch.is_grad_enabled() and each is not None and each.requires_grad for each in tensors[:3]]
    return Plan(terms, student, teacher, classes, teacher_classes, memory, wanted)


def _choose(strategy: Strategy, plan: Plan, tensors: Tensors, weights: Tensor | None) -> Strategy:
    """The strategy that is asked for, or the best that can. Raises `UsageError` for one that cannot."""
    losses = [term.loss for term in plan.terms]
    learning = any(each.requires_grad for loss in losses for each in loss.parameters())
    obstacles: dict[Strategy, dict[str, bool]] = {
        "gradient": {
            "a loss with the reduction 'none'": losses[0].reduction == "none",
            "a loss that has parameters of its own": learning,
            "weights of positions that need a gradient": weights is not None and weights.requires_grad,
        },
        "checkpoint": {},
        "tiles": {
            "a loss that is not a divergence given by its `terms`": not all(tiles.fits(loss) for loss in losses),
            "a loss that has parameters of its own": learning,
        },
    }
    possible: list[Strategy] = [name for name, found in obstacles.items() if not any(found.values())]
    if one_of(strategy, ("auto", *obstacles), "strategy") == "auto":
        wide = plan.rows < min(len(tensors.hidden), tiles.LEAST_ROWS)
        return "tiles" if possible == ["checkpoint", "tiles"] and wide else possible[0]
    if strategy not in possible:
        cause = next(cause for cause, present in obstacles[strategy].items() if present)
        names = " or ".join(f"'{name}'" for name in possible)
        raise UsageError(f"The strategy '{strategy}' cannot serve {cause}.", remedy=f"Use {names}.")
    return strategy
