"""The distillation stage as the command line runs it: what it publishes, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import compress
from compress.distillation.run import distill_stage
from compress.errors import ModelError, NumericsError
from compress.recipe import make_recipe
from compress.storage import file_sha256
from compress.workspace import Workspace
from tests.tiny_models import write_llama, write_text


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    text = write_text(folder)
    write_llama(folder / "teacher", text, hidden=48, seed=1)
    write_llama(folder / "student", text, seed=2)
    return folder


def stage(models: Path, out: Path, **options: Any) -> dict[str, Any]:
    part = {
        "teacher": str(models / "teacher"),
        "data": f"text:{models / 'text.txt'}",
        "losses": ["kl"],
        "steps": 3,
        "batch_size": 2,
        "context": 16,
        **options,
    }
    recipe = make_recipe({"model": str(models / "student"), "out": str(out), "distill": part})
    assert recipe.distill is not None
    with Workspace.open(out.with_name(f"{out.name}.work"), recipe.arguments()) as workspace:
        return distill_stage(recipe.distill, recipe.model, out, workspace)


def test_student_keeps_its_dtype_and_config(models: Path, tmp_path: Path) -> None:
    record = stage(models, tmp_path / "out")
    assert [step for step, _ in record["loss"]] == [1, 3]
    before, after = (load_file(folder / "model.safetensors") for folder in (models / "student", tmp_path / "out"))
    assert {name: (t.shape, t.dtype) for name, t in before.items()} == {n: (t.shape, t.dtype) for n, t in after.items()}
    assert any(not torch.equal(before[name], after[name]) for name in before)
    configs = [json.loads((folder / "config.json").read_text()) for folder in (models / "student", tmp_path / "out")]
    assert configs[0] == configs[1]
    files = json.loads((tmp_path / "out" / "compress.json").read_text())["files"]
    assert all(file_sha256(tmp_path / "out" / name) == entry["sha256"] for name, entry in files.items())
    assert "at step 3" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert compress.load(str(tmp_path / "out")).can_generate()


def test_diverged_training_is_an_error_and_leaves_nothing(models: Path, tmp_path: Path) -> None:
    with pytest.raises(NumericsError, match=r"lower the learning rate"):
        stage(models, tmp_path / "out", learning_rate=1e30, max_grad_norm=0.0, warmup_steps=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.work"]


def test_time_limit_ends_the_training_with_the_schedule(models: Path, tmp_path: Path) -> None:
    record = stage(models, tmp_path / "out", steps=100_000, max_seconds=1.0, schedule="linear", log_every=1)
    assert 0 < record["steps"] < 100_000
    assert record["loss"][-1][0] == record["steps"]


def test_other_tokenizer_of_the_same_size_is_refused(models: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.txt"
    other.write_text("Völlig anderer Text, mit anderen Wörtern. " * 500, encoding="utf-8")
    write_llama(tmp_path / "teacher", other, hidden=48, vocabulary=280)
    text = models / "text.txt"
    write_llama(tmp_path / "student", text, vocabulary=280)
    with pytest.raises(ModelError, match="different tokenizers"):
        stage(tmp_path, tmp_path / "out", data=f"text:{text}")


def test_padded_outputs_are_left_out_and_said(models: Path, tmp_path: Path) -> None:
    padded = AutoModelForCausalLM.from_pretrained(models / "teacher")
    width = padded.config.vocab_size
    padded.resize_token_embeddings(width + 20, mean_resizing=False)
    padded.save_pretrained(tmp_path / "teacher")
    AutoTokenizer.from_pretrained(models / "teacher").save_pretrained(tmp_path / "teacher")
    record = stage(models, tmp_path / "padded", teacher=str(tmp_path / "teacher"))
    assert record["loss"] == stage(models, tmp_path / "plain")["loss"]
    log = (tmp_path / "padded.work" / "log.jsonl").read_text(encoding="utf-8")
    assert f"the teacher {width + 20}: the first {width} are compared" in log
