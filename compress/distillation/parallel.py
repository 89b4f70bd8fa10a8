"""A trainer on several processes: what `transformers.Trainer` does for a loss of the model, for a loss of ours.

Data-parallel training adds up the gradients of N processes, each of its own rows. In DDP each process has the whole
student; in FSDP2 a part of every parameter, of its gradient and of the optimizer's state. The student is sharded
either by `sharding.shard` before the trainer is made, on any device, or by accelerate (`TrainingArguments(fsdp=True)`),
on accelerators only. What a checkpoint holds is whole in either case, and that of one process.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedType
from accelerate.optimizer import AcceleratedOptimizer
from torch import nn
from transformers import PreTrainedModel, Trainer, TrainingArguments
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME
from transformers.trainer_callback import TrainerCallback, TrainerControl, TrainerState

from compress.distillation.sharding import is_sharded, load_weights, parts_of_state, whole, whole_weights
from compress.errors import UsageError

SHARD = "Shard the student with compress.distillation.shard before you make the trainer, and leave out fsdp."


class LossParameters(TrainerCallback):
    """Averages over processes, clips and clears the gradients of parameters that losses own: the parent does so for the
    model's alone."""

    def __init__(self, owner: nn.Module, max_norm: float | None) -> None:
        self.owner, self.max_norm = owner, max_norm

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if args.world_size > 1:
            for parameter in self.owner.parameters():
                _average(parameter, args.world_size)
        if self.max_norm:
            nn.utils.clip_grad_norm_(self.owner.parameters(), self.max_norm)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.owner.zero_grad()


def _average(parameter: nn.Parameter, processes: int) -> None:
    """Average the gradient over processes, as the student's is (the loss was multiplied by their number); a process
    whose rows have nothing that counts may have none."""
    has = torch.tensor(float(parameter.grad is not None), device=parameter.device)
    torch.distributed.all_reduce(has)
    if has > 0:
        parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        torch.distributed.all_reduce(parameter.grad)
        parameter.grad /= processes


class Prepared(nn.Module):
    """A sharded student as the training loop sees it: nothing is left to be wrapped."""

    def __init__(self, model: nn.Module, accelerator: Accelerator) -> None:
        super().__init__()
        self.model, self.accelerator = model, accelerator

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with self.accelerator.autocast():
            return self.model(*args, **kwargs)


class ParallelTrainer(Trainer):
    """A `Trainer` whose student may be sharded before it is made, and whose checkpoints are those of one process.

    Raises `UsageError` for ways to several processes in which the losses or the checkpoints would not be whole.
    """

    def __init__(self, model: PreTrainedModel, args: TrainingArguments, **kwargs: Any) -> None:
        super().__init__(model=model, args=args, **kwargs)
        _check(self, args, is_sharded(model))

    @property
    def student(self) -> PreTrainedModel:
        """The model that is trained, without what wraps it."""
        assert isinstance(self.model, PreTrainedModel)
        return self.model

    def _wrap_model(self, model: nn.Module, training: bool = True, dataloader: Any = None) -> nn.Module:
        if isinstance(model, Prepared):
            return model
        if self.is_fsdp_enabled or not is_sharded(model):
            wrapped: nn.Module = super()._wrap_model(model, training, dataloader)
            return wrapped
        return Prepared(model, self.accelerator)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if not is_sharded(self.student):
            super().save_model(output_dir, _internal_call)
        else:
            weights = whole_weights(self.student, keep=self.args.should_save)
            self._save(output_dir, state_dict=weights)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not is_sharded(self.student):
            super()._save_optimizer_and_scheduler(output_dir)
            return
        assert self.optimizer is not None
        assert self.lr_scheduler is not None
        state = whole(self.optimizer.state_dict(), keep=self.args.should_save)
        if self.args.should_save:
            torch.save(state, Path(output_dir) / OPTIMIZER_NAME)
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if not is_sharded(self.student):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            load_weights(self.student, Path(resume_from_checkpoint))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or not is_sharded(self.student):
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        assert isinstance(self.optimizer, AcceleratedOptimizer)
        assert self.lr_scheduler is not None
        state = torch.load(Path(checkpoint) / OPTIMIZER_NAME, map_location="cpu", weights_only=True, mmap=True)
        self.optimizer.load_state_dict(parts_of_state(state, self.optimizer.optimizer))
        self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / SCHEDULER_NAME, weights_only=True))


def _check(trainer: Trainer, args: TrainingArguments, sharded: bool) -> None:
    """Raise `UsageError` for what would go wrong, or silently be something else."""
    plugin = trainer.accelerator.state.fsdp_plugin if trainer.is_fsdp_enabled else None
    kind = trainer.accelerator.distributed_type
    for wrong, what, remedy in (
        (trainer.is_deepspeed_enabled, "no DeepSpeed", "Use DDP, or FSDP2."),
        (sharded and args.torch_compile, "no torch_compile for a sharded student", "Leave one out."),
        (sharded and plugin is not None, "no fsdp for a student that is sharded already", "Leave out fsdp."),
        (args.fsdp and kind != DistributedType.FSDP, "no fsdp here: accelerate shards on accelerators alone", SHARD),
        (plugin is not None and plugin.fsdp_version != 2, "no FSDP1", 'Give fsdp_config={"version": 2}.'),
        (
            plugin is not None and plugin.cpu_ram_efficient_loading,
            "no cpu_ram_efficient_loading: the teacher would be empty on all processes but the first",
            "Set it to false.",
        ),
    ):
        if wrong:
            raise UsageError(f"{type(trainer).__name__} has {what}.", remedy=remedy)


def check_owned(trainer: Trainer, owned: Iterable[nn.Parameter]) -> None:
    """Raise `UsageError` when accelerate is to shard the student and losses have parameters: it takes an optimizer
    apart into the parameters of the model."""
    if trainer.is_fsdp_enabled and any(True for _ in owned):
        raise UsageError("accelerate's FSDP cannot train losses that have parameters of their own.", remedy=SHARD)
