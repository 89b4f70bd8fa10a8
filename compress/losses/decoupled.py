"""Losses that treat the label's class and the other classes apart (`labels.LabelSplit`): DKD, NKD, USKD."""

from __future__ import annotations

from typing import ClassVar, Unpack

import torch
from torch import Tensor

from compress.losses.base import ClosedFormLoss, Common, Needs, TokenLoss, between, positive
from compress.losses.divergence import Distributions
from compress.losses.kl import kl_term
from compress.losses.labels import LabelSplit

SMOOTHING = 0.1
"""The share of the uniform distribution in the labels of USKD's weak classifier."""


class DecoupledKD(ClosedFormLoss):
    """Decoupled distillation, alpha TCKD + beta NCKD, the two parts of KL(p || q) weighed apart.

        TCKD = KL((p_y, 1 - p_y) || (q_y, 1 - q_y)),     NCKD = KL(p^ || q^),     KL(p || q) = TCKD + (1 - p_y) NCKD,

    with p = softmax(z_t / T), q = softmax(z_s / T), and p^, q^ over the classes other than the label. In nats, times
    T^2 if `t2`. Zhao et al. 2022 (CVPR, arXiv 2203.08679). The defaults are the released ones for CIFAR-100 and
    ResNet32x4 to ResNet8x4; beta is 2 for ResNet56 to ResNet20, and on ImageNet beta = 0.5, T = 1. It stands beside a
    cross-entropy.

    The parts are computed in the accurate form of `compress.losses.divergence`; the released code takes the logarithm
    of a softmax, and masks with -1000. Where the teacher leaves out all other classes (-inf), p^ is not defined and
    NCKD is 0. Infinite where the student leaves out a class that the teacher does not. The released training raises the
    weight of this loss linearly over the first epochs (20 on CIFAR-100): that is the training's business.
    """

    needs = Needs.TEACHER | Needs.LABELS

    def __init__(
        self,
        alpha: float = 1.0,
        beta: float = 8.0,
        temperature: float = 4.0,
        t2: bool = True,
        **common: Unpack[Common],
    ) -> None:
        super().__init__(**common)
        self.alpha, self.beta = at_least_zero(alpha, "alpha"), at_least_zero(beta, "beta")
        self.temperature = positive(temperature, "temperature")
        self.t2 = t2

    def pair(self, student: Tensor, teacher: Tensor | None, labels: Tensor | None) -> tuple[Tensor, Tensor]:
        assert teacher is not None and labels is not None
        s, t = LabelSplit(student / self.temperature, labels), LabelSplit(teacher / self.temperature, labels)
        normed = torch.zeros_like(s.margin)
        choice = Distributions(
            torch.cat([s.log_label, s.log_rest], -1), torch.cat([t.log_label, t.log_rest], -1), normed, normed
        )
        others = Distributions(s.others, t.others, s.norm, t.norm)
        target = kl_term(choice).sum(-1)
        nontarget = kl_term(others).sum(-1).masked_fill(t.alone.squeeze(-1), 0)
        to_label, to_rest = choice.gap.split(1, -1)
        gradient = self.alpha * to_rest * others.q + self.beta * others.gap.masked_fill(t.alone, 0)
        gradient.scatter_(-1, s.column, self.alpha * to_label)
        scale = self.temperature**2 if self.t2 else 1.0
        return scale * (self.alpha * target + self.beta * nontarget), gradient.mul_(scale / self.temperature)


class NormalisedKD(ClosedFormLoss):
    """Normalised distillation (NKD), -p_y log q_y - gamma T^2 sum_{i != y} p^_i log q^_i, in nats.

    p and q of the first term are at temperature 1; p^ and q^, over the classes other than the label, are at T. Yang et
    al. 2023 (ICCV, arXiv 2303.13005), as released: gamma = 1.5 and T = 1 (ImageNet), gamma = 3.5 and T = 3 (CIFAR-100).
    It stands beside a cross-entropy.

    Both terms are cross-entropies: where the student equals the teacher the value is not 0, and the gradient is
    p_y (q - 1[y]), not 0 either. Where the teacher leaves out all other classes (-inf) the second term is 0. Infinite
    where the student leaves out a class that the teacher does not. An early version of the released code leaves the
    label in p^ and q^ (its mask is true everywhere); this is the later one, and the paper's.
    """

    needs = Needs.TEACHER | Needs.LABELS

    def __init__(self, gamma: float = 1.5, temperature: float = 1.0, **common: Unpack[Common]) -> None:
        super().__init__(**common)
        self.gamma = at_least_zero(gamma, "gamma")
        self.temperature = positive(temperature, "temperature")

    def pair(self, student: Tensor, teacher: Tensor | None, labels: Tensor | None) -> tuple[Tensor, Tensor]:
        assert teacher is not None and labels is not None
        s, t = LabelSplit(student, labels), LabelSplit(teacher, labels)
        p_label = t.log_label.exp()
        value = -weighed(p_label, s.log_label)
        to_rest = p_label * s.log_rest.exp()
        gradient = (to_rest * s.log_others.exp()).scatter_(-1, s.column, -to_rest)
        if self.temperature != 1:
            s, t = LabelSplit(student / self.temperature, labels), LabelSplit(teacher / self.temperature, labels)
        p_others = t.log_others.exp()
        value = value.squeeze(-1) - self.gamma * self.temperature**2 * weighed(p_others, s.log_others).sum(-1)
        gap = (s.log_others.exp() - p_others).masked_fill_(t.alone, 0)
        return value, gradient.add_(gap, alpha=self.gamma * self.temperature)


class UniversalSelfKD(TokenLoss):
    """Self-distillation from labels (USKD): -alpha s_y log q_y - beta sum_{i != y} z_i log q^_i + mu L_weak, in nats.

    The targets are made from the student itself and are constants for the gradient: s_y = q_y^2 + 1 - mean(q_y^2), the
    mean over the positions of the batch that count; z_i ~ 1 / rank_i, Zipf's law, where the other classes are ranked
    by w^_i + q^_i and w = softmax(`weak_logits`) is the prediction of a classifier on an intermediate layer. That
    classifier learns from L_weak, its cross-entropy with labels smoothed by 0.1. Yang et al. 2023 (ICCV, arXiv
    2303.13005) with the released defaults (ImageNet; on CIFAR-100 alpha = beta = mu = 0.1). It stands beside a
    cross-entropy.

    `weak_logits` [.., V] are an argument of the call. Without them, as in a trainer without such a classifier, the
    ranks are those of q^ alone and L_weak is 0: our reduction, not a published setting. Ties keep the order of the
    classes. The released code ranks by w_i / (1 - w_y) + log q_i / (1 - log q_y), a probability plus a ratio of
    logarithms, and lets the label take a rank too; here both are distributions over the other classes, ranked from 1 to
    V - 1. A class that the student leaves out (-inf) has no rank. The mean over the batch ties positions together:
    cutting a batch into micro-batches changes the value.
    """

    needs = Needs.LABELS
    independent: ClassVar[bool] = False
    divisible: ClassVar[bool] = True

    def __init__(self, alpha: float = 1.0, beta: float = 0.1, mu: float = 0.005, **common: Unpack[Common]) -> None:
        super().__init__(**common)
        self.alpha, self.beta = at_least_zero(alpha, "alpha"), at_least_zero(beta, "beta")
        self.mu = at_least_zero(mu, "mu")
        self.weak = _SmoothedLabels(**common)

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor | None = None,
        labels: Tensor | None = None,
        weights: Tensor | None = None,
        denominator: Tensor | float | None = None,
        weak_logits: Tensor | None = None,
    ) -> Tensor:
        """`teacher_logits` are not read: there is no teacher."""
        loss = super().forward(student_logits, weak_logits, labels, weights, denominator)
        if weak_logits is None:
            return loss
        return loss + self.mu * self.weak(weak_logits, None, labels, weights, denominator)

    def values(self, student: Tensor, teacher: Tensor | None, labels: Tensor | None) -> Tensor:
        """`teacher` are the weak logits, constants here."""
        assert labels is not None
        s = LabelSplit(student, labels)
        log_label, log_others = s.log_label, s.log_others
        with torch.no_grad():
            squared = log_label.exp().square()
            count = self.processes.total(squared.new_tensor(squared.numel()))
            label_target = squared + 1 - self.processes.total(squared.sum()) / count.clamp(min=1)
            zipf = zipf_by_rank(log_others, None if teacher is None else LabelSplit(teacher, labels).log_others)
        on_label = weighed(label_target, log_label).squeeze(-1)
        return -self.alpha * on_label - self.beta * weighed(zipf, log_others).sum(-1)


class _SmoothedLabels(ClosedFormLoss):
    """Cross-entropy with the labels mixed with the uniform distribution over the classes that are not -inf."""

    needs = Needs.LABELS

    def pair(self, student: Tensor, teacher: Tensor | None, labels: Tensor | None) -> tuple[Tensor, Tensor]:
        assert labels is not None
        log_w = torch.log_softmax(student, -1)
        present = (~torch.isneginf(student)).to(student.dtype)
        target = SMOOTHING * present / present.sum(-1, keepdim=True)
        column = labels.unsqueeze(-1)
        target.scatter_add_(-1, column, torch.full_like(column, 1, dtype=student.dtype) * (1 - SMOOTHING))
        return -weighed(target, log_w).sum(-1), log_w.exp() - target


def zipf_by_rank(student: Tensor, weak: Tensor | None) -> Tensor:
    """1 / rank, normalised, of the classes by exp(student) + exp(weak) [n, V]; 0 where the student's is -inf."""
    absent = torch.isneginf(student)
    score = student if weak is None else torch.logaddexp(student, weak).masked_fill_(absent, -torch.inf)
    order = score.argsort(dim=-1, descending=True, stable=True)
    ranks = torch.arange(1, student.shape[-1] + 1, device=student.device, dtype=student.dtype)
    zipf = torch.empty_like(student).scatter_(-1, order, ranks.reciprocal().expand_as(student)).masked_fill_(absent, 0)
    return zipf / zipf.sum(-1, keepdim=True).clamp_(min=1)  # it is at least 1, unless no class is left


def weighed(p: Tensor, log_q: Tensor) -> Tensor:
    """p log q, and 0 where p is 0 whatever log q is."""
    return torch.where(p > 0, p * log_q, torch.zeros_like(log_q))


def at_least_zero(value: float, name: str) -> float:
    """`value`, or a `UsageError` when it is not a finite number of at least 0."""
    return 0.0 if value == 0 else between(value, name, 0, float("inf"))
