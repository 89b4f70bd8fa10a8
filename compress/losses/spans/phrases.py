"""Noun, verb and prepositional phrases of English text."""

from __future__ import annotations

import re
from importlib import import_module

from compress.errors import DependencyError

WORD = re.compile(r"[\w\ufffd]+(?:['\u2019-][\w\ufffd]+)*")
"""A word, with the apostrophes and dashes inside it. U+FFFD stands for a part of a character."""
GAP = re.compile(r"[^\S\n]*")
"""What may lie between two words of one phrase."""


class EnglishPhrases:
    """The phrases of an English text, as ranges of characters: (start, end) in order, without overlap.

    The tagger (the lexicon of Brill 1992, trained on the Brown corpus and the Penn Treebank, and rules for suffixes)
    and the chunker (a grammar over the tags) are those of the package textblob, which brings their data along: nothing
    is downloaded. A phrase is a noun phrase, a verb phrase, or a preposition with the noun phrases that follow it;
    adjectives and adverbs by themselves are phrases too. None crosses punctuation or a line break.

    Raises `DependencyError` when textblob is not installed.
    """

    def __init__(self) -> None:
        try:
            self._parse = import_module("textblob.en").parse
        except ModuleNotFoundError as error:
            raise DependencyError("textblob", "spans") from error

    def __call__(self, text: str) -> list[tuple[int, int]]:
        runs = word_runs(text)
        if not runs:
            return []
        lines = "\n".join(" ".join(text[start:end] for start, end in run) for run in runs)
        tagged = self._parse(lines, tokenize=False, tags=True, chunks=True).split("\n")
        found: list[tuple[int, int]] = []
        for run, line in zip(runs, tagged, strict=True):
            before = "O"
            for (start, end), entry in zip(run, line.split(" "), strict=True):
                _, _, chunk, prepositional = entry.split("/")
                label = chunk if prepositional == "O" else prepositional
                if label == f"I-{before}":
                    found[-1] = (found[-1][0], end)
                elif label != "O":
                    found.append((start, end))
                before = label.removeprefix("B-").removeprefix("I-")
        return found


def word_runs(text: str) -> list[list[tuple[int, int]]]:
    """The words of a text as ranges of characters, in runs between which there is punctuation or a line break."""
    runs: list[list[tuple[int, int]]] = []
    end = -1
    for match in WORD.finditer(text):
        if end >= 0 and GAP.fullmatch(text, end, match.start()):
            runs[-1].append(match.span())
        else:
            runs.append([match.span()])
        end = match.end()
    return runs
