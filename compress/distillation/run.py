"""The distillation stage: from a recipe to a folder with a trained student.

The student, the teacher, the rows and their order, the optimizer and the schedule all follow from the recipe and the
seed, so that a training that was killed and taken up again at a checkpoint gives the same bytes as an unbroken one.
The exception is a training that a clock ends (`max_seconds`): how far it comes depends on the machine.

Several processes divide the rows of each forward pass: the losses are those of one process, roundings apart.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from compress.data import SampledRows, TextSource, fingerprint, text_source, tokenize
from compress.data.tokenizer import train_byte_bpe
from compress.distillation.callbacks import DIVERGED, Clock, Reporter
from compress.distillation.card import write_card
from compress.distillation.checkpoints import last_verified
from compress.distillation.objective import make_term, setting_of
from compress.distillation.optimizers import make_optimizer
from compress.distillation.schedules import make_schedule
from compress.distillation.sharding import is_sharded, shard, whole_weights
from compress.distillation.trainer import DistillTrainer
from compress.distributed import World
from compress.errors import NumericsError, RecipeError
from compress.modeling.loading import (
    check_room,
    check_tokenizers,
    config_from_file,
    load_config,
    load_model,
    load_tokenizer,
    skeleton,
)
from compress.modeling.resolve import resolve_model
from compress.storage import disk_errors, seal, stage_beside
from compress.workspace import Workspace

if TYPE_CHECKING:
    from compress.recipe import DistillRecipe

DAMAGED = "The checkpoint is damaged, or its training diverged; take an earlier one."


@dataclass(frozen=True)
class Student:
    """The model to train, in float32; its tokenizer; and the dtype to save it in, its own."""

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    dtype: torch.dtype


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
    `ModelError` for a student or teacher that is no causal language model or when their tokenizers differ, `DataError`
    for data that does not fill a row, `NumericsError` when a weight or the loss is not finite, `UsageError` for a batch
    that the processes cannot divide evenly.
    """
    world = workspace.world
    done = workspace.published("distill", out)
    if done is not None:
        return done
    _check_batch(recipe, world)
    torch.manual_seed(seed)
    source = text_source(recipe.data)
    sharded = recipe.parallel == "fsdp" and world.size > 1
    at_first = "cpu" if sharded else device
    subject = world.together(lambda: _student(recipe, student, source, at_first, trust_remote_code))
    teacher = world.together(lambda: _teacher(recipe, subject, at_first, trust_remote_code))
    rows = world.together(lambda: tokenize(source, subject.tokenizer).rows(recipe.context)[0])
    clock = Clock(workspace)
    use_cache = subject.model.config.use_cache  # the trainer switches it off
    if teacher is not None:
        _note_padding(subject.model, teacher, workspace)
    if sharded:
        shard(subject.model, device)
    if sharded and teacher is not None:
        shard(teacher, device, frozen=True)
    trainer = _trainer(recipe, subject, teacher, rows, workspace, clock, seed, device)
    resumed = world.on_first(lambda: [path.name for path in [last_verified(trainer.folder)] if path is not None])
    for name in resumed:
        workspace.events.emit("note", text=f"taking up the training at {name}")
    with disk_errors(workspace.folder), workspace.events.stage("distill", recipe.steps):
        trainer.train(resume_from_checkpoint=True)
    subject.model.config.use_cache = use_cache
    subject = _whole(subject, world, trust_remote_code)
    world.on_first(lambda: _check_finite(subject.model, "after the training", DIVERGED))
    record = {
        "steps": trainer.state.global_step,
        "tokens": trainer.state.global_step * recipe.batch_size * recipe.gradient_accumulation * recipe.context,
        "loss": [[entry["step"], entry["loss"]] for entry in trainer.state.log_history if "loss" in entry],
        "data": fingerprint(source).to_dict(),
        "parameters": subject.model.num_parameters(),
        "teacher": recipe.teacher,
        "student": student,
        "seconds": clock.seconds,
        "threads": torch.get_num_threads(),
        "processes": world.size,
    }
    record = world.gather(record)[0]
    _publish(subject, record, recipe, out, workspace)
    return record


def _check_batch(recipe: DistillRecipe, world: World) -> None:
    if recipe.batch_size % world.size:
        raise RecipeError(
            f"A batch of {recipe.batch_size} sequences cannot be divided evenly between {world.size} processes.",
            remedy="Give a --batch-size that is a multiple of their number.",
        )


def _whole(student: Student, world: World, trust_remote_code: bool) -> Student:
    """The student whose model, if it is sharded, is whole on the first process."""
    model = student.model
    if not is_sharded(model):
        return student
    weights = whole_weights(model, keep=world.first)
    if not world.first:
        return student
    made = skeleton(model.config, trust_remote_code)
    made.load_state_dict(weights, assign=True)
    made.tie_weights()
    made.generation_config = model.generation_config
    return replace(student, model=made)


def _student(
    recipe: DistillRecipe, student: str | None, source: TextSource, device: str, trust_remote_code: bool
) -> Student:
    if recipe.student is None:
        if student is None:
            raise RecipeError("The distillation names no student.", remedy="Give --student or distill.student.config.")
        model = load_model(student, device=device, expect="causal", trust_remote_code=trust_remote_code)
        _check_finite(model, f"of the student '{student}'", DAMAGED)
        stored = skeleton(load_config(resolve_model(student), trust_remote_code), trust_remote_code).dtype
        return Student(student, model, load_tokenizer(student, trust_remote_code), stored)
    if student is not None:
        raise RecipeError(
            f"The recipe names a student to start from ('{student}') and one of random weights.",
            remedy="Remove one of model and distill.student.",
        )
    config = config_from_file(Path(recipe.student.config))
    stored = skeleton(config).dtype
    named = recipe.student.tokenizer or recipe.teacher
    if named is not None:
        tokenizer = load_tokenizer(named, trust_remote_code)
    else:
        tokenizer = train_byte_bpe(source, config.vocab_size, config.max_position_embeddings)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).to(device)
    return Student(recipe.student.config, model, tokenizer, stored)


def _teacher(recipe: DistillRecipe, student: Student, device: str, trust_remote_code: bool) -> PreTrainedModel | None:
    name = recipe.teacher
    if name is None:
        return None
    model = load_model(name, device=device, expect="causal", trust_remote_code=trust_remote_code)
    check_tokenizers(student.name, student.tokenizer, name, load_tokenizer(name, trust_remote_code))
    check_room(student.tokenizer, student=student.model, teacher=model)
    _check_finite(model, f"of the teacher '{name}'", DAMAGED)
    return model


def _note_padding(student: PreTrainedModel, teacher: PreTrainedModel, workspace: Workspace) -> None:
    widths = [model.config.get_text_config().vocab_size for model in (student, teacher)]
    if widths[0] != widths[1]:
        text = (
            f"the student has {widths[0]:,} outputs, the teacher {widths[1]:,}: the first {min(widths):,} are compared"
        )
        workspace.events.emit("note", text=text)


def _check_finite(model: PreTrainedModel, which: str, remedy: str) -> None:
    """Refuse NaN and infinity: what is trained on them, or against them, is lost."""
    for name, parameter in model.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            raise NumericsError(f"The weight '{name}' {which} holds NaN or infinity.", remedy=remedy)


def _trainer(
    recipe: DistillRecipe,
    student: Student,
    teacher: PreTrainedModel | None,
    rows: torch.Tensor,
    workspace: Workspace,
    clock: Clock,
    seed: int,
    device: str,
) -> DistillTrainer:
    model = student.model
    setting = setting_of(
        model.config,
        None if teacher is None else teacher.config,
        pieces=lambda ids: [str(student.tokenizer.decode([token])) for token in ids],
    )
    terms = [make_term(spec.name, spec.options, setting, has_teacher=teacher is not None) for spec in recipe.losses]
    owned = [parameter for term in terms for parameter in term.loss.parameters()]
    reporter = Reporter(workspace.events, recipe.steps, recipe.max_seconds, workspace.world)
    optimizer = make_optimizer(recipe.optimizer, model, recipe.learning_rate, recipe.weight_decay, owned)
    schedule = make_schedule(optimizer, recipe.schedule, recipe.steps, recipe.warmup_steps, reporter.elapsed_part)
    args = TrainingArguments(
        output_dir=str(workspace.path("training", "checkpoint").parent),
        max_steps=recipe.steps,
        per_device_train_batch_size=recipe.batch_size // workspace.world.size,
        gradient_accumulation_steps=recipe.gradient_accumulation,
        max_grad_norm=recipe.max_grad_norm,
        bf16=recipe.precision == "bf16",
        use_cpu=device == "cpu",
        torch_compile=recipe.compile,
        logging_first_step=True,
        logging_steps=recipe.log_every,
        save_steps=recipe.save_every,
        save_strategy="no" if recipe.max_seconds is not None else "steps",
        save_total_limit=2,
        seed=seed,
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        logging_nan_inf_filter=False,
        dataloader_pin_memory=device != "cpu",
    )
    count = recipe.steps * recipe.batch_size * recipe.gradient_accumulation
    trainer = DistillTrainer(
        model,
        args,
        terms=terms,
        teacher=teacher,
        fused=recipe.fused,
        train_dataset=SampledRows(rows, count, seed),
        optimizers=(optimizer, schedule),
        callbacks=[reporter, clock],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _publish(student: Student, record: dict[str, Any], recipe: DistillRecipe, out: Path, workspace: Workspace) -> None:
    """Write the student as a model folder, in its own dtype, and let it appear at `out`; the pipeline removes what a
    failure leaves beside it."""

    def write() -> str:
        student.model.to(dtype=student.dtype)  # type: ignore[call-arg]
        staged = stage_beside(out)
        with disk_errors(out):
            student.model.save_pretrained(staged)
            student.tokenizer.save_pretrained(staged)
            write_card(staged / "README.md", student.model, recipe, record)
            seal(staged)
        return str(staged)

    staged = Path(workspace.world.on_first(write))
    with disk_errors(out):
        workspace.publish("distill", staged, out, record)
