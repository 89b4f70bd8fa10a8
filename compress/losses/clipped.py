"""The token-level loss of MGSR: a KL divergence of the part of the distribution that a small network keeps (DAC-KL).

Class k is kept to the degree w_k, which `compress.losses.clipping` finds. Let a channel show class k as itself with
probability w_k, and as "other" otherwise. The KL divergence of what it shows of p and of q is the clipped divergence
with its residual bucket:

    L = sum_k w_k p_k log(p_k / q_k) + P log(P / Q),    P = sum_k (1 - w_k) p_k,    Q = sum_k (1 - w_k) q_k.

By the data-processing inequality 0 <= L <= KL(p || q), and L never falls when a w_k rises:

    dL/dw_k = p_k log(p_k / q_k) - p_k log(P / Q) - p_k + q_k P / Q  >=  0.

So a network that *minimises* L always narrows its window, down to nothing if it may: that is the collapse. Without the
bucket the sum is not even bounded below by 0, and the network may also look for where it is negative. `ClippedKL` says
what is done about it.
"""

from __future__ import annotations

from typing import Any, Literal, Unpack

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from compress.errors import UsageError
from compress.losses.base import Common, TokenLoss, as_float, between, chunk_rows, one_of, positive
from compress.losses.clipping import ClippingNetwork, kept_shares, octaves
from compress.losses.divergence import Distributions, excess, tempered
from compress.losses.kl import kl_term

FAR = 20.0
"""|log(P / Q)| up to which the bucket's terms are taken as they are."""
EVEN = 1e-6
"""The divergence in nats from which on losing all of it counts."""


class ClippedKL(TokenLoss):
    """KL divergence of the teacher's and the student's distributions clipped to a window of quantiles, in nats: L as
    in the module's text, with w_y = 1 for the target class y (the label; without labels the teacher's first class).

    Liu et al. 2024 (MGSR, arXiv 2407.10068), "DAC-KL". The paper gives the idea: a learnable sub-network sees the
    teacher's distribution and predicts two quantiles, a sigmoid mask keeps the dense region between them, the target
    class is added, and the KL divergence is taken over the kept classes, which are not renormalised. What the network
    sees, how it is trained, how soft the mask is and what keeps it from masking everything are not given, and no code
    is published: all of this is our own design.

    clip         "learned", or "fixed" with the bounds `lower` (0.2) and `upper` (0.8), the paper's ablation.
    signal       what a learned network learns from. "student": the gradient of the loss itself, as in training end to
                 end; it narrows every window down to `mass_floor`. "retain" (default): the network alone minimises

                     (KL(p || q) - L) / KL(p || q) + price sum_k w_k log(1 + 1/k) / log(1 + V)

                 with k the rank of a class: the fraction of the divergence that the clip loses, and the length of the
                 kept region in log-ranks, log(1 + n) for the n largest classes.
    price        0.5: what keeping all classes costs, where losing all of the divergence costs 1.
    residual     true: with the bucket, so that L is a KL divergence. False: the paper's sum_k w_k p_k log(p_k / q_k),
                 which can be negative and can have its minimum away from p = q; it needs `signal="student"`.
    mass_floor   0.5: u - l is at least this, so that this much of the teacher's mass is kept besides the target.
    target       true: the target class is kept whole.
    softness     0.05: s, the width of the sigmoid in units of mass. Its sharpness is 1 / s.
    top          64: so many of the largest classes are ordered. The others are one tie at the bottom of the axis, with
                 one w for all of them; their mass and their divergence are counted exactly.
    hidden       32: the width of the network.
    temperature  1, and `t2` (false) multiplies by T^2, as for every divergence.

    The parameters of the network are those of this module: give them to the optimizer. `bounds` and `mask` show what
    it does. Raises `UsageError` for options that contradict each other.
    """

    def __init__(
        self,
        clip: Literal["learned", "fixed"] = "learned",
        signal: Literal["retain", "student"] = "retain",
        lower: float = 0.2,
        upper: float = 0.8,
        price: float = 0.5,
        residual: bool = True,
        mass_floor: float = 0.5,
        target: bool = True,
        softness: float = 0.05,
        top: int = 64,
        hidden: int = 32,
        temperature: float = 1.0,
        t2: bool = False,
        **common: Unpack[Common],
    ) -> None:
        super().__init__(**common)
        self.clip = one_of(clip, ("learned", "fixed"), "clip")
        self.signal = one_of(signal, ("retain", "student"), "signal")
        self.lower = between(lower, "lower", 0, 1, ends=True)
        self.upper = between(upper, "upper", 0, 1, ends=True)
        self.price = between(price, "price", 0, float("inf"), ends=True)
        self.mass_floor = between(mass_floor, "mass_floor", 0, 0.99, ends=True)
        self.softness = between(softness, "softness", 0.02, 1, ends=True)
        self.temperature = positive(temperature, "temperature")
        self.top = int(positive(top, "top"))
        self.residual, self.target, self.t2 = residual, target, t2
        if clip == "fixed" and self.upper - self.lower < self.mass_floor - 1e-9:
            raise UsageError(
                f"The bounds {lower:g} and {upper:g} keep less than the mass_floor, {mass_floor:g}.",
                remedy="Give bounds that are further apart, or a lower mass_floor.",
            )
        if clip == "learned" and signal == "retain" and not residual:
            raise UsageError(
                "Without the residual bucket there is no divergence of which signal='retain' could keep a part.",
                remedy="Give signal='student', or leave residual=True.",
            )
        self.network = ClippingNetwork(int(positive(hidden, "hidden")), self.mass_floor) if clip == "learned" else None

    def bounds(self, teacher_logits: Tensor) -> tuple[Tensor, Tensor]:
        """The quantiles (l, u), each [n], between which the distributions of logits [n, V] are kept."""
        log_head, _ = self._head(teacher_logits)
        return self._window(log_head, teacher_logits.shape[-1])

    def mask(self, teacher_logits: Tensor, labels: Tensor | None = None) -> Tensor:
        """w [n, V], how far each class is kept, for logits [n, V] and labels [n]."""
        log_head, head = self._head(teacher_logits)
        shares, rest = self._shares(log_head, teacher_logits.shape[-1])
        mask = rest.unsqueeze(-1).expand(teacher_logits.shape).scatter(1, head, shares)
        return mask.scatter(1, target_of(teacher_logits, labels), 1.0) if self.target else mask

    def check(self, student: Tensor, teacher: Tensor | None, labels: Tensor | None) -> None:
        super().check(student, teacher, labels)
        if labels is not None and labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < student.shape[1]:
            raise UsageError(
                f"A label is {int(labels.min())} or {int(labels.max())}; there are {student.shape[1]} classes.",
                remedy="Labels are class numbers from 0; -100 leaves a position out.",
            )

    def all_values(self, student: Tensor, teacher: Tensor | None, labels: Tensor | None) -> Tensor:
        return self.values(student, teacher, labels)  # each chunk is taken to float32 by itself

    def values(self, student: Tensor, teacher: Tensor | None, labels: Tensor | None) -> Tensor:
        assert teacher is not None
        size = teacher.shape[-1]
        log_head, head = self._head(teacher)
        shares, rest = self._shares(log_head, size)
        classes, kept, once = head, shares, torch.ones_like(shares)
        if self.target:
            target = target_of(teacher, labels)
            found = head == target
            classes, kept = torch.cat([head, target], -1), torch.cat([shares.masked_fill(found, 1), once[:, :1]], -1)
            once = torch.cat([once, (~found.any(-1, keepdim=True)).to(once.dtype)], -1)
        clipped, lost, whole = _Clipped.apply(
            student, teacher, classes, kept, once, rest, self.temperature, self.residual
        )
        if self.network is not None:
            own = -lost
            if self.signal == "retain":
                own = lost / (whole + EVEN) + self.price * octaves(shares, rest, size)
            clipped = _Beside.apply(clipped, own)
        return clipped * self.temperature**2 if self.t2 else clipped

    def _head(self, teacher: Tensor) -> tuple[Tensor, Tensor]:
        """log p [n, k] of the largest classes in descending order, and which they are."""
        rows, size = chunk_rows(len(teacher), teacher.shape[-1], teacher.device), teacher.shape[-1]
        shape = (len(teacher), min(self.top, size))
        log_head = teacher.new_empty(shape, dtype=torch.promote_types(teacher.dtype, torch.float32))
        head = teacher.new_empty(shape, dtype=torch.int64)
        for start in range(0, len(teacher), rows):
            part = slice(start, start + rows)
            scaled = tempered(as_float(teacher[part].detach()), self.temperature)
            values, head[part] = scaled.topk(shape[1])
            log_head[part] = values - scaled.logsumexp(-1, keepdim=True)
        return log_head, head

    def _window(self, log_head: Tensor, classes: int) -> tuple[Tensor, Tensor]:
        if self.network is not None:
            return self.network(log_head, classes)
        like = log_head[:, 0]
        return torch.full_like(like, self.lower), torch.full_like(like, self.upper)

    def _shares(self, log_head: Tensor, classes: int) -> tuple[Tensor, Tensor]:
        """w of the head's classes [n, k], and of all others [n]."""
        head = log_head.exp()
        start = (1 - head.cumsum(-1)).clamp(min=0)
        tail = start[:, -1:] if head.shape[-1] < classes else torch.zeros_like(start[:, -1:])
        start, mass = torch.cat([start, torch.zeros_like(tail)], -1), torch.cat([head, tail], -1)
        shares = kept_shares(start, mass, *self._window(log_head, classes), self.softness)
        return shares[:, :-1], shares[:, -1]


def target_of(teacher: Tensor, labels: Tensor | None) -> Tensor:
    """The target class [n, 1]: the label, or the first of the teacher's most probable ones."""
    return teacher.argmax(-1, keepdim=True) if labels is None else labels.unsqueeze(-1)


class _Beside(torch.autograd.Function):
    """The first, with the gradient of the sum of the two: what the network minimises is not added to the value."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, objective: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return upstream, upstream


class _Clipped(torch.autograd.Function):
    """(L, KL - L, KL), each [n]; the first is differentiated with respect to the student's logits alone, the second
    with respect to the shares alone, so that the student and the network each learn from what is theirs.

    `shares` are those of `classes` [n, k], of which `once` is 0 for one that is named before; `rest` [n] is that of all
    other classes. Only sums over these others are needed of what is [n, V], not their shares.
    """

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        teacher: Tensor,
        classes: Tensor,
        shares: Tensor,
        once: Tensor,
        rest: Tensor,
        temperature: float,
        residual: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        clip = with_bucket if residual else without_bucket
        clipped, whole, rest_slope = torch.empty_like(rest), torch.empty_like(rest), torch.empty_like(rest)
        slopes = torch.empty_like(shares)
        kept = torch.empty_like(student) if ctx.needs_input_grad[0] else None
        rows = chunk_rows(len(student), student.shape[1], student.device)
        for start in range(0, len(student), rows):
            part = slice(start, start + rows)
            p_logits, q_logits = teacher[part].to(shares.dtype), student[part].to(shares.dtype)
            d = Distributions.of(q_logits, p_logits, temperature)
            term = kl_term(d)
            whole[part] = term.sum(-1)
            clipped[part], slopes[part], rest_slope[part], gradient = clip(
                d, term, classes[part], shares[part], once[part], rest[part]
            )
            if kept is not None:
                kept[part] = gradient / temperature
        for slope in (slopes, rest_slope):  # of an infinite divergence the network learns nothing
            slope.nan_to_num_(0.0, 0.0, 0.0)
        ctx.save_for_backward(kept, slopes, rest_slope)
        ctx.mark_non_differentiable(whole)
        return clipped, whole - clipped, whole

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, clipped: Tensor, lost: Tensor, whole: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        kept, slopes, rest_slope = ctx.saved_tensors
        gradient = None if kept is None else kept * clipped.unsqueeze(-1).to(kept.dtype)
        return gradient, None, None, -slopes * lost.unsqueeze(-1), None, -rest_slope * lost, None, None


def others(values: Tensor, classes: Tensor) -> Tensor:
    """The sum over all but these classes, without subtraction: [n]."""
    return values.scatter(1, classes, 0.0).sum(-1)


def weighed(weights: Tensor, values: Tensor) -> Tensor:
    """The product, and 0 where the weight is, if the value is infinite as well."""
    return torch.where(weights == 0, torch.zeros_like(values), weights * values)


def with_bucket(
    d: Distributions, term: Tensor, classes: Tensor, shares: Tensor, once: Tensor, rest: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """L [n], dL/dw of the classes [n, k] and of the rest [n], and dL/d(z_s / T) [n, V]. `term` is p log(p/q) - p + q.

    With g = q - p and r = log(P / Q), neither the gradient w g - (1 - w) q expm1(r) nor the bucket's P excess(r)
    cancels for close distributions, as r = -log1p(sum (1 - w) g / P) then. Where the student leaves nearly nothing
    outside of what is kept (r > FAR), all is taken in logarithms.
    """
    left, left_rest = (1 - shares).clamp(min=0), (1 - rest).clamp(min=0)  # rounding may put a share above one
    p, q, gap, own = (x.gather(1, classes) for x in (d.p, d.q, d.gap, term))
    p_rest, q_rest, gap_rest, own_rest = (others(x, classes) for x in (d.p, d.q, d.gap, term))
    teacher_left = (left * p).sum(-1) + left_rest * p_rest  # a class named twice is kept whole: it has nothing left
    student_left = (left * q).sum(-1) + left_rest * q_rest
    gap_left = (left * gap).sum(-1) + left_rest * gap_rest

    near = gap_left.abs() < teacher_left / 2
    r = torch.where(near, -torch.log1p(gap_left / teacher_left), teacher_left.log() - student_left.log())
    empty = teacher_left == 0  # the bucket's value is Q then
    r = r.masked_fill(empty, -FAR)
    limited = r.clamp(-FAR, FAR)
    bucket = torch.where(limited == r, teacher_left * excess(limited), teacher_left * r + gap_left)
    bucket = torch.where(empty, student_left, bucket)

    pull, rise, turn = (x.unsqueeze(-1) for x in (torch.expm1(limited), excess(-limited), limited))
    slopes = own + q * rise + gap * turn
    slope_rest = own_rest + q_rest * rise.squeeze(-1) + gap_rest * turn.squeeze(-1)
    gradient = d.gap * rest.unsqueeze(-1) - d.q * (left_rest.unsqueeze(-1) * pull)
    gradient = gradient.scatter_(1, classes, shares * gap - left * q * pull)
    far = r > FAR
    if bool(far.any()):
        mask = left_rest[far].unsqueeze(-1).expand(-1, term.shape[1]).scatter(1, classes[far], left[far])
        log_kept = d.log_q[far] + mask.log()
        log_left = log_kept.logsumexp(-1, keepdim=True)
        at, share = teacher_left[far], torch.exp(log_kept - log_left).nan_to_num(0.0)
        bucket[far] = at * (at.log() - log_left.squeeze(-1)) + gap_left[far]
        gradient[far] = (1 - mask) * d.gap[far] + mask * d.q[far] - at.unsqueeze(-1) * share
    value = weighed(shares * once, own).sum(-1) + weighed(rest, own_rest) + bucket
    return value, slopes, slope_rest, gradient


def without_bucket(
    d: Distributions, term: Tensor, classes: Tensor, shares: Tensor, once: Tensor, rest: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same for the paper's sum, which is no divergence: L = sum w p log(p / q), dL/dw = p log(p / q), and
    dL/d(z_s / T) = q sum w p - w p."""
    plain = term - d.gap
    p, q, own = (x.gather(1, classes) for x in (d.p, d.q, plain))
    own_rest = others(plain, classes)
    counted = shares * once
    mass = ((counted * p).sum(-1) + rest * others(d.p, classes)).unsqueeze(-1)
    gradient = d.q * mass - d.p * rest.unsqueeze(-1)
    gradient = gradient.scatter_(1, classes, q * mass - shares * p)
    return weighed(counted, own).sum(-1) + weighed(rest, own_rest), own, own_rest, gradient
