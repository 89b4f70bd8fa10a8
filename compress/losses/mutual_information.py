"""A term for training a teacher: the conditional mutual information between its input and its output."""

from __future__ import annotations

import math
from typing import Unpack

import torch
from torch import Tensor

from compress.errors import UsageError
from compress.losses.base import Common, Needs, TokenLoss, as_float, between
from compress.losses.features import check_labels, means_by_class
from compress.losses.kl import ReverseKL

SAMPLES = 8
"""Samples of a class in one update of the published average."""
ESTABLISHED = 2**40
"""A number of samples beside which those to come do not count."""


class ConditionalMutualInformation(TokenLoss):
    """MCMI: minus the conditional mutual information of input and output given the class, E KL(p(x) || Q^y), in nats; a
    term for training a teacher.

    The value of a position is -KL(p(x) || Q^y), with the softmax p(x) of the model that is trained and the centroid
    Q^y = E[p(x) | y] of the class y of its label. With cross-entropy and a positive weight lambda this is the MCMI
    objective CE - lambda CMI of Ye et al., ICLR 2024 (arXiv 2401.08732), under which a *teacher* is fine-tuned before
    it teaches: it becomes less sure within a class, and says more about each example. Their scripts use lambda of 0.1
    to 0.25. `maximise=False` turns the sign: then the value is KL(p(x) || Q^y), which concentrates a class.

    Gradient with respect to the logits (of KL): p (log p - log Q^y - KL), with Q^y constant. That loses nothing: at
    Q^y = E[p | y] the derivative of CMI with respect to Q^y along distributions is zero.

    **Centroids.** Q^y is an average over the positions of class y that are seen in training mode, those of the batch
    included, each once whatever its weight, those of all processes. n positions weigh in with max(n / N, 1 -
    decay^(n / 8)), N being all so far: a plain mean of the first 8 / (1 - decay) = 80,000 of a class, then the
    published moving average (`decay` 0.9999 for each 8 samples of a class), the same to first order however a batch is
    cut. The published algorithm instead takes one pass over the data first, then runs 8 further samples of every class
    through the model at each step; for that, `start` with `class_means` of the probabilities, make the loss with
    `running=False`, and call `update` at each step. (The training loop that was released has this update commented
    out.)

    A class that has no centroid yet (in evaluation) has the value 0. Q^y is floored at the smallest normal float, so
    that the value is at most 88 nats, also for one-hot outputs of several labels.

    Memory: the centroids, 4 classes^2 bytes. More than `limit` classes are refused. Raises `UsageError` for logits of
    another number of classes (of fewer, if `vocabulary` is "common").
    """

    needs = Needs.LABELS
    independent = False
    divisible = True
    centroids: Tensor
    counts: Tensor

    def __init__(
        self,
        classes: int,
        decay: float = 0.9999,
        maximise: bool = True,
        running: bool = True,
        limit: int = 16384,
        **common: Unpack[Common],
    ) -> None:
        super().__init__(**common)
        if not 1 <= classes <= limit:
            raise UsageError(
                f"Centroids of {classes} classes take {4 * classes**2 / 2**30:.1f} GiB.",
                remedy=f"The loss is meant for classifiers; up to {limit} classes, or give a higher limit.",
            )
        self.decay = between(decay, "decay", 0, 1, ends=True)
        self.maximise, self.running = maximise, running
        self.divergence = ReverseKL()
        self.register_buffer("centroids", torch.zeros(classes, classes))
        self.register_buffer("counts", torch.zeros(classes, dtype=torch.int64))

    def start(self, centroids: Tensor) -> ConditionalMutualInformation:
        """Begin the moving average at these distributions [classes, classes]; a row of zeros is a class without one."""
        total = centroids.sum(-1)
        if centroids.shape != self.centroids.shape or bool(((total - 1).abs() > 1e-3).logical_and(total != 0).any()):
            wanted = tuple(self.centroids.shape)
            raise UsageError("The centroids are not distributions.", remedy=f"Give rows that sum to 1, {wanted}.")
        self.centroids.copy_(centroids)
        self.counts.copy_((total != 0) * ESTABLISHED)
        return self

    @torch.no_grad()
    def update(self, logits: Tensor, labels: Tensor) -> None:
        """Let logits [n, classes] with labels [n] weigh in."""
        check_labels(labels, len(self.counts))
        probabilities, labels = (self.processes.gather(x) for x in (torch.softmax(as_float(logits), -1), labels))
        if not len(labels):
            return
        present, counts, means = means_by_class(probabilities, labels)
        self.counts[present] += counts
        log_decay = math.log(self.decay) if self.decay else -math.inf
        share = torch.maximum(counts / self.counts[present], -torch.expm1(counts * (log_decay / SAMPLES)))
        means = means.to(self.centroids.dtype)
        self.centroids[present] += share.to(means.dtype).unsqueeze(-1) * (means - self.centroids[present])

    def on_common_classes(self, student: Tensor, teacher: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The logits of the classes that have centroids: with `vocabulary` "common" the first ones."""
        student, _ = super().on_common_classes(student, None)
        return student[..., : len(self.counts)] if self.vocabulary == "common" else student, None

    def values(self, student: Tensor, teacher: Tensor | None, labels: Tensor | None) -> Tensor:
        assert labels is not None
        if self.training and self.running:
            self.update(student.detach(), labels)
        floored = self.centroids[labels].clamp(min=torch.finfo(self.centroids.dtype).tiny).log().to(student.dtype)
        centroid = torch.where((self.counts[labels] > 0).unsqueeze(-1), floored, student.detach())
        divergence = self.divergence.values(student, centroid, None)
        return -divergence if self.maximise else divergence

    def check(self, student: Tensor, teacher: Tensor | None, labels: Tensor | None) -> None:
        super().check(student, teacher, labels)
        if not self.running and not bool(self.counts.any()):
            raise UsageError(
                f"{type(self).__name__} has no centroids.", remedy="Call `start` or `update` first, or let them run."
            )
        if student.shape[-1] != len(self.counts):
            raise UsageError(
                f"The logits have {student.shape[-1]} classes, the centroids {len(self.counts)}.",
                remedy="Make the loss with the model's number of classes.",
            )
