"""The Python of the documentation runs as it stands there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[1]


def blocks(name: str) -> list[str]:
    """The Python blocks of a page."""
    return re.findall(r"```python\n(.*?)```", (ROOT / name).read_text(encoding="utf-8"), re.DOTALL)


def test_python_of_the_readme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    loading, verbs = blocks("README.md")
    scope: dict[str, Any] = {}
    exec(verbs.replace("limit=65536", "limit=1024").replace("teacher", "student"), scope)
    assert 0 < scope["figures"]["kl_divergence"] < 1
    assert (tmp_path / "packed-onnx" / "model.onnx").is_file()
    exec(loading.replace('"q"', '"packed"'), scope)
    assert scope["model"].config.quantization_config.quant_method == "compress"


def test_python_of_the_distillation_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    rows = torch.randint(0, 4096, (64, 16), generator=torch.Generator().manual_seed(0))
    scope: dict[str, Any] = {"dataset": [{"input_ids": row, "labels": row} for row in rows]}
    (example,) = blocks("docs/distillation.md")
    exec(example.replace("max_steps=100", "max_steps=2").replace("_steps=50", "_steps=2"), scope)
    assert scope["trainer"].state.global_step == 2
    assert (tmp_path / "run" / "checkpoint-2" / "compress.json").is_file()
