"""The trainer: a `transformers.Trainer` whose student learns from a teacher.

Three things differ from its parent. The loss is an `Objective` of the student's and the teacher's shifted logits,
divided by the number of predicted tokens of the whole step (every token counts the same, whatever the micro-batches).
A checkpoint is whole or absent, and is resumed only if its manifest verifies. And the terms of the loss are reported
one by one.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
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
from compress.errors import ModelError
from compress.losses import IGNORED

STAGING = "staging"


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
            check_vocabularies(model, teacher)
        signal = OnlineTeacher(teacher).to(args.device) if isinstance(teacher, nn.Module) else teacher
        self.teacher: TeacherSignal | None = signal
        self.folder = Path(str(args.output_dir))
        self._sums: dict[str, Tensor] = {}
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
            for name, value in values.items():
                self._sums[name] = self._sums.get(name, torch.zeros_like(value)) + value.detach()
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
        """Add the mean of each term since the last log when there are several."""
        if "loss" in logs:
            steps = max(1, self.state.global_step - self._last_logged_step())
            if len(self._sums) > 1:
                logs.update({f"loss_{name}": float(total) / steps for name, total in self._sums.items()})
            self._sums.clear()
        super().log(logs, start_time)

    def _last_logged_step(self) -> int:
        return max((int(entry["step"]) for entry in self.state.log_history if "loss" in entry), default=0)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As the parent's; `True` resumes from the newest checkpoint that verifies (or starts when there is none), a
        path must verify."""
        if resume_from_checkpoint is True:
            found = last_verified(self.folder)
            resume_from_checkpoint = None if found is None else str(found)
        elif isinstance(resume_from_checkpoint, str):
            require_verified(Path(resume_from_checkpoint))
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
            put_in_place(self.folder / STAGING / name, self.folder / name)
            shutil.rmtree(self.folder / STAGING)
            if self.args.save_total_limit is not None:
                keep_newest(self.folder, self.args.save_total_limit)


def check_vocabularies(student: PreTrainedModel, teacher: PreTrainedModel) -> None:
    """Refuse two models whose logits have different widths."""
    widths = [model.config.get_text_config().vocab_size for model in (student, teacher)]
    if widths[0] != widths[1]:
        raise ModelError(
            f"The student's vocabulary has {widths[0]} tokens, the teacher's {widths[1]}.",
            remedy="Distil between models that share a tokenizer.",
        )
