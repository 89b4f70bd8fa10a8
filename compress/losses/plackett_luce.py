"""Distillation of the teacher's ranking: the Plackett-Luce likelihood of its order, weighted by its probabilities.

In the Plackett-Luce model a ranking pi is drawn by choosing its first class with the probabilities softmax(s), then its
second one among those that are left, and so on. With Z_k = sum_{l >= k} exp(s_{pi_l}) and one weight for each rank,

    L = sum_k alpha_k [log Z_k - s_{pi_k}],
    dL/ds_{pi_i} = exp(s_{pi_i}) sum_{k <= i} alpha_k / Z_k - alpha_i.

L is convex in s and does not change when a constant is added to s. Both are one scan each, in the log domain, so that
no class is too unlikely for them. alpha = (1, 0, ...) gives the cross-entropy of the first class, equal weights give
ListMLE (Xia et al. 2008).
"""

from __future__ import annotations

from typing import Unpack

import torch
from torch import Tensor

from compress.errors import UsageError
from compress.losses.base import ClosedFormLoss, Common, Needs, positive

NEVER = -float("inf")


class PlackettLuce(ClosedFormLoss):
    """Plackett-Luce distillation (PLD): L of the ranking that begins with the label and goes on with the other classes
    by descending logit of the teacher t (the lower class first where two are equal), with alpha = softmax(t / tau) of
    the classes so ranked, not renormalised; in nats.

    Bassam, Zhu and Bian 2025 (arXiv 2506.12542). `teacher_temperature` is tau, 1 in the paper's ImageNet runs and 4 in
    those on CIFAR-100; it shapes the weights alone, and the student's logits have no temperature. There is no
    cross-entropy to be added: the first term is that of the label, times the teacher's probability of the label.

    `top_k` is not of the paper. It saves the sort of a large vocabulary: the label and the best k - 1 others are
    ranked, and each class of the rest is chosen as if it came next,

        L_k = sum_{i <= k} alpha_i [log Z_i - s_{pi_i}] + sum_{j > k} alpha_j [log Z_{k+1} - s_{pi_j}].

    L_k is convex as well, falls as k grows, and is L for k >= C - 1. Among classes that tie for rank k, `torch.topk`
    chooses. Raises `UsageError` for a top_k below 1.
    """

    needs = Needs.TEACHER | Needs.LABELS

    def __init__(self, teacher_temperature: float = 1.0, top_k: int | None = None, **common: Unpack[Common]) -> None:
        super().__init__(**common)
        self.teacher_temperature = positive(teacher_temperature, "teacher_temperature")
        if top_k is not None and top_k < 1:
            raise UsageError(f"top_k is {top_k}.", remedy="Give the number of ranks, at least 1, or none for all.")
        self.top_k = top_k

    def pair(self, student: Tensor, teacher: Tensor | None, labels: Tensor | None) -> tuple[Tensor, Tensor]:
        assert teacher is not None
        assert labels is not None
        tempered = teacher / self.teacher_temperature
        # On a CPU torch's float32 log_softmax of 131,072 classes is 4e-6 off, forty times as much as this.
        log_weights = tempered - tempered.logsumexp(-1, keepdim=True)
        keys = teacher.scatter(-1, labels.unsqueeze(-1), float("inf"))
        if self.top_k is not None and self.top_k < student.shape[-1] - 1:
            return tied_tail_loss(student, log_weights, top_ranks(keys, self.top_k))
        order = keys.argsort(dim=-1, descending=True, stable=True)
        values, gradient = ranked_loss(student.gather(-1, order), log_weights.gather(-1, order))
        return values, torch.empty_like(student).scatter_(-1, order, gradient)


def ranked_loss(ranked: Tensor, log_weights: Tensor) -> tuple[Tensor, Tensor]:
    """L [n] and dL/ds [n, C] of logits s [n, C] that stand in the order of the ranking, and log alpha [n, C].

    A class with a weight that the student leaves out (-inf) makes L infinite where classes that can be chosen come
    after it. Where nothing that comes can be chosen, the order is all the same to the student and costs nothing. The
    gradient is finite in any case.
    """
    shifted = ranked - ranked.amax(-1, keepdim=True)
    log_z = suffix_logsumexp(shifted)
    possible = log_z > NEVER
    weights = torch.where(possible, log_weights.exp(), 0.0)
    values = torch.where(weights > 0, weights * (log_z - shifted), 0.0).sum(-1)
    share = torch.where(possible, log_weights - log_z, NEVER).logcumsumexp(-1)
    return values, (shifted + share).exp_() - weights


def suffix_logsumexp(logits: Tensor) -> Tensor:
    """log sum_{l >= k} exp(logits_l) for every k."""
    return logits.flip(-1).logcumsumexp(-1).flip(-1)


def top_ranks(keys: Tensor, k: int) -> Tensor:
    """The classes [n, k] with the largest keys [n, V], by descending key; the lower class first where two are equal."""
    classes = keys.topk(k, dim=-1, sorted=False).indices.sort(dim=-1).values
    order = keys.gather(-1, classes).argsort(dim=-1, descending=True, stable=True)
    return classes.gather(-1, order)


def tied_tail_loss(student: Tensor, log_weights: Tensor, head: Tensor) -> tuple[Tensor, Tensor]:
    """L_k [n] and its gradient [n, V] for the ranked classes `head` [n, k].

    The rest enters the ranking as one item more, with the logit log Z_{k+1} and the sum of its weights: coming last, it
    costs nothing itself. What is left of L_k is a cross-entropy within the rest.
    """
    shifted = student - student.amax(-1, keepdim=True)
    rest = torch.ones_like(student, dtype=torch.bool).scatter_(-1, head, False)
    log_z = torch.where(rest, shifted, NEVER).logsumexp(-1, keepdim=True)
    log_weight = torch.where(rest, log_weights, NEVER).logsumexp(-1, keepdim=True)
    values, of_items = ranked_loss(
        torch.cat([shifted.gather(-1, head), log_z], -1),
        torch.cat([log_weights.gather(-1, head), log_weight], -1),
    )
    weights = torch.where(rest & (log_z > NEVER), log_weights.exp(), 0.0)
    values = values + torch.where(weights > 0, weights * (log_z - shifted), 0.0).sum(-1)
    chosen = torch.where(rest & (log_z > NEVER), (shifted - log_z).exp(), 0.0)
    gradient = chosen * (of_items[:, -1:] + weights.sum(-1, keepdim=True)) - weights
    return values, gradient.scatter_(-1, head, of_items[:, :-1])
