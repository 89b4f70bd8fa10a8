"""Entropic optimal transport between the student's and the teacher's predictions of a batch.

Given costs C_ij between n things and m others, Sinkhorn's algorithm alternates, from g = 0,

    f_i = -lambda log( 1/m sum_j exp((g_j - C_ij) / lambda) ),
    g_j = -lambda log( 1/n sum_i exp((f_i - C_ij) / lambda) ),

and P_ij = exp((f_i + g_j - C_ij) / lambda) / (n m) is the plan: its columns sum to 1/m exactly, its rows to 1/n when
the iteration has converged, where it minimises <P, C> + lambda KL(P || uniform). Everything stays in the log domain,
for exp(-C / lambda) is zero in float32 already at C / lambda = 104.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal, Unpack

import torch
from torch import Tensor

from compress.errors import UsageError
from compress.losses.base import Common, TokenLoss, one_of, positive
from compress.losses.pairwise import pairwise_l1

Gradient = Literal["unrolled", "envelope"]


@dataclass(frozen=True)
class Transport:
    """What `sinkhorn` found for the costs [.., n, m]."""

    plan: Tensor
    """P [.., n, m], of total mass 1."""
    left: Tensor
    """The potentials f [.., n], in the unit of the costs."""
    right: Tensor
    """The potentials g [.., m]."""
    marginal_error: Tensor
    """sum_i |sum_j P_ij - 1/n| [..]: twice the mass that is in a wrong row."""
    iterations: int

    def cost(self, costs: Tensor) -> Tensor:
        """<P, C> [..], what the mass travels (the "sharp" value)."""
        return (self.plan * costs).sum((-2, -1))

    @property
    def regularised(self) -> Tensor:
        """mean f + mean g [..]: at convergence <P, C> + lambda KL(P || uniform); its derivative by C is then P."""
        return self.left.mean(-1) + self.right.mean(-1)


def sinkhorn(
    costs: Tensor, regularisation: float = 0.1, iterations: int = 20, tolerance: float | None = None
) -> Transport:
    """The entropic transport for costs [.., n, m] with uniform marginals; differentiable through every iteration.

    Ends after `iterations`, or when the marginal error of every problem of the batch is at most `tolerance`; which of
    the two it was, the result tells.
    """
    n, m = costs.shape[-2:]
    scaled = -costs / regularisation
    u, v = costs.new_zeros(costs.shape[:-1]), costs.new_zeros(*costs.shape[:-2], m)
    done = 0
    while True:
        following = math.log(m) - (scaled + v.unsqueeze(-2)).logsumexp(-1)
        if done == iterations or (tolerance is not None and done and _all_within(tolerance, u, following)):
            break
        u = following
        v = math.log(n) - (scaled + u.unsqueeze(-1)).logsumexp(-2)
        done += 1
    plan = (scaled + u.unsqueeze(-1) + v.unsqueeze(-2)).exp() / (n * m)
    return Transport(plan, regularisation * u, regularisation * v, _row_error(u, following), done)


def _row_error(u: Tensor, following: Tensor) -> Tensor:
    """The marginal error [..]: the rows of the plan sum to exp(u - following) / n, where `following` is the next u."""
    return (u - following).detach().expm1().abs().mean(-1)


def _all_within(tolerance: float, u: Tensor, following: Tensor) -> bool:
    return bool((_row_error(u, following) <= tolerance).all())


class Sinkhorn(TokenLoss):
    """Sinkhorn distillation (SinKD): the cost of transporting the student's predictions of a batch to the teacher's,

        L = <P, C>,  C_ij = || q_i - p_j ||_1 (+ paired if i != j),  p = softmax(z_t / T),  q = softmax(z_s / T),

    where P is the plan of `sinkhorn` between the B positions that count. Cui et al. 2024 (arXiv 2402.17110). No unit;
    between 0 and 2 (+ paired).

    **L does not know which prediction belongs to which input**: exchanging the teacher's rows leaves it as it is. Use
    it beside KL or the cross-entropy, never alone, or set `paired`, which charges that much for leaving one's own row.

    The mass of a row is 1/B here and 1 in the paper: `reduction="sum"` gives the paper's value, "mean" (and a trainer's
    sum over the denominator) 1/B of it. Values of rows are B sum_j P_ij C_ij; weights weigh these, and do not change P.

    - `temperature`: T = 2; there is no T^2. `regularisation`: lambda = 0.1. `iterations`: 20, as in the released code.
    - `tolerance`: end when sum_i |sum_j P_ij - 1/B| is at most this. After a call `marginal_error` holds that sum (with
      `debias`, the largest of three).
    - `gradient`: "unrolled" differentiates L through the iterations, as published; its memory grows with `iterations`.
      "envelope" holds P fixed. At convergence that is the gradient of <P, C> + lambda KL(P || uniform), which is not
      that of <P, C>: they differ by a third in places, and meet only as lambda goes to 0.
    - `debias`: S = OT(q, p) - OT(q, q)/2 - OT(p, p)/2 of the values with the entropy (Feydy et al. 2019, arXiv
      1810.08278), which is 0 for p = q and positive otherwise; <P, C> is not 0 there.
    - `max_rows`: of more positions than this only so many, evenly spaced, are transported, and the others get their
      mean: time is O(rows^2 V), memory O(rows^2 + rows V).

    Batches are those of a forward pass: unlike other losses, this one changes when a batch is cut into micro-batches.
    On several processes it is the batch of all: the chosen rows of the probabilities go to every process.
    """

    independent: ClassVar[bool] = False
    divisible: ClassVar[bool] = True

    def __init__(
        self,
        temperature: float = 2.0,
        regularisation: float = 0.1,
        iterations: int = 20,
        tolerance: float | None = None,
        gradient: Gradient = "unrolled",
        debias: bool = False,
        paired: float = 0.0,
        max_rows: int = 256,
        **common: Unpack[Common],
    ) -> None:
        super().__init__(**common)
        self.temperature = positive(temperature, "temperature")
        self.regularisation = positive(regularisation, "regularisation")
        self.tolerance = None if tolerance is None else positive(tolerance, "tolerance")
        self.gradient = one_of(gradient, ("unrolled", "envelope"), "gradient")
        self.debias = debias
        self.paired = 0.0 if paired == 0 else positive(paired, "paired")
        for name, count in (("iterations", iterations), ("max_rows", max_rows)):
            if count < 1:
                raise UsageError(f"{name} is {count}.", remedy="Give at least 1.")
        self.iterations = iterations
        self.max_rows = max_rows
        self.marginal_error: Tensor | None = None

    def values(self, student: Tensor, teacher: Tensor | None, labels: Tensor | None) -> Tensor:
        assert teacher is not None
        counts = self.processes.counts(len(student), student.device)
        if sum(counts) == 0:
            return student.sum(-1)
        rows = evenly_spaced(sum(counts), self.max_rows, student.device)
        first, last = (
            int((rows < sum(counts[:rank])).sum()) for rank in (self.processes.rank, self.processes.rank + 1)
        )
        own = rows[first:last] - sum(counts[: self.processes.rank])
        q = self.processes.gather(torch.softmax(student[own] / self.temperature, -1))
        p = self.processes.gather(torch.softmax(teacher[own] / self.temperature, -1))
        values = self.of_predictions(q, p)
        if len(own) == len(student):
            return values[first:last]
        return values.mean().expand(len(student)).index_copy(0, own, values[first:last])

    def of_predictions(self, q: Tensor, p: Tensor) -> Tensor:
        """The rows' values [B] of predictions [B, V]."""
        values, self.marginal_error = self.one_way(q, p)
        if self.debias:
            for each in (q, p):
                own, error = self.one_way(each, each)
                values = values - own / 2
                self.marginal_error = torch.maximum(self.marginal_error, error)
        return values

    def one_way(self, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        """The rows' values [B] of OT(left, right), and the marginal error."""
        costs = pairwise_l1(left, right)
        if self.paired:
            costs = costs + self.paired * (1 - torch.eye(len(costs), dtype=costs.dtype, device=costs.device))
        unrolled = self.gradient == "unrolled"
        with torch.set_grad_enabled(unrolled and torch.is_grad_enabled()):
            found = sinkhorn(costs, self.regularisation, self.iterations, self.tolerance)
            values = found.left + found.right if self.debias else len(costs) * (found.plan * costs).sum(-1)
        if not unrolled:
            values = values + len(costs) * (found.plan * (costs - costs.detach())).sum(-1)
        return values, found.marginal_error


def evenly_spaced(count: int, at_most: int, device: torch.device) -> Tensor:
    """`at_most` of the positions 0 .. count - 1, or all."""
    chosen = min(count, at_most)
    return torch.arange(chosen, device=device) * count // chosen
