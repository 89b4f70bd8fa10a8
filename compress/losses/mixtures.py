"""Divergences to a mixture m of p and q: bounded, whatever p and q are.

With u = log p - log q and w the weight of p in m = w p + (1 - w) q,

    log(p / m) = -log1p((1 - w) expm1(-u)),      log(q / m) = -log1p(w expm1(u)),

and a KL divergence to m is a sum of non-negative terms p excess(log(p / m)), as that to q is.
"""

from __future__ import annotations

from typing import Unpack

import torch
from torch import Tensor

from compress.errors import UsageError
from compress.losses.base import between
from compress.losses.divergence import Distributions, Divergence, Kernel, Options, excess
from compress.losses.kl import kl_term, reverse_kl_pull, reverse_kl_term

Ratio = tuple[Tensor, Tensor | None]
"""u = log(p / m), and expm1(-u) if it is at hand: what `excess` takes."""


def ratios(d: Distributions, weight: float) -> tuple[Ratio, Ratio]:
    """Those of p and of q to m = weight p + (1 - weight) q. The logarithm with the smaller weight inside is computed,
    and the other is that one plus or minus u: so both keep their digits."""
    if weight <= 0.5:
        ratio = torch.expm1(d.held_u).mul_(weight)
        log_q = torch.log1p(ratio).neg_()
        return (d.held_u + log_q, None), (log_q, ratio)
    ratio = d.ratio * (1 - weight)
    log_p = torch.log1p(ratio).neg_()
    return (log_p, ratio), (log_p - d.held_u, None)


class JensenShannon(Divergence):
    """Generalised Jensen-Shannon divergence, in nats, with m = beta p + (1 - beta) q:

        JSD_beta = beta KL(p || m) + (1 - beta) KL(q || m),    gradient (1 - beta) q (log(q/m) - KL(q || m)).

    Agarwal et al. 2024 (GKD, arXiv 2306.13649, section 2.1). At most log 2 (at beta = 1/2).

    As beta goes to 0 it goes to 0, like beta KL(p || q); as beta goes to 1, like (1 - beta) KL(q || p). So its gradient
    is the smaller, the nearer beta is to an end. `normalise` divides by beta (1 - beta): beta then goes from the
    forward KL at 0 to the reverse KL at 1 without a jump. Without it the ends are refused: TRL and Liger put the two
    KLs there, which no beta near the ends resembles.
    """

    def __init__(self, beta: float = 0.5, normalise: bool = False, **options: Unpack[Options]) -> None:
        super().__init__(**options)
        self.beta = between(beta, "beta", 0, 1, ends=True)
        self.normalise = normalise
        if self.beta in (0, 1) and not normalise:
            raise UsageError(
                f"beta is {self.beta:g}, where the Jensen-Shannon divergence is 0 for every student.",
                remedy=f"Use the loss '{'reverse_kl' if beta else 'kl'}', or normalise=True, whose limit it is.",
            )

    def kernel(self) -> Kernel | None:
        return None if self.normalise else ("jensen_shannon", (self.beta,))

    def terms(self, d: Distributions) -> tuple[Tensor, Tensor]:
        if self.beta == 0:
            return kl_term(d), d.gap
        if self.beta == 1:
            return reverse_kl_term(d), reverse_kl_pull(d)
        p_m, q_m = ratios(d, self.beta)
        of_p, of_q = self.beta, 1 - self.beta
        if self.normalise:
            of_p, of_q = 1 / of_q, 1 / of_p
        q = of_q * d.held_q
        return torch.addcmul(q * excess(*q_m), d.held_p, excess(*p_m), value=of_p), q * q_m[0]


class SkewKL(Divergence):
    """Skewed KL divergence, KL(p || m) with m = alpha p + (1 - alpha) q, in nats; gradient q (sum_v q_v w_v - w) with
    w = (1 - alpha) p / m.

    Ko et al. 2024 (DistiLLM, arXiv 2402.03898, section 3.1), whose alpha is 0.1. At most log(1 / alpha), and the
    weight w of a class at most (1 - alpha) / alpha: no class makes the gradient explode. KL(p || q) as alpha goes to 0.
    """

    def __init__(self, alpha: float = 0.1, **options: Unpack[Options]) -> None:
        super().__init__(**options)
        self.alpha = between(alpha, "alpha", 0, 1)

    def kernel(self) -> Kernel:
        return "skew_kl", (self.alpha,)

    def terms(self, d: Distributions) -> tuple[Tensor, Tensor]:
        p_m, _ = ratios(d, self.alpha)
        return d.held_p * excess(*p_m), d.held_q * torch.expm1(p_m[0]).mul_(self.alpha - 1)


class ReverseSkewKL(Divergence):
    """Skewed reverse KL divergence, KL(q || m) with m = alpha q + (1 - alpha) p, in nats; gradient
    q (c - sum_v q_v c_v) with c = log(q/m) - alpha (q/m - 1).

    Ko et al. 2024 (DistiLLM, arXiv 2402.03898, section 3.1), whose alpha is 0.1. At most log(1 / alpha).

    `detach_mixture` takes the q inside m for a constant, as the code of DistiLLM-2 does (Ko et al. 2025, arXiv
    2503.07067): c = log(q/m) then. The value stays; the gradient is that of JSD_(1-alpha) / alpha.
    """

    def __init__(self, alpha: float = 0.1, detach_mixture: bool = False, **options: Unpack[Options]) -> None:
        super().__init__(**options)
        self.alpha = between(alpha, "alpha", 0, 1)
        self.detach_mixture = detach_mixture

    def kernel(self) -> Kernel | None:
        return None if self.detach_mixture else ("reverse_skew_kl", (self.alpha,))

    def terms(self, d: Distributions) -> tuple[Tensor, Tensor]:
        _, q_m = ratios(d, 1 - self.alpha)
        c = q_m[0] if self.detach_mixture else torch.sub(q_m[0], torch.expm1(q_m[0]), alpha=self.alpha)
        return d.held_q * excess(*q_m), d.held_q * c
