"""Text from files: `text:FILE`, `json:FILE#FIELD`, `csv:FILE#FIELD,FIELD`."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from compress.data.base import Document
from compress.errors import DataError


def _read(path: Path, spec: str) -> str:
    try:
        return path.read_text(encoding="utf-8")
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
            return [json.loads(line) for line in text.splitlines() if line.strip()]
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


class CsvFile:
    """Columns of a CSV file; those of a row that are asked for, joined by newlines, are a document. Columns are named
    by the header, or, in a file without one, by their numbers from 0."""

    def __init__(self, path: Path, fields: list[str], spec: str) -> None:
        self.path, self.fields, self.spec, self.origin = path, fields, spec, path.name

    def documents(self) -> Iterator[Document]:
        rows = csv.reader(_read(self.path, self.spec).splitlines(keepends=True))
        if all(field.isdecimal() for field in self.fields):
            columns = [int(field) for field in self.fields]
        else:
            columns = self._columns(next(rows, []))
        for number, row in enumerate(rows):
            if text := "\n".join(self._cell(row, column, number) for column in columns).strip():
                yield Document(f"{self.path.name}#{number}", text)

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
