"""The Python of the documentation runs as it stands there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from compress.losses import loss_names, loss_options

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
    example, calls = blocks("docs/distillation.md")
    exec(example.replace("max_steps=100", "max_steps=2").replace("_steps=50", "_steps=2"), scope)
    assert scope["trainer"].state.global_step == 2
    assert (tmp_path / "run" / "checkpoint-2" / "compress.json").is_file()
    exec(calls, scope)
    assert scope["per_position"].shape == (28,)


@pytest.mark.parametrize("page", ["dynamic.md", "learned_transforms.md", "rounding.md", "transforms.md"])
def test_python_of_the_pages_on_quantization(page: str) -> None:
    for block in blocks(f"docs/{page}"):
        exec(block, {})


PAGES = sorted(path.name for path in (ROOT / "docs" / "losses").glob("*.md"))


@pytest.mark.parametrize("page", PAGES)
def test_python_of_the_pages_on_losses(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for block in blocks(f"docs/losses/{page}"):
        exec(block, {})


def test_every_loss_and_option_has_its_page() -> None:
    text = {page: (ROOT / "docs" / "losses" / page).read_text(encoding="utf-8") for page in PAGES}
    for name in loss_names():
        homes = [page for page, content in text.items() if f"`{name}`" in content]
        assert homes, f"no page of docs/losses describes '{name}'"
        for option in loss_options(name):
            assert any(f"`{option}" in text[page] for page in homes), f"no page says what '{option}' of '{name}' is"
    index = (ROOT / "docs" / "distillation.md").read_text(encoding="utf-8")
    assert all(f"losses/{page}" in index for page in PAGES)
