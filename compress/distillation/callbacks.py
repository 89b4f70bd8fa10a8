"""What listens to the trainer: the clock that survives interruptions, and the reporter of its progress."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Any

from transformers import TrainingArguments
from transformers.trainer_callback import TrainerCallback, TrainerControl, TrainerState

from compress.distributed import World
from compress.errors import NumericsError
from compress.events import Events, seconds_left
from compress.workspace import Workspace

DIVERGED = "The training diverged: lower the learning rate and begin anew with --restart."


class Clock(TrainerCallback):
    """The seconds that the training took, those before the checkpoint it was taken up from included."""

    UNIT = "training/clock"

    def __init__(self, workspace: Workspace) -> None:
        self.workspace = workspace
        earlier = workspace.done(self.UNIT)
        self.earlier: float = 0.0 if earlier is None else earlier["seconds"]
        self.started = time.monotonic()

    @property
    def seconds(self) -> float:
        return self.earlier + time.monotonic() - self.started

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.started = time.monotonic()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.workspace.commit(self.UNIT, [], {"step": state.global_step, "seconds": self.seconds})


class Reporter(TrainerCallback):
    """Passes the trainer's logs on as events, stops at the time limit, and refuses a loss that is not finite."""

    def __init__(self, events: Events, total: int, max_seconds: float | None, world: World | None = None) -> None:
        self.events, self.total, self.max_seconds = events, total, max_seconds
        self.world = world or World()
        self.part = 0.0
        self.started = time.monotonic()
        self.first = 0

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self.started

    def elapsed_part(self) -> float:
        """The part of the time limit that was used up at the last step; 0 without one."""
        return self.part

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.started, self.first, self.part = time.monotonic(), state.global_step, 0.0

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """All processes go by the clock of the first: otherwise one would end, and the others wait for it."""
        if self.max_seconds is not None:
            self.part = self.world.gather(self.elapsed / self.max_seconds)[0]

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """End at the time limit; the last step is always logged."""
        if self.elapsed_part() >= 1.0:
            control.should_training_stop = True
        if control.should_training_stop or state.global_step == state.max_steps:
            control.should_log = True

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if not logs or "loss" not in logs:
            return
        step = state.global_step
        if not math.isfinite(logs["loss"]):
            diverged = NumericsError(f"The loss at step {step} is {logs['loss']}.", remedy=DIVERGED)
            diverged.agreed = True  # it is the sum over processes
            raise diverged
        left = seconds_left(self.started, step - self.first, self.total - self.first)
        if left is not None and self.max_seconds is not None:
            left = min(left, max(0.0, self.max_seconds - self.elapsed))
        shown = {name: value for name, value in logs.items() if name.startswith("loss") or name == "learning_rate"}
        self.events.emit(
            "step", stage="distill", index=step, total=self.total, name="training", seconds_left=left, **shown
        )
