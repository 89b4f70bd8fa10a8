"""From the string in a recipe to a source of text.

| spec | text |
|---|---|
| `builtin:python/train`, `builtin:python/val` | the interpreter's standard library |
| `packages:NAME,NAME` | the Python source of installed packages |
| `text:FILE` | a UTF-8 file, one document |
| `json:FILE#FIELD` | a field of a JSON list or of JSON lines, one document a record |
| `csv:FILE#FIELD,FIELD` | columns of a CSV file, by header or number, one document a row |
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from compress.data.base import Document, TextSource
from compress.data.files import CsvFile, JsonFile, TextFile
from compress.data.python_source import InstalledPackages, StandardLibrary
from compress.errors import DataError

REMEDY = "Use builtin:python/train, builtin:python/val, packages:NAME, text:FILE, json:FILE#FIELD or csv:FILE#FIELD."


def _builtin(rest: str, spec: str) -> TextSource:
    name, _, split = rest.partition("/")
    if name != "python":
        raise DataError(f"There is no built-in data '{spec}'.", remedy=REMEDY)
    return StandardLibrary(split)


def _with_field(rest: str, spec: str) -> tuple[Path, str]:
    path, separator, field = rest.rpartition("#")
    if not separator or not path or not field:
        raise DataError(f"The data '{spec}' names no field.", remedy="Write FILE#FIELD.")
    return Path(path), field


def _json(rest: str, spec: str) -> TextSource:
    path, field = _with_field(rest, spec)
    return JsonFile(path, field, spec)


def _csv(rest: str, spec: str) -> TextSource:
    path, fields = _with_field(rest, spec)
    return CsvFile(path, fields.split(","), spec)


SCHEMES: dict[str, Callable[[str, str], TextSource]] = {
    "builtin": _builtin,
    "packages": lambda rest, spec: InstalledPackages(rest.split(",")),
    "text": lambda rest, spec: TextFile(Path(rest), spec),
    "json": _json,
    "csv": _csv,
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


def text_source(spec: str | Sequence[str]) -> TextSource:
    """The source that `spec` (or a list of specs, chained) names. Raises `DataError` for an unknown scheme."""
    if not isinstance(spec, str):
        sources = [text_source(one) for one in spec]
        if not sources:
            raise DataError("No data is named.", remedy=REMEDY)
        return sources[0] if len(sources) == 1 else Chain(sources)
    scheme, separator, rest = spec.partition(":")
    if not separator or not rest or scheme not in SCHEMES:
        raise DataError(f"The data '{spec}' is of no known kind.", remedy=REMEDY)
    return SCHEMES[scheme](rest, spec)
