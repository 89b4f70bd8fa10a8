"""Text from files: `text:FILE`, `json:FILE#FIELD`, `csv:FILE#FIELD,FIELD`."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from compress.data.base import Document
from compress.errors import DataError


def _read(path: Path, spec: str, newline: str | None = None) -> str:
    """The text of a file, without a byte order mark. `newline` is that of `open`: None makes every line end in LF."""
    try:
        with path.open(encoding="utf-8-sig", newline=newline) as stream:
            return stream.read()
    except FileNotFoundError:
        raise DataError(f"There is no file '{path}' (from '{spec}').", remedy="Check the path.") from None
    except IsADirectoryError:
        raise DataError(f"'{path}' (from '{spec}') is a folder.", remedy="Name a file.") from None
    except UnicodeDecodeError as error:
        raise DataError(
            f"'{path}' is not UTF-8 text: byte {error.start} does not decode.", remedy="Convert it to UTF-8."
        ) from None


class TextFile:
    """A whole text file as one document."""

    def __init__(self, path: Path, spec: str) -> None:
        self.path, self.spec, self.origin = path, spec, path.name

    def documents(self) -> Iterator[Document]:
        if text := _read(self.path, self.spec):
            yield Document(self.path.name, text)


class JsonFile:
    """One field of the records of a JSON list or of a JSON-lines file; each record is a document."""

    def __init__(self, path: Path, field: str, spec: str) -> None:
        self.path, self.field, self.spec, self.origin = path, field, spec, path.name

    def _records(self) -> list[Any]:
        text = _read(self.path, self.spec)
        try:
            if text.lstrip().startswith("["):
                return json.loads(text)
            # not splitlines(): U+2028 and other ends of lines for Unicode may stand inside a JSON string
            return [json.loads(line) for line in text.split("\n") if line.strip()]
        except json.JSONDecodeError as error:
            raise DataError(
                f"'{self.path}' is neither a JSON list nor JSON lines: {error}.", remedy="Check the file."
            ) from None

    def documents(self) -> Iterator[Document]:
        for number, record in enumerate(self._records()):
            if not isinstance(record, dict) or self.field not in record:
                known = ", ".join(sorted(record)) if isinstance(record, dict) else type(record).__name__
                raise DataError(
                    f"Record {number} of '{self.path}' has no field '{self.field}' (it has: {known}).",
                    remedy=f"Write json:{self.path}#FIELD with one of its fields.",
                )
            if record[self.field]:
                yield Document(f"{self.path.name}#{number}", str(record[self.field]))


@contextmanager
def _fields_of(characters: int) -> Iterator[None]:
    """Within the block the csv module reads fields of so many characters; its own limit is 128 KiB."""
    before = csv.field_size_limit(max(characters, 1))
    try:
        yield
    finally:
        csv.field_size_limit(before)


class CsvFile:
    """Columns of a CSV file; those of a row that are asked for, joined by newlines, are a document. Columns are named
    by the header. Numbers that are not names there count columns from 0 in a file without a header."""

    def __init__(self, path: Path, fields: list[str], spec: str) -> None:
        self.path, self.fields, self.spec, self.origin = path, fields, spec, path.name

    def documents(self) -> Iterator[Document]:
        rows = self._rows()
        header = rows[0] if rows else []
        if all(field.isdecimal() for field in self.fields) and not set(self.fields) <= set(header):
            columns = [int(field) for field in self.fields]
        else:
            columns, rows = self._columns(header), rows[1:]
        for number, row in enumerate(rows):
            if text := "\n".join(self._cell(row, column, number) for column in columns).strip():
                yield Document(f"{self.path.name}#{number}", text)

    def _rows(self) -> list[list[str]]:
        text = _read(self.path, self.spec, newline="")  # the ends of lines inside quotes are the reader's business
        try:
            with _fields_of(len(text)):
                return list(csv.reader(io.StringIO(text, newline="")))
        except csv.Error as error:
            raise DataError(f"'{self.path}' is not CSV: {error}.", remedy="Check the file.") from None

    def _columns(self, header: list[str]) -> list[int]:
        if missing := [field for field in self.fields if field not in header]:
            raise DataError(
                f"'{self.path}' has no column '{missing[0]}' (its first row is: {', '.join(header)}).",
                remedy=f"Write csv:{self.path}#COLUMN,COLUMN; without a header, columns are numbers from 0.",
            )
        return [header.index(field) for field in self.fields]

    def _cell(self, row: list[str], column: int, number: int) -> str:
        if column >= len(row):
            raise DataError(
                f"Row {number} of '{self.path}' has {len(row)} columns, none with number {column}.",
                remedy="Correct the row, or name other columns.",
            )
        return row[column]
