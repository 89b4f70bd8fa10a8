"""What every loss shares: shapes, masks, weights and the reduction.

A loss is called `loss(student_logits, teacher_logits, labels=None, weights=None)` with logits `[N, C]` or `[B, T, V]`
that are already shifted. A position counts unless its label is -100 or its weight is 0. With values v_i in nats and
weights w_i (1 where none are given),

    mean = sum_i w_i v_i / sum_i w_i,      sum = sum_i w_i v_i,      none = v_i w_i of the positions that count.

Positions that do not count are removed before anything is computed, so they cost nothing and may hold anything. When no
position counts, the result is a zero that is still connected to the graph.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from compress.errors import UsageError

IGNORED = -100
"""The label of a position that is left out, as everywhere in the field."""

Reduction = Literal["mean", "sum", "none"]


def positive(value: float, name: str) -> float:
    """`value`, or a `UsageError` when it is not a positive finite number."""
    if not 0 < value < float("inf"):
        raise UsageError(f"{name} is {value}.", remedy=f"Give a positive, finite {name}.")
    return float(value)


class TokenLoss(nn.Module):
    """Base of the losses that are a sum over positions. A subclass gives the value of each position."""

    def __init__(self, reduction: Reduction = "mean") -> None:
        super().__init__()
        if reduction not in ("mean", "sum", "none"):
            raise UsageError(f"There is no reduction '{reduction}'.", remedy="Use 'mean', 'sum' or 'none'.")
        self.reduction = reduction

    def values(self, student: Tensor, teacher: Tensor | None, labels: Tensor | None) -> Tensor:
        """Values in nats [N] from logits [N, V] (and labels [N]) of the positions that count."""
        raise NotImplementedError

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor | None = None,
        labels: Tensor | None = None,
        weights: Tensor | None = None,
    ) -> Tensor:
        classes = student_logits.shape[-1]
        check_shapes(student_logits, teacher_logits, labels, weights)
        student = student_logits.reshape(-1, classes)
        teacher = None if teacher_logits is None else teacher_logits.reshape(-1, classes)
        labels = None if labels is None else labels.reshape(-1)
        weights = None if weights is None else weights.reshape(-1)
        keep = counted(labels, weights)
        if keep is not None and not bool(keep.all()):
            student, teacher = student[keep], None if teacher is None else teacher[keep]
            labels = None if labels is None else labels[keep]
            weights = None if weights is None else weights[keep]
        if student.shape[0] == 0 and self.reduction != "none":
            return student.sum()  # of nothing: zero, whatever the positions left out hold
        return self.reduce(self.values(student, teacher, labels), weights)

    def reduce(self, values: Tensor, weights: Tensor | None) -> Tensor:
        weighted = values if weights is None else values * weights.to(values.dtype)
        if self.reduction == "none":
            return weighted
        total = weighted.sum()
        if self.reduction == "sum":
            return total
        return total / (len(values) if weights is None else weights.to(values.dtype).sum())


def counted(labels: Tensor | None, weights: Tensor | None) -> Tensor | None:
    """The positions that count, bool [N]; None when all do."""
    if labels is None and weights is None:
        return None
    if labels is None:
        assert weights is not None
        return weights != 0
    keep = labels != IGNORED
    return keep if weights is None else keep & (weights != 0)


def check_shapes(student: Tensor, teacher: Tensor | None, labels: Tensor | None, weights: Tensor | None) -> None:
    if teacher is not None and teacher.shape != student.shape:
        raise UsageError(
            f"The student's logits are {tuple(student.shape)}, the teacher's {tuple(teacher.shape)}.",
            remedy="Both need the same positions and the same vocabulary.",
        )
    for name, tensor in (("labels", labels), ("weights", weights)):
        if tensor is not None and tensor.shape != student.shape[:-1]:
            raise UsageError(
                f"The {name} are {tuple(tensor.shape)}, the logits {tuple(student.shape)}.",
                remedy=f"Give {name} of shape {tuple(student.shape[:-1])}.",
            )


def as_float(logits: Tensor) -> Tensor:
    """Half precisions in float32; float32 and float64 as they are."""
    return logits if logits.dtype in (torch.float32, torch.float64) else logits.float()
