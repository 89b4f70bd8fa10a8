"""The divergences as their papers write them, of p and q in float64: what the tests compare with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from compress.losses import (
    KL,
    Alpha,
    AlphaBeta,
    ChiSquare,
    Divergence,
    JensenShannon,
    Renyi,
    ReverseKL,
    ReverseSkewKL,
    SkewKL,
    SymmetricKL,
    TotalVariation,
)


def logits(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Of a student and a teacher, correlated."""
    generator = torch.Generator().manual_seed(seed)
    teacher = 2 * torch.randn(*shape, generator=generator, dtype=dtype)
    return teacher + torch.randn(*shape, generator=generator, dtype=dtype), teacher


def kl(p: Tensor, q: Tensor) -> Tensor:
    return (p * (p / q).log()).sum(-1)


def jensen_shannon(p: Tensor, q: Tensor, beta: float) -> Tensor:
    m = beta * p + (1 - beta) * q
    return beta * kl(p, m) + (1 - beta) * kl(q, m)


def skew(p: Tensor, q: Tensor, alpha: float) -> Tensor:
    return kl(p, alpha * p + (1 - alpha) * q)


def alpha_divergence(p: Tensor, q: Tensor, alpha: float) -> Tensor:
    if alpha in (0, 1):
        return kl(p, q) if alpha else kl(q, p)
    return (1 - (p**alpha * q ** (1 - alpha)).sum(-1)) / (alpha * (1 - alpha))


def renyi(p: Tensor, q: Tensor, alpha: float) -> Tensor:
    return kl(p, q) if alpha == 1 else (p**alpha * q ** (1 - alpha)).sum(-1).log() / (alpha - 1)


def alpha_beta(p: Tensor, q: Tensor, alpha: float, beta: float) -> Tensor:
    """Cichocki, Cruces and Amari 2011, equation 21 and its limits."""
    if alpha == beta == 0:
        return 0.5 * ((p.log() - q.log()) ** 2).sum(-1)
    if alpha == 0 or beta == 0:
        (x, y), c = ((p, q), alpha) if beta == 0 else ((q, p), beta)
        return (x**c * (x**c / y**c).log() - x**c + y**c).sum(-1) / c**2
    if alpha == -beta:
        return ((q**alpha / p**alpha).log() + (p**alpha / q**alpha) - 1).sum(-1) / alpha**2
    s = alpha + beta
    return -(p**alpha * q**beta - alpha / s * p**s - beta / s * q**s).sum(-1) / (alpha * beta)


@dataclass(frozen=True)
class Case:
    kind: type[Divergence]
    definition: Callable[[Tensor, Tensor], Tensor]
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return "-".join([self.kind.__name__, *(f"{key}={value}" for key, value in self.options.items())])

    def loss(self, **more: Any) -> Divergence:
        return self.kind(**self.options, **more)

    def truth(self, student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
        """The definition in float64."""
        p, q = (torch.softmax(logits.double() / temperature, -1) for logits in (teacher, student))
        return self.definition(p, q)


CASES = [
    Case(KL, kl),
    Case(ReverseKL, lambda p, q: kl(q, p)),
    *(Case(SymmetricKL, lambda p, q, w=w: w * kl(p, q) + (1 - w) * kl(q, p), {"forward": w}) for w in (0.5, 0.9, 0.2)),
    *(Case(JensenShannon, lambda p, q, b=b: jensen_shannon(p, q, b), {"beta": b}) for b in (0.5, 0.1, 0.9)),
    Case(JensenShannon, lambda p, q: jensen_shannon(p, q, 0.3) / (0.3 * 0.7), {"beta": 0.3, "normalise": True}),
    Case(JensenShannon, kl, {"beta": 0, "normalise": True}),
    Case(JensenShannon, lambda p, q: kl(q, p), {"beta": 1, "normalise": True}),
    *(Case(SkewKL, lambda p, q, a=a: skew(p, q, a), {"alpha": a}) for a in (0.1, 0.7)),
    *(Case(ReverseSkewKL, lambda p, q, a=a: skew(q, p, a), {"alpha": a}) for a in (0.1, 0.7)),
    Case(TotalVariation, lambda p, q: 0.5 * (p - q).abs().sum(-1)),
    Case(ChiSquare, lambda p, q: ((p - q) ** 2 / q).sum(-1)),
    Case(ChiSquare, lambda p, q: ((p - q) ** 2 / p).sum(-1), {"reverse": True}),
    *(
        Case(Alpha, lambda p, q, a=a: alpha_divergence(p, q, a), {"alpha": a})
        for a in (-1.0, -0.3, 0.0, 0.3, 0.5, 0.8, 1.0, 1.7, 3.0)
    ),
    *(Case(Renyi, lambda p, q, a=a: renyi(p, q, a), {"alpha": a}) for a in (0.3, 0.5, 1.0, 2.0)),
    *(
        Case(AlphaBeta, lambda p, q, a=a, b=b: alpha_beta(p, q, a, b), {"alpha": a, "beta": b})
        for a, b in ((0.2, 0.7), (0.8, 0.3), (1.0, 1.0), (2.0, -0.5), (-0.5, 2.0), (-0.4, -0.3))
    ),
    *(
        Case(AlphaBeta, lambda p, q, a=a, b=b: alpha_beta(p, q, a, b), {"alpha": a, "beta": b})
        for a, b in ((0.0, 0.7), (0.6, 0.0), (0.5, -0.5), (-0.5, 0.5), (0.0, 0.0), (0.0, -0.5))
    ),
]
