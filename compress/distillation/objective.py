"""The weighted sum of losses that a student is trained on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from compress.errors import UsageError
from compress.losses import NEEDS_TEACHER, TokenLoss, make_loss


@dataclass(frozen=True)
class Term:
    """One named loss of the sum."""

    name: str
    loss: TokenLoss
    weight: float = 1.0


def make_term(name: str, options: dict[str, object], *, has_teacher: bool) -> Term:
    """The term that a recipe writes as `NAME:weight=0.5,option=value`."""
    weight = options.get("weight", 1.0)
    if not isinstance(weight, int | float) or not 0 <= weight < float("inf"):
        raise UsageError(f"The weight of the loss '{name}' is {weight}.", remedy="Give a number of at least 0.")
    rest = {key: value for key, value in options.items() if key != "weight"}
    loss = make_loss(name, "sum", rest)
    if name in NEEDS_TEACHER and not has_teacher:
        raise UsageError(f"The loss '{name}' needs a teacher.", remedy="Name one with --teacher.")
    return Term(name, loss, float(weight))


class Objective:
    """sum_k weight_k loss_k, each a sum over the positions that count divided by a denominator that the caller gives:
    the number of counted positions of the whole step, over micro-batches and processes, so that every token of a step
    has the same weight however the step is cut.
    """

    def __init__(self, terms: Sequence[Term]) -> None:
        if not terms:
            raise UsageError("No loss is named.", remedy="Name one, for example kl.")
        self.terms = tuple(terms)

    def __call__(
        self, student: Tensor, teacher: Tensor | None, labels: Tensor, denominator: Tensor | int
    ) -> dict[str, Tensor]:
        """The named, weighted terms (scalars); the training loss is their sum."""
        values: dict[str, Tensor] = {}
        for term in self.terms:
            value = term.weight * term.loss(student, teacher, labels) / denominator
            values[term.name] = values[term.name] + value if term.name in values else value
        return values
