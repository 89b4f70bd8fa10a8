"""Text from files: `text:FILE`, `json:FILE#FIELDS`, `csv:FILE#FIELDS`."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from compress.data.base import Document
from compress.data.fields import Selection, select
from compress.errors import DataError, nearest


def read_text(path: Path, spec: str, newline: str | None = None) -> str:
    """The text of a file, without a byte order mark. `newline` is that of `open`: None makes every line end in LF.

    Raises `DataError` for a file that is missing, empty, a folder, not readable, or not UTF-8.
    """
    try:
        with path.open(encoding="utf-8-sig", newline=newline) as stream:
            text = stream.read()
    except FileNotFoundError:
        raise DataError(f"There is no file '{path}' (from '{spec}').", remedy="Check the path.") from None
    except IsADirectoryError:
        raise DataError(f"'{path}' (from '{spec}') is a folder.", remedy="Name a file.") from None
    except UnicodeDecodeError as error:
        raise DataError(
            f"'{path}' is not UTF-8 text: byte {error.start} does not decode.", remedy="Convert it to UTF-8."
        ) from None
    except (OSError, ValueError) as error:
        raise DataError(f"'{path}' (from '{spec}') cannot be read: {error}.", remedy="Check the file.") from None
    if not text.strip():
        raise DataError(f"'{path}' (from '{spec}') is empty: it holds no text.", remedy="Name a file with text.")
    return text


class TextFile:
    """A whole text file as one document."""

    def __init__(self, path: Path, spec: str) -> None:
        self.path, self.spec, self.origin = path, spec, path.name

    def documents(self) -> Iterator[Document]:
        yield Document(self.path.name, read_text(self.path, self.spec))


def read_records(path: Path, spec: str) -> list[Mapping[str, Any]]:
    """The objects of a JSON list or of a JSON-lines file. Raises `DataError` for anything else."""
    text = read_text(path, spec)
    try:
        if text.lstrip().startswith("["):
            records = json.loads(text)
        else:
            # not splitlines(): U+2028 and other ends of lines for Unicode may stand inside a JSON string
            records = [json.loads(line) for line in text.split("\n") if line.strip()]
    except (ValueError, RecursionError) as error:
        place = f" in line {_broken_line(text)}" if not text.lstrip().startswith("[") else ""
        raise DataError(
            f"'{path}' is neither a JSON list nor JSON lines{place}: {error}.", remedy="Check the file."
        ) from None
    for number, record in enumerate(records):
        if not isinstance(record, dict):
            raise DataError(
                f"Record {number} of '{path}' is a {type(record).__name__}, not an object with fields.",
                remedy="Give a JSON list of objects, or an object a line.",
            )
    if not records:
        raise DataError(f"'{path}' (from '{spec}') has no record: it holds no text.", remedy="Name another file.")
    return records


def _broken_line(text: str) -> int:
    """The number, from 1, of the first line that is no JSON."""
    for number, line in enumerate(text.split("\n"), 1):
        try:
            json.loads(line or "0")
        except (ValueError, RecursionError):
            return number
    return 0


def text_of(value: object, field: str, where: str, alone: bool = True) -> str:
    """A field's value, empty for null. Raises `DataError` for one that is no text, or, where it is not the document
    `alone`, no number either."""
    if not alone and isinstance(value, int | float):
        value = str(value)
    if not isinstance(value, str | None):
        raise DataError(
            f"The field '{field}' of {where} is of type {type(value).__name__}, not text.",
            remedy="Name a field of text; chats are named as chat:FILE#FIELD.",
        )
    text = value or ""
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            raise DataError(
                f"The field '{field}' of {where} has half of a surrogate pair, which is no text.",
                remedy="Correct the record.",
            ) from None
    return text


class JsonFile:
    """Fields of the records of a JSON list or of a JSON-lines file; each record is a document."""

    def __init__(self, path: Path, fields: str, spec: str) -> None:
        self.path, self.fields, self.spec, self.origin = path, fields, spec, path.name

    def documents(self) -> Iterator[Document]:
        records = read_records(self.path, self.spec)
        selection = select(self.fields, records[0])
        for number, record in enumerate(records):
            where = f"record {number} of '{self.path}'"
            for field in selection.names:
                if field not in record:
                    known = ", ".join(sorted(record))
                    raise DataError(
                        f"Record {number} of '{self.path}' has no field '{field}' (it has: {known}).",
                        remedy=nearest(field, record, f"Write json:{self.path}#FIELD with one of its fields"),
                    )
            alone = len(selection.names) == 1
            values = {field: text_of(record[field], field, where, alone) for field in selection.names}
            if document := selection.document(f"{self.path.name}#{number}", values.__getitem__):
                yield document


@contextmanager
def _fields_of(characters: int) -> Iterator[None]:
    """Within the block the csv module reads fields of so many characters; its own limit is 128 KiB."""
    before = csv.field_size_limit(max(characters, 1))
    try:
        yield
    finally:
        csv.field_size_limit(before)


class CsvFile:
    """Columns of a CSV file; each row is a document. Columns are named by the header. Numbers that are not names there
    count columns from 0 in a file without a header."""

    def __init__(self, path: Path, fields: str, spec: str) -> None:
        self.path, self.fields, self.spec, self.origin = path, fields, spec, path.name

    def documents(self) -> Iterator[Document]:
        rows = self._rows()
        header = rows[0] if rows else []
        selection = select(self.fields, header)
        if all(field.isdecimal() for field in selection.names) and not set(selection.names) <= set(header):
            columns = {field: int(field) for field in selection.names}
        else:
            columns, rows = self._columns(selection, header), rows[1:]
        for number, row in enumerate(rows):
            cells = {field: self._cell(row, column, number) for field, column in columns.items()}
            if len(cells) == 1:
                cells = {field: cell.strip() for field, cell in cells.items()}
            if document := selection.document(f"{self.path.name}#{number}", cells.__getitem__):
                yield document

    def _rows(self) -> list[list[str]]:
        text = read_text(self.path, self.spec, newline="")  # ends of lines inside quotes are the reader's business
        try:
            with _fields_of(len(text)):
                # strict: a quote that is never closed would make one field of all the rows that follow
                return list(csv.reader(io.StringIO(text, newline=""), strict=True))
        except csv.Error as error:
            raise DataError(
                f"'{self.path}' is not CSV: {error}.",
                remedy="Check the file; a quote within a quoted field is written twice.",
            ) from None

    def _columns(self, selection: Selection, header: list[str]) -> dict[str, int]:
        for field in selection.names:
            if field not in header:
                lead = f"Write csv:{self.path}#COLUMN (without a header, columns are numbers from 0)"
                raise DataError(
                    f"'{self.path}' has no column '{field}' (its first row is: {', '.join(header)}).",
                    remedy=nearest(field, header, lead),
                )
        return {field: header.index(field) for field in selection.names}

    def _cell(self, row: list[str], column: int, number: int) -> str:
        if column >= len(row):
            raise DataError(
                f"Row {number} of '{self.path}' has {len(row)} columns, none with number {column}.",
                remedy="Correct the row, or name other columns.",
            )
        return row[column]
