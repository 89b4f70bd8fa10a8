"""What losses make of a label, and the loss on labels in the same form as the distillation losses."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from compress.losses.base import ClosedFormLoss, Needs


class LabelSplit:
    """Logits z [n, V] and labels y [n] as two choices: label or not, and, if not, which of the others.

    With L = logsumexp of the other logits and the margin m = z_y - L,

        log q_y = -softplus(-m),     log (1 - q_y) = -softplus(m),     log q^_i = z_i - L  (i != y),

    where q^ is the distribution over the other classes alone. Both choices keep their digits however close q_y is to
    one (log(q_y) and log(1 - q_y) of a softmax do not: in float32 they are 0 and -inf from a margin of 17 on), and the
    label is left out of q^ by -inf, exactly, rather than by a large negative number.

    A row whose other classes are all -inf has q_y = 1 and no q^: `alone` is true, and q^ is 0 everywhere.
    """

    def __init__(self, logits: Tensor, labels: Tensor) -> None:
        self.column = labels.unsqueeze(-1)
        self.others = logits.scatter(-1, self.column, -torch.inf)
        norm = self.others.logsumexp(-1, keepdim=True)
        self.margin = logits.gather(-1, self.column) - norm
        self.alone = torch.isneginf(norm)
        self.norm = torch.where(self.alone, torch.zeros_like(norm), norm)

    @cached_property
    def log_label(self) -> Tensor:
        """log q_y [n, 1]."""
        return logsigmoid(self.margin)

    @cached_property
    def log_rest(self) -> Tensor:
        """log (1 - q_y) [n, 1]."""
        return logsigmoid(-self.margin)

    @cached_property
    def log_others(self) -> Tensor:
        """log q^ [n, V], -inf at the label."""
        return self.others - self.norm


class CrossEntropy(ClosedFormLoss):
    """Negative log-likelihood of the labels in nats: value = -log q(label), gradient q - 1[label].

    Both keep their digits where the student is sure: 1 - q(label) is not formed by subtraction.
    """

    needs = Needs.LABELS

    def pair(self, student: Tensor, teacher: Tensor | None, labels: Tensor | None) -> tuple[Tensor, Tensor]:
        assert labels is not None
        split = LabelSplit(student, labels)
        missing = split.log_rest.exp()
        gradient = split.log_others.exp().mul_(missing).scatter_(-1, split.column, -missing)
        return -split.log_label.squeeze(-1), gradient
