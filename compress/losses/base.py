"""What every loss shares: shapes, masks, weights, the reduction, and how the gradient is had.

A loss over positions is called `loss(student_logits, teacher_logits, labels=None, weights=None, denominator=None)` with
logits `[N, V]` or `[B, T, V]` that are already shifted. A position counts unless its label is -100 or its weight is 0.
With values v_i in nats and weights w_i (1 where none are given),

    mean = sum_i w_i v_i / D,      sum = sum_i w_i v_i,      none = w_i v_i of the positions that count.

D is sum_i w_i, or the `denominator` that the caller gives: the count of a whole step over micro-batches and processes,
so that a position weighs the same however the step is cut. Positions that do not count are removed before anything is
computed, so they cost nothing and may hold anything. When none counts, the result is a zero that is still connected to
the graph. The teacher receives no gradient.

There are two ways to write a loss. A `TokenLoss` gives its values with operations that torch can differentiate. A
`ClosedFormLoss` gives values *and* their gradient with respect to the student's logits: it is then computed in chunks
of rows that stay in the caches, keeps one tensor for the backward pass, and can be evaluated by `compress.losses.fused`
without the logits ever being whole.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypedDict, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from compress.errors import UsageError
from compress.losses.processes import ALONE, Processes

IGNORED = -100
"""The label of a position that is left out, as everywhere in the field."""

CPU_VALUES, DEVICE_VALUES = 2**18, 2**26
"""Values of a chunk. On two cores, KL of 2,040 rows of 4,096 classes: 0.12 s in chunks of 2^18, 0.18 s in one piece."""

T = TypeVar("T")
Reduction = Literal["mean", "sum", "none"]
Vocabulary = Literal["equal", "common"]


class Needs(enum.Flag):
    """What a loss reads besides the student's logits."""

    NOTHING = 0
    TEACHER = enum.auto()
    """The teacher's logits."""
    LABELS = enum.auto()
    FEATURES = enum.auto()
    """The hidden states of student and teacher."""
    TOKENS = enum.auto()
    """The token at each position."""


@dataclass(frozen=True)
class Outputs:
    """What two models made of one batch, position by position: all that a loss may ask for.

    Logits [.., V], `labels` (what the position predicts; -100 does not count), `weights` and `tokens` (what the
    position reads) [..], hidden states from the embedding to the last layer, each [.., width].
    """

    logits: Tensor
    teacher_logits: Tensor | None = None
    labels: Tensor | None = None
    weights: Tensor | None = None
    tokens: Tensor | None = None
    features: tuple[Tensor, ...] = ()
    teacher_features: tuple[Tensor, ...] = ()


class Common(TypedDict, total=False):
    """The options that every loss has."""

    reduction: Reduction
    vocabulary: Vocabulary


class Loss(nn.Module):
    """Base of all losses: the reduction, and the way a trainer calls them.

    `vocabulary` says what to do when the student has more classes than the teacher, or fewer: "equal" refuses;
    "common" drops the columns that only one of them has (padding of the embedding) and normalises over the others.
    """

    needs: ClassVar[Needs] = Needs.TEACHER
    divisible: ClassVar[bool] = False
    """Whether processes that each have some rows of a batch compute what one process computes of all, by means of
    `processes`, which a trainer sets. An `independent` `TokenLoss` needs no means."""
    processes: Processes = ALONE

    def __init__(self, *, reduction: Reduction = "mean", vocabulary: Vocabulary = "equal") -> None:
        super().__init__()
        self.reduction = one_of(reduction, ("mean", "sum", "none"), "reduction")
        self.vocabulary = one_of(vocabulary, ("equal", "common"), "vocabulary")

    def of(self, outputs: Outputs, denominator: Tensor | float | None = None) -> Tensor:
        """The loss of a trainer's batch."""
        raise NotImplementedError

    def reduce(
        self, values: Tensor, weights: Tensor | None = None, denominator: Tensor | float | None = None
    ) -> Tensor:
        """The reduction of the values [N] of the positions that count, as the module's text defines it."""
        weighted = values if weights is None else values * weights.to(values.dtype)
        if self.reduction == "none":
            return weighted
        total = weighted.sum()
        if self.reduction == "sum":
            return total
        if denominator is None:
            denominator = len(values) if weights is None else weights.sum()
        return total / (denominator.to(values.dtype) if isinstance(denominator, Tensor) else denominator)


class TokenLoss(Loss):
    """Base of the losses with one value for each position. A subclass gives `values`.

    `independent` says that the value of a position depends on that position alone; a loss that compares positions of
    the batch with each other is not, and cannot be cut into chunks of rows. A loss over something else than positions
    gives its mean to each of them.
    """

    independent: ClassVar[bool] = True

    def values(self, student: Tensor, teacher: Tensor | None, labels: Tensor | None) -> Tensor:
        """Values in nats [N] from logits [N, V] in float32 or float64 (and labels [N]) of the positions that count;
        differentiable with respect to the student's logits."""
        raise NotImplementedError

    def pair(self, student: Tensor, teacher: Tensor | None, labels: Tensor | None) -> tuple[Tensor, Tensor]:
        """The values [N], and the gradient of each with respect to its row of the student's logits [N, V]."""
        with torch.enable_grad():
            leaf = student.detach().requires_grad_()
            values = self.values(leaf, teacher, labels)
            (gradient,) = torch.autograd.grad(values.sum(), leaf)
        return values.detach(), gradient

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor | None = None,
        labels: Tensor | None = None,
        weights: Tensor | None = None,
        denominator: Tensor | float | None = None,
    ) -> Tensor:
        student, teacher = self.on_common_classes(student_logits, teacher_logits)
        check_positions(student, teacher, labels=labels, weights=weights)
        student = student.reshape(-1, student.shape[-1])
        teacher = None if teacher is None else teacher.detach().reshape(student.shape)
        labels = None if labels is None else labels.reshape(-1)
        weights = None if weights is None else weights.reshape(-1)
        keep = counted(labels, weights)
        if keep is not None:
            student = student[keep]
            teacher, labels, weights = (None if each is None else each[keep] for each in (teacher, labels, weights))
        self.check(student, teacher, labels)
        apart = not self.divisible or self.processes.size == 1
        if student.shape[0] == 0 and apart and self.reduction != "none":
            return as_float(student).sum()  # of nothing: zero, whatever the positions left out hold
        return self.reduce(self.all_values(student, teacher, labels), weights, denominator)

    def of(self, outputs: Outputs, denominator: Tensor | float | None = None) -> Tensor:
        teacher = outputs.teacher_logits if Needs.TEACHER in self.needs else None
        return self(outputs.logits, teacher, outputs.labels, outputs.weights, denominator)

    def on_common_classes(self, student: Tensor, teacher: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Both logits over the same classes, as `vocabulary` says."""
        if teacher is None or student.shape[-1] == teacher.shape[-1]:
            return student, teacher
        if self.vocabulary == "equal":
            raise UsageError(
                f"The student has {student.shape[-1]} classes, the teacher {teacher.shape[-1]}.",
                remedy="If the first ones are the same and the rest is padding, give vocabulary='common'.",
            )
        classes = min(student.shape[-1], teacher.shape[-1])
        return student[..., :classes], teacher[..., :classes]

    def check(self, student: Tensor, teacher: Tensor | None, labels: Tensor | None) -> None:
        """Raise `UsageError` for inputs that are missing or out of range."""
        if Needs.TEACHER in self.needs and teacher is None:
            raise UsageError(f"{type(self).__name__} needs the teacher's logits.", remedy="Pass them, or a teacher.")
        if Needs.LABELS not in self.needs:
            return
        if labels is None:
            raise UsageError(f"{type(self).__name__} needs labels.", remedy="Pass labels of the logits' shape.")
        if labels.numel() and not (int(labels.min()) >= 0 and int(labels.max()) < student.shape[-1]):
            raise UsageError(
                f"A label is {int(labels.min())} or {int(labels.max())}; there are {student.shape[-1]} classes.",
                remedy=f"Labels are class numbers from 0; {IGNORED} leaves a position out.",
            )

    def all_values(self, student: Tensor, teacher: Tensor | None, labels: Tensor | None) -> Tensor:
        """`values` of logits of any floating dtype."""
        student = as_float(student)
        return self.values(student, None if teacher is None else teacher.to(student.dtype), labels)


class ClosedFormLoss(TokenLoss):
    """Base of the losses whose gradient is written down. A subclass gives `pair`."""

    def pair(self, student: Tensor, teacher: Tensor | None, labels: Tensor | None) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def values(self, student: Tensor, teacher: Tensor | None, labels: Tensor | None) -> Tensor:
        return _InChunks.apply(self, student, teacher, labels)

    def all_values(self, student: Tensor, teacher: Tensor | None, labels: Tensor | None) -> Tensor:
        return self.values(student, teacher, labels)  # each chunk is taken to float32 by itself


class _InChunks(torch.autograd.Function):
    """Values of a `ClosedFormLoss`, chunk by chunk; the gradient is kept for the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, loss: ClosedFormLoss, student: Tensor, teacher: Tensor | None, labels: Tensor | None
    ) -> Tensor:
        dtype = torch.promote_types(student.dtype, torch.float32)
        values = student.new_empty(len(student), dtype=dtype)
        wanted = ctx.needs_input_grad[1]
        kept = torch.empty_like(student) if wanted else None
        rows = chunk_rows(len(student), student.shape[1], student.device)
        for start in range(0, len(student), rows):
            part = slice(start, start + rows)
            values[part], gradient = loss.pair(
                student[part].to(dtype),
                None if teacher is None else teacher[part].to(dtype),
                None if labels is None else labels[part],
            )
            if kept is not None:
                kept[part] = gradient
        if kept is not None:
            ctx.save_for_backward(kept)
        return values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[None, Tensor, None, None]:  # type: ignore[override]
        (gradient,) = ctx.saved_tensors
        return None, gradient * upstream.unsqueeze(-1).to(gradient.dtype), None, None


def chunk_rows(rows: int, classes: int, device: torch.device) -> int:
    """Rows to take at once: on a CPU as many as stay in its caches, elsewhere as many as bound the memory."""
    values = CPU_VALUES if device.type == "cpu" else DEVICE_VALUES
    return max(1, min(rows, values // max(1, classes)))


def counted(labels: Tensor | None, weights: Tensor | None) -> Tensor | None:
    """The positions that count, bool [N]; None when all do."""
    marks = [] if labels is None else [labels != IGNORED]
    marks += [] if weights is None else [weights != 0]
    if not marks:
        return None
    keep = marks[0] if len(marks) == 1 else marks[0] & marks[1]
    return None if bool(keep.all()) else keep


def check_positions(student: Tensor, teacher: Tensor | None = None, **others: Tensor | None) -> None:
    """Raise `UsageError` unless all have the positions of the student's logits."""
    if teacher is not None and teacher.shape != student.shape:
        raise UsageError(
            f"The student's logits are {tuple(student.shape)}, the teacher's {tuple(teacher.shape)}.",
            remedy="Both need the same positions and the same vocabulary.",
        )
    labels = others.get("labels")
    if labels is not None and labels.is_floating_point():
        remedy = "Labels are class numbers, of an integer type; weights are the argument after them."
        raise UsageError(f"The labels are {labels.dtype}.", remedy=remedy)
    for name, tensor in others.items():
        if tensor is not None and tensor.shape != student.shape[:-1]:
            raise UsageError(
                f"The {name} are {tuple(tensor.shape)}, the logits {tuple(student.shape)}.",
                remedy=f"Give {name} of shape {tuple(student.shape[:-1])}.",
            )


def as_float(logits: Tensor) -> Tensor:
    """Half precisions in float32; float32 and float64 as they are."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def positive(value: float, name: str) -> float:
    """`value`, or a `UsageError` when it is not a positive finite number."""
    return between(value, name, 0, float("inf"))


def between(value: float, name: str, low: float, high: float, *, ends: bool = False) -> float:
    """`value`, or a `UsageError` when it does not lie between `low` and `high` (which count if `ends`)."""
    if low < value < high or (ends and value in (low, high)):
        return float(value)
    brackets = "[]" if ends else "()"
    remedy = f"Give a number in {brackets[0]}{low:g}, {high:g}{brackets[1]}."
    raise UsageError(f"{name} is {value}.", remedy=remedy)


def one_of(value: T, allowed: tuple[T, ...], name: str) -> T:
    """`value`, or a `UsageError` when it is not one of `allowed`."""
    if value in allowed:
        return value
    raise UsageError(f"There is no {name} '{value}'.", remedy=f"Use one of {', '.join(map(str, allowed))}.")
