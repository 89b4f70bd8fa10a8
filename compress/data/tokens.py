"""From documents to rows of token ids.

The documents of a source are tokenized without special tokens and joined by the tokenizer's end-of-text token into one
stream (a chat whose template ends with that token gets no other); the stream is cut into rows of `context` tokens
without overlap. Beside each token stands the number of UTF-8 bytes of text that it adds, so that a loss in nats per
token becomes bits per byte whatever the tokenizer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils.data import Dataset

from compress.data.base import TextSource
from compress.data.rendering import render
from compress.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class TokenStream:
    """`ids`: int64 [T]. `bytes`: int64 [T], the bytes of text that each token adds (0 for the separator)."""

    ids: Tensor
    bytes: Tensor

    def rows(self, context: int, limit: int | None = None) -> tuple[Tensor, Tensor]:
        """Rows without overlap: (ids [N, context], bytes [N, context]); at most `limit` tokens, the rest of less than a
        row is left out. Raises `DataError` when the text does not fill one row."""
        count = len(self.ids) // context
        if limit is not None:
            count = min(count, limit // context)
        if count == 0:
            have = len(self.ids) if limit is None else min(len(self.ids), limit)
            raise DataError(
                f"The text has {have} tokens, fewer than one window of {context}.",
                remedy="Give more text, a larger limit or a smaller --context.",
            )
        size = count * context
        return self.ids[:size].view(count, context), self.bytes[:size].view(count, context)


def _byte_lengths(text: str, ends: list[int]) -> list[int]:
    """Bytes of UTF-8 that each token adds, from the character offsets at which the tokens end."""
    plain = text.isascii()
    lengths, position = [], 0
    for end in ends:
        step = text[position:end]
        lengths.append(len(step) if plain else len(step.encode()))
        position = max(position, end)
    return lengths


def tokenize(source: TextSource, tokenizer: PreTrainedTokenizerBase, max_tokens: int | None = None) -> TokenStream:
    """Tokenize the documents of `source`, in order, up to `max_tokens` (rounded up to whole documents)."""
    if not tokenizer.is_fast:
        raise DataError(
            f"The tokenizer of '{tokenizer.name_or_path}' has no fast form, which the byte count needs.",
            remedy="Save it with a tokenizer.json.",
        )
    separator = tokenizer.eos_token_id
    ids: list[Tensor] = []
    sizes: list[Tensor] = []
    total = 0
    closed = True
    for document in source.documents():
        if not closed and separator is not None:
            ids.append(torch.tensor([separator]))
            sizes.append(torch.zeros(1, dtype=torch.int64))
        text = render(document, tokenizer)
        encoded = tokenizer(
            text, add_special_tokens=False, return_offsets_mapping=True, verbose=False, truncation=False
        )
        ids.append(torch.tensor(encoded["input_ids"], dtype=torch.int64))
        ends = [end for _, end in encoded["offset_mapping"]]
        sizes.append(torch.tensor(_byte_lengths(text, ends), dtype=torch.int64))
        total += len(ids[-1])
        closed = bool(document.messages) and encoded["input_ids"][-1:] == [separator]
        if max_tokens is not None and total >= max_tokens:
            break
    if total == 0:
        raise DataError(f"The data '{source.spec}' holds no text.", remedy="Name a source with text.")
    return TokenStream(torch.cat(ids), torch.cat(sizes))


class SampledRows(Dataset[dict[str, Tensor]]):
    """`count` training rows drawn from `rows` [N, context] in a seeded order: epoch e is a permutation of all rows
    given by (seed, e). Item i depends on nothing but (seed, i), which is what makes a resumed training equal an
    unbroken one.
    """

    def __init__(self, rows: Tensor, count: int, seed: int) -> None:
        self._rows, self._count, self._seed = rows, count, seed
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.int64)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not 0 <= index < self._count:
            raise IndexError(index)
        epoch, place = divmod(index, len(self._rows))
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(self._seed * 1_000_003 + epoch)
            self._order, self._epoch = torch.randperm(len(self._rows), generator=generator), epoch
        row = self._rows[self._order[place]]
        return {"input_ids": row, "labels": row}
