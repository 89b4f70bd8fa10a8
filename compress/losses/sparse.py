"""A part of the teacher's distribution: the most probable classes with what is left over, or random draws.

The logits of a teacher over 150,000 classes take 300 kB a token. What `SparseTarget` holds of them fits on a disk: `k`
classes, their log-probabilities, and the log of the probability of all others together. That last number cannot be had
from the others: where the teacher is sure, 1 - sum p is lost in the rounding of the sum (in float32 a rest of 6.7e-9
comes out as 0). So it is stored, taken from the logits of the rest themselves.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from compress.errors import UsageError
from compress.losses.base import as_float, positive

Kind = Literal["top", "sampled"]


@dataclass(frozen=True)
class SparseTarget:
    """The teacher's distribution at each position, as far as it is known.

    - `indices` [.., k], int32 or int64: classes, each once in a row;
    - `log_probs` [.., k], any floating dtype: their log-probabilities in nats, normalised over the *whole* vocabulary;
      -inf for an entry that is not used (its index must be a class all the same, 0 say);
    - `log_rest` [..]: the log of the probability of all classes that are not listed; -inf when nothing is left;
    - `classes`: the size of the vocabulary;
    - `temperature`: the T of the softmax that the probabilities are of;
    - `kind`: "top", the probabilities of the listed classes are exact; "sampled", they are counts of draws over their
      number, an unbiased estimate of all of p, and there is no rest.

    Rounded to float16 for storage, the row no longer sums to one by about 1e-3; the losses normalise it again.
    """

    indices: Tensor
    log_probs: Tensor
    log_rest: Tensor
    classes: int
    temperature: float = 1.0
    kind: Kind = "top"

    def __post_init__(self) -> None:
        if self.log_probs.shape != self.indices.shape or self.log_rest.shape != self.indices.shape[:-1]:
            raise UsageError(
                f"A sparse target has indices {tuple(self.indices.shape)}, log-probabilities "
                f"{tuple(self.log_probs.shape)} and a rest {tuple(self.log_rest.shape)}.",
                remedy="Give [.., k], [.., k] and [..].",
            )

    @classmethod
    def from_log_probs(cls, indices: Tensor, log_probs: Tensor, classes: int, temperature: float = 1.0) -> SparseTarget:
        """A "top" target of a source that keeps no rest (the log-probabilities of a serving engine): it is
        log(1 - sum exp log_probs), as good as the digits given, and -inf where they leave nothing."""
        log_rest = log1mexp(log_probs.double().logsumexp(-1)).to(as_float(log_probs).dtype)
        return cls(indices, log_probs, log_rest, classes, temperature)

    @property
    def positions(self) -> torch.Size:
        """The shape without the classes."""
        return self.indices.shape[:-1]

    def rows(self, index: Tensor) -> SparseTarget:
        """The targets of some positions: `index` [n] counts them through, whatever their shape."""
        k = self.indices.shape[-1]
        return replace(
            self,
            indices=self.indices.reshape(-1, k)[index],
            log_probs=self.log_probs.reshape(-1, k)[index],
            log_rest=self.log_rest.reshape(-1)[index],
        )

    def to(self, device: torch.device) -> SparseTarget:
        return replace(
            self,
            indices=self.indices.to(device),
            log_probs=self.log_probs.to(device),
            log_rest=self.log_rest.to(device),
        )


def top_k_target(teacher_logits: Tensor, k: int, temperature: float = 1.0) -> SparseTarget:
    """The `k` most probable classes of softmax(teacher_logits / T) at each position of [.., V], or all V if k is more.

    Log-probabilities in the logits' dtype, at least float32. The rest is summed from the other logits, and keeps all
    its digits however small it is.
    """
    logits = as_float(teacher_logits.detach())
    indices = top_classes(logits, k)
    scores = grouped(logits, indices, positive(temperature, "temperature"))
    scores = (scores - scores.logsumexp(-1, keepdim=True)).to(logits.dtype)
    return SparseTarget(indices, scores[..., :-1], scores[..., -1], logits.shape[-1], temperature)


def sampled_target(
    teacher_logits: Tensor, draws: int, generator: torch.Generator, temperature: float = 1.0
) -> SparseTarget:
    """`draws` classes drawn from p = softmax(teacher_logits / T), with replacement, at each position of [.., V]; the
    probability of a class is the number of its draws over `draws`.

    Anshumann et al. 2025 (Sparse Logit Sampling, RS-KD, arXiv 2503.16870), with the teacher itself as the proposal.
    The generator may be on another device than the logits: a CPU generator gives the same draws everywhere.
    """
    logits = teacher_logits.detach().double() / positive(temperature, "temperature")
    # in float64: rounded to float32, the sums over 150,000 Zipf classes are off by 1.5e-3 in total variation
    cumulative = logits.softmax(-1).cumsum_(-1)
    shape = (*logits.shape[:-1], at_least_one(draws, "draws"))
    uniform = torch.rand(shape, generator=generator, device=generator.device, dtype=torch.float64)
    points = uniform.to(logits.device) * cumulative[..., -1:]
    drawn = torch.searchsorted(cumulative, points, right=True).clamp_(max=logits.shape[-1] - 1).sort(-1).values
    fresh = torch.ones_like(drawn, dtype=torch.bool)
    fresh[..., 1:] = drawn[..., 1:] != drawn[..., :-1]
    place = fresh.long().cumsum(-1) - 1
    indices = torch.zeros_like(drawn).scatter_(-1, place, drawn)
    counts = torch.zeros_like(points).scatter_add_(-1, place, torch.ones_like(points))
    log_probs = (counts / draws).log().to(as_float(teacher_logits).dtype)
    nothing = torch.full_like(log_probs[..., 0], -math.inf)
    return SparseTarget(indices, log_probs, nothing, logits.shape[-1], temperature, "sampled")


def top_classes(logits: Tensor, k: int) -> Tensor:
    """The indices [.., min(k, V)] of the largest logits, in no order."""
    return logits.topk(min(at_least_one(k, "k"), logits.shape[-1]), sorted=False).indices


def grouped(logits: Tensor, indices: Tensor, temperature: float) -> Tensor:
    """z / T of the classes `indices` [.., k], and the logsumexp of z / T of all others: [.., k + 1] in float64."""
    rest = logits.scatter(-1, indices, -math.inf)
    return torch.cat([logits.gather(-1, indices).double() / temperature, log_total(rest, temperature)], -1)


def log_total(logits: Tensor, temperature: float) -> Tensor:
    """log sum exp (z / T) of [.., V], float64 [.., 1]: exponentials in the dtype of the logits, their sum in float64.

    torch.logsumexp in float32 is off by 1e-6 at logits of 10. The probability of the rest would be too, in teacher and
    student each on its own, and a KL of 1e-6 nats would lose three more digits than any other of its k + 1 terms.
    """
    top = logits.amax(-1, keepdim=True).clamp(min=torch.finfo(logits.dtype).min)  # finite where all are -inf
    total = (logits - top).div_(temperature).exp_().sum(-1, keepdim=True, dtype=torch.float64)
    return top.double() / temperature + total.log()


def log1mexp(x: Tensor) -> Tensor:
    """log(1 - exp(x)) for x <= 0, to the last digits; -inf for x >= 0.

    Two branches (Maechler 2012, "Accurately computing log(1 - exp(-|a|))"): the one cancels near 0, the other far off.
    """
    x = x.clamp(max=0)
    near = x > -math.log(2)
    return torch.where(near, torch.log(-torch.expm1(x)), torch.log1p(-torch.exp(torch.where(near, -1, x))))


def at_least_one(value: int, name: str) -> int:
    if value >= 1:
        return value
    raise UsageError(f"{name} is {value}.", remedy="Give a whole number of at least 1.")
