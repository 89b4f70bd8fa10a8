"""Losses against a part of the teacher's distribution: its most probable classes, or random draws from it.

Each takes the teacher's logits [.., V], and makes the part itself, or a ready `SparseTarget` in their place (from a
cache on disk, or from an engine that serves only the top of the distribution).
"""

from __future__ import annotations

import math
from typing import ClassVar, Literal, Unpack

import torch
from torch import Tensor

from compress.errors import UsageError
from compress.losses.base import IGNORED, ClosedFormLoss, Common, Needs, between, check_positions, one_of, positive
from compress.losses.divergence import Distributions, Options
from compress.losses.kl import kl_term
from compress.losses.sparse import Kind, SparseTarget, at_least_one, grouped, log_total, sampled_target, top_classes

Tail = Literal["residual", "partial", "renormalised", "conditional"]
TAILS: tuple[Tail, ...] = ("residual", "partial", "renormalised", "conditional")


class TargetLoss(ClosedFormLoss):
    """Base of the losses against a `SparseTarget`. A subclass gives `pair`, for dense logits, and `target_pair`."""

    kind: ClassVar[Kind]
    """The targets that it takes."""

    def __init__(self, temperature: float = 1.0, t2: bool = False, **common: Unpack[Common]) -> None:
        super().__init__(**common)
        self.temperature = positive(temperature, "temperature")
        self.t2 = t2

    def target_pair(self, student: Tensor, target: SparseTarget) -> tuple[Tensor, Tensor]:
        """Like `pair`, of n targets in place of the teacher's logits."""
        raise NotImplementedError

    def scaled(self, value: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """The pair, from the value and its gradient with respect to z / T."""
        scale = self.temperature**2 if self.t2 else 1.0
        return value * scale, gradient.mul_(scale / self.temperature)

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor | SparseTarget | None = None,
        labels: Tensor | None = None,
        weights: Tensor | None = None,
        denominator: Tensor | float | None = None,
    ) -> Tensor:
        if not isinstance(teacher_logits, SparseTarget):
            return super().forward(student_logits, teacher_logits, labels, weights, denominator)
        target = teacher_logits.to(student_logits.device)
        student = self.on_classes_of(target, student_logits)
        check_positions(student, labels=labels)
        rows = torch.arange(target.positions.numel(), device=student.device).reshape(target.positions)
        if labels is not None:
            rows = rows.masked_fill(labels == IGNORED, IGNORED)
        return _Against(self, target)(student, None, rows, weights, denominator)

    def on_classes_of(self, target: SparseTarget, student: Tensor) -> Tensor:
        """The student's logits over the target's classes. Raises `UsageError` for a target of another loss, temperature
        or vocabulary, or of other positions."""
        name, classes = type(self).__name__, student.shape[-1]
        if target.kind != self.kind:
            remedy = "Use SampledKL for random draws and TopKKL for the most probable classes."
            raise UsageError(f"{name} was given a '{target.kind}' target, it takes '{self.kind}'.", remedy=remedy)
        if not math.isclose(target.temperature, self.temperature, rel_tol=1e-6):
            remedy = "Another T needs another target: give the loss the target's, or make the target again."
            raise UsageError(
                f"The target is of temperature {target.temperature:g}, {name} of {self.temperature:g}.", remedy=remedy
            )
        if target.positions != student.shape[:-1]:
            remedy = "Both need the same positions."
            raise UsageError(
                f"The student's logits are {tuple(student.shape)}, the target's positions {tuple(target.positions)}.",
                remedy=remedy,
            )
        if classes < target.classes or (classes > target.classes and self.vocabulary == "equal"):
            remedy = (
                "The part of a missing class cannot be taken out of a target: make it from logits cut to the student's."
                if classes < target.classes
                else "If the first ones are the same and the rest is padding, give vocabulary='common'."
            )
            raise UsageError(f"The student has {classes} classes, the target {target.classes}.", remedy=remedy)
        return student[..., : target.classes]


class _Against(ClosedFormLoss):
    """A loss and its targets: the label of a position is the row of its target."""

    needs = Needs.NOTHING

    def __init__(self, loss: TargetLoss, target: SparseTarget) -> None:
        super().__init__(reduction=loss.reduction)
        self.loss, self.target = loss, target

    def pair(self, student: Tensor, teacher: Tensor | None, labels: Tensor | None) -> tuple[Tensor, Tensor]:
        assert labels is not None
        return self.loss.target_pair(student, self.target.rows(labels))


class TopKKL(TargetLoss):
    """Forward KL against the teacher's `k` most probable classes S, in nats.

    With m = p(S) and Q = q(S),

        residual      sum_S p log(p/q) + (1 - m) log((1 - m) / (1 - Q))
        partial       sum_S p log(p/q)
        renormalised  sum_S p/m log(p / (m q))            = KL(p^S || q^S) - log Q
        conditional   sum_S p/m log(p Q / (m q))          = KL(p^S || q^S)

    where p^S, q^S are p, q given S. `tail` says what becomes of the other classes:

    - **residual** (the default) puts them together into one class. A true KL: never negative, its gradient is 0 at
      q = p, and it misses of the full one exactly (1 - m) KL(p given the rest || q given the rest).
    - **partial** leaves them out; both p and q are normalised over the whole vocabulary. KL-Top of OSTQuant's runs (Hu
      et al. 2025, arXiv 2501.13987; k = 1000, `post_attn=True` in its code), top-k of verl and of RS-KD's comparison.
      Not a divergence: it is negative where Q > m, and its gradient at q = p is m q - p [S], of L1 norm 2 m (1 - m).
    - **renormalised** makes the teacher's k a distribution, against the student's whole one: the student is asked for
      Q = 1. Gradient at q = p of L1 norm 2 (1 - m).
    - **conditional** renormalises both, a softmax over k logits: OSTQuant with `post_attn=False`. A true KL of
      what the two think *given* S; it says nothing of Q, which is free to fall.

    `beta`, with residual, first moves the part beta of the teacher's rest to S, in proportion: S then has the mass
    m + beta (1 - m) (ReTaCo 2026); 0 is the residual KL, 1 is renormalised.

    Everything is computed over k + 1 classes whose last logit is the logsumexp of the others, in the form of
    `divergence`: nothing is subtracted from 1, and a rest of 1e-9 keeps all its digits. Time and memory: one pass over
    the student's logits; exact for k >= V. Infinite where the student leaves out a class of S.
    """

    kind = "top"

    def __init__(self, k: int = 64, tail: Tail = "residual", beta: float = 0.0, **options: Unpack[Options]) -> None:
        super().__init__(**options)
        self.k = at_least_one(k, "k")
        self.tail = one_of(tail, TAILS, "tail")
        self.beta = between(beta, "beta", 0, 1, ends=True)
        if self.beta and tail != "residual":
            raise UsageError(f"beta is {beta} and tail '{tail}'.", remedy="beta goes with tail 'residual'.")
        if tail == "conditional" and k == 1:
            raise UsageError("Given one class there is nothing to compare.", remedy="Give a k of 2 or more.")

    def pair(self, student: Tensor, teacher: Tensor | None, labels: Tensor | None) -> tuple[Tensor, Tensor]:
        assert teacher is not None
        indices = top_classes(teacher, self.k)
        return self.of_scores(student, indices, grouped(teacher, indices, self.temperature))

    def target_pair(self, student: Tensor, target: SparseTarget) -> tuple[Tensor, Tensor]:
        scores = torch.cat([target.log_probs, target.log_rest.unsqueeze(-1)], -1)
        return self.of_scores(student, target.indices.long(), scores.double())

    def of_scores(self, student: Tensor, indices: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """The pair, from `target`, float64 [n, k + 1]: the teacher's scores of the listed classes and of the rest, the
        softmax of which are their probabilities. A class that has none is not of S."""
        unused = torch.isneginf(target[:, :-1])
        listed = (student.gather(-1, indices).double() / self.temperature).masked_fill_(unused, -math.inf)
        if self.tail == "conditional":
            value, slope = self.of_classes(Distributions.of(listed, target[:, :-1]))
            gradient = torch.zeros_like(student)
        else:
            struck = torch.full_like(unused, -math.inf, dtype=student.dtype).masked_fill_(unused, math.inf)
            rest = student.scatter_reduce(-1, indices, struck, "amin")
            log_rest = log_total(rest, self.temperature)
            value, slope = self.of_classes(Distributions.of(torch.cat([listed, log_rest], -1), self.moved(target)))
            # q given the rest, 0 on S
            within = rest.div_(self.temperature).sub_(log_rest.clamp(min=torch.finfo(rest.dtype).min)).exp_()
            gradient = within.mul_(slope[:, -1:])
            slope = slope[:, :-1]
        gradient.scatter_add_(-1, indices, slope.to(gradient.dtype))
        return self.scaled(value.to(gradient.dtype), gradient)

    def of_classes(self, d: Distributions) -> tuple[Tensor, Tensor]:
        """The value [n] and its gradient [n, k + 1] with respect to the scores."""
        terms = kl_term(d)
        if self.tail != "partial":
            return terms.sum(-1), d.gap
        # sum_S p u = sum_S (p u - p + q) + (m - Q), and m - Q is the gap of the rest
        last = torch.zeros_like(d.p)
        last[:, -1] = d.p[:, -1]
        return terms[:, :-1].sum(-1) + d.gap[:, -1], d.gap - d.p[:, -1:] * d.q + last

    def moved(self, target: Tensor) -> Tensor:
        """The scores when the part beta of the rest is given to the listed classes."""
        beta = 1.0 if self.tail == "renormalised" else self.beta
        if beta == 0:
            return target
        listed, rest = target[:, :-1], target[:, -1:]
        mass = listed.logsumexp(-1, keepdim=True)
        raised = torch.logaddexp(mass, rest + math.log(beta)) - mass
        return torch.cat([listed + raised, rest + (math.log1p(-beta) if beta < 1 else -math.inf)], -1)


class SampledKL(TargetLoss):
    """RS-KD: cross-entropy against random draws from the teacher, - sum_v p'_v log q_v with p' = counts / draws.

    The gradient q - p' is an unbiased estimate of that of the full forward KL, from `draws` classes or fewer; a top-k
    target of as many is biased. The value is in nats but not a divergence: its mean is KL(p || q) + H(p).

    Anshumann et al. 2025 (arXiv 2503.16870), about 50 draws from the teacher itself. From the teacher's logits, every
    call in training mode makes fresh draws: their stream starts at `seed`, and where it has got to is the buffer
    `stream`, so that a training taken up from a checkpoint goes on with the draws that it would have had. In
    evaluation mode the stream stands still, and the same logits get the same draws. Several processes draw from one
    stream, each what is for its positions (in the fused form, each from one of its own). A ready target is used as it
    is: over epochs that all use one, the estimate is of its draws and not of p.
    """

    kind = "sampled"
    divisible = True
    stream: Tensor

    def __init__(self, draws: int = 50, seed: int = 0, **options: Unpack[Options]) -> None:
        super().__init__(**options)
        self.draws = at_least_one(draws, "draws")
        self.register_buffer("stream", torch.Generator().manual_seed(seed).get_state())

    def all_values(self, student: Tensor, teacher: Tensor | None, labels: Tensor | None) -> Tensor:
        if not self.training:
            return super().all_values(student, teacher, labels)
        counts = self.processes.counts(len(student), student.device)
        self.skip(sum(counts[: self.processes.rank]))
        values = super().all_values(student, teacher, labels)
        self.skip(sum(counts[self.processes.rank + 1 :]))
        return values

    def skip(self, positions: int) -> None:
        """Leave out the draws for so many positions."""
        generator = torch.Generator()
        generator.set_state(self.stream.cpu())
        torch.rand(positions, self.draws, generator=generator, dtype=torch.float64)
        self.stream.copy_(generator.get_state())

    def pair(self, student: Tensor, teacher: Tensor | None, labels: Tensor | None) -> tuple[Tensor, Tensor]:
        assert teacher is not None
        generator = torch.Generator()
        generator.set_state(self.stream.cpu())
        target = sampled_target(teacher, self.draws, generator, self.temperature)
        if self.training:
            self.stream.copy_(generator.get_state())
        return self.target_pair(student, target)

    def target_pair(self, student: Tensor, target: SparseTarget) -> tuple[Tensor, Tensor]:
        indices, weights = target.indices.long(), target.log_probs.to(student.dtype).softmax(-1)
        log_q = torch.log_softmax(student / self.temperature, -1)
        drawn = torch.where(weights > 0, weights * log_q.gather(-1, indices), torch.zeros_like(weights))
        return self.scaled(-drawn.sum(-1), log_q.exp_().scatter_add_(-1, indices, -weights))
