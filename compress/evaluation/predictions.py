"""How well a model predicts tokens, and how far it is from another: the figures of every model that predicts them.

Which tokens of a row are predicted, and from what, is the caller's (`causal.py`, `seq2seq.py`). With N scored tokens,
v_i = -log q(token_i) in nats and b bytes of text behind them,

    nll = sum v_i / N,   perplexity = exp(nll),   bits_per_byte = sum v_i / (b ln 2),

and against a reference with distribution p at each position

    kl_divergence = (1/N) sum KL(p || q)  (nats per token, in the form that does not cancel),
    kl_stderr     = standard error of that mean over rows,
    top1_agreement = the part of the positions where both have the same most likely token.

Logits are in float32, sums in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable
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

Predict = Callable[[nn.Module, Tensor], Tensor]
"""A model's logits [B, S, V] for the last S tokens of rows [B, T]."""


@dataclass
class _Sums:
    nll: list[float] = field(default_factory=list)
    kl: list[float] = field(default_factory=list)
    reference_nll: list[float] = field(default_factory=list)
    agreement: float = 0.0


def _row_nll(logits: Tensor, targets: Tensor) -> list[float]:
    """Summed negative log-likelihood of each row's `targets` [B, S], from logits [B, S, V]."""
    values = F.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
    return values.double().sum(1).tolist()


def _row_kl(logits: Tensor, reference: Tensor) -> list[float]:
    """Summed KL(reference || model) of each row."""
    rows = max(1, POSITIONS // logits.shape[1])
    divergence = KL(reduction="none")
    totals: list[float] = []
    for student, teacher in zip(logits.split(rows), reference.split(rows), strict=True):
        values = divergence(student, teacher)
        totals += values.double().view(len(student), -1).sum(1).tolist()
    return totals


@torch.inference_mode()
def _accumulate(
    model: nn.Module, reference: nn.Module | None, ids: Tensor, predict: Predict, scored: int, batch_tokens: int
) -> _Sums:
    sums = _Sums()
    device = next(model.parameters()).device
    for rows in ids.split(max(1, batch_tokens // ids.shape[1])):
        batch = rows.to(device)
        targets = batch[:, -scored:]
        logits = predict(model, batch).float()
        sums.nll += _row_nll(logits, targets)
        if reference is None:
            continue
        wanted = predict(reference, batch).float()
        sums.reference_nll += _row_nll(wanted, targets)
        sums.kl += _row_kl(logits, wanted)
        sums.agreement += float((logits.argmax(-1) == wanted.argmax(-1)).sum())
    return sums


def prediction_figures(
    model: nn.Module,
    ids: Tensor,
    sizes: Tensor,
    reference: nn.Module | None,
    *,
    predict: Predict,
    scored: int,
    batch_tokens: int,
) -> dict[str, float | int | None]:
    """The figures above for `model` on the last `scored` tokens of rows `ids` [N, T] whose tokens add `sizes` [N, T]
    bytes; None for one that is not defined (the standard error of a single row). About `batch_tokens` tokens go through
    the models at once.

    Raises `NumericsError` when the model's loss is NaN or beyond any perplexity.
    """
    sums = _accumulate(model, reference, ids, predict, scored, batch_tokens)
    rows = len(ids)
    tokens = rows * scored
    nll = math.fsum(sums.nll) / tokens
    if not nll < MAX_NLL:
        raise NumericsError(
            f"The model's loss on this text is {nll:g} nats per token.",
            remedy="Its weights are damaged or its training diverged; take an earlier checkpoint.",
        )
    text_bytes = int(sizes[:, -scored:].sum())
    result: dict[str, float | int | None] = {
        "perplexity": math.exp(nll),
        "nll": nll,
        "bits_per_byte": nll * tokens / (text_bytes * math.log(2)) if text_bytes else None,
        "tokens": tokens,
    }
    if reference is not None:
        means = torch.tensor(sums.kl, dtype=torch.float64) / scored
        result["kl_divergence"] = float(means.mean())
        result["kl_stderr"] = float(means.std() / math.sqrt(rows)) if rows > 1 else None
        result["top1_agreement"] = sums.agreement / tokens
        result["reference_perplexity"] = math.exp(math.fsum(sums.reference_nll) / tokens)
    return result
