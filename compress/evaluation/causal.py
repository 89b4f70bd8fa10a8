"""How well a causal language model predicts text, and how far it is from another.

Windows of `context` tokens without overlap; the first token of each window is not scored; logits in float32; sums in
float64. With N scored tokens, v_i = -log q(token_i) in nats and b bytes of text behind them,

    nll = sum v_i / N,   perplexity = exp(nll),   bits_per_byte = sum v_i / (b ln 2),

and against a reference with distribution p at each position

    kl_divergence = (1/N) sum KL(p || q)  (nats per token, in the form that does not cancel),
    kl_stderr     = standard error of that mean over windows,
    top1_agreement = the part of the positions where both have the same most likely token.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compress.errors import NumericsError
from compress.losses import KL

POSITIONS = 2048
"""Positions whose logits are compared at once: bounds the memory of the comparison, whatever the vocabulary."""

MAX_NLL = 700.0
"""Nats per token whose perplexity a float64 still holds; no model that works comes near."""


@dataclass
class _Sums:
    nll: list[float] = field(default_factory=list)
    kl: list[float] = field(default_factory=list)
    reference_nll: list[float] = field(default_factory=list)
    agreement: float = 0.0


def _batches(ids: Tensor, batch_tokens: int) -> Iterator[Tensor]:
    yield from ids.split(max(1, batch_tokens // ids.shape[1]))


def _window_nll(logits: Tensor, ids: Tensor) -> list[float]:
    """Summed negative log-likelihood of each window, from logits [B, T, V]."""
    values = F.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
    return values.double().sum(1).tolist()


def _window_kl(logits: Tensor, reference: Tensor) -> list[float]:
    """Summed KL(reference || model) of each window."""
    rows = max(1, POSITIONS // logits.shape[1])
    divergence = KL(reduction="none")
    totals: list[float] = []
    for student, teacher in zip(logits[:, :-1].split(rows), reference[:, :-1].split(rows), strict=True):
        values = divergence(student, teacher)
        totals += values.double().view(len(student), -1).sum(1).tolist()
    return totals


@torch.inference_mode()
def _accumulate(model: nn.Module, reference: nn.Module | None, ids: Tensor, batch_tokens: int) -> _Sums:
    sums = _Sums()
    device = next(model.parameters()).device
    for batch in _batches(ids, batch_tokens):
        batch = batch.to(device)
        logits = model(input_ids=batch, use_cache=False).logits.float()
        sums.nll += _window_nll(logits, batch)
        if reference is None:
            continue
        target = reference(input_ids=batch, use_cache=False).logits.float()
        sums.reference_nll += _window_nll(target, batch)
        sums.kl += _window_kl(logits, target)
        sums.agreement += float((logits[:, :-1].argmax(-1) == target[:, :-1].argmax(-1)).sum())
    return sums


def evaluate_causal(
    model: nn.Module,
    ids: Tensor,
    sizes: Tensor,
    reference: nn.Module | None = None,
    *,
    batch_tokens: int = 2048,
) -> dict[str, float | int | None]:
    """The figures above for `model` on windows `ids` [N, context] whose tokens add `sizes` [N, context] bytes; None for
    one that is not defined (the standard error of a single window).

    Raises `NumericsError` when the model's loss is NaN or beyond any perplexity.
    """
    sums = _accumulate(model, reference, ids, batch_tokens)
    windows, scored = len(ids), ids.shape[1] - 1
    tokens = windows * scored
    nll = math.fsum(sums.nll) / tokens
    if not nll < MAX_NLL:
        raise NumericsError(
            f"The model's loss on this text is {nll:g} nats per token.",
            remedy="Its weights are damaged or its training diverged; take an earlier checkpoint.",
        )
    text_bytes = int(sizes[:, 1:].sum())
    result: dict[str, float | int | None] = {
        "perplexity": math.exp(nll),
        "nll": nll,
        "bits_per_byte": nll * tokens / (text_bytes * math.log(2)) if text_bytes else None,
        "tokens": tokens,
    }
    if reference is not None:
        means = torch.tensor(sums.kl, dtype=torch.float64) / scored
        result["kl_divergence"] = float(means.mean())
        result["kl_stderr"] = float(means.std() / math.sqrt(windows)) if windows > 1 else None
        result["top1_agreement"] = sums.agreement / tokens
        result["reference_perplexity"] = math.exp(math.fsum(sums.reference_nll) / tokens)
    return result
