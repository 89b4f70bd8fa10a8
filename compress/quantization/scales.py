"""Scales of least error for codes that are given.

With the columns of V in scopes p that share a scale, the factors s that minimize

    tr((W - V diag(s)) H (W - V diag(s))^T)      solve, row by row,      sum_q s_q v_p H_pq v_q^T = v_p H_p w^T

(van der Ouderaa et al. 2026, arXiv 2603.11021, for block scales). A codec stores what it can of them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compress.codecs.base import Rounding

SMALLEST, LARGEST = 0.5, 2.0
"""Factors outside are those of a system that says nothing."""


def refit_scales(weight: Tensor, hessian: Tensor, places: Tensor, scope: int, rounding: Rounding) -> None:
    """Rescale `rounding` for W float32 [o, n] and H float32 [n, n], both in an order of which `places` int64 [n] gives
    each column's place. A row whose error the stored scales do not lower is a row of rounding, no error."""
    ordered = hessian[places.unsqueeze(1), places]
    rounding.rescale(scale_factors(weight[:, places], rounding.decoded(), ordered, scope))


def scale_factors(weight: Tensor, value: Tensor, hessian: Tensor, scope: int) -> Tensor:
    """s float32 [o, ceil(n / scope)] of W and V float32 [o, n]; 1 where V is zero or the optimum is far off."""
    rows, columns = weight.shape
    starts = range(0, columns, scope)
    system = torch.zeros(rows, len(starts), len(starts), dtype=torch.float64, device=weight.device)
    wanted = torch.zeros(rows, len(starts), dtype=torch.float64, device=weight.device)
    for p, start in enumerate(starts):
        part = slice(start, start + scope)
        across = value[:, part] @ hessian[part]
        wanted[:, p] = (across * weight).sum(1, dtype=torch.float64)
        for q, other in enumerate(starts):
            there = slice(other, other + scope)
            system[:, p, q] = (across[:, there] * value[:, there]).sum(1, dtype=torch.float64)
    diagonal = system.diagonal(dim1=1, dim2=2)
    empty = diagonal <= 0
    diagonal.add_(torch.where(empty, 1.0, 1e-6 * diagonal))
    factors = torch.linalg.solve(system, torch.where(empty, 1.0, wanted))
    known = ~empty & (factors >= SMALLEST) & (factors <= LARGEST)
    return torch.where(known, factors, 1.0).to(torch.float32)
