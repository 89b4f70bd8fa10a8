"""Any f-divergence, from its generator."""

from __future__ import annotations

from collections.abc import Callable
from typing import Unpack

import torch
from torch import Tensor

from compress.errors import UsageError
from compress.losses.divergence import Distributions, Divergence, Options

Generator = Callable[[Tensor], Tensor]


class FDivergence(Divergence):
    """D_f = sum_v q_v f(p_v / q_v) for a convex f of the ratio with f(1) = 0; gradient a - q sum_v a_v with
    a = q (f(t) - t f'(t)), t = p / q.

    Csiszar 1967; Ali and Silvey 1966. `f` maps a tensor of positive ratios elementwise; `derivative` is f', by autograd
    if it is not given. f(t) and f(t) - f'(1) (t - 1) give the same divergence; the second, whose terms are all >= 0, is
    summed. The named divergences are faster, and exact for every ratio; this is for those that have no name:

        t log t  KL       -log t  reverse KL       |t - 1| / 2  total variation       (t - 1)^2  Pearson chi-square

    f is evaluated in float64, because it cancels near t = 1. Ratios are held between e^-40 and e^40, so that an
    unbounded divergence ends somewhere. Python only: it has no name in recipes.

    Raises `UsageError` when f(1) is not 0, f'(1) is not finite, or f' falls somewhere between 1/1000 and 1000.
    """

    def __init__(self, f: Generator, derivative: Generator | None = None, **options: Unpack[Options]) -> None:
        super().__init__(**options)
        self.f, self.derivative = f, derivative
        ratios = torch.cat([torch.ones(1), torch.logspace(-3, 3, 600)]).double()
        values, slopes = self.with_slope(ratios)
        self.slope = slopes[0].item()
        if not abs(values[0].item()) < 1e-9:
            raise UsageError(f"f(1) is {values[0].item():g}.", remedy="Subtract it: a divergence of equals is 0.")
        if not bool(torch.isfinite(slopes).all()):
            raise UsageError("The derivative of f is not finite.", remedy="Give one that is, for ratios > 0.")
        if not bool((slopes[1:].diff() >= -1e-9 * slopes.abs().max()).all()):
            raise UsageError("f is not convex: its derivative falls.", remedy="Only a convex f makes a divergence.")

    def with_slope(self, ratio: Tensor) -> tuple[Tensor, Tensor]:
        """f and f'."""
        if self.derivative is not None:
            return self.f(ratio), self.derivative(ratio)
        with torch.enable_grad():
            ratio = ratio.detach().requires_grad_()
            values = self.f(ratio)
            (slopes,) = torch.autograd.grad(values.sum(), ratio)
        return values.detach(), slopes

    def terms(self, d: Distributions) -> tuple[Tensor, Tensor]:
        q, ratio = d.held_q.double(), d.held_u.double().exp()
        values, slopes = self.with_slope(ratio)
        values = values - self.slope * (ratio - 1)
        a = values - ratio * (slopes - self.slope)
        return (q * values).to(d.u.dtype), (q * a).to(d.u.dtype)
