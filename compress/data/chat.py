"""Chats: `chat:FILE`, `chat:FILE#MESSAGES`, `chat:FILE#PROMPT,RESPONSE`.

A chat is a list of messages, each with a `role` and its `content`. Named without a field, it is the field `messages` of
a record or, where the data have none, its `prompt` and `response`. FILE is a JSON list, JSON lines, or a data set on
disk (`compress.data.tables`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from compress.data.base import Document, IndexedText, Message
from compress.data.files import text_of
from compress.data.tables import Records
from compress.errors import DataError, nearest

MESSAGES = ("messages",)
TURNS = ("prompt", "response")
ROLES = ("user", "assistant")


class ChatSource(IndexedText):
    """The chats of `records`: of one field with messages, or of two fields, what the user and the assistant say."""

    def __init__(self, records: Records, fields: Sequence[str], spec: str) -> None:
        self._records, self.spec, self.origin = records, spec, records.path.name
        self._fields = tuple(fields)
        if not fields:
            self._fields = MESSAGES if MESSAGES[0] in records.fields else TURNS
        for field in self._fields:
            if field not in records.fields:
                asked = "messages, nor prompt and response" if not fields else f"'{field}'"
                raise DataError(
                    f"The records of '{records.path}' have no {asked}.",
                    remedy=nearest(field, records.fields, "Write chat:FILE#MESSAGES or chat:FILE#PROMPT,RESPONSE of"),
                )
        if len(self._fields) > len(ROLES):
            raise DataError(
                f"A chat of the fields {', '.join(self._fields)} has more than a prompt and a response.",
                remedy="Name one field of messages, or two.",
            )

    def __len__(self) -> int:
        return len(self._records)

    def document(self, index: int) -> Document | None:
        record, where = self._records.row(index, self._fields), f"record {index} of '{self._records.path}'"
        if len(self._fields) == 1:
            messages = messages_of(record[self._fields[0]], where)
        else:
            turns = [text_of(record[field], field, where) for field in self._fields]
            if not all(turns):
                return None
            messages = tuple({"role": role, "content": turn} for role, turn in zip(ROLES, turns, strict=True))
        if not messages:
            return None
        text = "\n".join(message["content"] for message in messages)
        return Document(f"{self.origin}#{index}", text, messages=messages)


def messages_of(value: object, where: str) -> tuple[Message, ...]:
    """The messages that `value` lists, with their roles and contents alone. Raises `DataError` for another shape."""
    found: list[Message] = []
    for message in value if isinstance(value, (list, tuple)) else [value] if value else []:
        if not isinstance(message, Mapping) or not all(
            isinstance(message.get(key), str) for key in ("role", "content")
        ):
            raise DataError(
                f"A chat in {where} is no list of messages with a role and a content of text: {_short(message)}.",
                remedy='Write it as [{"role": "user", "content": "..."}, ...].',
            )
        found.append({key: text_of(message[key], key, where) for key in ("role", "content")})
    return tuple(found)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 80 else f"{text[:77]}..."
