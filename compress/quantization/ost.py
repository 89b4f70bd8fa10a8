"""OSTQuant (Hu et al. 2025, arXiv 2501.13987): a model's basis, learned so that quantization hurts least.

`learn_basis` does it for a model in memory, `learn_checkpoint` for one in a folder, with its state in a work folder
every `SAVE_EVERY` steps. Both need the whole model in float32 and end with the tensors of
`compress.transforms.learned`, which the fold takes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from compress.codecs.base import Codec, CodecSpec
from compress.data.calibration import Batch
from compress.errors import UsageError, WorkspaceError
from compress.events import Events, seconds_left
from compress.modeling.io import stream_tensors
from compress.modeling.loading import load_model, load_tokenizer
from compress.modeling.structure import MatrixView
from compress.modeling.writer import write_tensors
from compress.quantization.data import calibration_batches
from compress.quantization.learning import Learner, Progress
from compress.quantization.looped import LoopedModel
from compress.quantization.rounders import CalibrationOptions
from compress.quantization.target import Target, require_places
from compress.quantization.transforms import Ost
from compress.transforms.incoherence import online_mixing, view_signs
from compress.transforms.learned import starting_tensors
from compress.transforms.probe import proven_sites

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel

    from compress.workspace import Workspace

SAVE_EVERY = 10
UNIT, STATE = "transform/learned", "transform/state"
STAGE = "learn"


@dataclass(frozen=True)
class Learned:
    """The tensors of a learned basis, and `figures` for a report: the mean loss in nats of the first and the last tenth
    of the steps, and the QSUR of each matrix and of its inputs, before and after."""

    tensors: dict[str, Tensor]
    figures: dict[str, Any]


def learn_basis(
    model: PreTrainedModel,
    views: Sequence[MatrixView],
    options: Ost,
    codec: Codec,
    specs: Mapping[str, CodecSpec],
    batches: Sequence[Batch],
    seed: int,
    events: Events,
    save: Callable[[Progress], None] = lambda progress: None,
    resumed: Progress | None = None,
) -> Learned:
    """Learn the basis of `model`, in float32, which is left as it is.

    `save` is called every `SAVE_EVERY` steps; `resumed` is what it was given last. Raises `ModelError` for a model
    without a place for a transform, `NumericsError` when the loss is not finite.
    """
    sites = proven_sites(model)
    scalings = require_places(model, sites, options)
    mixing = online_mixing(views, sites) if options.online else {view.name: "none" for view in views}
    signs = {view.name: view_signs(view, mixing[view.name], seed).to(model.device) for view in views}
    looped = LoopedModel(model, views, signs, codec if options.weights else None, specs, options.dynamic)
    tensors = starting_tensors(sites, scalings, model.get_parameter, options.start, seed, options.parts)
    learner = Learner(looped, sites, scalings, tensors, options, seed)
    if resumed is not None:
        learner.restore(resumed)
    steps, started, first = options.steps, time.monotonic(), learner.step

    def listen(step: int, loss: float) -> None:
        left = seconds_left(started, step - first, steps - first)
        events.emit("step", stage=STAGE, index=step, total=steps, name=f"step {step}", seconds_left=left, loss=loss)
        if step % SAVE_EVERY == 0:
            save(learner.progress())

    rows = rows_of(batches, options.batch)
    with events.stage(STAGE, steps), frozen(model):
        found = learner.learn(rows, listen)
        return Learned(found, {**learner.figures(), "qsur": looped.qsur(rows[0], learner.fold())})


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Within this, the parameters of `model` need no gradient, and it is in evaluation mode."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    training = [module for module in model.modules() if module.training]
    try:
        model.requires_grad_(False).eval()
        yield
    finally:
        for module in training:
            module.training = True
        for parameter in trained:
            parameter.requires_grad_()


def learn_checkpoint(
    target: Target,
    options: Ost,
    codec: Codec,
    specs: Mapping[str, CodecSpec],
    calibration: CalibrationOptions | None,
    workspace: Workspace,
    seed: int,
    trust_remote_code: bool = False,
) -> Learned:
    """The same for the checkpoint of `target`, on the device and rows of `calibration`. A unit of `workspace` holds
    what was learned, so that it is learned once, another the state of a learning that was stopped. Of several processes
    the first learns. Raises `UsageError` without data, and what `learn_basis` does."""
    figures = workspace.done(UNIT)
    if figures is None:
        figures = workspace.on_first(
            lambda: _learn_alone(target, options, codec, specs, calibration, workspace, seed, trust_remote_code)
        )
    return Learned(dict(stream_tensors(_file(workspace, UNIT), WorkspaceError)), figures)


def _learn_alone(
    target: Target,
    options: Ost,
    codec: Codec,
    specs: Mapping[str, CodecSpec],
    calibration: CalibrationOptions | None,
    workspace: Workspace,
    seed: int,
    trust_remote_code: bool,
) -> dict[str, Any]:
    """Learn the basis, keep it in `workspace`, and return its figures."""
    if calibration is None:
        raise UsageError("A transform is learned from data.", remedy="Name some with --data.")
    model = load_model(target.source, device=calibration.device, trust_remote_code=trust_remote_code)
    batches = calibration_batches(
        model,
        calibration.data,
        lambda: load_tokenizer(target.source, trust_remote_code),
        rows=calibration.rows,
        context=calibration.context,
        seed=seed,
    )

    def save(progress: Progress) -> None:
        path = _state_file(workspace, progress.step)
        write_tensors(path, {**progress.tensors, **progress.state})
        workspace.commit(STATE, [path], {"step": progress.step, "losses": progress.losses})

    stopped = workspace.done(STATE)
    resumed = None
    if stopped is not None:
        stored = dict(stream_tensors(_state_file(workspace, stopped["step"]), WorkspaceError))
        resumed = Progress.of(stored, stopped["step"], stopped["losses"])
    learned = learn_basis(
        model, target.views, options, codec, specs, batches, seed, workspace.events, save=save, resumed=resumed
    )
    path = _file(workspace, UNIT)
    write_tensors(path, {name: tensor.cpu() for name, tensor in learned.tensors.items()})
    workspace.commit(UNIT, [path], learned.figures)
    workspace.drop(STATE)
    for step in (0, SAVE_EVERY):
        _state_file(workspace, step).unlink(missing_ok=True)
    return learned.figures


def rows_of(batches: Sequence[Batch], rows: int) -> list[Batch]:
    """Batches of `rows` rows each, the last one with what is left; those with other inputs than ids, or rows of
    different lengths, as they are."""
    if any(batch.keys() != {"input_ids"} for batch in batches):
        return list(batches)
    ids = [batch["input_ids"] for batch in batches]
    if len({one.shape[1] for one in ids}) > 1:
        return list(batches)
    return [{"input_ids": part} for part in torch.cat(ids).split(rows)]


def _state_file(workspace: Workspace, step: int) -> Path:
    """Two in turn: the one that the manifest names is never written over."""
    return _file(workspace, f"{STATE}.{step % (2 * SAVE_EVERY)}")


def _file(workspace: Workspace, unit: str) -> Path:
    return workspace.path("transform", f"{unit.rpartition('/')[2]}.safetensors")
