"""What a source of text is: named documents, and a fingerprint that says exactly which text it was."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Protocol

from compress.errors import DataError


@dataclass(frozen=True)
class Document:
    """One text with a name that is stable over machines (a module path, a row number)."""

    name: str
    text: str


@dataclass(frozen=True)
class Fingerprint:
    """Which text a report speaks of. `sha256` covers names and texts of all documents, in order; `origin` says where
    the text came from (the Python version for the standard library, a file name for a file)."""

    spec: str
    origin: str
    documents: int
    bytes: int
    sha256: str

    def to_dict(self) -> dict[str, str | int]:
        return asdict(self)


class TextSource(Protocol):
    """A deterministic sequence of documents. `spec` is the string a recipe names it by."""

    spec: str
    origin: str

    def documents(self) -> Iterator[Document]: ...


def fingerprint(source: TextSource) -> Fingerprint:
    """Read `source` once and describe it. Raises `DataError` when it holds no text."""
    digest, count, size = hashlib.sha256(), 0, 0
    for document in source.documents():
        payload = document.text.encode()
        digest.update(f"{document.name}\0{len(payload)}\0".encode())
        digest.update(payload)
        count, size = count + 1, size + len(payload)
    if size == 0:
        raise DataError(f"The data '{source.spec}' holds no text.", remedy="Name a source with at least one document.")
    return Fingerprint(source.spec, source.origin, count, size, digest.hexdigest())
