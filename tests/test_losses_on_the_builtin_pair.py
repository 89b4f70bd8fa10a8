"""Every loss that has a name, in the trainer, on the built-in student and teacher: a few steps on the same rows."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from benchmarks.losses_end_to_end import ANCHORED
from compress.data import SampledRows, text_source, tokenize
from compress.distillation.objective import make_term, setting_of
from compress.distillation.trainer import DistillTrainer
from compress.losses import KL, Needs, loss_names
from compress.modeling.loading import load_model, load_tokenizer
from compress.recipe import Method

ROWS, CONTEXT, STEPS = 4, 48, 8


@pytest.fixture(scope="module")
def rows() -> torch.Tensor:
    found, _ = tokenize(text_source("builtin:python/val"), load_tokenizer("builtin:student")).rows(CONTEXT)
    return found[:ROWS]


@pytest.fixture(scope="module")
def teacher() -> PreTrainedModel:
    return load_model("builtin:teacher")


@torch.no_grad()
def divergence(student: PreTrainedModel, teacher: PreTrainedModel, rows: torch.Tensor) -> float:
    student.eval()
    return float(KL()(student(input_ids=rows).logits, teacher(input_ids=rows).logits))


@pytest.mark.parametrize("name", loss_names())
def test_a_few_steps(name: str, rows: torch.Tensor, teacher: PreTrainedModel, tmp_path: Path) -> None:
    student, tokenizer = load_model("builtin:student"), load_tokenizer("builtin:student")
    setting = setting_of(
        student.config, teacher.config, pieces=lambda ids: [str(tokenizer.decode([token])) for token in ids]
    )
    methods = [Method.model_validate(text) for text in ANCHORED.get(name, [name])]
    terms = [make_term(method.name, method.options, setting, has_teacher=True) for method in methods]
    before = divergence(student, teacher, rows)
    args = TrainingArguments(
        output_dir=str(tmp_path),
        use_cpu=True,
        report_to=[],
        max_steps=STEPS,
        per_device_train_batch_size=ROWS,
        learning_rate=3e-4,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = DistillTrainer(
        student, args, terms=terms, teacher=teacher, train_dataset=SampledRows(rows, ROWS * STEPS, seed=0)
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == STEPS
    assert sum(losses[-2:]) < sum(losses[:2])
    if any(Needs.TEACHER in term.loss.needs for term in terms):
        assert divergence(student, teacher, rows) < before
