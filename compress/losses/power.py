"""Divergences made of powers of p and q: alpha-beta, with alpha, Renyi and chi-square as its cases; total variation.

With s = alpha + beta and u = log p - log q,

    D = sum [alpha/s p^s + beta/s q^s - p^alpha q^beta] / (alpha beta).

This is 0/0 where alpha, beta or s is 0, and between close models its terms cancel. Put

    f = p^s (bend(s) - bend(beta)) / alpha,      bend(c) = excess(c u) / c,  bend(0) = 0,

or the same with p and q, alpha and beta exchanged, and -u for u. As bend(c) is about c u^2 / 2, the bracket is about
(s - beta) u^2 / 2: where |alpha| >= |beta| it does not cancel; where it would, the other form does not. All limits but
alpha = beta = 0 (f = u^2 / 2) are then ordinary values, and f >= 0 term by term.
"""

from __future__ import annotations

import math
from typing import Unpack

import torch
from torch import Tensor

from compress.losses.base import between, positive
from compress.losses.divergence import OVERFLOW_LIMIT, Distributions, Divergence, Kernel, Options, excess


def alpha_beta_terms(d: Distributions, alpha: float, beta: float) -> tuple[Tensor, Tensor]:
    """(f, a) of the alpha-beta divergence, a = -(p^alpha q^beta - q^s) / alpha."""
    s = alpha + beta
    limit = OVERFLOW_LIMIT / max(1.0, abs(s), abs(alpha), abs(beta))
    if d.reach < limit:
        f, a = close_terms(d, d.u, alpha, beta)
    else:
        bounded = d.u.abs() < limit
        close = close_terms(d, torch.where(bounded, d.u, 0.0), alpha, beta)
        f, a = (torch.where(bounded, *either) for either in zip(close, far_terms(d, alpha, beta), strict=True))
    if s >= 0 and d.absent is None:
        return f, a
    equal = d.u == 0  # nothing, also where a power of p = q = 0 is infinite
    return f.masked_fill(equal, 0), a.masked_fill(equal, 0)


def close_terms(d: Distributions, u: Tensor, alpha: float, beta: float) -> tuple[Tensor, Tensor]:
    """(f, a) where no power of p / q overflows; u is 0 elsewhere."""
    s = alpha + beta
    p, q = (d.p, d.q) if s == 1 else (torch.exp(power(d.log_p, s)), torch.exp(power(d.log_q, s)))
    a = torch.mul(q, -torch.expm1(alpha * u).div_(alpha) if alpha else -u)
    if alpha == beta == 0:
        return 0.5 * u * u, a
    if abs(alpha) >= abs(beta):
        return p * (bend(u, s) - bend(u, beta)) / alpha, a
    return q * (bend(-u, s) - bend(-u, alpha)) / beta, a


def bend(u: Tensor, c: float) -> Tensor:
    """excess(c u) / c."""
    return excess(c * u).div_(c) if c else torch.zeros_like(u)


def far_terms(d: Distributions, alpha: float, beta: float) -> tuple[Tensor, Tensor]:
    """(f, a) where p / q is so far from 1 that nothing cancels; they overflow only where f and a do."""
    s = alpha + beta
    log_p, log_q = power(d.log_p, s), power(d.log_q, s)
    log_product = power(d.log_p, alpha) + power(d.log_q, beta)
    a = -secant(log_q, log_product, d.u, alpha)
    if alpha == beta == 0:
        return 0.5 * d.u * d.u, a
    if abs(alpha) >= abs(beta):
        f = (secant(log_p, log_product, d.u, -beta) - secant(log_p, log_q, d.u, -s)) / alpha
    else:
        f = (secant(log_q, log_product, -d.u, -alpha) - secant(log_q, log_p, -d.u, -s)) / beta
    return f.masked_fill(f.isnan() & ~d.u.isnan(), math.inf), a  # two infinite powers of p = 0 or q = 0


def secant(log_a: Tensor, log_b: Tensor, u: Tensor, c: float) -> Tensor:
    """(b - a) / c where log b - log a = c u; its limit a u where c = 0 (0 where a is). Neither factor overflows unless
    the result does."""
    if c == 0:
        a = torch.exp(log_a)
        return (a * u).masked_fill_(a == 0, 0)
    step = torch.expm1((c * u).clamp_(max=OVERFLOW_LIMIT)).div_(c)
    return torch.exp(torch.maximum(log_a, log_b - OVERFLOW_LIMIT)).mul_(step)


def power(log: Tensor, exponent: float) -> Tensor:
    """The logarithm of a power; 0^0 = 1."""
    return exponent * log if exponent else torch.zeros_like(log)


class AlphaBeta(Divergence):
    """Alpha-beta divergence; for all alpha, beta and s = alpha + beta that are not 0

        D = -1/(alpha beta) sum_v [p_v^alpha q_v^beta - alpha/s p_v^s - beta/s q_v^s],

    with gradient a - q sum_v a_v, a = q^beta (q^alpha - p^alpha) / alpha. Not in nats unless s = 1.

    Cichocki, Cruces and Amari 2011 (Entropy 13); for distillation Wang et al. 2025 (ABKD, arXiv 2505.04560), whose
    defaults for language models these are (alpha 0.2, beta 0.7; for images 0.8, 0.3 with a weight of 32). KL at (1, 0),
    reverse KL at (0, 1), half of sum (p - q)^2 at (1, 1), twice sum (sqrt p - sqrt q)^2 at (1/2, 1/2). Where alpha,
    beta or s is 0, it is the limit. The released code of ABKD has 1/alpha and 1/beta there, where the limits have
    1/alpha^2 and 1/beta^2: it jumps.

    Infinite where the teacher leaves a class out and alpha <= 0, or the student does and beta <= 0. With s near 0 or
    below, the rarest classes weigh most.
    """

    def __init__(self, alpha: float = 0.2, beta: float = 0.7, **options: Unpack[Options]) -> None:
        super().__init__(**options)
        self.alpha = between(alpha, "alpha", -math.inf, math.inf)
        self.beta = between(beta, "beta", -math.inf, math.inf)

    def terms(self, d: Distributions) -> tuple[Tensor, Tensor]:
        return alpha_beta_terms(d, self.alpha, self.beta)


class Alpha(Divergence):
    """Amari's alpha divergence, in nats, for any real alpha:

        D_alpha = (1 - sum_v p_v^alpha q_v^(1 - alpha)) / (alpha (1 - alpha)),

    gradient a - q sum_v a_v with a = (q - p^alpha q^(1 - alpha)) / alpha.

    Cichocki and Amari 2010 (Entropy 12). KL at 1 and reverse KL at 0 (the limits, without a jump); at 1/2 twice the
    sum of (sqrt p - sqrt q)^2, and at most 4; half of Pearson's chi-square at 2, half of Neyman's at -1. Bounded by
    1 / (alpha (1 - alpha)) between 0 and 1; elsewhere infinite as the KL that lies on its side.
    """

    def __init__(self, alpha: float = 0.5, **options: Unpack[Options]) -> None:
        super().__init__(**options)
        self.alpha = between(alpha, "alpha", -math.inf, math.inf)

    def terms(self, d: Distributions) -> tuple[Tensor, Tensor]:
        return alpha_beta_terms(d, self.alpha, 1 - self.alpha)


class Renyi(Alpha):
    """Renyi divergence of order alpha > 0, in nats,

        D = log(sum_v p_v^alpha q_v^(1 - alpha)) / (alpha - 1),

    with gradient q - w, w = p^alpha q^(1 - alpha) over its sum. KL at 1.

    Renyi 1961; van Erven and Harremoes 2014 (arXiv 1206.2459). Taken as log1p(alpha (alpha - 1) D_alpha) / (alpha - 1),
    with Amari's D_alpha, where the sum is near 1, and as it stands elsewhere. Infinite where p and q have no class in
    common, and for alpha >= 1 where the student leaves a class out that the teacher does not.
    """

    def __init__(self, alpha: float = 0.5, **options: Unpack[Options]) -> None:
        super().__init__(positive(alpha, "alpha"), **options)

    def finish(self, total: Tensor) -> tuple[Tensor, Tensor | None]:
        if self.alpha == 1:
            return total, None
        shift = (self.alpha * (self.alpha - 1) * total).clamp(min=-1)  # the sum, less one
        return torch.log1p(shift) / (self.alpha - 1), self.alpha / (1 + shift)

    def of_distributions(self, d: Distributions) -> tuple[Tensor, Tensor]:
        value, gradient = super().of_distributions(d)
        far = (value * (self.alpha - 1)).abs() > 0.5
        if self.alpha == 1 or not bool(far.any()):
            return value, gradient
        log_product = torch.where(d.u > 0, d.log_p + (self.alpha - 1) * d.u, d.log_q + self.alpha * d.u)
        log_sum = log_product.logsumexp(-1)
        plain = (d.q - log_product.softmax(-1)).masked_fill(log_sum.isinf().unsqueeze(-1), 0)
        value = torch.where(far, log_sum / (self.alpha - 1), value)
        return value, torch.where(far.unsqueeze(-1), plain, gradient)


class ChiSquare(Divergence):
    """Pearson's chi-square divergence sum_v (p_v - q_v)^2 / q_v, a = q - p^2 / q; with `reverse` Neyman's,
    sum_v (p_v - q_v)^2 / p_v, a = 2 q (q - p) / p. Gradient a - q sum_v a_v.

    Pearson 1900; Neyman 1949. Unbounded: one class with a ratio p / q of e^u adds about p e^u (reverse: q e^-u), so
    that a single token can outweigh a batch. It is for close models. What exceeds the range of the type is infinite,
    and its gradient 0, never nan.
    """

    def __init__(self, reverse: bool = False, **options: Unpack[Options]) -> None:
        super().__init__(**options)
        self.reverse = reverse

    def terms(self, d: Distributions) -> tuple[Tensor, Tensor]:
        f, a = alpha_beta_terms(d, -1, 2) if self.reverse else alpha_beta_terms(d, 2, -1)
        return 2 * f, 2 * a


class TotalVariation(Divergence):
    """Total variation distance 1/2 sum_v |p_v - q_v|, in 0..1; gradient a - q sum_v a_v with a = 1/2 q sign(q - p), and
    sign(0) = 0.

    For distillation Wen et al. 2023 (arXiv 2307.15190). Its gradient does not shrink as q nears p, and changes sign
    there: with a fixed learning rate it does not settle.
    """

    def kernel(self) -> Kernel:
        return "total_variation", ()

    def terms(self, d: Distributions) -> tuple[Tensor, Tensor]:
        return 0.5 * d.gap.abs(), d.q * (0.5 * d.gap.sign())
