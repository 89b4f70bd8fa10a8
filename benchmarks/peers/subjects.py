"""The models that are quantized, and the text for them: the same rows of token ids for every contestant.

Calibration rows are drawn as `compress quantize --data` draws them; evaluation windows are the first of other text. The
stories of the second subject lie in one file, of which the other file of that data set is a lower-cased copy, so that
they are split by number: the first half calibrates, the second half evaluates.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from compress.data import Document, TextSource, text_source, tokenize
from compress.data.calibration import calibration_rows
from compress.errors import DataError, UsageError
from compress.modeling.loading import load_tokenizer

STORIES = Path("text") / "tinystories_1000.json"
GROUPS = {"teacher": 64, "babyllama": 32}
"""Weights to a scale in the peers' formats, by model."""
MODELS = tuple(GROUPS)


@dataclass(frozen=True)
class Subject:
    """A model with its two texts. `group`: weights to a scale in the peers' formats."""

    name: str
    model: str
    calibration: TextSource
    evaluation: TextSource
    group: int


class Stories:
    """Every story of a JSON list whose number is in [start, stop) of the whole, given as parts of it."""

    def __init__(self, path: Path, start: float, stop: float) -> None:
        self._path, self._part = path, (start, stop)
        self.spec, self.origin = f"{path.name}[{start:g}:{stop:g}]", path.name

    def documents(self) -> Iterator[Document]:
        stories = json.loads(self._path.read_text(encoding="utf-8"))
        first, last = (round(part * len(stories)) for part in self._part)
        for number in range(first, last):
            yield Document(f"{self.origin}#{number}", stories[number])


def subject(name: str, data: Path | None) -> Subject:
    """The subject called `name`; `data` is the folder of real models and texts, which `babyllama` needs.

    Raises `UsageError` when it is not given, `DataError` when it lacks a file.
    """
    if name == "teacher":
        train, validation = (text_source(f"builtin:python/{split}") for split in ("train", "val"))
        return Subject(name, "builtin:teacher", train, validation, GROUPS[name])
    if data is None:
        raise UsageError(
            f"The model '{name}' is none of this repository.", remedy="Give --data DIR, or --models teacher."
        )
    model, stories = data / "models" / name, data / STORIES
    for path in (model, stories):
        if not path.exists():
            raise DataError(f"There is no '{path}'.", remedy="Check --data, or give --models teacher.")
    return Subject(name, str(model), Stories(stories, 0, 0.5), Stories(stories, 0.5, 1), GROUPS[name])


def calibration(chosen: Subject, rows: int, context: int, seed: int) -> Tensor:
    """Token ids int64 [rows, context] from anywhere in the text."""
    return calibration_rows(chosen.calibration, load_tokenizer(chosen.model), rows=rows, context=context, seed=seed)


def evaluation(chosen: Subject, windows: int, context: int) -> Tensor:
    """Token ids int64 [windows, context] from the beginning of the other text."""
    limit = windows * context
    return tokenize(chosen.evaluation, load_tokenizer(chosen.model), limit).rows(context, limit)[0]
