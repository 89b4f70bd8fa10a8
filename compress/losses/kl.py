"""The Kullback-Leibler family: forward, reverse, and both."""

from __future__ import annotations

from typing import Unpack

import torch
from torch import Tensor

from compress.losses.base import between
from compress.losses.divergence import Distributions, Divergence, Kernel, Options, excess, plus


def kl_term(d: Distributions) -> Tensor:
    """p log(p/q) - p + q >= 0."""
    return plus(d.held_p * excess(d.held_u, d.ratio), d.p_beyond)


def reverse_kl_term(d: Distributions) -> Tensor:
    """q log(q/p) - q + p >= 0."""
    return plus(d.held_q * excess(-d.held_u), d.q_beyond)


def jeffreys_term(d: Distributions) -> Tensor:
    """(p - q) log(p/q) >= 0, the sum of the two: a product, so that nothing cancels."""
    return plus(plus(-d.gap * d.held_u, d.p_beyond), d.q_beyond)


def reverse_kl_pull(d: Distributions) -> Tensor:
    """q log(q/p): a of the reverse KL, up to a multiple of q."""
    return plus(-d.held_q * d.held_u, d.q_beyond)


class KL(Divergence):
    """Forward KL divergence, KL(p || q) = sum_v p_v log(p_v / q_v), in nats; gradient q - p.

    Hinton, Vinyals and Dean 2015 (arXiv 1503.02531). Covers the teacher's modes: the student is punished where the
    teacher has weight and it has none. Infinite, with the same finite gradient, where the student leaves a class out
    that the teacher does not. `temperature` and `t2` as for every divergence.
    """

    centred = True

    def kernel(self) -> Kernel:
        return "kl", ()

    def terms(self, d: Distributions) -> tuple[Tensor, Tensor]:
        return kl_term(d), d.gap


class ReverseKL(Divergence):
    """Reverse KL divergence, KL(q || p) = sum_v q_v log(q_v / p_v), in nats; gradient q (log q - log p - KL(q || p)).

    Gu et al. 2024 (MiniLLM, arXiv 2306.08543). Seeks a mode: the student is punished where it has weight and the
    teacher has none. Infinite where the teacher leaves a class out that the student does not.
    """

    def kernel(self) -> Kernel:
        return "reverse_kl", ()

    def terms(self, d: Distributions) -> tuple[Tensor, Tensor]:
        return reverse_kl_term(d), reverse_kl_pull(d)


class SymmetricKL(Divergence):
    """forward KL(p || q) + (1 - forward) KL(q || p), in nats; 0 < forward < 1.

    At `forward` = 1/2 half of Jeffreys' divergence sum_v (p_v - q_v) log(p_v / q_v). Punishes both ways of being wrong,
    and is infinite where either of the two is.
    """

    def __init__(self, forward: float = 0.5, **options: Unpack[Options]) -> None:
        super().__init__(**options)
        self.weight = between(forward, "forward", 0, 1)

    def kernel(self) -> Kernel:
        return "symmetric_kl", (self.weight,)

    def terms(self, d: Distributions) -> tuple[Tensor, Tensor]:
        w = self.weight
        f = min(w, 1 - w) * jeffreys_term(d)
        if w > 0.5:
            f = torch.add(f, kl_term(d), alpha=2 * w - 1)
        elif w < 0.5:
            f = torch.add(f, reverse_kl_term(d), alpha=1 - 2 * w)
        return f, torch.add(w * d.gap, reverse_kl_pull(d), alpha=1 - w)
