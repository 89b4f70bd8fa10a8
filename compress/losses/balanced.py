"""Forward and reverse KL together, weighed by a gate: BD-KD, AKL, ToDi, EOPD.

Forward KL pulls the student up where it has too little, reverse KL pushes it down where it has too much. These losses
take both and say by a gate how much of each,

    rho KL(p || q) + nu KL(q || p).

The gate depends on the student but is a constant for the gradient, as in every published version: what is minimised is
the divergence under the present gate. So the gradient is *not* the derivative of the value when the gate varies
smoothly (BD-KD's smooth gate, AKL, ToDi), and a finite difference of the value does not give it.

All of them contain a reverse KL: they are infinite where the teacher leaves a class out that the student does not.
"""

from __future__ import annotations

from typing import Literal, Unpack

import torch
from torch import Tensor

from compress.losses.base import ClosedFormLoss, Common, between, one_of, positive
from compress.losses.divergence import Distributions, Divergence, Options
from compress.losses.kl import KL, ReverseKL, jeffreys_term, reverse_kl_pull, reverse_kl_term

HEAD = 1024
"""Most probable classes among which AKL looks for its head before it sorts them all."""


def finite(log_p: Tensor) -> Tensor:
    """log p, finite where p is 0, so that p log p is 0 there. (torch.xlogy would take the logarithm again.)"""
    return log_p.clamp(min=torch.finfo(log_p.dtype).min)


def entropy_gap(d: Distributions) -> Tensor:
    """H(q) - H(p) [n] in nats, = - sum (q - p) (log p + H(p)) - KL(q || p).

    Two entropies of close models would cancel. Here each term is small with u = log p - log q, and an error of the
    norms, common to all classes, drops out to first order: of the sum because of H(p), of the KL by its form.
    """
    log_p = finite(d.log_p)
    terms = d.p * log_p
    entropy = -terms.sum(-1, keepdim=True)
    close = -d.gap * (log_p + entropy) - reverse_kl_term(d)
    if not d.held:
        return close.sum(-1)
    apart = terms - d.q * finite(d.log_q) + d.gap * (1 - entropy)  # the same, where log p may be -inf
    return torch.where(d.bounded, close, apart).sum(-1)


class GatedKL(ClosedFormLoss):
    """Base of rho KL(p || q) + nu KL(q || p), with one rho and one nu for each position. A subclass gives `gate`.

    `temperature` is that of both divergences; `t2` multiplies the value by T^2.
    """

    def __init__(self, temperature: float = 1.0, t2: bool = False, **common: Unpack[Common]) -> None:
        super().__init__(**common)
        self.temperature = positive(temperature, "temperature")
        self.t2 = t2
        self.forward_kl, self.reverse_kl = KL(), ReverseKL()

    def gate(self, d: Distributions, untempered: Distributions) -> tuple[Tensor, Tensor]:
        """rho and nu [n], from the distributions at T and at 1."""
        raise NotImplementedError

    def pair(self, student: Tensor, teacher: Tensor | None, labels: Tensor | None) -> tuple[Tensor, Tensor]:
        assert teacher is not None
        d = Distributions.of(student, teacher, self.temperature)
        rho, nu = self.gate(d, d if self.temperature == 1 else Distributions.of(student, teacher))
        forward, reverse = self.forward_kl.of_distributions(d), self.reverse_kl.of_distributions(d)
        value = _times(rho, forward[0]) + _times(nu, reverse[0])
        gradient = _times(rho.unsqueeze(-1), forward[1]) + _times(nu.unsqueeze(-1), reverse[1])
        scale = self.temperature**2 if self.t2 else 1.0
        return value * scale, gradient * (scale / self.temperature)


def _times(weight: Tensor, values: Tensor) -> Tensor:
    """A divergence that has no weight counts for nothing even where it is infinite."""
    return torch.where(weight != 0, weight * values, torch.zeros_like(values))


class BalancedKL(GatedKL):
    """BD-KD: rho KL(p || q) + nu KL(q || p), weighed by the gap of the entropies g = H(q) - H(p), in nats.

        hard     rho = 1 + delta [g < 0],            nu = 1 + delta [g > 0]
        smooth   rho = 1 + delta sigmoid(-g / tau),  nu = 1 + delta sigmoid(g / tau)
        fixed    rho = nu = 1 + delta / 2

    A student more certain than its teacher (g < 0) hears more of the forward KL, which spreads it; a less certain one
    more of the reverse KL. g is taken at temperature 1 over the whole vocabulary. Smooth tends to hard as the
    `gate_temperature` tau tends to 0 and to fixed as it grows; the three have the same sum of weights (but for g = 0).

    Amara et al. 2022 (BD-KD, arXiv 2212.12965). *Reconstructed*: the authors publish no code. That the weights follow
    the entropy gap is from the paper; the rule "hard" with delta = 2 is that of one re-implementation by other people
    (the code of ABKD, arXiv 2505.04560), which has the cross-entropy in place of the forward KL: another value, the
    same gradient. The smooth and fixed gates are ours. BD-KD trains teacher and student together; this is the
    student's half, all of it that a frozen teacher leaves. The label term of BD-KD is `cross_entropy`.
    """

    def __init__(
        self,
        gate: Literal["hard", "smooth", "fixed"] = "hard",
        delta: float = 2.0,
        gate_temperature: float = 1.0,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(**options)
        self.rule = one_of(gate, ("hard", "smooth", "fixed"), "gate")
        self.delta = between(delta, "delta", 0, float("inf")) if delta else 0.0
        self.gate_temperature = positive(gate_temperature, "gate_temperature")

    def gate(self, d: Distributions, untempered: Distributions) -> tuple[Tensor, Tensor]:
        if self.rule == "fixed":
            even = torch.full_like(d.q[:, 0], 1 + self.delta / 2)
            return even, even
        gap = entropy_gap(untempered)
        if self.rule == "hard":
            return 1 + self.delta * (gap < 0).to(gap.dtype), 1 + self.delta * (gap > 0).to(gap.dtype)
        gap = gap / self.gate_temperature
        return 1 + self.delta * torch.sigmoid(-gap), 1 + self.delta * torch.sigmoid(gap)


class AdaptiveKL(GatedKL):
    """AKL: h KL(p || q) + (1 - h) KL(q || p), with h the part of sum_v |p_v - q_v| that lies in the teacher's head.

    The head is the smallest set of the teacher's most probable classes whose probabilities sum to `mu` or more. Early
    in training the forward KL fits the head first and the reverse KL the tail: each gets the weight of what is wrong
    there.

    Wu et al. 2024 (arXiv 2404.02657). The released code leaves the class that crosses mu to the tail unless it is the
    first one, and is 0/0 where p = q (here 0, with a gradient of 0).
    """

    def __init__(self, mu: float = 0.5, **options: Unpack[Options]) -> None:
        super().__init__(**options)
        self.mu = between(mu, "mu", 0, 1)

    def gate(self, d: Distributions, untempered: Distributions) -> tuple[Tensor, Tensor]:
        wrong = d.gap.abs()
        p, order = d.p.topk(min(HEAD, d.p.shape[-1]))
        if bool((p.sum(-1) < self.mu).any()):
            p, order = torch.sort(d.p, dim=-1, descending=True)
        head = p.cumsum(-1) - p < self.mu
        total = wrong.sum(-1).clamp(min=torch.finfo(wrong.dtype).tiny)
        h = (wrong.gather(-1, order) * head).sum(-1) / total
        return h, 1 - h


class EntropyGatedKL(GatedKL):
    """EOPD: KL(q || p) + [H(p) > threshold] KL(p || q): forward KL where the teacher itself is uncertain, in nats.

    `mode` "add" is the paper's: the reverse KL everywhere, and the forward KL on top of it where the gate is open.
    "switch" takes the one *or* the other. H(p) is taken at temperature 1 over the whole vocabulary.

    Jin et al. 2026 (arXiv 2603.07079), threshold 0.8. There the reverse KL is estimated by policy gradient from the one
    token that the student drew, and the forward KL is the partial sum over the teacher's top 16 (`top_kl` with
    `tail=partial`); here both are the full divergences of the same distributions.
    """

    def __init__(
        self, threshold: float = 0.8, mode: Literal["add", "switch"] = "add", **options: Unpack[Options]
    ) -> None:
        super().__init__(**options)
        self.threshold = between(threshold, "threshold", 0, float("inf"), ends=True)
        self.mode = one_of(mode, ("add", "switch"), "mode")

    def gate(self, d: Distributions, untempered: Distributions) -> tuple[Tensor, Tensor]:
        entropy = -(untempered.p * finite(untempered.log_p)).sum(-1)
        uncertain = (entropy > self.threshold).to(entropy.dtype)
        return uncertain, torch.ones_like(uncertain) if self.mode == "add" else 1 - uncertain


class TokenwiseKL(Divergence):
    """ToDi: sum_v w_v p_v u_v - (1 - w_v) q_v u_v with u = log p - log q and w = sigmoid(u), a gate for each class.

    Since sigmoid(u) = p / (p + q), the terms are (p_v - q_v) u_v >= 0 and the *value* is Jeffreys' divergence
    KL(p || q) + KL(q || p), exactly. Only the gradient tells the two apart: with w constant,

        dF/dz = c - q sum_w c_w + q - p,    c = -(1 - w) q u,

    where Jeffreys' has c = -q u. Watching this value says how far the student is, not what the gate does.

    Jung et al. 2025 (arXiv 2505.16297): equal in value and gradient to the released code. The terms are those of the
    paper, w p log(p/q), not w (p log(p/q) - p + q): the added parts do not sum to 0 under a gate, and would make
    another gradient. The accuracy between close models is kept, for the terms are products of two small numbers.
    """

    def terms(self, d: Distributions) -> tuple[Tensor, Tensor]:
        return jeffreys_term(d), torch.addcmul(d.gap, torch.sigmoid(-d.u), reverse_kl_pull(d))
