"""Estimates of the reverse KL divergence KL(q || p) from one sampled token: what there is on-policy, when the student
samples and only the log-probabilities of its tokens are known to both models.

With x ~ q and R = log p(x) - log q(x) (Schulman 2020, "Approximating KL Divergence"),

    estimate    value           dk / d log q    E_q[value]         E_q[gradient]
    k1          -R              1               KL(q || p)         0
    k2          R^2 / 2         -R              not KL(q || p)     gradient of KL(q || p)
    k3          e^R - R - 1     1 - e^R         KL(q || p)         gradient of KL(p || q)
    k3_plus     that of k3      that of k2      KL(q || p)         gradient of KL(q || p)

The gradient of an expectation over q is not the expectation of the gradient: the sampling depends on q too, and that
part is not in these formulas. Hence k1 trains nothing, and k3, the best estimate of the value, trains the *forward*
divergence, because E_q[(1 - p/q) grad log q] = -sum_x p grad log q. k2 has the gradient of the reverse divergence. So
report k3, train with k2, or use k3_plus, which is both.

All of this holds for tokens sampled from the student as it is now. Each function takes log q(x) and log p(x) of the
same tokens, any shape, in nats; the gradient flows into the student's alone, and the result has their shape. A token
that the teacher rules out (log p = -inf) has an infinite value, and with k2 and k3_plus an infinite gradient: take such
tokens out beforehand.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from compress.losses.divergence import OVERFLOW_LIMIT, excess


def k1(student_log_probs: Tensor, teacher_log_probs: Tensor) -> Tensor:
    """log q - log p: unbiased, of any sign, of large variance; its gradient is zero on average."""
    return student_log_probs - teacher_log_probs.detach()


def k2(student_log_probs: Tensor, teacher_log_probs: Tensor) -> Tensor:
    """(log p - log q)^2 / 2: biased in value, with the gradient of KL(q || p)."""
    return (student_log_probs - teacher_log_probs.detach()).square() / 2


def k3(student_log_probs: Tensor, teacher_log_probs: Tensor) -> Tensor:
    """e^R - R - 1 >= 0: unbiased, of small variance while p / q is bounded; has the gradient of KL(p || q)."""
    ratio = teacher_log_probs.detach() - student_log_probs
    bounded = ratio.abs() < OVERFLOW_LIMIT
    return torch.where(bounded, excess(-torch.where(bounded, ratio, 0.0)), torch.expm1(ratio) - ratio)


def k3_plus(student_log_probs: Tensor, teacher_log_probs: Tensor) -> Tensor:
    """The value of k3 with the gradient of k2: unbiased in value, with the gradient of KL(q || p)."""
    slope = (student_log_probs - teacher_log_probs).detach()
    return _WithSlope.apply(student_log_probs, k3(student_log_probs.detach(), teacher_log_probs), slope)


class _WithSlope(torch.autograd.Function):
    """The given value, with the given derivative with respect to the first argument."""

    @staticmethod
    def forward(ctx: Any, at: Tensor, value: Tensor, slope: Tensor) -> Tensor:
        ctx.save_for_backward(slope)
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        (slope,) = ctx.saved_tensors
        return upstream * slope, None, None
