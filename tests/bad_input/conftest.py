"""The good things that rows break: tiny models, results of every kind, a text."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from compress.cli.main import main
from tests.families import bert, save
from tests.tiny_models import write_llama, write_text


def call(words: str) -> None:
    done = CliRunner().invoke(main, words.split())
    assert done.exit_code == 0, done.output


@pytest.fixture(scope="session")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `student`, `teacher`, `nan` (a student with NaN weights), `quantized` and `onnx` (both of the
    student), `stages` (a result of several stages), `encoder`, `narrow` (a student with fewer outputs than its
    tokenizer has tokens), `work` (the work folder of a finished run) and `text.txt`."""
    folder = tmp_path_factory.mktemp("good")
    text = write_text(folder)
    write_llama(folder / "student", text, seed=2)
    write_llama(folder / "teacher", text, hidden=64, layers=2, seed=1)
    shutil.copytree(folder / "student", folder / "nan")
    tensors = load_file(folder / "nan" / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][3, 5] = torch.nan
    save_file(tensors, folder / "nan" / "model.safetensors", {"format": "pt"})
    call(f"quantize {folder / 'student'} --bits 3 --out {folder / 'quantized'} --quiet")
    shutil.rmtree(folder / "quantized.work")
    with contextlib.chdir(folder):
        call("quantize student --bits 4 --out q --work work --quiet")
    shutil.rmtree(folder / "q")
    AutoTokenizer.from_pretrained(folder / "student").save_pretrained(folder / "encoder")
    save(bert(vocab_size=300), folder / "encoder")
    narrow = AutoModelForCausalLM.from_pretrained(write_llama(folder / "narrow", text))
    narrow.resize_token_embeddings(290, mean_resizing=False)
    narrow.save_pretrained(folder / "narrow")
    (folder / "stages").mkdir()
    shutil.copytree(folder / "student", folder / "stages" / "distilled")
    shutil.copytree(folder / "quantized", folder / "stages" / "quantized")
    shutil.copytree(folder / "student", folder / "onnx", ignore=shutil.ignore_patterns("*.safetensors"))
    (folder / "onnx" / "model.onnx").write_bytes(b"\x08\x0a")
    return folder


@pytest.fixture
def here(good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A fresh working directory with links to the good things."""
    for path in good.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    return tmp_path
