"""Sources of text against the files they come from."""

from __future__ import annotations

import csv
import hashlib
import json
import sysconfig
from pathlib import Path

import pytest

from compress.data import fingerprint, text_source
from compress.data.python_source import is_validation
from compress.errors import DataError


def test_python_splits_are_disjoint_and_cover_the_library() -> None:
    train = {document.name for document in text_source("builtin:python/train").documents()}
    val = {document.name for document in text_source("builtin:python/val").documents()}
    assert not train & val
    assert {"argparse.py", "json/decoder.py"} <= train | val
    assert not any("test" in Path(name).parts or "site-packages" in name for name in train | val)
    assert 0.03 < len(val) / len(train | val) < 0.12
    for name in sorted(val)[:5]:
        assert hashlib.sha256(name.encode()).hexdigest() < "10"
        assert (Path(sysconfig.get_paths()["stdlib"]) / name).is_file()


def test_split_depends_on_nothing_but_the_name() -> None:
    assert [is_validation(name) for name in ("argparse.py", "json/decoder.py", "ast.py")] == [
        int(hashlib.sha256(name.encode()).hexdigest()[:2], 16) < 16
        for name in ("argparse.py", "json/decoder.py", "ast.py")
    ]


def test_fingerprint_changes_with_the_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("héllo\n", encoding="utf-8")
    first = fingerprint(text_source(f"text:{tmp_path / 'a.txt'}"))
    assert (first.documents, first.bytes) == (1, 7)
    (tmp_path / "a.txt").write_text("hallo\n", encoding="utf-8")
    assert fingerprint(text_source(f"text:{tmp_path / 'a.txt'}")).sha256 != first.sha256


def test_json_csv_and_chains(tmp_path: Path) -> None:
    records = [{"q": "one", "a": "1"}, {"q": "two", "a": "2"}]
    (tmp_path / "list.json").write_text(json.dumps(records))
    (tmp_path / "lines.json").write_text("\n".join(json.dumps(record) for record in records))
    with (tmp_path / "t.csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, ["q", "a"])
        writer.writeheader()
        writer.writerows([*records, {"q": "th\nree", "a": '3 "x"'}])
    for name in ("list", "lines"):
        texts = [d.text for d in text_source(f"json:{tmp_path / f'{name}.json'}#q").documents()]
        assert texts == ["one", "two"]
    texts = [
        d.text for d in text_source([f"csv:{tmp_path / 't.csv'}#q,a", f"json:{tmp_path / 'list.json'}#a"]).documents()
    ]
    assert texts == ["one\n1", "two\n2", 'th\nree\n3 "x"', "1", "2"]
    texts = [d.text for d in text_source(f"csv:{tmp_path / 't.csv'}#1").documents()]
    assert texts == ["a", "1", "2", '3 "x"']


def texts_of(spec: str) -> list[str]:
    return [document.text for document in text_source(spec).documents()]


BREAKS = "a\u2028b\x85c\x0cd\x1ce"
"""Characters at which `str.splitlines` cuts, and files do not."""


def test_lines_end_where_files_end_them(tmp_path: Path) -> None:
    records = [{"q": BREAKS}, {"q": "two"}]
    lines = "\r\n".join(json.dumps(record, ensure_ascii=False) for record in records)
    (tmp_path / "lines.json").write_text(lines, encoding="utf-8", newline="")
    assert texts_of(f"json:{tmp_path / 'lines.json'}#q") == [BREAKS, "two"]
    with (tmp_path / "t.csv").open("w", encoding="utf-8", newline="") as stream:
        csv.writer(stream).writerows([["q", "a"], [BREAKS, "1"], ["x\r\ny", "2"]])
    assert texts_of(f"csv:{tmp_path / 't.csv'}#q,a") == [f"{BREAKS}\n1", "x\r\ny\n2"]


def test_byte_order_marks_are_no_text(tmp_path: Path) -> None:
    for name, text in (("t.txt", "text"), ("l.json", '[{"q": "one"}]'), ("l.jsonl", '{"q": "one"}'), ("t.csv", "q\n1")):
        (tmp_path / name).write_text(text, encoding="utf-8-sig")
    assert texts_of(f"text:{tmp_path / 't.txt'}") == ["text"]
    assert texts_of(f"json:{tmp_path / 'l.json'}#q") == texts_of(f"json:{tmp_path / 'l.jsonl'}#q") == ["one"]
    assert texts_of(f"csv:{tmp_path / 't.csv'}#q") == ["1"]


def test_large_fields(tmp_path: Path) -> None:
    large, limit = "x" * 300_000, csv.field_size_limit()
    (tmp_path / "t.csv").write_text(f"q,a\n{large},1\n")
    assert texts_of(f"csv:{tmp_path / 't.csv'}#q") == [large]
    assert csv.field_size_limit() == limit


def test_numbers_are_names_where_the_header_has_them(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("2023,2024\nold,new\n")
    assert texts_of(f"csv:{tmp_path / 't.csv'}#2024") == ["new"]
    assert texts_of(f"csv:{tmp_path / 't.csv'}#1") == ["2024", "new"]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("nonsense", "of no known kind"),
        ("builtin:python/test", "no split 'test'"),
        ("builtin:ruby/train", "no built-in data"),
        ("text:{here}/missing.txt", "no file"),
        ("text:{here}", "is a folder"),
        ("text:{here}/latin.txt", "not UTF-8 text: byte 1"),
        ("text:{here}/empty.txt", "empty.txt.* is empty: it holds no text"),
        ("json:{here}/empty.txt#q", "empty.txt.* is empty: it holds no text"),
        ("csv:{here}/empty.txt#q", "empty.txt.* is empty: it holds no text"),
        ("json:{here}/none.json#q", "has no record: it holds no text"),
        ("json:{here}/blank.json#q", "holds no text"),
        ("csv:{here}/header.csv#a", "holds no text"),
        ("json:{here}/list.json#q", "'q' of record 0 of .* is of type list, not text"),
        ("json:{here}/half.json#q", "half of a surrogate pair"),
        ("json:{here}/deep.json#q", "neither a JSON list nor JSON lines"),
        ("json:{here}/number.json#q", "Record 1 of .* is a int, not an object"),
        ("json:{here}/named.json#titel", "Did you mean 'title'"),
        ("csv:{here}/open.csv#a", "is not CSV: unexpected end of data"),
        ("json:{here}/latin.txt", "names no field"),
        ("json:{here}/bad.json#q", "neither a JSON list nor JSON lines"),
        ("json:{here}/good.json#x", "Record 0 .* has no field 'x' .it has: q"),
        ("csv:{here}/good.csv#x", "no column 'x' .its first row is: a, b"),
        ("csv:{here}/good.csv#0,2", "Row 0 of .* has 2 columns, none with number 2"),
        ("packages:json", "'json' .* is no installed distribution"),
        ("packages:no_such_package", "'no_such_package' .* is not installed"),
    ],
)
def test_what_is_wrong_is_said(tmp_path: Path, spec: str, message: str) -> None:
    (tmp_path / "latin.txt").write_bytes("né".encode("latin-1"))
    (tmp_path / "empty.txt").write_bytes(b"")
    (tmp_path / "bad.json").write_text("{")
    (tmp_path / "good.json").write_text('[{"q": "1"}]')
    (tmp_path / "good.csv").write_text("a,b\n1,2\n")
    (tmp_path / "none.json").write_text("[]")
    (tmp_path / "named.json").write_text('[{"title": "x"}]')
    (tmp_path / "blank.json").write_text('[{"q": ""}, {"q": null}]')
    (tmp_path / "header.csv").write_text("a,b\n")
    (tmp_path / "list.json").write_text('[{"q": ["1"]}]')
    (tmp_path / "half.json").write_text('[{"q": "\\ud800"}]')
    (tmp_path / "deep.json").write_text("[" * 200_000)
    (tmp_path / "number.json").write_text('[{"q": "1"}, 2]')
    (tmp_path / "open.csv").write_text('a,b\n1,2\n"3,4\n5,6\n')
    with pytest.raises(DataError, match=message):
        fingerprint(text_source(spec.format(here=tmp_path)))


def test_numbers_are_no_text_but_beside_text(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text('[{"n": 3, "text": "three"}, {"n": 0.5, "text": "a half"}]')
    assert [document.text for document in text_source(f"json:{path}#n,text").documents()] == ["3\nthree", "0.5\na half"]
    with pytest.raises(DataError, match=r"field 'n' of record 0 .* of type int, not text"):
        list(text_source(f"json:{path}#n").documents())


def test_the_broken_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a"}\n\n{"text": "b"}\n{"text": "c')
    with pytest.raises(DataError, match="in line 4"):
        list(text_source(f"json:{path}#text").documents())
