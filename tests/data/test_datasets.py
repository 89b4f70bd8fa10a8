"""Data sets on disk, as the library `datasets` and the hub's cache leave them, against the records in them."""

from __future__ import annotations

import importlib.util
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from compress.data import IndexedText, fingerprint, text_source
from compress.data.calibration import calibration_rows
from compress.data.tokenizer import train_byte_bpe
from compress.errors import DataError, DependencyError

datasets = pytest.importorskip("datasets")

RECORDS = [
    {"text": f"row {number} é {'x' * number}", "n": number, "other": f"o{number}" if number % 5 else ""}
    for number in range(30)
]
TEXTS = [str(record["text"]) for record in RECORDS]


def texts_of(spec: str) -> list[str]:
    return [document.text for document in text_source(spec).documents()]


def saved(folder: Path, records: list[dict[str, Any]] = RECORDS) -> Path:
    datasets.Dataset.from_list(records).save_to_disk(str(folder), num_shards=min(2, len(records)))
    return folder


def saved_splits(folder: Path) -> Path:
    parts = {"train": RECORDS[:20], "test": RECORDS[20:]}
    splits = {name: datasets.Dataset.from_list(records) for name, records in parts.items()}
    datasets.DatasetDict(splits).save_to_disk(str(folder))
    return folder


def parquet(folder: Path) -> Path:
    """As a repository on the hub is laid out, in the hub's cache, where files are links to blobs."""
    snapshot = folder / "snapshots" / "0123abcd"
    (snapshot / "data").mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("0123abcd")
    (folder / "blobs").mkdir()
    for name, records in {"train-00000-of-00002": RECORDS[:10], "train-00001-of-00002": RECORDS[10:20]}.items():
        datasets.Dataset.from_list(records).to_parquet(str(folder / "blobs" / name))
        (snapshot / "data" / f"{name}.parquet").symlink_to(folder / "blobs" / name)
    datasets.Dataset.from_list(RECORDS[20:]).to_parquet(str(snapshot / "data" / "test-00000-of-00001.parquet"))
    (snapshot / "README.md").write_text("a card")
    (snapshot / "script.py").write_text("raise SystemExit('code of a data set ran')")
    return folder


def cache(folder: Path) -> Path:
    """As `load_dataset` leaves it, with a file of `Dataset.map` beside it."""
    folder.mkdir()
    for split, records in {"train": RECORDS[:20], "test": RECORDS[20:]}.items():
        datasets.Dataset.from_list(records).save_to_disk(str(folder / "made"))
        (folder / "made" / "data-00000-of-00001.arrow").rename(folder / f"rows-{split}.arrow")
        for path in (folder / "made").iterdir():
            path.unlink()
        (folder / "made").rmdir()
    (folder / "cache-12ab34.arrow").write_bytes((folder / "rows-test.arrow").read_bytes())
    (folder / "dataset_info.json").write_text("{}")
    return folder


def lines(folder: Path) -> Path:
    folder.mkdir()
    for split, records in {"train": RECORDS[:20], "test": RECORDS[20:]}.items():
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, records)))
    return folder


@pytest.mark.parametrize("make", [saved_splits, parquet, cache, lines])
def test_splits(make: Callable[[Path], Path], tmp_path: Path) -> None:
    folder = make(tmp_path / "set")
    assert texts_of(f"dataset:{folder}@train#text") == TEXTS[:20]
    assert texts_of(f"dataset:{folder}@test#text") == TEXTS[20:]
    assert texts_of(f"dataset:{folder}@test#n,text")[1] == f"21\n{TEXTS[21]}"
    with pytest.raises(DataError, match="has several splits") as caught:
        text_source(f"dataset:{folder}#text")
    assert "test, train" in caught.value.remedy
    with pytest.raises(DataError, match="no split 'tset'") as caught:
        text_source(f"dataset:{folder}@tset#text")
    assert "Did you mean 'test'" in caught.value.remedy
    with pytest.raises(DataError, match="no field 'txt'") as caught:
        text_source(f"dataset:{folder}@test#txt")
    assert "Did you mean 'text'" in caught.value.remedy and "other" in caught.value.remedy


def test_one_data_set_without_splits(tmp_path: Path) -> None:
    spec = f"dataset:{saved(tmp_path / 'set@home')}#text"
    assert texts_of(spec) == TEXTS
    described = fingerprint(text_source(spec))
    assert described.documents == 30 and described.bytes == sum(len(text.encode()) for text in TEXTS)
    with pytest.raises(DataError, match="has no splits"):
        text_source(f"dataset:{saved(tmp_path / 'plain')}@train#text")


def test_records_without_text_are_left_out(tmp_path: Path) -> None:
    spec = f"dataset:{saved(tmp_path / 'set')}#other"
    assert texts_of(spec) == [f"o{number}" for number in range(30) if number % 5]


def test_only_what_is_drawn_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A drawing reads a part of the records, in an order that the seed gives to all of them, whatever their text."""
    records = [{"text": f"{number} " * 20} for number in range(400)]
    source = text_source(f"dataset:{saved(tmp_path / 'set', records)}#text")
    assert isinstance(source, IndexedText)
    tokenizer = train_byte_bpe(source, 280, 64)
    read: list[int] = []
    whole = type(source).document
    monkeypatch.setattr(type(source), "document", lambda self, index: (read.append(index), whole(self, index))[1])
    rows = calibration_rows(source, tokenizer, rows=4, context=16, seed=7)
    order = list(range(400))
    random.Random(7).shuffle(order)
    assert 4 <= len(read) < 40 and read == order[: len(read)]
    held = tmp_path / "rows.json"
    held.write_text(json.dumps(records))
    assert rows.equal(calibration_rows(text_source(f"json:{held}#text"), tokenizer, rows=4, context=16, seed=7))


def test_data_sets_one_after_the_other(tmp_path: Path) -> None:
    spec = [f"dataset:{saved(tmp_path / 'set')}#other", f"dataset:{saved_splits(tmp_path / 'two')}@test#text"]
    source = text_source(spec)
    assert isinstance(source, IndexedText) and len(source) == 40
    assert [document.text for document in source.documents()] == [*texts_of(spec[0]), *TEXTS[20:]]
    assert source.document(0) is None and source.document(39) is not None


def test_no_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DependencyError, match=r"'datasets' is not installed") as caught:
        text_source(f"dataset:{tmp_path}#text")
    assert "model-compress[data]" in caught.value.remedy


def half(path: Path) -> None:
    """The first half of a file, in a new one: the old one may be mapped into memory."""
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content[: len(content) // 2])


def truncated(folder: Path) -> Path:
    half(saved(folder) / "data-00000-of-00002.arrow")
    return folder


def truncated_parquet(folder: Path) -> Path:
    folder.mkdir()
    datasets.Dataset.from_list(RECORDS).to_parquet(str(folder / "train.parquet"))
    half(folder / "train.parquet")
    return folder


def lacking(folder: Path) -> Path:
    (saved(folder) / "data-00001-of-00002.arrow").unlink()
    return folder


def garbled(folder: Path) -> Path:
    (saved(folder) / "state.json").write_text("{")
    return folder


def empty(folder: Path) -> Path:
    datasets.Dataset.from_dict({"text": []}).save_to_disk(str(folder))
    return folder


def empty_parquet(folder: Path) -> Path:
    datasets.Dataset.from_dict({"text": ["x"]}).select([]).to_parquet(str(folder / "train.parquet"))
    return folder


def bare(folder: Path) -> Path:
    folder.mkdir()
    (folder / "notes.txt").write_text("text")
    return folder


def a_file(folder: Path) -> Path:
    folder.write_text("text")
    return folder


def nested(folder: Path) -> Path:
    return saved(folder, [{"text": [{"role": "user", "content": "x"}]}])


def without_text(folder: Path) -> Path:
    return saved(folder, [{"text": ""}, {"text": ""}])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: folder, "does not exist"),
        (a_file, "is a file"),
        (bare, "holds no data set"),
        (empty, "has no record"),
        (empty_parquet, "has no record"),
        (without_text, "holds no text"),
        (truncated, "cannot be read"),
        (truncated_parquet, "cannot be read"),
        (lacking, "cannot be read"),
        (garbled, "cannot be read"),
        (nested, "record 0 of .* is of type list, not text"),
    ],
)
def test_what_is_wrong_is_said(make: Callable[[Path], Path], message: str, tmp_path: Path) -> None:
    folder = make(tmp_path / "set")
    with pytest.raises(DataError, match=message) as caught:
        fingerprint(text_source(f"dataset:{folder}#text"))
    assert str(folder) in str(caught.value) and caught.value.remedy
