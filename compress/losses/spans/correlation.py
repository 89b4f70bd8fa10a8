"""How neighbouring predictions of one span go together, in teacher and student.

For the neighbours k and k + 1 of one span let r = p_k * p_{k+1}, class by class, and s = q_k * q_{k+1} that of the
student. The value of the pair is v = sum over the vocabulary of (s - r)^2. With a = 2 (s - r) s,

    dv/dz_k = a - q_k sum(a),    dv/dz_{k+1} = a - q_{k+1} sum(a):

the two positions share a. Nothing but logits is kept for the backward pass, which computes the products anew, in chunks
of positions that overlap by one neighbour.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, Unpack

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from compress.errors import UsageError
from compress.losses.base import (
    Common,
    Loss,
    Needs,
    Outputs,
    as_float,
    check_positions,
    chunk_rows,
    counted,
    one_of,
    positive,
)
from compress.losses.spans.sources import ChunkSpans, FixedSpans, PunctuationSpans, SpanSource

POWERS = {"hadamard": 1.0, "geometric": 0.5}


class SpanCorrelation(Loss):
    """Squared distance of the products of neighbouring distributions, averaged over the neighbours of one span:

        L = mean over pairs (k, k + 1) of sum_v (q_k,v q_{k+1},v - p_k,v p_{k+1},v)^2,    0 <= v <= 2, no unit.

    Liu et al. 2024 (MGSR, arXiv 2407.10068), span-level correlation; no code is published. Called as

        loss(student_logits [B, T, V], teacher_logits, labels=None, weights=None, denominator=None, spans=[B, T])

    with the number of the span to which the *predicted* token of each position belongs, -1 for none. A pair counts when
    both positions do, and its weight is the mean of theirs. "mean" divides by the weight of all pairs, or by the
    `denominator`; "sum" and "none" are over pairs. With a trainer (`of`) the loss is the mean over the pairs of the
    batch, times the part of the denominator that the batch has: a step cut into micro-batches is the mean of their
    means, by tokens. The batch is that of all processes.

    source       where a trainer's spans come from: "fixed" (default; `length` (4) tokens each), "punctuation" (up to
                 the next mark or line break), "chunks" (noun, verb and prepositional phrases as in the paper; for
                 English, with the extra `spans`). The last two need `pieces`, the text of each of some tokens.
                 `loss.source` may be any `SpanSource`.
    pairing      "hadamard", the paper's product, or "geometric" (ours), its square root. A product of probabilities is
                 so small where the distributions are flat that the paper's loss sees little but the tokens of which
                 a model is sure.
    temperature  1: both models' logits are divided by it.

    Raises `UsageError` without spans, for logits that are not [B, T, V], and for a source without its `pieces`.
    """

    needs = Needs.TEACHER | Needs.TOKENS
    divisible = True

    def __init__(
        self,
        source: Literal["fixed", "punctuation", "chunks"] = "fixed",
        length: int = 4,
        pairing: Literal["hadamard", "geometric"] = "hadamard",
        temperature: float = 1.0,
        pieces: Callable[[Sequence[int]], list[str]] | None = None,
        **common: Unpack[Common],
    ) -> None:
        super().__init__(**common)
        self.pairing = one_of(pairing, ("hadamard", "geometric"), "pairing")
        self.temperature = positive(temperature, "temperature")
        self.source = span_source(source, length, pieces)

    def of(self, outputs: Outputs, denominator: Tensor | float | None = None) -> Tensor:
        spans = self.spans(outputs)
        if denominator is None or self.reduction != "mean":
            return self(outputs.logits, outputs.teacher_logits, outputs.labels, outputs.weights, spans=spans)
        labels, weights = outputs.labels, outputs.weights
        first = pairs(spans, labels, weights).view(-1).nonzero().squeeze(-1)
        pair_weights = torch.ones_like(first) if weights is None else weights_of_pairs(weights, first)
        of_pairs = self.processes.total(pair_weights.sum())
        of_positions = self.processes.total(positions_weight(labels, weights, spans))
        loss = self(outputs.logits, outputs.teacher_logits, labels, weights, of_pairs, spans=spans)
        return loss * (of_positions / denominator)

    def spans(self, outputs: Outputs) -> Tensor:
        """The span of the token that each position predicts: position t reads token t and predicts token t + 1. What
        the last position predicts is known from its label alone; without one it is in no span."""
        tokens = outputs.tokens
        if tokens is None or tokens.dim() != 2:
            raise UsageError(
                "The spans of a trainer's batch are found by its tokens [B, T], and there are none.",
                remedy="Give Outputs(tokens=...), or call the loss with spans.",
            )
        last = tokens.new_full((len(tokens), 1), -1) if outputs.labels is None else outputs.labels[:, -1:]
        return self.source(torch.cat([tokens, last], 1))[:, 1:]

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor | None = None,
        labels: Tensor | None = None,
        weights: Tensor | None = None,
        denominator: Tensor | float | None = None,
        *,
        spans: Tensor | None = None,
    ) -> Tensor:
        student, teacher = self._checked(student_logits, teacher_logits, spans, labels, weights)
        assert spans is not None
        classes = student.shape[-1]
        linked = pairs(spans, labels, weights)
        first = linked.view(-1).nonzero().squeeze(-1)
        if len(first) == 0 and self.reduction != "none":
            return as_float(student[:0]).sum()
        used = linked.clone()
        used[:, 1:] |= linked[:, :-1]
        rows = used.view(-1).nonzero().squeeze(-1)
        values: Tensor = _Pairs.apply(
            student.reshape(-1, classes),
            teacher.detach().reshape(-1, classes),
            rows,
            linked.view(-1)[rows[:-1]],
            POWERS[self.pairing],
            self.temperature,
        )
        return self.reduce(values, None if weights is None else weights_of_pairs(weights, first), denominator)

    def _checked(
        self,
        student: Tensor,
        teacher: Tensor | None,
        spans: Tensor | None,
        labels: Tensor | None,
        weights: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        if teacher is None or spans is None:
            missing = "the teacher's logits" if teacher is None else "spans"
            raise UsageError(f"SpanCorrelation needs {missing}.", remedy="Pass them.")
        if student.dim() != 3:
            raise UsageError(
                f"The student's logits are {tuple(student.shape)}; neighbours are only known of rows.",
                remedy="Give logits of shape [B, T, V].",
            )
        if self.vocabulary == "common":
            classes = min(student.shape[-1], teacher.shape[-1])
            student, teacher = student[..., :classes], teacher[..., :classes]
        check_positions(student, teacher, spans=spans, labels=labels, weights=weights)
        return student, teacher


class _Pairs(torch.autograd.Function):
    """The values [M] of the pairs. `rows` [K] are the positions that are in a pair, in order, of logits [N, V];
    `linked` [K - 1] says which neighbours among them are one."""

    @staticmethod
    def forward(
        ctx: Any, student: Tensor, teacher: Tensor, rows: Tensor, linked: Tensor, power: float, temperature: float
    ) -> Tensor:
        ctx.save_for_backward(student, teacher, rows, linked)
        ctx.power, ctx.temperature = power, temperature
        values = student.new_zeros(len(linked), dtype=torch.promote_types(student.dtype, torch.float32))
        step = chunk_rows(len(rows), student.shape[1], student.device)
        for start in range(0, len(linked), step):
            at = rows[start : start + step + 1]
            _, difference, _ = products(student[at], teacher[at], power, temperature)
            values[start : start + step] = difference.square().sum(-1)
        return values[linked]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        student, teacher, rows, linked = ctx.saved_tensors
        gradient = torch.zeros_like(student)
        scale = upstream.new_zeros(len(linked), 1)
        scale[linked, 0] = upstream * (2 * ctx.power / ctx.temperature)
        step = chunk_rows(len(rows), student.shape[1], student.device)
        for start in range(0, len(rows), step):
            low, stop = max(0, start - 1), min(len(rows), start + step)
            at = rows[low : stop + 1]
            product, difference, q = products(student[at], teacher[at], ctx.power, ctx.temperature)
            shared = difference.mul_(product).mul_(scale[low : low + len(at) - 1])
            pull = torch.zeros_like(q)
            pull[:-1] += shared
            pull[1:] += shared
            pull, q = pull[start - low : stop - low], q[start - low : stop - low]
            gradient[rows[start:stop]] = (pull - q * pull.sum(-1, keepdim=True)).to(gradient.dtype)
        return gradient, None, None, None, None, None


def products(student: Tensor, teacher: Tensor, power: float, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """Of logits [n + 1, V] of neighbours: s = (q_k q_{k+1})^power and s - r, both [n, V], and q [n + 1, V].

    The difference of the two products is taken as it stands: s expm1(log r - log s), which does not cancel, has two to
    four times its error in float32, because the logarithms of the norms are rounded at the size of the logits.
    """
    q = torch.softmax(as_float(student) / temperature, -1)
    p = torch.softmax(teacher.to(q.dtype) / temperature, -1)
    s, r = (x[:-1] * x[1:] for x in ((q, p) if power == 1 else (q**power, p**power)))
    return s, s - r, q


def pairs(spans: Tensor, labels: Tensor | None, weights: Tensor | None) -> Tensor:
    """Whether a position and the next are a pair, bool [B, T]: of one span, and both count."""
    keep = counted(labels, weights)
    inside = spans >= 0 if keep is None else (spans >= 0) & keep
    linked = torch.zeros_like(inside)
    linked[:, :-1] = inside[:, :-1] & inside[:, 1:] & (spans[:, :-1] == spans[:, 1:])
    return linked


def weights_of_pairs(weights: Tensor, first: Tensor) -> Tensor:
    """The means of the two positions' weights, of the pairs whose first positions, counted through, are `first`."""
    flat = weights.reshape(-1)
    return (flat[first] + flat[first + 1]) / 2


def positions_weight(labels: Tensor | None, weights: Tensor | None, like: Tensor) -> Tensor:
    """The weight of the positions that count: their number, without weights."""
    keep = counted(labels, weights)
    weights = torch.ones_like(like) if weights is None else weights
    return weights.sum() if keep is None else weights[keep].sum()


def span_source(name: str, length: int, pieces: Callable[[Sequence[int]], list[str]] | None) -> SpanSource:
    """The source of that name."""
    if one_of(name, ("fixed", "punctuation", "chunks"), "source") == "fixed":
        return FixedSpans(length)
    if pieces is None:
        raise UsageError(
            f"The source '{name}' looks at the text of the tokens, and cannot read it.",
            remedy="Give pieces, a function from token numbers to the text of each, or source='fixed'.",
        )
    return PunctuationSpans(pieces) if name == "punctuation" else ChunkSpans(pieces)
