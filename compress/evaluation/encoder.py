"""How far an encoder's sentence embeddings are from a reference's.

An embedding is the mean of the last hidden states over the tokens that are not padding. `cosine` is the mean over the
documents of the cosine between the model's and the reference's embedding of the same document. A pair of sentences is
one document, which the encoder reads as its tokenizer joins pairs.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from compress.data import Document, TextSource
from compress.data.rendering import encode, is_like
from compress.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def embed(model: PreTrainedModel, inputs: dict[str, Tensor]) -> Tensor:
    """Mean-pooled embeddings [B, hidden] in float32, of the body of a model with a head."""
    body = model.base_model
    inputs = {name: tensor.to(model.device) for name, tensor in inputs.items()}
    hidden = body(**inputs).last_hidden_state.float()
    mask = inputs["attention_mask"].unsqueeze(-1).to(hidden.dtype)
    return (hidden * mask).sum(1) / mask.sum(1)


def _batches(documents: Sequence[Document], size: int) -> Iterator[list[Document]]:
    """Documents in order, in runs of at most `size` that a tokenizer takes together."""
    run: list[Document] = []
    for document in documents:
        if run and (len(run) == size or not is_like(run[0], document)):
            yield run
            run = []
        run.append(document)
    yield run


@torch.inference_mode()
def evaluate_encoder(
    model: PreTrainedModel,
    reference: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    source: TextSource,
    *,
    context: int,
    limit: int | None = None,
    batch: int = 32,
) -> dict[str, float | int | None]:
    """`cosine` over the documents of `source`, each cut to `context` tokens: the first that have at most `limit` tokens
    in all. `cosine_stderr` is the standard error of that mean, None for a single document."""
    documents: list[Document] = []
    tokens = 0
    for document in source.documents():
        length = len(encode([document], tokenizer, context)["input_ids"][0])
        if limit is not None and tokens + length > limit:
            break
        documents.append(document)
        tokens += length
    if not documents:
        raise DataError(
            f"No document of '{source.spec}' fits into the limit.", remedy="Name a source with text, or a larger limit."
        )
    cosines: list[float] = []
    for run in _batches(documents, batch):
        inputs = encode(run, tokenizer, context, padding=True, return_tensors="pt")
        pair = (embed(model, inputs), embed(reference, inputs))
        cosines += F.cosine_similarity(*pair).double().tolist()
    error = statistics.stdev(cosines) / math.sqrt(len(cosines)) if len(cosines) > 1 else None
    return {
        "cosine": sum(cosines) / len(cosines),
        "cosine_stderr": error,
        "documents": len(cosines),
        "tokens": tokens,
    }
