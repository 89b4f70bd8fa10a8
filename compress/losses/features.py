"""A loss on features: the direction and the norm of the student's, against the class means of the teacher's."""

from __future__ import annotations

from typing import Unpack

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compress.errors import UsageError
from compress.losses.base import IGNORED, Common, Loss, Needs, Outputs, as_float, counted

ROWS = 2**14
"""Rows whose mean is taken at once: a float32 sum of more loses digits, a running mean of means does not."""


def means_by_class(values: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The classes that occur [k], how often [k], and the mean of their values [k, D]. From values [n, D], labels [n];
    the rows of a class are added in their order, so that equal batches give equal bits."""
    present, counts = labels.unique(return_counts=True)
    means = torch.segment_reduce(values[labels.argsort(stable=True)], "mean", lengths=counts, axis=0)
    return present, counts, means


class ClassMeans(nn.Module):
    """The mean of the features of each class over all batches seen so far; zeros for a class not seen yet.

    Buffers `means` [classes, width] in float32 and `counts` [classes]: 4 classes width bytes.
    """

    means: Tensor
    counts: Tensor

    def __init__(self, classes: int, width: int) -> None:
        super().__init__()
        self.register_buffer("means", torch.zeros(classes, width))
        self.register_buffer("counts", torch.zeros(classes, dtype=torch.int64))

    @torch.no_grad()
    def update(self, features: Tensor, labels: Tensor) -> None:
        """Add features [.., width] with labels [..]; label -100 is left out."""
        features, labels = features.reshape(-1, features.shape[-1]), labels.reshape(-1)
        check_labels(labels, len(self.counts))
        keep = labels != IGNORED
        features, labels = features[keep].to(self.means.dtype), labels[keep]
        for rows, of_rows in zip(features.split(ROWS), labels.split(ROWS), strict=True):
            if len(of_rows):
                present, counts, means = means_by_class(rows, of_rows)
                self.counts[present] += counts
                share = (counts / self.counts[present]).to(means.dtype).unsqueeze(-1)
                self.means[present] += share * (means - self.means[present])


def class_means(features: Tensor, labels: Tensor, classes: int) -> Tensor:
    """The mean feature of each class, [classes, D], from features [.., D] and labels [..]; zeros for a class without
    any. Over batches, use a `ClassMeans`: `update` it with each, and read `means`."""
    found = ClassMeans(classes, features.shape[-1]).to(features.device, as_float(features[:0]).dtype)
    found.update(features, labels)
    return found.means


class NormDirection(Loss):
    """Norm and direction (ND): 1 - <f_s, e_c> / max(|f_s|, |f_t|), the student's features against e_c, the direction of
    the teacher's class mean.

    f_s, f_t: features of student and teacher; e_c = m_c / |m_c| with the teacher's mean feature m_c of the class c of
    the label. No unit; 0 when f_s points along m_c and is at least as long as f_t, 1 when it is orthogonal or zero, 2
    at most.

    Wang et al., ECCV 2024 (arXiv 2305.17007), and their released code. It is added to another loss, with a weight of
    0.5 to 4 there. Features are those of the layer before the classifier; for a language model (our extension) the
    hidden states, a class being the next token: m_c is the mean state of the positions that predict it.

    `student_width` unlike `teacher_width`: f_s is W f + b of the student's feature, learned with the student. The
    released code puts batch normalisation and dropout of 0.5 before W; we do not, because the first makes a position's
    value depend on its batch, and the second on a global random state. Equal widths: f_s is the feature itself, as
    there. `seed` draws W.

    The class means run over the batches that are seen in training mode: a batch counts before its loss is computed,
    each position once whatever its weight, those of all processes. `fix` gives means computed beforehand instead,
    as the paper does. A position whose class has no mean yet (in evaluation) or a mean of zero, or whose two features
    are both zero, is left out; a `denominator` that the caller gives does not know of that.

    `layer` and `teacher_layer` choose the hidden states for a trainer: 0 is the embedding, -1 the last.
    Memory: 4 classes teacher_width bytes. Raises `UsageError` for shapes, labels and layers that do not fit.
    """

    needs = Needs.TEACHER | Needs.LABELS | Needs.FEATURES
    divisible = True
    fixed: Tensor

    def __init__(
        self,
        classes: int,
        student_width: int,
        teacher_width: int,
        layer: int = -1,
        teacher_layer: int = -1,
        seed: int = 0,
        **common: Unpack[Common],
    ) -> None:
        super().__init__(**common)
        if min(classes, student_width, teacher_width) < 1:
            sizes = f"{classes} classes, a student's width of {student_width} and a teacher's of {teacher_width}"
            raise UsageError(f"{type(self).__name__} has {sizes}.", remedy="Give positive numbers.")
        self.layer, self.teacher_layer = layer, teacher_layer
        self.widths = student_width, teacher_width
        self.running = ClassMeans(classes, teacher_width)
        self.register_buffer("fixed", torch.zeros((), dtype=torch.bool))
        self.weight: nn.Parameter | None = None
        self.bias: nn.Parameter | None = None
        if student_width != teacher_width:
            bound = student_width**-0.5  # that of `nn.Linear`
            uniform = torch.rand(teacher_width, student_width, generator=torch.Generator().manual_seed(seed))
            self.weight = nn.Parameter((2 * uniform - 1) * bound)
            self.bias = nn.Parameter(torch.zeros(teacher_width))

    def fix(self, means: Tensor) -> NormDirection:
        """Use these class means [classes, teacher_width] from now on, in place of running ones; a row of zeros is a
        class without a mean."""
        if means.shape != self.running.means.shape:
            wanted = tuple(self.running.means.shape)
            raise UsageError(f"The class means are {tuple(means.shape)}.", remedy=f"Give a tensor of shape {wanted}.")
        self.running.means.copy_(means)
        self.fixed.fill_(True)
        return self

    def project(self, features: Tensor) -> Tensor:
        """The student's features in the teacher's space."""
        if self.weight is None or self.bias is None:
            return features
        return as_float(F.linear(features, self.weight.to(features.dtype), self.bias.to(features.dtype)))

    def forward(
        self,
        student_features: Tensor,
        teacher_features: Tensor,
        labels: Tensor,
        weights: Tensor | None = None,
        denominator: Tensor | float | None = None,
    ) -> Tensor:
        self._check(student_features, teacher_features, labels, weights)
        student = as_float(student_features).reshape(-1, self.widths[0])
        teacher = as_float(teacher_features).detach().reshape(-1, self.widths[1])
        labels = labels.reshape(-1)
        weights = None if weights is None else weights.reshape(-1)
        keep = counted(labels, weights)
        if keep is not None:
            student, teacher, labels = student[keep], teacher[keep], labels[keep]
            weights = None if weights is None else weights[keep]
        if self.training and not self.fixed:
            self.running.update(self.processes.gather(teacher), self.processes.gather(labels))
        student = self.project(student)
        centre, teacher = self.running.means[labels].to(student.dtype), teacher.to(student.dtype)
        length = torch.linalg.vector_norm(centre, dim=-1)
        longest = torch.maximum(torch.linalg.vector_norm(student, dim=-1), torch.linalg.vector_norm(teacher, dim=-1))
        known = (length > 0) & (longest > 0)
        direction = centre[known] / length[known].unsqueeze(-1)
        values = 1 - (student[known] * direction).sum(-1) / longest[known]
        if not len(values) and self.reduction != "none":
            return values.sum()  # of nothing: zero
        return self.reduce(values, None if weights is None else weights[known], denominator)

    def of(self, outputs: Outputs, denominator: Tensor | float | None = None) -> Tensor:
        if outputs.labels is None:
            raise UsageError(f"{type(self).__name__} needs labels.", remedy="Pass labels of the logits' shape.")
        student = hidden_state(outputs.features, self.layer, "student")
        teacher = hidden_state(outputs.teacher_features, self.teacher_layer, "teacher")
        return self(student, teacher, outputs.labels, outputs.weights, denominator)

    def _check(self, student: Tensor, teacher: Tensor, labels: Tensor, weights: Tensor | None) -> None:
        widths = student.shape[-1], teacher.shape[-1]
        if widths != self.widths:
            raise UsageError(
                f"The student's features have a width of {widths[0]}, the teacher's of {widths[1]}.",
                remedy=f"This loss was made for {self.widths[0]} and {self.widths[1]}.",
            )
        for name, shape in (
            ("teacher's features", teacher.shape[:-1]),
            ("labels", labels.shape),
            ("weights", labels.shape if weights is None else weights.shape),
        ):
            if shape != student.shape[:-1]:
                raise UsageError(
                    f"The {name} have positions {tuple(shape)}, the student's features {tuple(student.shape[:-1])}.",
                    remedy="All need the same positions.",
                )
        check_labels(labels, len(self.running.counts))


def check_labels(labels: Tensor, classes: int) -> None:
    """Raise `UsageError` for a label that is neither a class nor -100."""
    wrong = labels[(labels != IGNORED) & ((labels < 0) | (labels >= classes))]
    if len(wrong):
        raise UsageError(
            f"A label is {int(wrong[0])}; there are {classes} classes.",
            remedy=f"Labels are class numbers from 0; {IGNORED} leaves a position out.",
        )


def hidden_state(states: tuple[Tensor, ...], layer: int, whose: str) -> Tensor:
    """The hidden state `layer`, counted from the embedding, or from the end if it is negative."""
    if not -len(states) <= layer < len(states):
        raise UsageError(
            f"There is no layer {layer}: the {whose} gives {len(states)} hidden states.",
            remedy="Layer 0 is the embedding, -1 the last one.",
        )
    return states[layer]
