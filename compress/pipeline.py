"""Carries a plan out. The one file that knows the order of the stages: distill, quantize, export, evaluate, report.

A stage takes a `Task` (the recipe, what it reads, where its result goes, the work folder) and returns a plain record of
what it did. What is finished is noted in the work folder, so a second run takes up where the first stopped, and a
finished run says so. A result that a later stage has been built on must stay as it was: when it is gone or changed, the
run is refused, because the parts would no longer belong together.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from compress.distributed import joined
from compress.errors import UsageError, WorkspaceError
from compress.events import Events
from compress.modeling.resolve import resolve_model
from compress.plan import Plan, StagePlan, arguments, make_plan
from compress.plan.places import INSIDE, table_folder
from compress.plan.quantize import rates_of
from compress.recipe import Recipe, load_recipe
from compress.storage import (
    check_free,
    discard_replaced,
    discard_staged,
    reserve,
    seal,
    stage_beside,
    staged_path,
    write_json,
)
from compress.workspace import Workspace

if TYPE_CHECKING:
    from compress.codecs.base import Codec
    from compress.quantization.allocation.checkpoint import Spending
    from compress.quantization.rounders import CalibrationOptions
    from compress.reporting.comparison import Subject

REPORT = "report.json"
T = TypeVar("T")


@dataclass(frozen=True)
class Task:
    """One stage of a plan, and the work folder it is done in."""

    plan: Plan
    stage: StagePlan
    workspace: Workspace

    @property
    def recipe(self) -> Recipe:
        return self.plan.recipe

    @property
    def out(self) -> Path:
        assert self.stage.out is not None
        return Path(self.stage.out)

    @property
    def source(self) -> str:
        assert self.stage.source is not None
        return self.stage.source


@dataclass(frozen=True)
class Handler:
    """How a kind of stage is done. `unit` is the unit of the work folder that says that it is finished; `run` returns
    the record of what was done, at once when it is finished already."""

    unit: Callable[[StagePlan], str]
    run: Callable[[Task], dict[str, Any]]


def run(recipe: Recipe | str, *, restart: bool = False, events: Events | None = None) -> dict[str, Any]:
    """Plan `recipe` (or the recipe file of that name) and carry it out; returns the report.

    The report has the figures of the quantization on top and the records of the other stages by name. It is also
    written to `report.json` in the work folder, and in `out` when the recipe has several stages. The processes that
    `torchrun` starts divide the work (docs/distributed.md), and all get the report. `restart` discards
    earlier work of this recipe and lets the results replace older ones; what may not be replaced is refused before
    anything is discarded. Raises the `CompressError` of whatever went wrong; the work folder can be taken up again.
    """
    if isinstance(recipe, str):
        recipe = load_recipe(recipe)
    with joined(recipe.device) as world, ExitStack() as held:
        plan = world.together(lambda: make_plan(recipe))
        outs = [Path(stage.out) for stage in plan.stages if stage.out is not None]
        world.on_first(lambda: _reserve(held, plan, outs, restart))
        with Workspace.open(Path(plan.work), arguments(plan), restart, events) as workspace:
            world.on_first(lambda: _discard(plan, outs, restart))
            return _run_stages(plan, workspace)


def _reserve(held: ExitStack, plan: Plan, outs: Sequence[Path], restart: bool) -> None:
    """Keep other runs from the places of the results until `held` ends. Raises `UsageError` for one that is taken."""
    if outs:
        held.enter_context(reserve(Path(plan.out)))
    goes_on = Path(plan.work).exists() and not restart
    for out in () if goes_on else outs:
        check_free(out, restart)
    _check_report(plan, restart or goes_on)


def _discard(plan: Plan, outs: Sequence[Path], restart: bool) -> None:
    """Remove what older results left beside the new ones, and the report that they had in common."""
    for out in outs:
        discard_replaced(out)
    if restart and len(plan.stages) > 1:
        Path(plan.out, REPORT).unlink(missing_ok=True)


def _run_stages(plan: Plan, workspace: Workspace) -> dict[str, Any]:
    tasks = [Task(plan, stage, workspace) for stage in plan.stages]
    finished = _finished(tasks)
    if finished == len(tasks):
        workspace.events.emit("note", text=f"already finished: '{plan.out}'")
    records = {}
    for index, task in enumerate(tasks):
        if index >= finished:
            workspace.commit(_begun(task), [], {})
        records[task.stage.name] = _carry_out(task)
    return _report(plan, records, workspace)


def _carry_out(task: Task) -> dict[str, Any]:
    """The record of a stage. A stage that fails leaves its work folder and no half result."""
    try:
        return _handler(task).run(task)
    except BaseException:
        if task.stage.out is not None and task.workspace.world.first:
            discard_staged(task.out)
        raise


def _handler(task: Task) -> Handler:
    return HANDLERS[task.stage.name.partition(":")[0]]


def _begun(task: Task) -> str:
    return f"begun:{task.stage.name}"


def _is_finished(task: Task) -> bool:
    unit = _handler(task).unit(task.stage)
    if task.stage.out is None:
        return task.workspace.done(unit) is not None
    return task.workspace.published(unit, task.out) is not None


def _finished(tasks: Sequence[Task]) -> int:
    """How many stages are finished, from the first on.

    Raises `WorkspaceError` when a stage is not finished (any more) though a later one has begun, and `UsageError` when
    the place of a result that is still to come is taken.
    """
    count = next((index for index, task in enumerate(tasks) if not _is_finished(task)), len(tasks))
    for index, task in enumerate(tasks[count:], count):
        later = [other.stage.name for other in tasks[index + 1 :] if _begun(other) in task.workspace.units()]
        if later:
            raise WorkspaceError(
                f"'{task.stage.out or task.stage.name}', on which '{later[0]}' was built, is missing or changed.",
                remedy="Put it back, or begin anew with --restart.",
            )
        out, overwrite = task.stage.out, task.workspace.overwrite
        if out is not None:
            task.workspace.world.on_first(partial(check_free, Path(out), overwrite))
    return count


def _check_report(plan: Plan, overwrite: bool) -> None:
    """Refuse a run of several stages whose `report.json` would replace somebody's file, or, unless told to, our own."""
    path = Path(plan.out, REPORT)
    if len(plan.stages) == 1 or not path.exists():
        return
    if not _is_report(path):
        raise UsageError(f"'{path}' is no report of compress.", remedy="Name another --out, or remove it yourself.")
    if not overwrite:
        raise UsageError(f"'{path}' exists.", remedy="Name another --out, or replace an older result with --restart.")


def _is_report(path: Path) -> bool:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and content.keys() >= {"recipe", "stages"}


def _report(plan: Plan, records: Mapping[str, Mapping[str, Any]], workspace: Workspace) -> dict[str, Any]:
    others = {name: record for name, record in records.items() if name != "quantize"}
    head = {"recipe": plan.recipe.model_dump(mode="json"), "stages": list(records)}
    report = {**head, **records.get("quantize", {}), **others}

    def write() -> None:
        write_json(workspace.path(REPORT), report)
        if len(records) > 1:
            _check_report(plan, overwrite=True)
            write_json(Path(plan.out, REPORT), report)

    workspace.world.on_first(write)
    return report


def _distill(task: Task) -> dict[str, Any]:
    from compress.distillation.run import distill_stage

    recipe = task.recipe
    assert recipe.distill is not None
    return distill_stage(
        recipe.distill,
        task.stage.source,
        task.out,
        task.workspace,
        seed=recipe.seed,
        device=recipe.device,
        trust_remote_code=recipe.trust_remote_code,
    )


def _quantize(task: Task) -> dict[str, Any]:
    from compress.codecs import codec
    from compress.quantization.options import rounding_of
    from compress.quantization.rounders import CalibrationOptions
    from compress.quantization.run import quantize_checkpoint
    from compress.quantization.tables import TableBits
    from compress.quantization.transforms import parse_transform
    from compress.recipe.schema import parse_bytes

    asked, planned = task.recipe.quantize, task.plan.quantization
    assert asked is not None
    assert planned is not None
    for guess in planned.guesses:
        task.workspace.events.emit("note", text=guess)
    method = codec(asked.codec.name, **asked.codec.options)
    specs = {matrix.name: replace(method.spec(matrix.width), mixing=matrix.mixing) for matrix in planned.matrices}
    calibration = None
    if asked.calibration is not None and asked.data is not None:
        options = rounding_of(asked.calibration.name, asked.calibration.options)
        calibration = CalibrationOptions(
            asked.data,
            options,
            asked.rows,
            asked.context,
            task.recipe.seed,
            parse_bytes(asked.memory),
            task.recipe.device,
        )
    return quantize_checkpoint(
        resolve_model(task.source),
        task.out,
        specs,
        method,
        task.workspace,
        task.workspace.events,
        calibration=calibration,
        transform=parse_transform(planned.transform),
        seed=task.recipe.seed,
        towers=asked.towers,
        tables=TableBits(asked.embedding_bits, asked.head_bits),
        spending=_spending(task, method, calibration),
        bits_target=asked.bits,
        max_shard_bytes=asked.max_shard_bytes,
        trust_remote_code=task.recipe.trust_remote_code,
    )


def _spending(task: Task, codec: Codec, calibration: CalibrationOptions | None) -> Spending | None:
    """How the bits are spent; None for uniformly."""
    from compress.plan.stamps import table_arguments
    from compress.quantization.allocation import Uniform, allocation_of
    from compress.quantization.allocation.checkpoint import Spending

    asked = task.recipe.quantize
    assert asked is not None
    method = allocation_of(asked.allocation.name, asked.allocation.options)
    if isinstance(method, Uniform) or calibration is None:
        return None
    return Spending(
        rates_of(asked),
        method,
        codec,
        calibration,
        table_folder(asked, task.workspace.folder),
        table_arguments(task.recipe, task.source),
        task.recipe.trust_remote_code,
    )


def _transform(task: Task) -> dict[str, Any]:
    from compress.codecs import codec
    from compress.modeling.loading import load_config, skeleton
    from compress.modeling.structure import matrices
    from compress.quantization.allocation import uniform
    from compress.quantization.checkpoint import transform_checkpoint
    from compress.quantization.options import Nearest
    from compress.quantization.rounders import CalibrationOptions
    from compress.quantization.transforms import Hadamard, Ost, transform_of

    asked, recipe = task.recipe.transform, task.recipe
    assert asked is not None
    transform = transform_of(asked.transform.name, asked.transform.options)
    assert isinstance(transform, (Hadamard, Ost))
    source, method = resolve_model(task.source), codec(asked.codec.name, **asked.codec.options)
    views = matrices(skeleton(load_config(source, recipe.trust_remote_code), recipe.trust_remote_code))
    calibration = None
    if asked.data is not None:
        calibration = CalibrationOptions(
            asked.data, Nearest(), asked.rows, asked.context, recipe.seed, device=recipe.device
        )
    return transform_checkpoint(
        source,
        task.out,
        transform,
        task.workspace,
        codec=method,
        specs=uniform(views, method, asked.bits) if asked.bits is not None else {},
        calibration=calibration,
        seed=recipe.seed,
        dtype=asked.dtype,
        max_shard_bytes=asked.max_shard_bytes,
        trust_remote_code=recipe.trust_remote_code,
    )


def _export(task: Task) -> dict[str, Any]:
    from compress.exporters import BUILDERS, DTYPES
    from compress.modeling.loading import load_model

    unit = task.stage.name
    record = task.workspace.published(unit, task.out)
    if record is not None:
        return record
    to = unit.partition(":")[2]

    def build() -> dict[str, Any]:
        task.workspace.events.emit("note", text=f"export: loading '{task.source}'")
        model = load_model(task.source, dtype=DTYPES[to], trust_remote_code=task.recipe.trust_remote_code)
        staged = stage_beside(task.out)
        report = BUILDERS[to](model, staged, tokenizer_from=resolve_model(task.source), events=task.workspace.events)
        seal(staged)
        return report.to_dict()

    report = _alone(task, build)
    task.workspace.publish(unit, staged_path(task.out), task.out, report)
    return report


def _evaluate(task: Task) -> dict[str, Any]:
    from compress.reporting.comparison import compare

    record = task.workspace.done(task.stage.name)
    if record is not None:
        return record
    recipe = task.recipe
    asked = recipe.evaluate
    assert asked is not None
    models = _alone(
        task,
        lambda: compare(
            _subjects(task),
            asked,
            scratch=task.workspace.path("scratch", "onnx"),
            events=task.workspace.events,
            device=recipe.device,
            trust_remote_code=recipe.trust_remote_code,
        ),
    )
    task.workspace.commit(task.stage.name, [], {"models": models})
    return {"models": models}


def _alone(task: Task, work: Callable[[], T]) -> T:
    """What the first process does while the others, if there are any, wait."""
    workspace = task.workspace
    if workspace.world.size > 1:
        text = f"{task.stage.name}: the first of {workspace.world.size} processes works, the others wait"
        workspace.events.emit("note", text=text)
    return workspace.on_first(work)


def _subjects(task: Task) -> list[Subject]:
    """The columns of the comparison: the models named to compare with, then what the run made, its result last."""
    from compress.reporting.comparison import Subject

    asked = task.recipe.evaluate
    assert asked is not None
    made = {stage.name: stage.out for stage in task.plan.stages if stage.out is not None}
    compared = [model for model in asked.compare if model != task.source]
    columns = {model: model for model in compared}
    for stage, name in INSIDE.items():
        if stage in made:
            columns[f"{name} (result)" if name in compared else name] = made[stage]
    if task.source not in columns.values():
        columns[task.source] = task.source
    onnx = made.get("export:onnx")
    return [
        Subject(name, model, Path(onnx) if onnx is not None and model == task.source else None)
        for name, model in columns.items()
    ]


HANDLERS: Mapping[str, Handler] = {
    "distill": Handler(lambda stage: "distill", _distill),
    "transform": Handler(lambda stage: "transform/checkpoint", _transform),
    "quantize": Handler(lambda stage: "quantize/artifact", _quantize),
    "export": Handler(lambda stage: stage.name, _export),
    "evaluate": Handler(lambda stage: stage.name, _evaluate),
}
