"""Rows of tokens for calibration, drawn from a source of text.

For a model that predicts tokens: the documents in an order drawn by the seed, one after the other with a separator, cut
into windows of `context` tokens without overlap, of which as many as asked are drawn. Reading ends when there are
`SURPLUS` times as many windows, so that a large text costs no more than a small one.

For an encoder, which reads each text by itself: documents in such an order, each a row of at most `context` tokens,
until they have as many tokens in all as `rows` full rows would, or the source ends.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from compress.data.base import Document, TextSource
from compress.data.tokens import tokenize
from compress.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SURPLUS = 4
BATCH_TOKENS = 2048
"""Tokens that go through a block at once, rounded down to whole rows, but at least one."""

Batch = dict[str, Tensor]
"""`input_ids` int64 [B, T] and, where rows are filled up, `attention_mask` int64 [B, T]."""


class _Shuffled:
    """The documents of a source in an order drawn by `seed`."""

    def __init__(self, source: TextSource, seed: int) -> None:
        self.spec, self.origin = source.spec, source.origin
        self._documents = list(source.documents())
        random.Random(seed).shuffle(self._documents)

    def documents(self) -> Iterator[Document]:
        return iter(self._documents)


def calibration_rows(
    source: TextSource, tokenizer: PreTrainedTokenizerBase, *, rows: int = 128, context: int = 256, seed: int = 0
) -> Tensor:
    """Token ids int64 [rows, context] for a model that predicts tokens. Raises `DataError` for a source of fewer."""
    stream = tokenize(_Shuffled(source, seed), tokenizer, SURPLUS * rows * context)
    windows = len(stream.ids) // context
    if windows < rows:
        raise DataError(
            f"The data '{source.spec}' fills {windows} rows of {context} tokens, not {rows}.",
            remedy="Give more data, fewer --rows or a smaller --context.",
        )
    chosen = torch.randperm(windows, generator=torch.Generator().manual_seed(seed))[:rows].sort().values
    return stream.ids[: windows * context].view(windows, context)[chosen]


def causal_batches(rows: Tensor) -> list[Batch]:
    """Rows int64 [N, T] in batches, none of them filled up."""
    return [{"input_ids": part} for part in rows.split(max(1, BATCH_TOKENS // rows.shape[1]))]


def encoder_batches(
    source: TextSource, tokenizer: PreTrainedTokenizerBase, *, rows: int = 128, context: int = 256, seed: int = 0
) -> list[Batch]:
    """Documents as batches for an encoder, short ones first. Raises `DataError` for a source without text."""
    chosen: list[list[int]] = []
    tokens = 0
    for document in _Shuffled(source, seed).documents():
        ids = tokenizer(document.text, truncation=True, max_length=context)["input_ids"]
        if tokens + len(ids) > rows * context:
            break
        chosen.append(ids)
        tokens += len(ids)
    if not chosen:
        raise DataError(f"The data '{source.spec}' holds no text.", remedy="Name a source with text.")
    chosen.sort(key=len)
    return [_filled(part, int(tokenizer.pad_token_id or 0)) for part in _cut(chosen)]


def _cut(documents: Sequence[list[int]]) -> Iterator[list[list[int]]]:
    """Documents, by ascending length, in runs of at most `BATCH_TOKENS` tokens when filled up."""
    run: list[list[int]] = []
    for ids in documents:
        if run and (len(run) + 1) * len(ids) > BATCH_TOKENS:
            yield run
            run = []
        run.append(ids)
    yield run


def _filled(documents: Sequence[list[int]], filler: int) -> Batch:
    longest = len(documents[-1])
    ids = torch.full((len(documents), longest), filler, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, document in enumerate(documents):
        ids[row, : len(document)] = torch.tensor(document)
        mask[row, : len(document)] = 1
    return {"input_ids": ids, "attention_mask": mask}
