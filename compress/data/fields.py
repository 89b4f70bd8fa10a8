"""Which fields of a record are a document: `FIELD`, `FIELD,FIELD` or `FIELD+FIELD`.

Fields with a comma between them are one text, joined by line ends. A plus makes two texts of a record: a pair of
sentences, which a tokenizer joins in its own way (with a separator, and with ids that tell the first from the second).
A name that has a comma or a plus in it is taken as it is where the data have it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

from compress.data.base import Document
from compress.errors import DataError


@dataclass(frozen=True)
class Selection:
    """The fields of a document's text and, of a pair, those of its second text."""

    first: tuple[str, ...]
    second: tuple[str, ...] | None = None

    @property
    def names(self) -> tuple[str, ...]:
        return (*self.first, *(self.second or ()))

    def document(self, name: str, value: Callable[[str], str]) -> Document | None:
        """The document of a record whose fields are `value`; None for one without text, or half a pair."""
        first, second = (self._joined(side, value) for side in (self.first, self.second))
        if not first or second == "":
            return None
        return Document(name, first, second)

    def _joined(self, side: tuple[str, ...] | None, value: Callable[[str], str]) -> str | None:
        if side is None:
            return None
        return "\n".join(map(value, side)).strip() if len(self.names) > 1 else value(side[0])


def select(fields: str, known: Collection[str]) -> Selection:
    """The selection that `fields` spells for records that have the fields `known`; whether they have them is for the
    caller to say. Raises `DataError` for more than two texts, or for one without a name."""
    if fields in known:
        return Selection((fields,))
    sides = [(side,) if side in known else tuple(side.split(",")) for side in fields.split("+")]
    if len(sides) > 2 or not all(all(side) for side in sides):
        raise DataError(
            f"'{fields}' names no fields of a record.",
            remedy="Write FIELD, FIELD,FIELD for one text of several fields, or FIELD+FIELD for a pair of sentences.",
        )
    return Selection(*sides)
