"""Names to folders: a layout like a checkout's and one like a wheel's, and what is said when nothing is found."""

from __future__ import annotations

from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

import compress
from compress.errors import ModelError
from compress.modeling.resolve import builtin_names, model_name, resolve_model


@pytest.mark.parametrize("inside", [True, False], ids=["wheel", "checkout"])
def test_builtin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inside: bool) -> None:
    package = tmp_path / "compress"
    models = (package if inside else tmp_path) / "models"
    (models / "teacher").mkdir(parents=True)
    (models / "teacher" / "config.json").write_text("{}")
    package.mkdir(exist_ok=True)
    monkeypatch.setattr(compress, "__file__", str(package / "__init__.py"))
    assert builtin_names() == ["teacher"]
    assert resolve_model("builtin:teacher") == models / "teacher"
    with pytest.raises(ModelError, match="no built-in model 'studnet'"):
        resolve_model("builtin:studnet")


def test_installation_without_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compress, "__file__", str(tmp_path / "compress" / "__init__.py"))
    with pytest.raises(ModelError, match="has no built-in models"):
        resolve_model("builtin:teacher")


def test_local_folder_and_file(tmp_path: Path) -> None:
    assert resolve_model(str(tmp_path)) == tmp_path
    (tmp_path / "file").touch()
    with pytest.raises(ModelError, match="is a file"):
        resolve_model(str(tmp_path / "file"))
    with pytest.raises(ModelError, match="There is no folder"):
        resolve_model(str(tmp_path / "none"))


def test_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda ref, allow_patterns: str(tmp_path / ref))
    assert resolve_model("org/name") == tmp_path / "org/name"


def test_hub_unreachable(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(ref: str, allow_patterns: list[str]) -> str:
        raise LocalEntryNotFoundError("offline")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(ModelError, match="no local folder 'org/name'"):
        resolve_model("org/name")


def test_model_name(tmp_path: Path) -> None:
    assert model_name(Path("/cache/models--org--name/snapshots/0123abcd")) == "org/name"
    assert model_name(tmp_path / "mine") == "mine"
