"""The distillation stage: from a recipe to a folder with a trained student.

The student, the teacher, the rows and their order, the optimizer and the schedule all follow from the recipe and the
seed, so that a training that was killed and taken up again at a checkpoint gives the same bytes as an unbroken one.
The exception is a training that a clock ends (`max_seconds`): how far it comes depends on the machine.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments
from transformers.trainer_callback import PrinterCallback, TrainerCallback, TrainerControl, TrainerState

from compress.data import SampledRows, fingerprint, text_source, tokenize
from compress.data.tokenizer import train_byte_bpe
from compress.distillation.card import write_card
from compress.distillation.checkpoints import last_verified
from compress.distillation.objective import make_term
from compress.distillation.optimizers import make_optimizer
from compress.distillation.schedules import make_schedule
from compress.distillation.trainer import DistillTrainer, check_vocabularies
from compress.errors import ModelError, NumericsError, RecipeError
from compress.events import Events, seconds_left
from compress.modeling.loading import load_config, load_model, load_tokenizer, skeleton
from compress.modeling.resolve import resolve_model
from compress.workspace import Workspace, disk_errors, seal, stage_beside

if TYPE_CHECKING:
    from compress.recipe import DistillRecipe


def distill_stage(
    recipe: DistillRecipe,
    student: str | None,
    out: Path,
    workspace: Workspace,
    *,
    seed: int = 0,
    device: str = "cpu",
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Train the student of `recipe` and publish it at `out`; returns the record of the training.

    `student` names the model to start from; None starts from random weights of `recipe.student.config`. Raises
    `ModelError` for a student or teacher that is no causal language model or when their vocabularies differ,
    `DataError` for data that does not fill a row, `NumericsError` when the loss is not finite.
    """
    done = workspace.published("distill", out)
    if done is not None:
        return done
    torch.manual_seed(seed)
    model, tokenizer, dtype = _student(recipe, student, device, trust_remote_code)
    teacher = None
    if recipe.teacher is not None:
        teacher = load_model(recipe.teacher, device=device, trust_remote_code=trust_remote_code)
        check_vocabularies(model, teacher)
    source = text_source(recipe.data)
    rows, _ = tokenize(source, tokenizer).rows(recipe.context)
    clock = _Clock(workspace)
    trainer = _trainer(recipe, model, teacher, rows, workspace, [clock], seed, device)
    resumed = last_verified(workspace.path("training"))
    if resumed is not None:
        workspace.events.emit("note", text=f"taking up the training at {resumed.name}")
    with disk_errors(workspace.folder), workspace.events.stage("distill", recipe.steps):
        trainer.train(resume_from_checkpoint=True)
    record = {
        "steps": trainer.state.global_step,
        "tokens": trainer.state.global_step * recipe.batch_size * recipe.gradient_accumulation * recipe.context,
        "loss": [[e["step"], e["loss"]] for e in trainer.state.log_history if "loss" in e],
        "data": fingerprint(source).to_dict(),
        "parameters": model.num_parameters(),
        "teacher": recipe.teacher,
        "student": student,
        "seconds": clock.seconds,
        "threads": torch.get_num_threads(),
    }
    model.to(dtype=dtype)  # type: ignore[call-arg]
    _publish(model, tokenizer, record, recipe, out, workspace)
    return record


def _student(
    recipe: DistillRecipe, student: str | None, device: str, trust_remote_code: bool
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, torch.dtype]:
    """The student in float32 for training, its tokenizer, and the dtype to save it in: its own."""
    if recipe.student is None:
        if student is None:
            raise RecipeError("The distillation names no student.", remedy="Give --student or distill.student.config.")
        model = load_model(student, device=device, expect="causal", trust_remote_code=trust_remote_code)
        stored = skeleton(load_config(resolve_model(student), trust_remote_code), trust_remote_code).dtype
        return model, load_tokenizer(student), stored
    if student is not None:
        raise RecipeError(
            f"The recipe names a student to start from ('{student}') and one of random weights.",
            remedy="Remove one of model and distill.student.",
        )
    path = Path(recipe.student.config)
    try:
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise ModelError(f"The student's config '{path}' cannot be read: {error}.", remedy="Check the path.") from None
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    tokenizer: PreTrainedTokenizerBase
    if recipe.student.tokenizer is None:
        tokenizer = train_byte_bpe(text_source(recipe.data), config.vocab_size, config.max_position_embeddings)
    else:
        tokenizer = load_tokenizer(recipe.student.tokenizer)
    stored = skeleton(config).dtype
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).to(device), tokenizer, stored


class _Clock(TrainerCallback):
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


class _Report(TrainerCallback):
    """Passes the trainer's logs on as events, stops at the time limit, and refuses a loss that is not finite."""

    def __init__(self, events: Events, total: int, max_seconds: float | None) -> None:
        self.events, self.total, self.max_seconds = events, total, max_seconds
        self.started = time.monotonic()
        self.first = 0

    def elapsed_part(self) -> float:
        return 0.0 if self.max_seconds is None else (time.monotonic() - self.started) / self.max_seconds

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.started, self.first = time.monotonic(), state.global_step

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.elapsed_part() >= 1.0:
            control.should_training_stop = True

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
        if not torch.isfinite(torch.tensor(logs["loss"])):
            raise NumericsError(f"The loss at step {step} is {logs['loss']}.", remedy="Lower the learning rate.")
        left = seconds_left(self.started, step - self.first, self.total - self.first)
        if left is not None and self.max_seconds is not None:
            left = min(left, max(0.0, self.max_seconds - (time.monotonic() - self.started)))
        shown = {name: value for name, value in logs.items() if name.startswith("loss") or name == "learning_rate"}
        self.events.emit(
            "step", stage="distill", index=step, total=self.total, name="training", seconds_left=left, **shown
        )


def _trainer(
    recipe: DistillRecipe,
    model: PreTrainedModel,
    teacher: PreTrainedModel | None,
    rows: torch.Tensor,
    workspace: Workspace,
    callbacks: list[TrainerCallback],
    seed: int,
    device: str,
) -> DistillTrainer:
    terms = [make_term(spec.name, dict(spec.options), has_teacher=teacher is not None) for spec in recipe.losses]
    report = _Report(workspace.events, recipe.steps, recipe.max_seconds)
    optimizer = make_optimizer(recipe.optimizer, model, recipe.learning_rate, recipe.weight_decay)
    schedule = make_schedule(optimizer, recipe.schedule, recipe.steps, recipe.warmup_steps, report.elapsed_part)
    args = TrainingArguments(
        output_dir=str(workspace.path("training", "checkpoint").parent),
        max_steps=recipe.steps,
        per_device_train_batch_size=recipe.batch_size,
        gradient_accumulation_steps=recipe.gradient_accumulation,
        bf16=recipe.precision == "bf16",
        use_cpu=device == "cpu",
        torch_compile=recipe.compile,
        logging_steps=recipe.log_every,
        save_steps=recipe.save_every,
        save_strategy="no" if recipe.max_seconds is not None else "steps",
        save_total_limit=2,
        seed=seed,
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        logging_nan_inf_filter=False,
    )
    count = recipe.steps * recipe.batch_size * recipe.gradient_accumulation
    trainer = DistillTrainer(
        model,
        args,
        terms=terms,
        teacher=teacher,
        train_dataset=SampledRows(rows, count, seed),
        optimizers=(optimizer, schedule),
        callbacks=[report, *callbacks],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _publish(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    record: dict[str, Any],
    recipe: DistillRecipe,
    out: Path,
    workspace: Workspace,
) -> None:
    """Write the student as a model folder and let it appear at `out`."""
    staged = stage_beside(out)
    with disk_errors(out):
        try:
            model.save_pretrained(staged)
            tokenizer.save_pretrained(staged)
            write_card(staged / "README.md", model, recipe, record)
            seal(staged)
            workspace.publish("distill", staged, out, record)
        except BaseException:
            shutil.rmtree(staged, ignore_errors=True)
            raise
