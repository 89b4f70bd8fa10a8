"""How far a model is from the original, given the hidden states after its last block.

Of a model with logits it is the KL divergence KL(p || q) from the original's distribution p, in nats, at every
position; of an encoder 1 - cos of the mean-pooled embeddings of every document. Both are sums over the rows of a batch
in float64 with the number of positions, so that batches add up.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from compress.data.calibration import Batch
from compress.evaluation.encoder import embed
from compress.losses import KL
from compress.modeling.loading import kind_of
from compress.modeling.stack import after_blocks

if TYPE_CHECKING:
    from transformers import PreTrainedModel

POSITIONS = 2048
"""Positions whose distributions are compared at once."""
KEPT_BYTES = 1 << 30
"""What the original says is kept up to this size, and else computed again from its hidden states."""


class Divergence:
    """Of the model `model`, whose parameters outside of the blocks must have their weights, on `batches`, for which the
    original has `hidden` after the last block; its blocks return `tuples` or not."""

    def __init__(
        self, model: PreTrainedModel, batches: Mapping[int, Batch], hidden: Mapping[int, Tensor], tuples: bool
    ) -> None:
        self._model, self._batches, self._hidden, self._tuples = model, batches, hidden, tuples
        self.figure = "cosine" if kind_of(model) == "encoder" else "kl_divergence"
        self._kept: dict[int, Tensor] = {}
        self._left = KEPT_BYTES

    def rows(self, batch: int, hidden: Tensor) -> Tensor:
        """For each row of a batch the summed divergence of `hidden` and how many positions it has, float64 [B, 2]."""
        said, wanted = self._said(batch, hidden), self._wanted(batch)
        if self.figure == "cosine":
            values = 1 - functional.cosine_similarity(said.double(), wanted.double())
            return torch.stack([values, torch.ones_like(values)], 1)
        flat = said.reshape(-1, said.shape[-1]), wanted.reshape(-1, wanted.shape[-1])
        parts = zip(*(side.split(POSITIONS) for side in flat), strict=True)
        divergence = KL(reduction="none")
        values = torch.cat([divergence(a, b).flatten().double() for a, b in parts]).view(said.shape[0], -1)
        mask = self._batches[batch].get("attention_mask")
        counts = torch.ones_like(values) if mask is None else mask.to(values)
        return torch.stack([(values * counts).sum(1), counts.sum(1)], 1)

    def _wanted(self, batch: int) -> Tensor:
        if batch in self._kept:
            return self._kept[batch]
        found = self._said(batch, self._hidden[batch])
        if found.nbytes <= self._left:
            self._kept[batch] = found
            self._left -= found.nbytes
        return found

    def _said(self, batch: int, hidden: Tensor) -> Tensor:
        """Logits float32 [B, T, V] or [B, C], or embeddings [B, d]."""
        inputs = dict(self._batches[batch])
        with after_blocks(self._model, hidden, self._tuples):
            if self.figure == "cosine":
                inputs.setdefault("attention_mask", torch.ones_like(inputs["input_ids"]))
                return embed(self._model, inputs)
            caching = {"use_cache": False} if self._model.can_generate() else {}
            logits: Tensor = self._model(**inputs, **caching).logits
            return logits.float()


def mean(rows: Tensor) -> float:
    """The divergence at a position, of `Divergence.rows` of some batches."""
    sums = rows.sum(0)
    return float(sums[0] / sums[1])
