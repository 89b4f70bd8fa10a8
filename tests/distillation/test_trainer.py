"""The trainer against a loop written out by hand, and against itself when it is interrupted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    TrainingArguments,
)
from transformers.trainer_callback import PrinterCallback, TrainerCallback

from compress.data import SampledRows
from compress.distillation.checkpoints import checkpoints, last_verified, verifies
from compress.distillation.objective import Objective, Term, make_term
from compress.distillation.trainer import DistillTrainer
from compress.errors import ModelError, UsageError, WorkspaceError
from compress.losses import KL, CrossEntropy, Outputs

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


def trainer(
    folder: Path, terms: list[Term], *, micro: int = 4, accumulate: int = 1, fused: bool = False, **options: Any
) -> DistillTrainer:
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
    data = Masked(rows(), 6 * micro * accumulate, 3)
    made = DistillTrainer(tiny(16, 1), args, terms=terms, teacher=tiny(24, 2), fused=fused, train_dataset=data)
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
    made = trainer(tmp_path, [Term("kl", KL())], micro=micro, accumulate=accumulate)
    made.train()
    student, losses = by_hand(6)
    assert logged(made) == pytest.approx(losses, rel=5e-5)  # float32 sums in another order
    for (name, got), want in zip(made.model.named_parameters(), student.parameters(), strict=True):
        assert torch.allclose(got, want, atol=2e-5), name


def test_terms_are_summed_and_reported_by_name(tmp_path: Path) -> None:
    terms = [make_term("kl", {"weight": 0.5}, has_teacher=True), make_term("cross_entropy", {}, has_teacher=True)]
    made = trainer(tmp_path, terms, max_steps=2)
    made.train()
    for entry in made.state.log_history[:2]:
        assert entry["loss"] == pytest.approx(0.5 * entry["loss_kl"] + entry["loss_cross_entropy"], rel=1e-6)


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
    made = trainer(tmp_path, [Term("kl", KL())], save_strategy="steps", save_steps=3)
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
    trainer(tmp_path, [Term("kl", KL())], save_strategy="steps", save_steps=6).train()
    (checkpoint,) = checkpoints(tmp_path)
    names = {path.name for path in checkpoint.iterdir()} - {"compress.json"}
    assert set(json.loads((checkpoint / "compress.json").read_text())["files"]) == names
    assert not (tmp_path / "staging").exists()


class Owning(KL):
    """KL times a factor that learns, with a count of the batches seen."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.ones(()))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def of(self, outputs: Outputs, denominator: torch.Tensor | float | None = None) -> torch.Tensor:
        self.seen += self.training
        return self.factor * super().of(outputs, denominator)


def test_what_a_loss_owns_learns_and_is_resumed(tmp_path: Path) -> None:
    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2}
    whole = trainer(tmp_path / "whole", [Term("owning", Owning())], **options)
    whole.train()
    first = trainer(tmp_path / "broken", [Term("owning", Owning())], **options)
    first.add_callback(Stop(5))
    first.train()
    second = trainer(tmp_path / "broken", [Term("owning", Owning())], **options)
    second.train(resume_from_checkpoint=True)
    for name, want in whole.objective.state_dict().items():
        assert torch.equal(second.objective.state_dict()[name], want), name
    (loss,) = whole.objective.losses
    whole.evaluate(Masked(rows(), 4, 0))
    assert loss.seen == 6
    factor = nn.Parameter(torch.ones(()))
    optimizer = torch.optim.AdamW([factor], lr=1e-2, weight_decay=0.0)
    for value in logged(whole):  # factor * KL, so that the gradient is value / factor
        factor.grad = value / factor.detach()
        optimizer.step()
    assert float(loss.factor.detach()) == pytest.approx(float(factor.detach()), rel=1e-5)


def test_an_optimizer_without_the_parameters_of_a_loss_is_refused(tmp_path: Path) -> None:
    model = tiny(16, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[], max_steps=1)
    terms = [Term("owning", Owning())]
    made = DistillTrainer(
        model, args, terms=terms, teacher=tiny(24, 2), train_dataset=Masked(rows(), 4, 0), optimizers=(optimizer, None)
    )
    with pytest.raises(UsageError, match="lacks 1 parameters that belong to a loss"):
        made.train()


def test_a_classifier_is_trained_sample_by_sample(tmp_path: Path) -> None:
    def classifier(width: int) -> BertForSequenceClassification:
        torch.manual_seed(width)
        return BertForSequenceClassification(
            BertConfig(
                vocab_size=VOCABULARY,
                hidden_size=width,
                intermediate_size=width,
                num_hidden_layers=1,
                num_attention_heads=2,
                num_labels=5,
                hidden_dropout_prob=0.0,
                attention_probs_dropout_prob=0.0,
            )
        )

    data = [{"input_ids": row, "labels": torch.tensor(place % 5)} for place, row in enumerate(rows())]
    args = TrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, report_to=[], max_steps=2, per_device_train_batch_size=5,
        learning_rate=0.0, logging_steps=1, disable_tqdm=True,
    )  # fmt: skip
    student, teacher = classifier(8), classifier(16).eval()
    terms = [Term("kl", KL(temperature=2.0, t2=True)), Term("cross_entropy", CrossEntropy(), weight=0.5)]
    made = DistillTrainer(student, args, terms=terms, teacher=teacher, train_dataset=data)
    made.train()
    labels = torch.stack([item["labels"] for item in data])
    with torch.no_grad():
        logits, target = student(input_ids=rows()).logits, teacher(input_ids=rows()).logits
    p, q = F.log_softmax(target / 2, -1), F.log_softmax(logits / 2, -1)
    want = 4 * (p.exp() * (p - q)).sum(-1).mean() + 0.5 * F.cross_entropy(logits, labels)
    assert sum(logged(made)[:2]) / 2 == pytest.approx(float(want), rel=1e-5)


def test_a_balanced_term_has_the_gradient_norm_that_was_asked_for() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 9, generator=generator, requires_grad=True)
    outputs = Outputs(logits, torch.randn(6, 9, generator=generator), torch.arange(6))
    first, second = Term("kl", KL(), weight=3.0), Term("cross_entropy", CrossEntropy(), balance=0.25)
    total, values = Objective([first, second])(outputs)
    (both,) = torch.autograd.grad(total, logits, retain_graph=True)
    (of_kl,) = torch.autograd.grad(3.0 * values["kl"], logits, retain_graph=True)
    (of_labels,) = torch.autograd.grad(values["cross_entropy"], logits)
    part = both - of_kl
    assert part.norm() == pytest.approx(0.25 * float(of_kl.norm()), rel=1e-4)
    assert F.cosine_similarity(part.flatten(), of_labels.flatten(), dim=0) == pytest.approx(1.0, abs=1e-5)


def test_vocabularies_must_agree(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="vocabulary of 'student' has 32 tokens, that of 'teacher' 48"):
        DistillTrainer(
            tiny(16, 1),
            TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[]),
            terms=[Term("kl", KL())],
            teacher=tiny(24, 2, vocabulary=48),
        )


def test_terms_that_cannot_work_are_refused() -> None:
    with pytest.raises(UsageError, match="needs a teacher"):
        make_term("kl", {}, has_teacher=False)
    with pytest.raises(UsageError, match="weight of the loss 'kl' is -1"):
        make_term("kl", {"weight": -1}, has_teacher=True)
    with pytest.raises(UsageError, match="has a weight and a balance"):
        make_term("kl", {"weight": 1, "balance": 1}, has_teacher=True)
    with pytest.raises(UsageError, match="No loss"):
        Objective([])
    with pytest.raises(UsageError, match="none before it"):
        Objective([Term("kl", KL(), balance=1.0)])


def test_padding_of_the_vocabulary_is_left_out(tmp_path: Path) -> None:
    student, teacher = tiny(16, 1), tiny(24, 2, vocabulary=48)
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[], max_steps=1, learning_rate=0.0)
    terms = [make_term("kl", {}, has_teacher=True)]
    data = Masked(rows(), 8, 0)
    made = DistillTrainer(student, args, terms=terms, teacher=teacher, train_dataset=data)
    made.train()
    batch = torch.stack([data[place]["input_ids"] for place in range(8)])
    keep = torch.stack([data[place]["labels"] for place in range(8)])[:, 1:] != -100
    with torch.no_grad():
        p = F.log_softmax(teacher(input_ids=batch).logits[:, :-1, :VOCABULARY], -1)
        q = F.log_softmax(student(input_ids=batch).logits[:, :-1], -1)
    want = ((p.exp() * (p - q)).sum(-1) * keep).sum() / keep.sum()
    assert made.state.log_history[-1]["train_loss"] == pytest.approx(float(want), rel=1e-5)


def test_fused_training_is_the_same_training(tmp_path: Path) -> None:
    def made(folder: str, fused: bool) -> DistillTrainer:
        terms = [make_term("kl", {"temperature": 2.0, "t2": True}, has_teacher=True)]
        terms.append(make_term("cross_entropy", {"weight": 0.3}, has_teacher=True))
        return trainer(tmp_path / folder, terms, micro=2, accumulate=2, fused=fused)

    runs = [made("whole", False), made("fused", True)]
    for run in runs:
        run.train()
    for name in ("loss", "loss_kl", "loss_cross_entropy"):
        whole, fused = ([entry[name] for entry in run.state.log_history if name in entry] for run in runs)
        assert fused == pytest.approx(whole, rel=1e-5)
    for (name, got), want in zip(runs[1].model.named_parameters(), runs[0].model.parameters(), strict=True):
        assert torch.allclose(got, want, atol=2e-5), name


def test_what_cannot_be_fused_is_refused(tmp_path: Path) -> None:
    class Together(KL):
        independent = False

    with pytest.raises(UsageError, match="'together' compares positions"):
        trainer(tmp_path, [Term("together", Together())], fused=True)
    with pytest.raises(UsageError, match="'cross_entropy' has a balance"):
        trainer(tmp_path, [Term("kl", KL()), Term("cross_entropy", CrossEntropy(), balance=1.0)], fused=True)
