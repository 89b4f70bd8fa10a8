"""DIST: the student's probabilities need only correlate with the teacher's, along the classes and along the batch.

1 - r of two almost proportional vectors is the difference of two numbers near one. With a and b the vectors centred
and scaled to length one,

    1 - r = |a - b|^2 / 2,     d(1 - r)/da' = ((a - b) - (1 - r) a) / |a'|     (a' the centred vector before scaling),

which loses nothing and is never negative. r does not change with the scale of its vectors, so that each is taken
relative to its largest probability: the correlation over the batch of a class whose probabilities are all about 1e-30
is as good as any other.
"""

from __future__ import annotations

from typing import Any, ClassVar, Unpack

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from compress.losses.base import Common, TokenLoss, chunk_rows, positive
from compress.losses.decoupled import at_least_zero
from compress.losses.processes import ALONE, Processes

FLAT = 4.0
"""A line is constant when its relative standard deviation is below this many roundings: what is left is their noise."""


class Dist(TokenLoss):
    """DIST, T^2 (beta inter + gamma intra), correlations instead of equality of p = softmax(z_t / T) and q.

        inter_n = 1 - r(q_n, p_n) over the classes of position n,
        intra   = mean over the classes v of 1 - r(q_v, p_v), over the positions of the batch that count,

    r Pearson's correlation; position n has the value T^2 (beta inter_n + gamma intra), without T^2 unless `t2`. Huang
    et al. 2022 (NeurIPS, arXiv 2205.10536). The defaults are those for CIFAR-100 (beta = gamma = 2, T = 4); on ImageNet
    beta = gamma = 2, T = 1. It stands beside a cross-entropy.

    The released code divides by |a'| |b'| + 1e-8, which is `eps` here. It is more than a guard: with T = 1 and 1,024
    tokens of a model with 4,096 classes, 7 % of the classes have |a'| |b'| below 1e-8. Their correlation counts as less
    than half, their gradient is damped, and a student equal to the teacher is not at a minimum. With `eps` = 0, the
    default, r is the paper's correlation.

    Constant lines (to rounding; with one position every class is one) have no correlation: if one of the two vectors is
    constant, r is 0, the value 1 and the gradient 0; if both are, a position has inter = 0, and a class does not count
    in the mean of intra. Classes that both leave out (-inf) do not count anywhere. As the student's prediction tends to
    uniform, the gradient grows as the inverse of its relative standard deviation. Weights apply to the values of
    positions, not inside intra. Time O(N V); memory O(N V): positions cannot be cut into chunks. On several
    processes intra is over the positions of all; sums over them are exchanged, not the positions.
    """

    independent: ClassVar[bool] = False
    divisible: ClassVar[bool] = True

    def __init__(
        self,
        beta: float = 2.0,
        gamma: float = 2.0,
        temperature: float = 4.0,
        eps: float = 0.0,
        t2: bool = True,
        **common: Unpack[Common],
    ) -> None:
        super().__init__(**common)
        self.beta, self.gamma = at_least_zero(beta, "beta"), at_least_zero(gamma, "gamma")
        self.temperature, self.eps = positive(temperature, "temperature"), at_least_zero(eps, "eps")
        self.t2 = t2

    def values(self, student: Tensor, teacher: Tensor | None, labels: Tensor | None) -> Tensor:
        assert teacher is not None
        if sum(self.processes.counts(len(student), student.device)) == 0:
            return student.sum(-1)
        # not log_softmax: on a CPU its sum is taken without pairing, and 1e-5 off over 128,000 classes
        log_q, log_p = (
            z - z.logsumexp(-1, keepdim=True) for z in (student / self.temperature, teacher / self.temperature)
        )
        absent = torch.isneginf(log_q) & torch.isneginf(log_p)
        present = ~absent if bool(self.processes.total(absent.any().long())) else None
        inter, _ = _Decorrelation.apply(log_q, log_p, present, 1, self.eps, ALONE)
        intra, counts = _Decorrelation.apply(log_q, log_p, present, 0, self.eps, self.processes)
        intra = intra.sum() / counts.sum().clamp(min=1)
        return (self.temperature**2 if self.t2 else 1.0) * (self.beta * inter + self.gamma * intra)


class _Decorrelation(torch.autograd.Function):
    """1 - r of exp(log_q) and exp(log_p) [N, V] along a dimension, and which lines are not constant in both; some lines
    at a time, so that they stay in the caches. The gradient is kept for the backward pass. Lines along the positions
    (dimension 0) go on in the other processes."""

    @staticmethod
    def forward(
        ctx: Any, log_q: Tensor, log_p: Tensor, present: Tensor | None, dim: int, eps: float, processes: Processes
    ) -> tuple[Tensor, Tensor]:
        lines, numbers = log_q.shape[1 - dim], sum(processes.counts(log_q.shape[dim], log_q.device))
        step = chunk_rows(lines, numbers, log_q.device)
        kept = torch.empty_like(log_q) if ctx.needs_input_grad[0] else None
        values, counts = [], []
        for start in range(0, lines, step):
            part = (slice(None),) * (1 - dim) + (slice(start, start + step),)
            value, count, gradient = decorrelation(
                log_q[part], log_p[part], None if present is None else present[part], dim, eps, processes
            )
            values.append(value)
            counts.append(count)
            if kept is not None:
                kept[part] = gradient
        ctx.dim, ctx.processes = dim, processes
        if kept is not None:
            ctx.save_for_backward(kept)
        counted = torch.cat(counts) if counts else log_q.new_empty(0, dtype=torch.bool)
        ctx.mark_non_differentiable(counted)
        return torch.cat(values) if values else log_q.new_empty(0), counted

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (gradient,) = ctx.saved_tensors
        return gradient * ctx.processes.total(upstream).unsqueeze(ctx.dim), None, None, None, None, None


def decorrelation(
    log_q: Tensor, log_p: Tensor, present: Tensor | None, dim: int, eps: float, processes: Processes
) -> tuple[Tensor, Tensor, Tensor]:
    """1 - r of the lines along `dim`, which of them are not constant in both, and the gradient at log_q."""
    q, a, length_q, top_q = standardised(log_q, present, dim, processes)
    _, b, length_p, top_p = standardised(log_p, present, dim, processes)
    difference = a - b
    value = processes.total(torch.linalg.vector_norm(difference, dim=dim, keepdim=True).square()) / 2
    slope = length_q.reciprocal()
    if eps > 0:
        product = length_q * length_p * torch.exp(top_q + top_p)
        damping = product / (product + eps)
        value, slope = damping * value + (1 - damping), slope * damping
    varies_q, varies_p = length_q > 0, length_p > 0
    both, either = varies_q & varies_p, varies_q | varies_p
    value = torch.where(both, value, either.to(value.dtype))
    gradient = difference.addcmul_(a, value, value=-1).mul_(slope.masked_fill(~both, 0)).mul_(q)
    return value.squeeze(dim), either.squeeze(dim), gradient


def standardised(
    log_x: Tensor, present: Tensor | None, dim: int, processes: Processes
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x relative to its largest value, x centred and scaled to length one (0 when constant), the length before (0 when
    constant), and the logarithm of the largest value."""
    if log_x.shape[dim]:
        top = log_x.amax(dim, keepdim=True)
    else:
        top = torch.full_like(log_x.sum(dim, keepdim=True), -torch.inf)
    top = processes.largest(top)
    top = top.masked_fill(torch.isneginf(top), 0)
    x = torch.exp(log_x - top)
    if present is None:
        count = processes.total(torch.full_like(top, log_x.shape[dim]))
        centred = x - processes.total(x.sum(dim, keepdim=True)) / count
    else:
        count = processes.total(present.sum(dim, keepdim=True)).clamp(min=1).to(x.dtype)
        centred = (x - processes.total(x.sum(dim, keepdim=True)) / count).mul_(present)
    length = processes.total(torch.linalg.vector_norm(centred, dim=dim, keepdim=True).square()).sqrt()
    flat = length <= FLAT * torch.finfo(x.dtype).eps * count.sqrt()
    return x, centred.mul_((1 / length).masked_fill_(flat, 0)), length.masked_fill(flat, 0), top
