"""The trainer against a loop written out by hand, and against itself when it is interrupted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments
from transformers.trainer_callback import PrinterCallback, TrainerCallback

from compress.data import SampledRows
from compress.distillation.checkpoints import checkpoints, last_verified, verifies
from compress.distillation.objective import Objective, Term, make_term
from compress.distillation.trainer import DistillTrainer
from compress.errors import ModelError, UsageError, WorkspaceError
from compress.losses import KL

VOCABULARY = 32


def tiny(width: int, layers: int, vocabulary: int = VOCABULARY) -> LlamaForCausalLM:
    torch.manual_seed(width)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=32,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config)


def rows() -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (10, 12), generator=torch.Generator().manual_seed(0))


class Masked(SampledRows):
    """Rows of which each has another number of labels that count."""

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        item = super().__getitem__(index)
        labels = item["input_ids"].clone()
        labels[: index % 7] = -100
        return {"input_ids": item["input_ids"], "labels": labels}


def trainer(folder: Path, terms: list[Term], *, micro: int = 4, accumulate: int = 1, **options: Any) -> DistillTrainer:
    settings: dict[str, Any] = {"max_steps": 6, "save_strategy": "no", "logging_steps": 1, **options}
    args = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=accumulate,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=0.0,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        **settings,
    )
    made = DistillTrainer(
        tiny(16, 1), args, terms=terms, teacher=tiny(24, 2), train_dataset=Masked(rows(), 6 * micro * accumulate, 3)
    )
    made.remove_callback(PrinterCallback)
    return made


def by_hand(steps: int) -> tuple[LlamaForCausalLM, list[float]]:
    """Token-mean KL by its definition, AdamW, batches of four."""
    student, teacher, data = tiny(16, 1), tiny(24, 2).eval(), Masked(rows(), 4 * steps, 3)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-2, weight_decay=0.0, betas=(0.9, 0.999), eps=1e-8)
    losses = []
    for step in range(steps):
        items = [data[4 * step + i] for i in range(4)]
        ids = torch.stack([item["input_ids"] for item in items])
        keep = torch.stack([item["labels"] for item in items])[:, 1:] != -100
        with torch.no_grad():
            p = F.log_softmax(teacher(input_ids=ids).logits[:, :-1], -1)
        q = F.log_softmax(student(input_ids=ids).logits[:, :-1], -1)
        loss = ((p.exp() * (p - q)).sum(-1) * keep).sum() / keep.sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return student, losses


def logged(made: DistillTrainer) -> list[float]:
    return [entry["loss"] for entry in made.state.log_history if "loss" in entry]


@pytest.mark.parametrize(("micro", "accumulate"), [(4, 1), (2, 2), (1, 4)])
def test_equals_a_loop_by_hand_however_the_step_is_cut(tmp_path: Path, micro: int, accumulate: int) -> None:
    made = trainer(tmp_path, [Term("kl", KL(reduction="sum"))], micro=micro, accumulate=accumulate)
    made.train()
    student, losses = by_hand(6)
    assert logged(made) == pytest.approx(losses, rel=1e-5)
    for (name, got), want in zip(made.model.named_parameters(), student.parameters(), strict=True):
        assert torch.allclose(got, want, atol=2e-5), name


def test_terms_are_summed_and_reported_by_name(tmp_path: Path) -> None:
    terms = [make_term("kl", {"weight": 0.5}, has_teacher=True), make_term("cross_entropy", {}, has_teacher=True)]
    made = trainer(tmp_path, terms, max_steps=2)
    made.train()
    for entry in made.state.log_history[:2]:
        assert entry["loss"] == pytest.approx(entry["loss_kl"] + entry["loss_cross_entropy"], rel=1e-6)


class Stop(TrainerCallback):
    """Ends the training after a step, as a kill would."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step == self.step


@pytest.mark.parametrize("every", [1, 3])
def test_resumed_training_equals_an_unbroken_one(tmp_path: Path, every: int) -> None:
    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2, "save_total_limit": 2, "logging_steps": every}

    def made(name: str) -> DistillTrainer:
        terms = [make_term("kl", {"weight": 0.7}, has_teacher=True), make_term("cross_entropy", {}, has_teacher=True)]
        return trainer(tmp_path / name, terms, **options)

    whole = made("whole")
    whole.train(resume_from_checkpoint=True)
    first = made("broken")
    first.add_callback(Stop(5))
    first.train()
    second = made("broken")
    second.train(resume_from_checkpoint=True)
    entries = [[entry for entry in one.state.log_history if "loss" in entry] for one in (whole, second)]
    for want, got in zip(*entries, strict=True):
        for name in ("loss", "loss_kl", "loss_cross_entropy", "learning_rate", "step"):
            assert got[name] == want[name]
    for got, want in zip(second.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(got, want)
    assert [path.name for path in checkpoints(tmp_path / "broken")] == ["checkpoint-4", "checkpoint-6"]


def test_damaged_checkpoint_is_passed_over(tmp_path: Path) -> None:
    made = trainer(tmp_path, [Term("kl", KL(reduction="sum"))], save_strategy="steps", save_steps=3)
    made.train()
    older, newer = checkpoints(tmp_path)
    assert verifies(older)
    assert last_verified(tmp_path) == newer
    damaged = newer / "model.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"\0")
    assert last_verified(tmp_path) == older
    (older / "optimizer.pt").unlink()
    assert last_verified(tmp_path) is None
    with pytest.raises(WorkspaceError, match="not what was written"):
        made.train(resume_from_checkpoint=str(newer))


def test_checksums_name_every_file(tmp_path: Path) -> None:
    trainer(tmp_path, [Term("kl", KL(reduction="sum"))], save_strategy="steps", save_steps=6).train()
    (checkpoint,) = checkpoints(tmp_path)
    names = {path.name for path in checkpoint.iterdir()} - {"compress.json"}
    assert set(json.loads((checkpoint / "compress.json").read_text())["files"]) == names
    assert not (tmp_path / "staging").exists()


def test_vocabularies_must_agree(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="vocabulary of 'student' has 32 tokens, that of 'teacher' 48"):
        DistillTrainer(
            tiny(16, 1),
            TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[]),
            terms=[Term("kl", KL(reduction="sum"))],
            teacher=tiny(24, 2, vocabulary=48),
        )


def test_terms_that_cannot_work_are_refused() -> None:
    with pytest.raises(UsageError, match="needs a teacher"):
        make_term("kl", {}, has_teacher=False)
    with pytest.raises(UsageError, match="weight of the loss 'kl' is -1"):
        make_term("kl", {"weight": -1}, has_teacher=True)
    with pytest.raises(UsageError, match="No loss"):
        Objective([])
