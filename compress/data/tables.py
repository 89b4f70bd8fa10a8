"""Records with named fields: of a JSON file, or of a data set of the `datasets` library on disk.

A data set is a folder, as one of these leaves it:

- `Dataset.save_to_disk`, and `DatasetDict.save_to_disk`, which has a folder a split;
- the caches of `datasets` and of the hub: files `.arrow`, `.parquet`, `.jsonl` or `.json`, also further down. The split
  of a file is its name without the number of its shard, after the last hyphen: `train` of `imdb-train.arrow` and of
  `data/train-00000-of-00002.parquet`. Where that is a number, it is the name of its folder. Of a repository in the
  hub's cache it is the snapshot that `refs/main` names.

Arrow files are mapped into memory: what is not asked for is not read. Of Parquet files the asked fields are read, since
they are compressed; JSON files are read whole. Files are only read: no code that comes with a data set is run, nothing
is downloaded, and no cache is written.
"""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.data.base import Document, IndexedText, require_package
from compress.data.fields import select
from compress.data.files import read_records, text_of
from compress.errors import DataError, nearest

if TYPE_CHECKING:
    from datasets import Dataset

SAVED, SAVED_SPLITS = "state.json", "dataset_dict.json"
DESCRIPTIONS = ("dataset_info.json", "dataset_infos.json")
SHARD = re.compile(r"-\d+-of-\d+$")
JSON = (".jsonl", ".json")
FILES = (".arrow", ".parquet", *JSON)
DERIVED = "cache-"
"""How the files begin that `Dataset.map` leaves beside a data set."""


class Records(ABC):
    """A sequence of records, and the fields that they have."""

    path: Path
    fields: Sequence[str]

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def row(self, index: int, fields: Sequence[str]) -> Mapping[str, Any]:
        """Record `index` with `fields` alone."""


class JsonRecords(Records):
    """The records of JSON files, all with the fields of the first, or without a value."""

    def __init__(self, paths: Sequence[Path], path: Path, spec: str) -> None:
        self.path = path
        self._rows = [row for one in paths for row in read_records(one, spec)]
        self.fields = list(self._rows[0])

    def __len__(self) -> int:
        return len(self._rows)

    def row(self, index: int, fields: Sequence[str]) -> Mapping[str, Any]:
        return {field: self._rows[index].get(field) for field in fields}


class ArrowRecords(Records):
    """A data set in Arrow or Parquet files. Each set of fields is opened once."""

    def __init__(self, data: Dataset, fields: Sequence[str], path: Path) -> None:
        self.path, self.fields = path, fields
        self._data = data
        self._views: dict[tuple[str, ...], Dataset] = {}

    def __len__(self) -> int:
        return len(self._data)

    def row(self, index: int, fields: Sequence[str]) -> Mapping[str, Any]:
        names = tuple(dict.fromkeys(fields))
        if names not in self._views:
            # fields that nobody asked for are not decoded: pictures, say
            self._views[names] = self._data.select_columns(list(names))
        with _reading(self.path):
            row: Mapping[str, Any] = self._views[names][index]
        return row


class FieldSource(IndexedText):
    """Fields of records; each record is a document."""

    def __init__(self, records: Records, fields: str, spec: str) -> None:
        self._records, self.spec, self.origin = records, spec, records.path.name
        self._selection = select(fields, records.fields)
        for field in self._selection.names:
            if field not in records.fields:
                raise DataError(
                    f"The data set '{records.path}' has no field '{field}'.",
                    remedy=nearest(field, records.fields, "Its fields are"),
                )

    def __len__(self) -> int:
        return len(self._records)

    def document(self, index: int) -> Document | None:
        row = self._records.row(index, self._selection.names)
        where = f"record {index} of '{self._records.path}'"
        alone = len(self._selection.names) == 1
        return self._selection.document(
            f"{self.origin}#{index}", lambda field: text_of(row[field], field, where, alone)
        )


def open_dataset(folder: Path, split: str | None, wanted: Collection[str], spec: str) -> Records:
    """The records of the data set in `folder`: of `split`, or of its only one. `wanted` are the fields to be read of
    Parquet files; none of them, all.

    Raises `DependencyError` without the library `datasets`, `DataError` for a folder without a data set, a split that
    is not there or must be named, files that are damaged, and no records.
    """
    require_package("datasets")
    folder = _snapshot(folder)
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise DataError(
            f"The data set '{folder}' (from '{spec}') {what}.",
            remedy="Name the folder of a data set; files are named as json:, csv: or text:.",
        )
    if (folder / SAVED_SPLITS).is_file():
        names = [path.name for path in folder.iterdir() if (path / SAVED).is_file()]
        folder, split = folder / _choose(split, names, spec), None
    if (folder / SAVED).is_file():
        if split is not None:
            raise DataError(f"The data set '{folder}' has no splits.", remedy=f"Leave '@{split}' out.")
        records: Records = _saved(folder)
    else:
        splits = _files(folder)
        if not splits:
            raise DataError(
                f"'{folder}' (from '{spec}') holds no data set.",
                remedy="Name a folder written by save_to_disk, or one with .arrow, .parquet or .jsonl files.",
            )
        paths = splits[_choose(split, splits, spec)]
        in_json = paths[0].suffix in JSON
        records = JsonRecords(paths, folder, spec) if in_json else _joined(paths, wanted, folder)
    if not len(records):
        raise _no_records(folder)
    return records


def _no_records(folder: Path) -> DataError:
    return DataError(f"The data set '{folder}' has no record: it holds no text.", remedy="Name another one.")


def _snapshot(folder: Path) -> Path:
    """The files of a repository in the hub's cache; any other folder is what it is."""
    reference = folder / "refs" / "main"
    return folder / "snapshots" / Path(reference.read_text().strip()).name if reference.is_file() else folder


def _choose(split: str | None, known: Iterable[str], spec: str) -> str:
    names = sorted(known)
    if split is None and len(names) == 1:
        return names[0]
    if split in names:
        return split
    what = "has several splits" if split is None else f"has no split '{split}'"
    raise DataError(
        f"The data set of '{spec}' {what}.",
        remedy=nearest(split or "train", names, "Write dataset:FOLDER@SPLIT#FIELD with one of"),
    )


def _files(folder: Path) -> dict[str, list[Path]]:
    """The files of a data set by their split, of the first kind of file that there is."""
    for suffix in FILES:
        found: dict[str, list[Path]] = {}
        for path in sorted(folder.rglob(f"*{suffix}")):
            relative = path.relative_to(folder)
            hidden = any(part.startswith(".") for part in relative.parts)
            if path.is_file() and not hidden and path.name not in DESCRIPTIONS and not path.name.startswith(DERIVED):
                found.setdefault(_split_of(relative), []).append(path)
        if found:
            return found
    return {}


def _split_of(path: Path) -> str:
    stem = SHARD.sub("", path.stem).rpartition("-")[2]
    return path.parent.name if stem.isdecimal() and path.parent.name else stem


def _saved(folder: Path) -> ArrowRecords:
    from datasets import load_from_disk

    with _reading(folder):
        if not json.loads((folder / SAVED).read_text(encoding="utf-8"))["_data_files"]:
            raise _no_records(folder)
        data = load_from_disk(str(folder)).with_format(None)
    return ArrowRecords(data, data.column_names, folder)


def _joined(paths: Sequence[Path], wanted: Collection[str], folder: Path) -> ArrowRecords:
    from datasets import Dataset, concatenate_datasets
    from datasets.table import InMemoryTable
    from pyarrow import parquet

    parts, fields = [], []
    for path in paths:
        with _reading(path):
            if path.suffix == ".arrow":
                part = Dataset.from_file(str(path))
                fields = part.column_names
            else:
                fields = parquet.read_schema(path).names
                columns = [field for field in fields if field in wanted] or None
                part = Dataset(InMemoryTable(parquet.read_table(path, columns=columns)))
        parts.append(part)
    with _reading(folder):
        return ArrowRecords(concatenate_datasets(parts), fields, folder)


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Within the block the errors of `datasets` and Arrow name the file, and no progress is drawn."""
    from datasets.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
    from pyarrow import ArrowException

    silent = are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    except (ArrowException, OSError, ValueError, TypeError, LookupError, EOFError) as error:
        reason = str(error).partition("\n")[0]
        raise DataError(
            f"The data set '{path}' cannot be read: {reason}.",
            remedy="It is damaged, or of another version of the library 'datasets'; save it again.",
        ) from error
    finally:
        if not silent:
            enable_progress_bars()
