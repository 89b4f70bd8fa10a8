"""A distance between distributions over different vocabularies."""

from __future__ import annotations

from typing import Unpack

import torch
import torch.nn.functional as F
from torch import Tensor

from compress.losses.base import ClosedFormLoss, Common, positive


class UniversalLogit(ClosedFormLoss):
    """Universal logit distillation (ULD): sum_r |p_(r) - q_(r)|, both distributions sorted in descending order, the one
    over the smaller vocabulary continued by zeros; p = softmax(z_t / T), q = softmax(z_s / T). Between 0 and 2.

    Boizard, El Haddad, Hudelot and Colombo 2024 (arXiv 2402.12030): for student and teacher with different tokenizers.
    It is the least L1 distance over all ways to match the classes of one with those of the other, so it knows how
    certain the teacher is and not of what: it is 0 for a student with the same probabilities on other classes. Add the
    cross-entropy of the labels; the paper adds 1.5 times this loss to it.

    Positions must be aligned: position i of the student and of the teacher continue the same text. The logits may have
    different numbers of classes, [.., V_s] and [.., V_t], whatever `vocabulary` says. `temperature` is T; there is no
    T^2.

    With sigma_v the sign of q_(r) - p_(r) at the rank r of v, the gradient is q (sigma - sum_w q_w sigma_w) / T; where
    two ranks are equal, 0 is taken for the sign, and among equal classes the lower one has the higher rank.
    """

    def __init__(self, temperature: float = 1.0, **common: Unpack[Common]) -> None:
        super().__init__(**common)
        self.temperature = positive(temperature, "temperature")

    def on_common_classes(self, student: Tensor, teacher: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Both with as many classes as the wider one; a class that is added has probability 0."""
        if teacher is None:
            return student, None
        classes = max(student.shape[-1], teacher.shape[-1])
        return _widened(student, classes), _widened(teacher, classes)

    def pair(self, student: Tensor, teacher: Tensor | None, labels: Tensor | None) -> tuple[Tensor, Tensor]:
        assert teacher is not None
        ranked, order = (student / self.temperature).sort(dim=-1, descending=True, stable=True)
        q = ranked.softmax(-1)
        gap = q - (teacher / self.temperature).sort(dim=-1, descending=True).values.softmax(-1)
        sign = gap.sign()
        gradient = q * (sign - (q * sign).sum(-1, keepdim=True)) / self.temperature
        return gap.abs().sum(-1), torch.empty_like(student).scatter_(-1, order, gradient)


def _widened(logits: Tensor, classes: int) -> Tensor:
    missing = classes - logits.shape[-1]
    return F.pad(logits, (0, missing), value=-float("inf")) if missing else logits
