"""`compress.distill`: a call that trains, writes and returns; the same call again returns what is there."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import compress
from compress.errors import RecipeError
from tests.tiny_models import write_llama, write_text


def test_distill(tmp_path: Path) -> None:
    text = write_text(tmp_path)
    teacher, student = write_llama(tmp_path / "teacher", text, seed=1), write_llama(tmp_path / "student", text, seed=2)
    options = {"out": tmp_path / "out", "data": f"text:{text}", "teacher": teacher}
    with pytest.raises(RecipeError, match="stepz"):
        compress.distill(student, stepz=2, **options)
    first = compress.distill(student, steps=2, batch_size=2, context=32, log_every=1, **options)
    again = compress.distill(student, steps=2, batch_size=2, context=32, log_every=1, **options)
    before = compress.load(student)
    assert not torch.equal(first.lm_head.weight, before.lm_head.weight)
    assert torch.equal(first.lm_head.weight, again.lm_head.weight)
