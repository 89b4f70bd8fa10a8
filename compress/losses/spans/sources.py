"""Which tokens of a row belong together.

A source maps tokens [B, T] to span numbers [B, T]: neighbours with the same number are in one span, and -1 is in none.
A negative token is no token (padding, or one that is not known), and so in no span.

A source that looks at text is given `pieces`, the text of each of some tokens one by one, with the space that belongs
to it: concatenated they are the text of the row.
"""

from __future__ import annotations

import unicodedata
from bisect import bisect_right
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from compress.losses.base import positive
from compress.losses.spans.phrases import EnglishPhrases

Pieces = Callable[[Sequence[int]], list[str]]
Phrases = Callable[[str], list[tuple[int, int]]]
"""From a text to the ranges [start, end) of characters of its phrases: in order, without overlap."""

MARKS = frozenset({"Po", "Ps", "Pe", "Pi", "Pf"})
"""The Unicode categories of punctuation that divides. Dashes and underscores join."""
JOINING = frozenset("'\u2019")


class SpanSource(Protocol):
    """From tokens int64 [B, T] to span numbers int64 [B, T] on the same device."""

    def __call__(self, tokens: Tensor) -> Tensor: ...


class FixedSpans:
    """Spans of `length` tokens, counted from the start of the row. They need no text, and know nothing of it."""

    def __init__(self, length: int = 4) -> None:
        self.length = int(positive(length, "length"))

    def __call__(self, tokens: Tensor) -> Tensor:
        numbers = torch.arange(tokens.shape[1], device=tokens.device) // self.length
        return torch.where(tokens >= 0, numbers, -1)


class PunctuationSpans:
    """A span ends with a token that holds a line break or whose last character is a punctuation mark (of the Unicode
    categories Po, Ps, Pe, Pi, Pf; an apostrophe is none). The mark belongs to the span that it ends."""

    def __init__(self, pieces: Pieces) -> None:
        self.pieces = pieces

    def __call__(self, tokens: Tensor) -> Tensor:
        known, place = tokens.clamp(min=0).unique(return_inverse=True)
        ends = torch.tensor([divides(piece) for piece in self.pieces(known.tolist())], device=tokens.device)
        closed = (ends[place] | (tokens < 0)).long()
        return torch.where(tokens >= 0, closed.cumsum(-1) - closed, -1)


class ChunkSpans:
    """A span is a phrase of the text: as `phrases` finds them, by default the noun, verb and prepositional phrases of
    English (`EnglishPhrases`, which needs the package textblob).

    A token belongs to the phrase in which its first character that is no space lies: so all pieces of one word do. What
    lies outside of every phrase is in no span.
    """

    def __init__(self, pieces: Pieces, phrases: Phrases | None = None) -> None:
        self.pieces = pieces
        self.phrases = EnglishPhrases() if phrases is None else phrases

    def __call__(self, tokens: Tensor) -> Tensor:
        known = tokens.clamp(min=0).unique().tolist()
        texts = dict(zip(known, self.pieces(known), strict=True))
        rows = [self._row([texts[token] if token >= 0 else "" for token in row]) for row in tokens.tolist()]
        return torch.tensor(rows, device=tokens.device)

    def _row(self, pieces: list[str]) -> list[int]:
        phrases = self.phrases("".join(pieces))
        starts = [start for start, _ in phrases]
        numbers, offset = [], 0
        for piece in pieces:
            first = offset + len(piece) - len(piece.lstrip())
            offset += len(piece)
            number = bisect_right(starts, first) - 1
            inside = first < offset and number >= 0 and first < phrases[number][1]
            numbers.append(number if inside else -1)
        return numbers


def divides(piece: str) -> bool:
    """Whether a span ends with this token."""
    text = piece.rstrip(" ")
    if "\n" in text:
        return True
    return text != "" and text[-1] not in JOINING and unicodedata.category(text[-1]) in MARKS
