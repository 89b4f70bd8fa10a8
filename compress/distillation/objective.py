"""The weighted sum of losses that a student is trained on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from compress.distillation.teacher import Signal
from compress.errors import UsageError
from compress.losses import Loss, Needs, Outputs, Setting, TokenLoss, loss_class, make_loss
from compress.losses.fused import Head, linear_losses
from compress.losses.processes import ALONE, Processes

WEIGHTS = {"weight": 1.0, "balance": None}
"""The options of a term that are not those of its loss, with their defaults."""


@dataclass(frozen=True)
class Term:
    """One named loss of the sum, with a fixed weight or, if `balance` is given, with the one that makes the norm of its
    gradient at the logits `balance` times that of the first term, anew in each micro-batch; in evaluation, with the
    last of these."""

    name: str
    loss: Loss
    weight: float = 1.0
    balance: float | None = None


def make_term(name: str, options: Mapping[str, object], setting: Setting | None = None, *, has_teacher: bool) -> Term:
    """The term that a recipe writes as `NAME:weight=0.5,option=value`."""
    weights: dict[str, float | None] = {}
    for key, default in WEIGHTS.items():
        value = options.get(key, default)
        if value is not None and not (isinstance(value, int | float) and 0 <= value < float("inf")):
            raise UsageError(f"The {key} of the loss '{name}' is {value}.", remedy="Give a number of at least 0.")
        weights[key] = None if value is None else float(value)
    if weights["balance"] is not None and "weight" in options:
        raise UsageError(f"The loss '{name}' has a weight and a balance.", remedy="Give one of the two.")
    if Needs.TEACHER in loss_class(name).needs and not has_teacher:
        raise UsageError(f"The loss '{name}' needs a teacher.", remedy="Name one with --teacher.")
    rest = {key: value for key, value in options.items() if key not in WEIGHTS}
    loss = make_loss(name, rest, setting, vocabulary="common")
    assert weights["weight"] is not None
    return Term(name, loss, weights["weight"], weights["balance"])


def setting_of(
    student: PreTrainedConfig,
    teacher: PreTrainedConfig | None,
    pieces: Callable[[Sequence[int]], list[str]] | None = None,
) -> Setting:
    """What losses must know about the two models, from their configs."""
    config = student.get_text_config()
    other = config if teacher is None else teacher.get_text_config()
    return Setting(
        classes=min(config.vocab_size, other.vocab_size),
        student_width=config.hidden_size,
        teacher_width=other.hidden_size,
        student_layers=config.num_hidden_layers,
        pieces=pieces,
    )


class Objective(nn.Module):
    """sum_k weight_k loss_k, each a sum over the positions that count divided by a denominator that the caller gives:
    the number of counted positions of the whole step, over micro-batches and processes, so that every token of a step
    has the same weight however the step is cut.

    A module, because a loss may have parameters that learn with the student, and state that belongs to a checkpoint.
    """

    balanced: Tensor
    processes: Processes = ALONE

    def __init__(self, terms: Sequence[Term]) -> None:
        super().__init__()
        if not terms:
            raise UsageError("No loss is named.", remedy="Name one, for example kl.")
        if terms[0].balance is not None:
            raise UsageError(
                f"The first loss, '{terms[0].name}', has a balance: there is none before it to be balanced with.",
                remedy="Give it a weight, or name another loss first.",
            )
        self.terms = tuple(terms)
        self.losses = nn.ModuleList(term.loss for term in terms)
        if any(term.balance is not None for term in terms):
            # of the last batch with a gradient: what evaluation weighs with
            self.register_buffer("balanced", torch.tensor([term.weight for term in terms]))
        names = [term.name for term in terms]
        self.names = [
            name if names.count(name) == 1 else f"{name}_{names[:place].count(name) + 1}"
            for place, name in enumerate(names)
        ]

    @property
    def needs(self) -> Needs:
        """What the losses read, taken together."""
        together = Needs.NOTHING
        for term in self.terms:
            together |= term.loss.needs
        return together

    def divide(self, processes: Processes) -> None:
        """Compute from now on with these processes, each of which has some rows of a batch, what one computes of all.
        Raises `UsageError` for a loss that cannot."""
        for term in self.terms:
            if not (term.loss.divisible or (isinstance(term.loss, TokenLoss) and term.loss.independent)):
                raise UsageError(
                    f"The loss '{term.name}' compares positions and sees those of one process alone: on "
                    f"{processes.size} processes it is another loss than on one.",
                    remedy="Train in one process, or let it use `processes` and declare it `divisible`.",
                )
        self.processes = processes
        for module in self.modules():
            if isinstance(module, Loss):
                module.processes = processes

    def forward(self, outputs: Outputs, denominator: Tensor | float | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """The training loss, and the value of each term before its weight."""
        values = [term.loss.of(outputs, denominator) for term in self.terms]
        weights = [term.weight for term in self.terms]
        norms: dict[int, Tensor] = {}
        total = weights[0] * values[0]
        for place, term in enumerate(self.terms[1:], start=1):
            weight: Tensor | float = weights[place]
            if term.balance is not None and not outputs.logits.requires_grad:
                weight = self.balanced[place]
            elif term.balance is not None:
                for which in (0, place):
                    if which not in norms:
                        own = gradient_norm(values[which], outputs.logits, self.names[which])
                        norms[which] = self.processes.total(own.square()).sqrt()
                ratio = term.balance * weights[0] * norms[0] / norms[place]
                weight = torch.where(norms[place] > 0, ratio, torch.zeros_like(ratio))
                self.balanced[place] = weight
            total = total + weight * values[place]
        return total, dict(zip(self.names, values, strict=True))

    def fused(
        self, hidden: Tensor, head: Head, teacher: Signal, labels: Tensor, denominator: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The same from hidden states [B, T, H] and the heads, without the logits ever being whole."""
        total, values = linear_losses(
            self.by_position(), hidden, head, teacher.hidden, teacher.head, labels, denominator=denominator
        )
        return total, dict(zip(self.names, values, strict=True))

    def by_position(self) -> list[tuple[float, TokenLoss]]:
        """The weights and losses, if each can be computed a few positions at a time; else raises `UsageError`."""
        found = []
        for term in self.terms:
            if not isinstance(term.loss, TokenLoss) or not term.loss.independent:
                cause = "compares positions with each other, or reads more than logits"
            elif term.balance is not None:
                cause = "has a balance, which needs the gradient at the logits"
            else:
                found.append((term.weight, term.loss))
                continue
            raise UsageError(f"The loss '{term.name}' {cause}.", remedy="Train without `fused`.")
        return found


def gradient_norm(value: Tensor, at: Tensor, name: str) -> Tensor:
    """The 2-norm of the gradient of a scalar with respect to the logits `at`; the graph stays."""
    (gradient,) = torch.autograd.grad(value, at, retain_graph=True, allow_unused=True)
    if gradient is None:
        raise UsageError(f"The loss '{name}' has no gradient at the logits to balance.", remedy="Give it a weight.")
    return gradient.detach().float().norm()
