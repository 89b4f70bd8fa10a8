"""How far an encoder's sentence embeddings are from a reference's.

An embedding is the mean of the last hidden states over the tokens that are not padding. `cosine` is the mean over the
documents of the cosine between the model's and the reference's embedding of the same document.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compress.data import TextSource
from compress.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def embed(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """Mean-pooled embeddings [B, hidden] in float32."""
    hidden = model(**inputs).last_hidden_state.float()
    mask = inputs["attention_mask"].unsqueeze(-1).to(hidden.dtype)
    return (hidden * mask).sum(1) / mask.sum(1)


@torch.inference_mode()
def evaluate_encoder(
    model: nn.Module,
    reference: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    source: TextSource,
    *,
    context: int,
    limit: int | None = None,
    batch: int = 32,
) -> dict[str, float | int]:
    """`cosine` over the documents of `source` (cut to `context` tokens, at most `limit` tokens in all)."""
    texts: list[str] = []
    tokens = 0
    for document in source.documents():
        if limit is not None and tokens >= limit:
            break
        texts.append(document.text)
        tokens += min(context, len(tokenizer(document.text, truncation=True, max_length=context)["input_ids"]))
    if not texts:
        raise DataError(f"The data '{source.spec}' holds no text.", remedy="Name a source with text.")
    cosines: list[float] = []
    for start in range(0, len(texts), batch):
        inputs = tokenizer(
            texts[start : start + batch], padding=True, truncation=True, max_length=context, return_tensors="pt"
        )
        pair = (embed(model, dict(inputs)), embed(reference, dict(inputs)))
        cosines += F.cosine_similarity(*pair).double().tolist()
    return {"cosine": sum(cosines) / len(cosines), "documents": len(cosines), "tokens": tokens}
