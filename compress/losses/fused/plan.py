"""What a fused loss computes, apart from its tensors: the terms, the two projections, and the sizes of the pieces."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from compress.losses.base import TokenLoss, chunk_rows
from compress.losses.fused.projection import Projection, pieces

CPU_BYTES, DEVICE_BYTES = 2**28, 2**30
"""Default for the logits that exist at one time, both models' together."""
CPU_ROWS = 256
"""More do not make a CPU's matrix products faster. KL of 1,024 rows, 128,256 classes, width 1,024, in CPU seconds: 13.4
with 512 rows at a time, 13.5 with 256, 14.6 with 128, 19.3 with 64; the dense loss 18.2; the products alone 12.7."""


@dataclass(frozen=True)
class Term:
    """`weight` times a loss, and how many of the student's and of the teacher's logits it reads (0: no teacher)."""

    weight: float
    loss: TokenLoss
    classes: int
    teacher_classes: int


class Tensors(NamedTuple):
    """The positions that count, and the heads: what autograd keeps for the backward pass."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    teacher_hidden: Tensor | None
    teacher_weight: Tensor | None
    teacher_bias: Tensor | None
    labels: Tensor | None


class Piece(NamedTuple):
    """Logits [n, C] of some rows: the student's, the teacher's; and the labels [n] of those rows."""

    rows: slice
    student: Tensor
    teacher: Tensor | None
    labels: Tensor | None

    def seen_by(self, term: Term) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The arguments of a term's loss."""
        student, teacher = term.loss.on_common_classes(self.student, self.teacher if term.teacher_classes else None)
        return student, teacher, self.labels

    def parts(self) -> Iterator[Piece]:
        """The piece in parts: a loss needs some ten tensors of the size of what it is given. On a CPU they stay in the
        caches, elsewhere they need as much again as the piece itself."""
        count, classes = self.student.shape
        for part in pieces(count, min(chunk_rows(count, classes, self.student.device), -(-count // 8))):
            yield Piece(
                slice(self.rows.start + part.start, self.rows.start + part.stop),
                self.student[part],
                None if self.teacher is None else self.teacher[part],
                None if self.labels is None else self.labels[part],
            )


@dataclass(frozen=True)
class Plan:
    """`classes` and `teacher_classes` count the columns that are projected (no teacher: 0)."""

    terms: tuple[Term, ...]
    student: Projection
    teacher: Projection | None
    classes: int
    teacher_classes: int
    memory: int
    """In bytes, for logits."""
    wanted: Sequence[bool]
    """Whether hidden states, weight and bias of the student need gradients."""

    @property
    def dtype(self) -> torch.dtype:
        return self.student.dtype

    @property
    def rows(self) -> int:
        """Rows of logits, of all classes and both models, that the memory holds."""
        return max(1, self.memory // ((self.classes + self.teacher_classes) * self.dtype.itemsize))


def default_memory(device: torch.device, row_bytes: int) -> int:
    """For rows of logits that take so many bytes."""
    return min(CPU_BYTES, CPU_ROWS * row_bytes) if device.type == "cpu" else DEVICE_BYTES


class Logits:
    """Projects rows and columns of both models' logits, into the same memory over and over: a piece may be overwritten,
    and lasts until the next."""

    def __init__(self, plan: Plan, tensors: Tensors, rows: int | None = None, columns: int | None = None) -> None:
        """For pieces of at most `rows` x `columns`: of as many rows as the memory holds, and of all columns."""
        self.plan, self.tensors = plan, tensors
        self.rows = min(len(tensors.hidden), plan.rows if rows is None else rows)
        new = tensors.hidden.new_empty
        self.student = new(self.rows * (columns or plan.classes), dtype=plan.dtype)
        self.teacher = new(self.rows * min(plan.teacher_classes, columns or plan.teacher_classes), dtype=plan.dtype)

    def piece(self, rows: slice, columns: slice | None = None) -> Piece:
        """The logits of some rows and some columns, or of all columns that the plan has."""
        plan, t = self.plan, self.tensors
        student = _project(plan.student, columns or slice(plan.classes), self.student, rows, *t[:3])
        teacher = None
        if plan.teacher is not None and t.teacher_hidden is not None and t.teacher_weight is not None:
            place = columns or slice(plan.teacher_classes)
            teacher = _project(
                plan.teacher, place, self.teacher, rows, t.teacher_hidden, t.teacher_weight, t.teacher_bias
            )
        return Piece(rows, student, teacher, None if t.labels is None else t.labels[rows])

    def pieces(self) -> Iterator[Piece]:
        """All rows, with all columns."""
        for rows in pieces(len(self.tensors.hidden), max(1, self.rows)):
            yield self.piece(rows)


def _project(
    projection: Projection,
    columns: slice,
    memory: Tensor,
    rows: slice,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
) -> Tensor:
    hidden, weight = hidden[rows], weight[columns]
    out = memory[: len(hidden) * len(weight)].view(len(hidden), len(weight))
    return projection.logits(hidden, weight, None if bias is None else bias[columns], out)
