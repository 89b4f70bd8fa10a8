"""The trainer: a `transformers.Trainer` whose student learns from a teacher.

Four things differ from its parent. The loss is an `Objective` of what student and teacher make of a batch, divided by
the number of predicted tokens of the whole step (every token counts the same, whatever the micro-batches). A loss may
own parameters and state: they learn with the student and are part of the checkpoint. A checkpoint is whole or absent,
and is resumed only if its manifest verifies. And the terms of the loss are reported one by one.

Several processes (DDP, or FSDP2 for a student that was sharded) divide the rows of a step and give the loss curve of
one: process r of N takes batches r, r + N, .. of the order, so that with batches of B rows micro-batch i of all
processes is that of one process with batches of B N rows; all that is summed over positions is summed over processes.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_model, save_model
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.data import SequentialSampler
from transformers import PreTrainedModel, TrainingArguments

from compress.data import SampledRows
from compress.distillation.checkpoints import keep_newest, last_verified, put_in_place, require_verified
from compress.distillation.objective import Objective, Term
from compress.distillation.parallel import LossParameters, ParallelTrainer, check_owned
from compress.distillation.teacher import OnlineTeacher, Signal, TeacherSignal
from compress.distributed import world
from compress.errors import UsageError
from compress.losses import IGNORED, Needs, Outputs
from compress.losses.fused import Head
from compress.losses.processes import Processes
from compress.modeling.head import head_of
from compress.modeling.loading import check_vocabularies
from compress.storage import write_json

STAGING = "staging"
LOSS_STATE = "losses.safetensors"
"""The file of a checkpoint with the parameters and the state of the losses that have any."""


def check_arguments(args: TrainingArguments, fused: bool, others: Mapping[str, Any]) -> None:
    """Raise `UsageError` for what the parent would do and this trainer does not."""
    for given, name, remedy in (
        (
            args.load_best_model_at_end,
            "load_best_model_at_end",
            "Load the checkpoint that you want after the training.",
        ),
        (args.label_smoothing_factor, "label_smoothing_factor", "Smooth with a loss of your own."),
        (others.get("compute_loss_func"), "compute_loss_func", "Pass it as a loss in `terms`."),
        (
            fused and others.get("compute_metrics"),
            "compute_metrics with `fused`",
            "There are no logits: leave one out.",
        ),
    ):
        if given:
            raise UsageError(f"DistillTrainer has no {name}.", remedy=remedy)


def predicted(labels: Tensor) -> Tensor:
    """The labels of the positions that predict: all but the first token's of each row [B, T], all of [B]."""
    return labels[:, 1:] if labels.ndim == 2 else labels


def aligned(outputs: Any, teacher: Signal, inputs: Mapping[str, Tensor]) -> Outputs:
    """What the losses see, position by position: a causal model's logits [B, T, V] without the last position and labels
    without the first; a classifier's [B, C] as they are."""
    if outputs.logits.ndim == 2:
        return Outputs(outputs.logits, teacher.logits, inputs["labels"])
    return Outputs(
        logits=outputs.logits[:, :-1],
        teacher_logits=None if teacher.logits is None else teacher.logits[:, :-1],
        labels=predicted(inputs["labels"]),
        tokens=inputs["input_ids"][:, :-1],
        features=tuple(state[:, :-1] for state in outputs.hidden_states or ()),
        teacher_features=tuple(state[:, :-1] for state in teacher.features),
    )


def before_last(teacher: Signal) -> Signal:
    """The teacher's last hidden states without those of the last position, which predicts nothing that is known."""
    assert teacher.hidden is not None
    return replace(teacher, hidden=teacher.hidden[:, :-1])


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
        """The means over the steps up to `step`, summed over processes by `reduce`; the next window begins. The terms
        are given when there are several, each as it is before its weight."""
        means = {name: float(reduce(total, "sum")) / max(1, step - self.start) for name, total in self.sums.items()}
        self.start, self.sums = step, {}
        return means if len(means) > 2 else {"loss": means["loss"]}

    def to_dict(self, reduce: Callable[..., Any]) -> dict[str, Any]:
        """What a checkpoint keeps: the sums over processes."""
        return {"start": self.start, "sums": {name: float(reduce(total, "sum")) for name, total in self.sums.items()}}

    @classmethod
    def load(cls, folder: Path, first: bool) -> LossWindow:
        """That of a checkpoint; the sums are the first process's part."""
        stored = json.loads((folder / cls.FILE).read_text(encoding="utf-8"))
        return cls(stored["start"], stored["sums"] if first else dict.fromkeys(stored["sums"], 0.0))


class DistillTrainer(ParallelTrainer):
    """Train `model` (the student) on `terms` against `teacher`.

    `teacher` is a model (run online, frozen), any `TeacherSignal`, or None for losses on labels alone. Batches hold
    what the models take (`input_ids` [B, T] and so on) and `labels`: [B, T], not shifted (-100 is left out), for a
    causal language model; [B] for a classifier with logits [B, C], whose losses then see one position a sample.
    Everything else (arguments, callbacks, data) is the parent's. Parameters that a loss owns are added to the
    optimizer that the parent makes; an optimizer of your own must have them. With `fused` the losses are computed from
    the last hidden states, a few positions at a time, and the logits of neither causal model ever exist whole.

    Raises `ModelError` when the two vocabularies differ in size and a loss does not allow it, and for a head that is
    not known when `fused`; `UsageError` for a loss that cannot be `fused`, for one that cannot be divided between
    several processes, and for an optimizer that lacks the parameters of a loss.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        args: TrainingArguments,
        *,
        terms: Sequence[Term],
        teacher: PreTrainedModel | TeacherSignal | None = None,
        fused: bool = False,
        **kwargs: Any,
    ) -> None:
        check_arguments(args, fused, kwargs)
        super().__init__(model, args, **kwargs)
        self.model_accepts_loss_kwargs = True  # the loss below is divided by the step's token count
        self.objective: Objective = Objective(terms).to(args.device)
        if isinstance(teacher, PreTrainedModel) and any(term.loss.vocabulary == "equal" for term in terms):
            check_vocabularies("student", model, "teacher", teacher)
        signal = OnlineTeacher(teacher).to(args.device) if isinstance(teacher, PreTrainedModel) else teacher
        self.teacher: TeacherSignal | None = signal
        self.head: Head | None = None
        if fused:
            self.objective.by_position()
            self.head = head_of(model)
        self.folder = Path(str(args.output_dir))
        self._window = LossWindow()
        self._saving = False
        self._caching = {"use_cache": False} if model.can_generate() else {}
        if args.world_size > 1:
            self.objective.divide(Processes(args.process_index, args.world_size))
            check_owned(self, self.objective.parameters())
        if any(True for _ in self.objective.parameters()):
            self.add_callback(LossParameters(self.objective, args.max_grad_norm))

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        given = self.optimizer is not None
        optimizer = super().create_optimizer(*args, **kwargs)
        known = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        missing = [parameter for parameter in self.objective.parameters() if id(parameter) not in known]
        if missing and given:
            raise UsageError(
                f"The optimizer lacks {len(missing)} parameters that belong to a loss.",
                remedy="Give it those of `Objective(terms).parameters()` too.",
            )
        if missing:
            optimizer.add_param_group({"params": missing, "weight_decay": 0.0})
        return optimizer

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        features = {name: tensor for name, tensor in inputs.items() if name != "labels"}
        self.objective.train(model.training)  # in evaluation no loss updates its statistics
        labels = predicted(inputs["labels"])
        denominator = labels.ne(IGNORED).sum() if num_items_in_batch is None else torch.as_tensor(num_items_in_batch)
        teacher = self.teacher if Needs.TEACHER in self.objective.needs else None
        if self.head is not None:
            outputs = model(**features, **self._caching, output_hidden_states=True, logits_to_keep=1)
            student = outputs.hidden_states[-1][:, :-1]
            with self.accelerator.autocast():
                signal = Signal() if teacher is None else before_last(teacher.before_head(features))
                loss, values = self.objective.fused(
                    student, self._present(self.head), signal, labels, denominator.clamp(min=1)
                )
        else:
            hidden = Needs.FEATURES in self.objective.needs
            outputs = model(**features, **self._caching, output_hidden_states=hidden)
            with self.accelerator.autocast():
                signal = Signal() if teacher is None else teacher(features, hidden)
            loss, values = self.objective(aligned(outputs, signal, inputs), denominator.clamp(min=1))
        if model.training:
            self._window.add({"loss": loss, **{f"loss_{name}": value for name, value in values.items()}})
        if num_items_in_batch is not None:
            loss = loss * self.args.world_size  # gradients, and losses in evaluation, are averaged over processes
        return (loss, outputs) if return_outputs else loss

    def _present(self, head: Head) -> Head:
        """The head with the weights that the last forward pass used: a sharded student has them whole from there on to
        the end of the backward pass."""
        output = self.student.get_output_embeddings()
        assert isinstance(output, nn.Linear)  # `head_of` took it
        if isinstance(output.weight, DTensor):
            raise UsageError(
                "`fused` needs the weight of the head, which is sharded when the losses are computed.",
                remedy="Keep the head gathered after the forward pass (reshard_after_forward=False), or omit `fused`.",
            )
        return replace(head, weight=output.weight, bias=output.bias)

    def _get_num_items_in_batch(self, batch_samples: list[Mapping[str, Tensor]], device: torch.device) -> Any:
        """The number of predicted tokens of the step, over micro-batches and processes."""
        if not batch_samples:
            return None
        labels = [predicted(batch["labels"]) for batch in batch_samples]
        count = torch.stack([each.ne(IGNORED).sum() for each in labels]).sum().to(device)
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
        self._window = LossWindow()
        if resume_from_checkpoint is True:
            resume_from_checkpoint = world().on_first(lambda: _text(last_verified(self.folder)))
        elif isinstance(resume_from_checkpoint, str):
            given = Path(resume_from_checkpoint)
            world().on_first(lambda: _text(require_verified(given)))
        if isinstance(resume_from_checkpoint, str):
            self._window = LossWindow.load(Path(resume_from_checkpoint), world().first)
            if self.objective.state_dict():
                load_model(self.objective, Path(resume_from_checkpoint) / LOSS_STATE)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """Rows that come in a seeded order of their own are taken in that order."""
        dataset = self.train_dataset if train_dataset is None else train_dataset
        return SequentialSampler(dataset) if isinstance(dataset, SampledRows) else super()._get_train_sampler(dataset)

    def _get_output_dir(self, trial: Any) -> str:
        return str(self.folder / STAGING) if self._saving else super()._get_output_dir(trial)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Save into the staging folder, then seal and rename: the first process, while the others wait."""
        name, together = f"checkpoint-{self.state.global_step}", world()
        together.on_first(lambda: shutil.rmtree(self.folder / STAGING, ignore_errors=True))
        window = self._window.to_dict(self.accelerator.reduce)
        self._saving = True
        try:
            together.together(lambda: super(DistillTrainer, self)._save_checkpoint(model, trial))
        finally:
            self._saving = False
        together.on_first(lambda: self._put_in_place(name, window))

    def _put_in_place(self, name: str, window: dict[str, Any]) -> None:
        staged = self.folder / STAGING / name
        write_json(staged / LossWindow.FILE, window)
        if self.objective.state_dict():
            save_model(self.objective, str(staged / LOSS_STATE))
        put_in_place(staged, self.folder / name)
        shutil.rmtree(self.folder / STAGING)
        if self.args.save_total_limit is not None:
            keep_newest(self.folder, self.args.save_total_limit)


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)
