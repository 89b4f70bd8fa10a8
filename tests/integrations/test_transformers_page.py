"""The snippets of docs/transformers.md, in their order."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from compress.cli.main import main
from compress.quantization.modules import packed_modules
from tests.test_docs import ROOT, blocks

PAGE = "docs/transformers.md"


@pytest.fixture
def scope(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.chdir(tmp_path)
    command = "compress quantize builtin:student --bits 3.25 --out packed"
    assert f"```\n{command}\n```" in (ROOT / PAGE).read_text(encoding="utf-8")
    done = CliRunner().invoke(main, command.split()[1:])
    assert done.exit_code == 0, done.output
    return {}


def test_page(scope: dict[str, Any], tmp_path: Path) -> None:
    loading, dequantizing, training, merging, compiling = blocks(PAGE)
    exec(loading, scope)
    assert packed_modules(scope["write"].model)
    assert scope["tokens"].shape[1] == scope["prompt"].input_ids.shape[1] + 16
    exec(dequantizing, scope)
    assert "quantization_config" not in (tmp_path / "plain" / "config.json").read_text()
    exec("import torch\n" + compiling, scope)
    with torch.no_grad():
        eager = scope["model"](**scope["prompt"]).logits
    torch.testing.assert_close(scope["logits"], eager, rtol=0, atol=1e-4 * float(eager.abs().max()))
    pytest.importorskip("peft", reason="the rest needs peft")
    exec(training, scope)
    batch = scope["batch"]
    with torch.no_grad():
        trained, again = scope["model"].eval()(batch).logits, scope["again"](batch).logits
        assert torch.equal(trained, again)
        exec(merging, scope)
        torch.testing.assert_close(
            scope["merged"](batch).logits, trained, rtol=0, atol=2.0**-5 * float(trained.abs().max())
        )
