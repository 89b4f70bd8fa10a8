"""Tiny models, and a working directory that holds them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.tiny_models import write_llama, write_text


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    text = write_text(folder)
    write_llama(folder / "teacher", text, hidden=64, layers=2, seed=1)
    write_llama(folder / "student", text, seed=2)
    return folder


@pytest.fixture
def inside(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A fresh working directory with `teacher`, `student` and `text.txt` in it."""
    for name in ("teacher", "student", "text.txt"):
        (tmp_path / name).symlink_to(models / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path
