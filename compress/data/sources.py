"""From the string in a recipe to a source of text or images.

| spec | data |
|---|---|
| `builtin:python/train`, `builtin:python/val` | the interpreter's standard library |
| `packages:NAME,NAME` | the Python source of installed packages |
| `text:FILE` | a UTF-8 file, one document |
| `json:FILE#FIELDS` | fields of a JSON list or of JSON lines, one document a record |
| `csv:FILE#FIELDS` | columns of a CSV file, by header or number, one document a row |
| `dataset:FOLDER[@SPLIT]#FIELDS` | a Hugging Face data set on disk, one document a record |
| `chat:FILE or FOLDER[@SPLIT][#FIELDS]` | chats of a JSON file or a data set, through the tokenizer's chat template |
| `images:FOLDER` | image files; sub-folders are classes |
| `images:FILE.npz#IMAGES[,LABELS]` | arrays of a numpy archive |

FIELDS is `FIELD`, `FIELD,FIELD` (one text) or `FIELD+FIELD` (a pair of sentences).
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING

from compress.data.base import Document, ImageSource, IndexedText, TextSource
from compress.data.chat import MESSAGES, TURNS, ChatSource
from compress.data.files import CsvFile, JsonFile, TextFile
from compress.data.images import ImageArrays, ImageFolder
from compress.data.python_source import InstalledPackages, StandardLibrary
from compress.data.tables import FieldSource, JsonRecords, Records, open_dataset
from compress.errors import DataError

if TYPE_CHECKING:
    from compress.modeling.loading import Kind

KINDS = (
    "builtin:python/train", "builtin:python/val", "packages:NAME,NAME", "text:FILE", "json:FILE#FIELD",
    "csv:FILE#FIELD,FIELD", "csv:FILE#FIELD+FIELD", "dataset:FOLDER@SPLIT#FIELD", "chat:FILE", "images:FOLDER",
    "images:FILE.npz#IMAGES,LABELS",
)  # fmt: skip
"""A spec of each kind, for lists and messages."""

REMEDY = f"Use one of {', '.join(KINDS)}."
IMAGES = "images"


def _builtin(rest: str, spec: str) -> TextSource:
    name, _, split = rest.partition("/")
    if name != "python":
        raise DataError(f"There is no built-in data '{spec}'.", remedy=REMEDY)
    return StandardLibrary(split)


def _with_fields(rest: str, spec: str) -> tuple[Path, str]:
    path, separator, fields = rest.rpartition("#")
    if not separator or not path or not fields:
        raise DataError(f"The data '{spec}' names no field.", remedy="Write FILE#FIELD.")
    return Path(path), fields


def _with_split(place: str) -> tuple[Path, str | None]:
    """FOLDER@SPLIT; a folder that has such a name is taken as it is."""
    folder, separator, split = place.rpartition("@")
    return (Path(folder), split) if separator and folder and not Path(place).exists() else (Path(place), None)


def _json(rest: str, spec: str) -> TextSource:
    return JsonFile(*_with_fields(rest, spec), spec)


def _csv(rest: str, spec: str) -> TextSource:
    return CsvFile(*_with_fields(rest, spec), spec)


def _dataset(rest: str, spec: str) -> TextSource:
    place, fields = _with_fields(rest, spec)
    records = open_dataset(*_with_split(str(place)), {fields, *re.split(r"[,+]", fields)}, spec)
    return FieldSource(records, fields, spec)


def _chat(rest: str, spec: str) -> TextSource:
    place, _, named = rest.partition("#")
    fields = named.split(",") if named else []
    folder, split = _with_split(place)
    records: Records
    if split is None and not folder.is_dir():
        records = JsonRecords([folder], folder, spec)
    else:
        records = open_dataset(folder, split, fields or {*MESSAGES, *TURNS}, spec)
    return ChatSource(records, fields, spec)


SCHEMES: dict[str, Callable[[str, str], TextSource]] = {
    "builtin": _builtin,
    "packages": lambda rest, spec: InstalledPackages(rest.split(",")),
    "text": lambda rest, spec: TextFile(Path(rest), spec),
    "json": _json,
    "csv": _csv,
    "dataset": _dataset,
    "chat": _chat,
}


class Chain:
    """Several sources, one after the other."""

    def __init__(self, sources: Sequence[TextSource]) -> None:
        self.sources = sources
        self.spec = " + ".join(source.spec for source in sources)
        self.origin = "; ".join(source.origin for source in sources)

    def documents(self) -> Iterator[Document]:
        for source in self.sources:
            yield from source.documents()


class IndexedChain(IndexedText):
    """Several indexed sources, one after the other."""

    def __init__(self, sources: Sequence[IndexedText]) -> None:
        self.sources = sources
        self.spec = " + ".join(source.spec for source in sources)
        self.origin = "; ".join(source.origin for source in sources)
        self._ends = list(accumulate(map(len, sources)))

    def __len__(self) -> int:
        return self._ends[-1]

    def document(self, index: int) -> Document | None:
        which = bisect_right(self._ends, index)
        return self.sources[which].document(index - (self._ends[which - 1] if which else 0))


def is_images(spec: str) -> bool:
    """Whether `spec` names images; nothing is read."""
    return spec.partition(":")[0] == IMAGES


def require_kind(kind: Kind, specs: Sequence[str], name: str) -> None:
    """Raise `DataError` unless the sources `specs` are of what a model of `kind`, called `name`, reads: text or images.
    Nothing is read."""
    for spec in specs:
        if kind == "speech":
            raise DataError(
                f"'{name}' reads sounds, and there is no source of these.",
                remedy="Pass batches of its inputs in Python.",
            )
        if kind == "image" and not is_images(spec):
            raise DataError(
                f"'{name}' reads images, and '{spec}' is text.",
                remedy="Write images:FOLDER or images:FILE.npz#IMAGES,LABELS.",
            )
        if kind != "image" and is_images(spec):
            raise DataError(f"'{name}' reads text, and '{spec}' are images.", remedy="Name a source of text.")


def text_source(spec: str | Sequence[str]) -> TextSource:
    """The source of text that `spec` (or a list of specs, chained) names. Raises `DataError` for an unknown scheme, for
    images, and for what is wrong with the data as far as that shows before they are read."""
    if not isinstance(spec, str):
        sources = [text_source(one) for one in spec]
        if not sources:
            raise DataError("No data is named.", remedy=REMEDY)
        if len(sources) == 1:
            return sources[0]
        indexed = [source for source in sources if isinstance(source, IndexedText)]
        return IndexedChain(indexed) if len(indexed) == len(sources) else Chain(sources)
    scheme, separator, rest = spec.partition(":")
    if scheme == IMAGES:
        raise DataError(f"'{spec}' are images, where text is needed.", remedy="Name text; images are for image models.")
    if not separator or not rest or scheme not in SCHEMES:
        file = f"Did you mean text:{spec}? " if Path(spec).is_file() else ""
        raise DataError(f"The data '{spec}' is of no known kind.", remedy=f"{file}{REMEDY}")
    return SCHEMES[scheme](rest, spec)


def image_source(spec: str | Sequence[str]) -> ImageSource:
    """The source of images that `spec` names. Raises `DataError` for text, for several sources, and for images that are
    missing or damaged as far as that shows before they are read."""
    if not isinstance(spec, str):
        if not spec:
            raise DataError("No data is named.", remedy=REMEDY)
        if len(spec) != 1:
            raise DataError(
                f"{len(spec)} sources of images are named.", remedy="Name one; folders may be joined in one."
            )
        return image_source(spec[0])
    scheme, _, rest = spec.partition(":")
    if scheme != IMAGES or not rest:
        raise DataError(
            f"'{spec}' is no source of images, which the model needs.",
            remedy="Write images:FOLDER or images:FILE.npz#IMAGES,LABELS.",
        )
    place, separator, arrays = rest.rpartition("#")
    if Path(rest).is_dir() or (not separator and not rest.endswith(".npz")):
        return ImageFolder(Path(rest), spec)
    images, _, labels = arrays.partition(",")
    if not place or not images:
        raise DataError(f"The data '{spec}' names no array.", remedy="Write images:FILE.npz#IMAGES,LABELS.")
    return ImageArrays(Path(place), images, labels or None, spec)


def data_source(spec: str) -> TextSource | ImageSource:
    """The source of either kind that `spec` names."""
    return image_source(spec) if is_images(spec) else text_source(spec)
