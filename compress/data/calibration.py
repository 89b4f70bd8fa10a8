"""Rows of tokens for calibration, drawn from a source of text.

For a model that predicts tokens: the documents in an order drawn by the seed, one after the other with a separator, cut
into windows of `context` tokens without overlap, of which as many as asked are drawn. Reading ends when there are
`SURPLUS` times as many windows, so that a large text costs no more than a small one.

For an encoder, which reads each text by itself: documents in such an order, each a row of at most `context` tokens,
until they have as many tokens in all as `rows` full rows would, or the source ends.

For a model of encoder and decoder: windows as for the first, the first half of each for the encoder and the rest for
the decoder, which gets it behind its start token and without the last one.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from compress.data.base import Document, IndexedText, TextSource
from compress.data.rendering import encode
from compress.data.tokens import tokenize
from compress.errors import DataError, ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SURPLUS = 4
BATCH_TOKENS = 2048
"""Tokens that go through a block at once, rounded down to whole rows, but at least one."""

PAIRED = "token_type_ids"
Row = dict[str, list[int]]

Batch = dict[str, Tensor]
"""A model's inputs by name. Of text `input_ids` int64 [B, T] and, where rows are filled up, `attention_mask` int64
[B, T], for pairs of sentences `token_type_ids`, for a decoder beside an encoder `decoder_input_ids`; of images
`pixel_values` float32 [B, C, H, W]."""


class _Shuffled:
    """The documents of a source in an order drawn by `seed`. Those of an indexed source are read as they are needed."""

    def __init__(self, source: TextSource, seed: int) -> None:
        self.spec, self.origin = source.spec, source.origin
        self._source = source
        self._random = random.Random(seed)

    def documents(self) -> Iterator[Document]:
        if isinstance(self._source, IndexedText):
            order = list(range(len(self._source)))
            self._random.shuffle(order)
            yield from filter(None, map(self._source.document, order))
        else:
            documents = list(self._source.documents())
            self._random.shuffle(documents)
            yield from documents


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


def seq2seq_batches(rows: Tensor, start: int) -> list[Batch]:
    """Rows int64 [N, T] in batches for an encoder and a decoder whose start token is `start`."""
    half = halves(rows.shape[1])
    return [
        {"input_ids": batch["input_ids"][:, :half], "decoder_input_ids": shifted(batch["input_ids"][:, half:], start)}
        for batch in causal_batches(rows)
    ]


def decoder_start(model: PreTrainedModel) -> int:
    """The token with which the decoder of `model` begins. Raises `ModelError` when its config names none."""
    start = model.config.to_dict().get("decoder_start_token_id")
    if start is None and model.generation_config is not None:
        start = model.generation_config.decoder_start_token_id
    if start is None:
        raise ModelError(
            f"The config of the {type(model).__name__} names no decoder_start_token_id.",
            remedy="Add it to config.json; of a T5 it is that of the padding.",
        )
    return int(start)


def halves(context: int) -> int:
    """Tokens of a row that an encoder gets; the decoder has the rest."""
    return context // 2


def shifted(ids: Tensor, start: int) -> Tensor:
    """What a decoder reads to predict `ids` int64 [B, T]: `start` and all but the last."""
    return torch.cat([torch.full_like(ids[:, :1], start), ids[:, :-1]], 1)


def encoder_batches(
    source: TextSource, tokenizer: PreTrainedTokenizerBase, *, rows: int = 128, context: int = 256, seed: int = 0
) -> list[Batch]:
    """Documents as batches for an encoder, short ones first. Raises `DataError` for a source without text."""
    chosen: list[Row] = []
    tokens = 0
    for document in _Shuffled(source, seed).documents():
        row = {name: values[0] for name, values in encode([document], tokenizer, context).items()}
        size = len(row["input_ids"])
        if tokens + size > rows * context:
            break
        chosen.append(row)
        tokens += size
    if not chosen:
        raise DataError(f"The data '{source.spec}' holds no text.", remedy="Name a source with text.")
    chosen.sort(key=lambda row: len(row["input_ids"]))
    return [_filled(part, int(tokenizer.pad_token_id or 0)) for part in _cut(chosen)]


def _cut(documents: Sequence[Row]) -> Iterator[list[Row]]:
    """Documents, by ascending length, in runs of at most `BATCH_TOKENS` tokens when filled up."""
    run: list[Row] = []
    for row in documents:
        if run and (len(run) + 1) * len(row["input_ids"]) > BATCH_TOKENS:
            yield run
            run = []
        run.append(row)
    yield run


def _filled(documents: Sequence[Row], filler: int) -> Batch:
    """Documents as a batch. Where one of them is a pair, all have the ids that tell its sentences apart."""
    shape = len(documents), len(documents[-1]["input_ids"])
    batch = {"input_ids": torch.full(shape, filler), "attention_mask": torch.zeros(shape, dtype=torch.int64)}
    if any(PAIRED in row for row in documents):
        batch[PAIRED] = torch.zeros(shape, dtype=torch.int64)
    for index, row in enumerate(documents):
        size = len(row["input_ids"])
        batch["attention_mask"][index, :size] = 1
        for name in batch.keys() & row.keys() - {"attention_mask"}:
            batch[name][index, :size] = torch.tensor(row[name])
    return batch
