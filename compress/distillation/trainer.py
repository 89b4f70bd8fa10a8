"""The trainer: a `transformers.Trainer` whose student learns from a teacher.

Three things differ from its parent. The loss is an `Objective` of the student's and the teacher's shifted logits,
divided by the number of predicted tokens of the whole step (every token counts the same, whatever the micro-batches).
A checkpoint is whole or absent, and is resumed only if its manifest verifies. And the terms of the loss are reported
one by one.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import SequentialSampler
from transformers import PreTrainedModel, Trainer, TrainingArguments

from compress.data import SampledRows
from compress.distillation.checkpoints import keep_newest, last_verified, put_in_place, require_verified
from compress.distillation.objective import Objective, Term
from compress.distillation.teacher import OnlineTeacher, TeacherSignal
from compress.losses import IGNORED
from compress.modeling.loading import check_vocabularies
from compress.storage import write_json

STAGING = "staging"


class LossWindow:
    """The terms of the loss, summed in float64 over the steps since the last log."""

    FILE = "loss_window.json"

    def __init__(self, start: int = 0, sums: Mapping[str, float] | None = None) -> None:
        self.start = start
        self.sums = {name: torch.tensor(value, dtype=torch.float64) for name, value in (sums or {}).items()}

    def add(self, values: Mapping[str, Tensor]) -> None:
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + value.detach().double()

    def close(self, step: int, reduce: Callable[..., Any]) -> dict[str, float]:
        """The means over the steps up to `step`, summed over processes by `reduce`; the next window begins."""
        means = {name: float(reduce(total, "sum")) / max(1, step - self.start) for name, total in self.sums.items()}
        self.start, self.sums = step, {}
        terms = {f"loss_{name}": mean for name, mean in means.items()} if len(means) > 1 else {}
        return {"loss": math.fsum(means.values()), **terms}

    def save(self, folder: Path) -> None:
        sums = {name: float(total) for name, total in self.sums.items()}
        write_json(folder / self.FILE, {"start": self.start, "sums": sums})

    @classmethod
    def load(cls, folder: Path) -> LossWindow:
        stored = json.loads((folder / cls.FILE).read_text(encoding="utf-8"))
        return cls(stored["start"], stored["sums"])


class DistillTrainer(Trainer):
    """Train `model` (the student) on `terms` against `teacher`.

    `teacher` is a model (run online, frozen), any `TeacherSignal`, or None for losses on labels alone. Batches hold
    `input_ids` [B, T], optionally `attention_mask`, and `labels` [B, T] that are not shifted (-100 is left out), as for
    any causal language model of transformers. Everything else (arguments, callbacks, data) is the parent's.

    Raises `ModelError` when the two vocabularies differ in size.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        args: TrainingArguments,
        *,
        terms: Sequence[Term],
        teacher: nn.Module | TeacherSignal | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(model=model, args=args, **kwargs)
        self.model_accepts_loss_kwargs = True  # the loss below is divided by the step's token count
        self.objective: Objective = Objective(terms)
        if isinstance(teacher, PreTrainedModel):
            check_vocabularies("student", model, "teacher", teacher)
        signal = OnlineTeacher(teacher).to(args.device) if isinstance(teacher, nn.Module) else teacher
        self.teacher: TeacherSignal | None = signal
        self.folder = Path(str(args.output_dir))
        self._window = LossWindow()
        self._saving = False

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        labels = inputs["labels"][..., 1:]
        features = {name: tensor for name, tensor in inputs.items() if name != "labels"}
        outputs = model(**features, use_cache=False)
        teacher = None if self.teacher is None else self.teacher(features)[..., :-1, :]
        denominator = labels.ne(IGNORED).sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
        values = self.objective(outputs.logits[..., :-1, :], teacher, labels, denominator)
        loss = torch.stack(list(values.values())).sum()
        if model.training:
            self._window.add(values)
            if num_items_in_batch is not None:
                loss = loss * self.args.world_size  # gradients are averaged over processes
        return (loss, outputs) if return_outputs else loss

    def _get_num_items_in_batch(self, batch_samples: list[Mapping[str, Tensor]], device: torch.device) -> Any:
        """The number of predicted tokens of the step, over micro-batches and processes."""
        if not batch_samples:
            return None
        count = torch.stack([batch["labels"][..., 1:].ne(IGNORED).sum() for batch in batch_samples]).sum().to(device)
        if self.args.world_size > 1:
            count = self.accelerator.gather(count).sum()
        return count.clamp(min=1)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log the mean loss of the steps since the last log, and that of each term when there are several.

        The parent's mean forgets the steps before a checkpoint; this one is part of the checkpoint.
        """
        if "loss" in logs:
            logs |= self._window.close(self.state.global_step, self.accelerator.reduce)
        super().log(logs, start_time)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As the parent's; `True` resumes from the newest checkpoint that verifies (or starts when there is none), a
        path must verify."""
        if resume_from_checkpoint is True:
            found = last_verified(self.folder)
            resume_from_checkpoint = None if found is None else str(found)
        elif isinstance(resume_from_checkpoint, str):
            require_verified(Path(resume_from_checkpoint))
        if isinstance(resume_from_checkpoint, str):
            self._window = LossWindow.load(Path(resume_from_checkpoint))
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """Rows that come in a seeded order of their own are taken in that order."""
        dataset = self.train_dataset if train_dataset is None else train_dataset
        return SequentialSampler(dataset) if isinstance(dataset, SampledRows) else super()._get_train_sampler(dataset)

    def _get_output_dir(self, trial: Any) -> str:
        return str(self.folder / STAGING) if self._saving else super()._get_output_dir(trial)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Save into the staging folder, then seal and rename."""
        name = f"checkpoint-{self.state.global_step}"
        shutil.rmtree(self.folder / STAGING, ignore_errors=True)
        self._saving = True
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._saving = False
        if self.args.should_save:
            self._window.save(self.folder / STAGING / name)
            put_in_place(self.folder / STAGING / name, self.folder / name)
            shutil.rmtree(self.folder / STAGING)
            if self.args.save_total_limit is not None:
                keep_newest(self.folder, self.args.save_total_limit)
