"""What a fused loss is given, checked and reduced to the positions that count."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from compress.errors import UsageError
from compress.losses.base import Needs, TokenLoss, as_float, check_positions, counted
from compress.losses.fused.head import Head
from compress.losses.fused.plan import Tensors, Term


class Given(NamedTuple):
    """The arguments of `linear_losses` that are tensors: positions [..], hidden states [.., H]."""

    hidden: Tensor
    head: Head
    teacher_hidden: Tensor | None
    teacher_head: Head | None
    labels: Tensor | None
    weights: Tensor | None


def planned_terms(terms: Sequence[tuple[float, TokenLoss]], given: Given) -> tuple[Term, ...]:
    """The terms, after all checks that need no values. Raises `UsageError` for what cannot be computed row by row."""
    if not terms:
        raise UsageError("No loss is named.", remedy="Give at least one pair (weight, loss).")
    for _, loss in terms:
        _check_loss(loss)
    for which, head in (("student", given.head), ("teacher", given.teacher_head)):
        if head is not None and not isinstance(head, Head):
            raise UsageError(
                f"The {which}'s head is a {type(head).__name__}.", remedy="Give a Head(weight, bias, ...)."
            )
    if len({loss.reduction == "none" for _, loss in terms}) > 1:
        raise UsageError(
            "Some of the losses have the reduction 'none', and others have not.", remedy="Give all of them the same."
        )
    given.head.check(given.hidden)
    if (given.teacher_hidden is None) != (given.teacher_head is None):
        raise UsageError("The teacher's hidden states and its head belong together.", remedy="Give both or neither.")
    if given.teacher_head is not None and given.teacher_hidden is not None:
        given.teacher_head.check(given.teacher_hidden)
    return tuple(_planned(weight, loss, given) for weight, loss in terms)


def counted_rows(given: Given) -> tuple[Tensors, Tensor | None]:
    """The positions that count, as rows; and their weights."""
    hidden, head, teacher_hidden, teacher_head, labels, weights = given
    hidden = hidden.reshape(-1, hidden.shape[-1])
    if teacher_hidden is not None:
        teacher_hidden = teacher_hidden.detach().reshape(-1, teacher_hidden.shape[-1])
    labels = None if labels is None else labels.reshape(-1)
    weights = None if weights is None else weights.reshape(-1)
    keep = counted(labels, weights)
    if keep is not None:
        hidden = hidden[keep]
        teacher_hidden, labels, weights = (
            None if each is None else each[keep] for each in (teacher_hidden, labels, weights)
        )
    teacher_weight = None if teacher_head is None else teacher_head.weight.detach()
    teacher_bias = None if teacher_head is None or teacher_head.bias is None else teacher_head.bias.detach()
    return Tensors(hidden, head.weight, head.bias, teacher_hidden, teacher_weight, teacher_bias, labels), weights


def check_values(terms: Sequence[Term], tensors: Tensors) -> None:
    """The losses' own checks."""
    for term in terms:
        student = _stand_in(tensors.hidden, term.classes)
        term.loss.check(student, student if term.teacher_classes else None, tensors.labels)


def connected_zero(terms: Sequence[Term], tensors: Tensors) -> Tensor:
    """The loss of no position: zero, whatever weight and bias hold, with a gradient of zeros for all that learns."""
    own = [each for term in terms for each in term.loss.parameters()]
    inputs = [each for each in (*tensors[:3], *own) if each is not None]
    return torch.stack([as_float(each).reshape(-1)[:0].sum() for each in inputs]).sum()


def _check_loss(loss: TokenLoss) -> None:
    name = type(loss).__name__
    if not isinstance(loss, TokenLoss) or loss.needs & (Needs.FEATURES | Needs.TOKENS):
        raise UsageError(f"{name} reads more than logits and labels.", remedy="Call `of` with the models' outputs.")
    if not loss.independent:
        raise UsageError(
            f"{name} compares positions with each other, and cannot be computed a few rows at a time.",
            remedy="Call it on the whole logits: loss(head(hidden), teacher_head(teacher_hidden)).",
        )


def _planned(weight: float, loss: TokenLoss, given: Given) -> Term:
    hidden, head, teacher_hidden, teacher_head, labels, weights = given
    of_student, of_teacher = hidden.new_empty(0, head.classes), None
    if Needs.TEACHER in loss.needs and teacher_head is not None:
        of_teacher = hidden.new_empty(0, teacher_head.classes)
    student, teacher = loss.on_common_classes(of_student, of_teacher)
    check_positions(
        _stand_in(hidden, student.shape[-1]),
        None if teacher is None or teacher_hidden is None else _stand_in(teacher_hidden, teacher.shape[-1]),
        labels=labels,
        weights=weights,
    )
    # a loss may also add classes that one of the two has not
    columns = min(student.shape[-1], of_student.shape[-1])
    if teacher is None or of_teacher is None:
        return Term(weight, loss, columns, 0)
    return Term(weight, loss, columns, min(teacher.shape[-1], of_teacher.shape[-1]))


def _stand_in(hidden: Tensor, classes: int) -> Tensor:
    """A tensor of the logits' shape that takes no memory."""
    return hidden.new_zeros(()).expand(*hidden.shape[:-1], classes)
