"""What a source of data is: named documents or images, and a fingerprint that says exactly which they were."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Protocol

from compress.errors import DataError, DependencyError

if TYPE_CHECKING:
    import numpy

Message = Mapping[str, str]
"""What one side of a chat says: `role` and `content`."""


@dataclass(frozen=True)
class Document:
    """One text with a name that is stable over machines (a module path, a row number).

    With `second` it is a pair of sentences, `text` being the first. With `messages` it is a chat, whose words alone are
    in `text`; what a model reads is the chat as its tokenizer's template has it. `compress.data.rendering` turns each
    of the three into what a tokenizer takes.
    """

    name: str
    text: str
    second: str | None = None
    messages: tuple[Message, ...] = ()

    @property
    def payload(self) -> bytes:
        """All that it holds, for the fingerprint."""
        if self.messages:
            return json.dumps([dict(message) for message in self.messages], sort_keys=True).encode()
        return (self.text if self.second is None else json.dumps([self.text, self.second])).encode()


@dataclass(frozen=True)
class Fingerprint:
    """Which data a report speaks of. `sha256` covers names and contents of all documents or images, in order; `origin`
    says where they came from (the Python version for the standard library, a file name for a file). `documents` counts
    images too."""

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


class IndexedText(ABC):
    """A source of text whose documents can be had in any order without reading the others."""

    spec: str
    origin: str

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def document(self, index: int) -> Document | None:
        """Record `index`; None for one without text."""

    def documents(self) -> Iterator[Document]:
        yield from filter(None, map(self.document, range(len(self))))


class ImageSource(ABC):
    """A deterministic sequence of images. `labels` has a number for each image, or is None; `classes` names what the
    numbers mean, unless they are the model's own."""

    spec: str
    origin: str
    labels: Sequence[int] | None = None
    classes: tuple[str, ...] | None = None

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def pixels(self, index: int, channels: int) -> numpy.ndarray:
        """Image `index`, uint8 [H, W, C], with 1 channel (grey) or 3 (red, green, blue)."""

    @abstractmethod
    def contents(self) -> Iterator[tuple[str, bytes]]:
        """Name and bytes of each image, for the fingerprint."""


def fingerprint(source: TextSource | ImageSource) -> Fingerprint:
    """Read `source` once and describe it. Raises `DataError` when it holds nothing."""
    digest, count, size = hashlib.sha256(), 0, 0
    for name, payload in _contents(source):
        digest.update(f"{name}\0{len(payload)}\0".encode())
        digest.update(payload)
        count, size = count + 1, size + len(payload)
    if size == 0:
        raise DataError(
            f"The data '{source.spec}' holds no {'image' if isinstance(source, ImageSource) else 'text'}.",
            remedy="Name a source with at least one document.",
        )
    return Fingerprint(source.spec, source.origin, count, size, digest.hexdigest())


def _contents(source: TextSource | ImageSource) -> Iterator[tuple[str, bytes]]:
    if isinstance(source, ImageSource):
        return source.contents()
    return ((document.name, document.payload) for document in source.documents())


def require_package(package: str) -> None:
    """Raise `DependencyError` when an optional package for data is not installed."""
    if importlib.util.find_spec(package) is None:
        raise DependencyError(package, "data")
