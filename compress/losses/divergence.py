"""The frame of the divergences between the teacher's distribution p and the student's q over the vocabulary.

**Why not `sum p (log p - log q)`.** Between close models (an 8-bit and a 16-bit one) the divergence is 1e-3 to 1e-6
nats, while the terms of that sum are of the size of its cancellations: in float32 it loses all digits and turns
negative. With u = log p - log q, and since p and q both sum to one,

    KL(p || q) = sum p u = sum p (expm1(-u) + u),

where every term of the second form is non-negative (it is the Bregman divergence of the exponential), so the sum does
not cancel and needs no clamp. What is left is the rounding of u itself, about 1e-7 of the logits' size. Every
divergence here is written so.

**One pair of pointwise functions.** A divergence is a sum F = sum_v f(p_v, q_v), or a function of one. With
a_v = q_v df/dq_v, the gradient with respect to the student's logits is

    dF/dz_v = a_v - q_v sum_w a_w.

A subclass gives (f, a) in `terms`, in product form (no power of q alone, which would overflow). Besides, only sums
over v are needed, so that the vocabulary can be cut into tiles.

**Classes that one model has all but left out.** Where |u| >= 40 the forms above would overflow. There u is held at
+-40, and the smaller of p and q is raised to e^-40 = 4e-18 of the larger, which changes neither a sum nor a difference
of the two in float64. So every bounded divergence has one form for every u. One that grows with |u| adds what is
missing (`p_beyond`, `q_beyond`).
"""

from __future__ import annotations

import math
from functools import cached_property
from typing import ClassVar, Unpack

import torch
from torch import Tensor

from compress.losses.base import ClosedFormLoss, Common, positive
from compress.ops import divergence_rows, native_divergences

Kernel = tuple[str, tuple[float, ...]]
"""A kind of `compress.ops.divergence_rows` and its options."""

OVERFLOW_LIMIT = 40.0
"""|u| at which u is held: e^-40 is below the rounding of float64, and its inverse squared still a float32."""
SERIES_LIMIT = 0.25
"""|u| below which expm1(-u) + u itself cancels, and the series of `excess` is exact to 2e-16."""


def excess(u: Tensor, ratio: Tensor | None = None) -> Tensor:
    """expm1(-u) + u >= 0, to the last digits, for |u| <= 40. `ratio` is expm1(-u), if it is at hand.

    For small u it is -u expm1(-u) (1/2 + u/12 - u^3/720 + u^5/30240 - ...), with the series of u / (1 - e^-u).
    """
    ratio = torch.expm1(-u) if ratio is None else ratio
    square = series = u * u
    for quotient in (42,) if u.dtype == torch.float32 else (39.6, 40, 42):  # of one coefficient to the next
        series = torch.addcmul(square, square, series, value=-1 / quotient)
    series = torch.addcmul(u, u, series, value=-1 / 60)  # u - u^3/60 + u^5/2520 - ...
    both = u * ratio
    close = torch.addcmul(both, both, series, value=1 / 6).mul_(-0.5)
    small = torch.lt(square.detach(), SERIES_LIMIT**2, out=torch.empty_like(square.detach()))
    # lerp with a weight of exactly 0 or 1 picks one of the two, several times faster than `where` on a CPU
    return torch.add(ratio, u).lerp_(close, small)


class Distributions:
    """p and q over the same classes, or over a tile of them, and what the divergences make of them, each once.

    log_p, log_q and u = log p - log q are [n, V]. A class that both leave out (-inf) has u = 0; one that only the
    student leaves out has u = inf, and where p > 0 an infinite divergence is what it is.
    """

    def __init__(
        self,
        student: Tensor,
        teacher: Tensor,
        student_norm: Tensor,
        teacher_norm: Tensor,
        temperature: float = 1.0,
    ) -> None:
        """From logits [n, V] and the logsumexp [n, 1] of logits / temperature over the whole vocabulary.

        The logits of close models are subtracted before they are divided: their difference is exact, while two
        quotients are rounded each by itself (at T = 0.7 and 1e-5 nats this costs three digits).
        """
        self.student, self.teacher, self.temperature = student, teacher, temperature
        self.student_norm, self.teacher_norm = student_norm, teacher_norm
        difference = teacher - student
        self.u = (difference if temperature == 1 else difference.div_(temperature)).sub_(teacher_norm - student_norm)
        self.absent: Tensor | None = None
        """The classes that both leave out; None when there are none."""
        self.reach = largest(self.u)
        """The largest |u|, on a CPU. It is looked at once, so that what is rare costs nothing where it is absent."""
        if math.isnan(self.reach):
            self.absent = torch.isneginf(teacher) & torch.isneginf(student)
            self.u.masked_fill_(self.absent, 0)
            self.reach = largest(self.u)
        self.held = not self.reach < OVERFLOW_LIMIT

    @classmethod
    def of(cls, student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Distributions:
        """From logits [n, V] of whole rows."""
        q, student_norm = softmax_and_norm(tempered(student, temperature))
        p, teacher_norm = softmax_and_norm(tempered(teacher, temperature))
        made = cls(student, teacher, student_norm, teacher_norm, temperature)
        made.p, made.q = p, q
        return made

    @cached_property
    def log_p(self) -> Tensor:
        return tempered(self.teacher, self.temperature) - self.teacher_norm

    @cached_property
    def log_q(self) -> Tensor:
        return tempered(self.student, self.temperature) - self.student_norm

    @cached_property
    def p(self) -> Tensor:
        return torch.exp(self.log_p)

    @cached_property
    def q(self) -> Tensor:
        return torch.exp(self.log_q)

    @cached_property
    def bounded(self) -> Tensor:
        """Where u is not held, bool [n, V]."""
        return self.u.abs() < OVERFLOW_LIMIT

    @cached_property
    def held_u(self) -> Tensor:
        """u, held."""
        return self.u.clamp(-OVERFLOW_LIMIT, OVERFLOW_LIMIT) if self.held else self.u

    @cached_property
    def held_p(self) -> Tensor:
        """p, raised where u is held below."""
        return torch.maximum(self.p, self.q * math.exp(-OVERFLOW_LIMIT)) if self.held else self.p

    @cached_property
    def held_q(self) -> Tensor:
        """q, raised where u is held above."""
        return torch.maximum(self.q, self.p * math.exp(-OVERFLOW_LIMIT)) if self.held else self.q

    @cached_property
    def p_beyond(self) -> Tensor | None:
        """p (u - 40) where u is held above, else 0; None when none is."""
        return beyond(self.p, self.u) if self.held else None

    @cached_property
    def q_beyond(self) -> Tensor | None:
        """q (-u - 40) where u is held below, else 0; None when none is."""
        return beyond(self.q, -self.u) if self.held else None

    @cached_property
    def ratio(self) -> Tensor:
        """q / p - 1 = expm1(-u), held."""
        return torch.neg(self.held_u).expm1_()

    @cached_property
    def gap(self) -> Tensor:
        """q - p, without cancellation."""
        return self.held_p * self.ratio


def largest(u: Tensor) -> float:
    """max |u|; nan if one is, and where u is not on a CPU: a device would have to be waited for."""
    if u.device.type != "cpu" or u.numel() == 0:
        return math.nan
    low, high = torch.aminmax(u.detach())
    return max(-low.item(), high.item())


def tempered(logits: Tensor, temperature: float) -> Tensor:
    return logits if temperature == 1 else logits / temperature


def softmax_and_norm(logits: Tensor) -> tuple[Tensor, Tensor]:
    """softmax [n, V] and logsumexp [n, 1], with one exponential for both.

    The sum inside `torch.softmax` is taken without pairing on a CPU (1e-5 off over 128,000 classes); the sum of its
    result is not, and puts it right.
    """
    p = logits.softmax(-1)
    total = p.sum(-1, keepdim=True)
    p = p / total if p.requires_grad else p.div_(total)
    return p, logits.amax(-1, keepdim=True) - p.amax(-1, keepdim=True).log()


def beyond(weight: Tensor, u: Tensor) -> Tensor:
    """weight (u - 40) where u > 40, else 0; 0 as well where the weight is (0 times infinity)."""
    return (weight * (u - OVERFLOW_LIMIT).clamp_(min=0)).masked_fill_(weight == 0, 0)


def plus(value: Tensor, more: Tensor | None) -> Tensor:
    """The sum, if there is more."""
    return value if more is None else value + more


class Options(Common, total=False):
    """What every divergence can be told."""

    temperature: float
    t2: bool


class Divergence(ClosedFormLoss):
    """Base of the divergences D(p, q) with p = softmax(z_t / T), q = softmax(z_s / T).

    `temperature` is T; `t2` multiplies the value by T^2 (Hinton, Vinyals and Dean 2015, section 2: the gradient then
    keeps its size as T grows). Where a value is infinite and its gradient is too, the gradient given is 0.
    """

    centred: ClassVar[bool] = False
    """sum_v a_v = 0 for every p and q, so that it need not be summed."""

    def __init__(self, temperature: float = 1.0, t2: bool = False, **common: Unpack[Common]) -> None:
        super().__init__(**common)
        self.temperature = positive(temperature, "temperature")
        self.t2 = t2

    @property
    def scale(self) -> float:
        return self.temperature**2 if self.t2 else 1.0

    def terms(self, d: Distributions) -> tuple[Tensor, Tensor]:
        """f [n, V] whose sum is F, and a = q df/dq [n, V]."""
        raise NotImplementedError

    def finish(self, total: Tensor) -> tuple[Tensor, Tensor | None]:
        """The divergence [n] from F [n], and its derivative with respect to F; None when it is F itself."""
        return total, None

    def kernel(self) -> Kernel | None:
        """What computes this divergence in the compiled library; None when nothing does."""
        return None

    def of_distributions(self, d: Distributions) -> tuple[Tensor, Tensor]:
        """D [n] and dD / d(z_s / T) [n, V] of whole rows."""
        f, a = self.terms(d)
        value, slope = self.finish(f.sum(-1))
        gradient = a if self.centred else centre(value, a, d.q)
        return value, gradient if slope is None else gradient * slope.unsqueeze(-1)

    def pair(self, student: Tensor, teacher: Tensor | None, labels: Tensor | None) -> tuple[Tensor, Tensor]:
        assert teacher is not None
        kernel = self.kernel()
        if kernel is not None and kernel[0] in native_divergences() and on_cpu(student, teacher):
            student = student.detach().contiguous()
            gradient = torch.empty_like(student)
            value = divergence_rows(
                student,
                teacher.contiguous(),
                *kernel,
                temperature=self.temperature,
                scale=self.scale,
                gradient=gradient,
            )
            return value, gradient
        value, gradient = self.of_distributions(Distributions.of(student, teacher, self.temperature))
        return scaled(value, self.scale), scaled(gradient, self.scale / self.temperature)


def on_cpu(*logits: Tensor) -> bool:
    """Whether these are float32 on the CPU, of at least one class, and not to be differentiated by autograd."""
    return all(
        z.dtype == torch.float32
        and z.device.type == "cpu"
        and z.shape[-1] > 0
        and not (torch.is_grad_enabled() and z.requires_grad)
        for z in logits
    )


def centre(value: Tensor, a: Tensor, q: Tensor) -> Tensor:
    """a - q sum a [n, V], the gradient; 0 in the rows where it is infinite, as the value [n] there is."""
    total = a.sum(-1, keepdim=True)
    gradient = torch.addcmul(a, q, total, value=-1)
    lost = value.isinf().unsqueeze(-1) & ~total.isfinite()
    if lost.device.type == "cpu" and not bool(lost.any()):
        return gradient
    return gradient.masked_fill_(lost, 0)


def scaled(values: Tensor, factor: float) -> Tensor:
    return values if factor == 1 else values * factor
