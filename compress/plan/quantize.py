"""The plan of a quantization: each matrix with its bits, and the size of the result, known before a weight is read.

A code's size does not depend on the weights, so bits per weight and the bytes of the files are exact; where the student
is yet to be made from random weights, the bytes leave out the files' headers. Memory is an estimate (`memory`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from compress.codecs import codec
from compress.codecs.base import CodecSpec
from compress.codecs.registry import codec_of
from compress.errors import UsageError
from compress.modeling.structure import MatrixView, find_stacks, matrices, require_one_stack
from compress.plan.memory import calibrated_memory, learning_memory, nearest_memory
from compress.plan.structure import structure_notes
from compress.plan.subject import Subject
from compress.plan.transform import fold_notes, learned_text
from compress.quantization.allocation import uniform
from compress.quantization.options import Ldlq, rounding_of
from compress.quantization.target import Change, open_target, predict, transformed
from compress.quantization.transforms import Ost, Transform, chosen_transform, transform_of
from compress.transforms.incoherence import online_cost

if TYPE_CHECKING:
    from compress.recipe import QuantizeRecipe


@dataclass(frozen=True)
class MatrixPlan:
    """One matrix of the target set. `group` names the matrices that share its width; `bytes` is its whole payload;
    `mixing` the sides that are mixed at run time."""

    name: str
    shape: tuple[int, int]
    block: int
    group: str
    codec: str
    width: int
    mixing: str
    bits_per_weight: float
    bytes: int


@dataclass(frozen=True)
class QuantizationPlan:
    """`guesses` are what the model's structure was taken for.

    `bits_per_weight` over the target set, `model_bits_per_weight` = 8 `model_bytes` / parameters. `bits_target` is
    None where the only rate of a codec was taken."""

    bits_target: float | None
    bits_per_weight: float
    model_bits_per_weight: float
    model_bytes: int
    data_free: bool
    rounding: str
    transform: str
    memory_bytes: int
    codec: str
    containers: tuple[str, ...]
    notes: tuple[str, ...]
    guesses: tuple[str, ...]
    matrices: tuple[MatrixPlan, ...]


def plan_quantization(
    recipe: QuantizeRecipe, subject: Subject, trust_remote_code: bool = False, exported: bool = False
) -> QuantizationPlan:
    """`exported`: the result will be written in another format too. Raises `UsageError` for an unknown codec or option,
    or when `bits` is out of the codec's reach for this model; `ModelError` for a model that cannot be quantized.
    """
    method = codec(recipe.codec.name, **recipe.codec.options)
    calibration = recipe.calibration
    options = None if calibration is None else rounding_of(calibration.name, calibration.options)
    views = matrices(subject.model, recipe.towers)
    if recipe.towers and not any(stack.tower for stack in find_stacks(subject.model)):
        raise UsageError(f"'{subject.name}' has no towers.", remedy="Leave out --towers.")
    if recipe.data is not None:
        require_one_stack(views, subject.model)
    asked = transform_of(recipe.transform.name, recipe.transform.options)
    transform = chosen_transform(asked, method, recipe.data is not None, exported)
    if subject.checkpoint is not None:
        target = open_target(subject.checkpoint.folder, trust_remote_code, transform, towers=recipe.towers)
        change = Change(target.fold, target.mixing, target.transform)
    else:
        change = transformed(subject.model, views, transform, 0, subject.read)
    mixing = change.mixing
    specs = uniform(views, method, recipe.bits, mixing)
    rows = tuple(_row(view, specs[view.name]) for view in views)
    weights = sum(view.weights for view in views)
    if subject.checkpoint is not None:
        model_bytes = predict(target, specs, recipe.max_shard_bytes).model_bytes
    else:
        model_bytes = subject.bytes - weights * subject.model.dtype.itemsize + sum(row.bytes for row in rows)
    memory = nearest_memory(rows)
    if isinstance(options, Ldlq):
        memory = calibrated_memory(subject.model, views, rows, recipe, options)
    if isinstance(transform, Ost):
        memory = max(memory, learning_memory(subject.model, views, transform, recipe.context))
    return QuantizationPlan(
        bits_target=recipe.bits,
        bits_per_weight=sum(row.bytes for row in rows) * 8 / weights,
        model_bits_per_weight=model_bytes * 8 / subject.parameters,
        model_bytes=model_bytes,
        data_free=recipe.data is None,
        rounding="nearest" if calibration is None else str(calibration),
        memory_bytes=memory,
        codec=str(recipe.codec),
        transform=change.text,
        containers=() if set(mixing.values()) != {"none"} else method.containers(specs[views[0].name]),
        notes=tuple(_notes(recipe, subject, views, transform, change)),
        guesses=tuple(structure_notes(subject.model, views, recipe.towers)),
        matrices=rows,
    )


def _row(view: MatrixView, spec: CodecSpec) -> MatrixPlan:
    bits = codec_of(spec).bits(spec, view.shape)
    return MatrixPlan(
        view.name,
        view.shape,
        view.block,
        view.group,
        spec.codec,
        spec.width,
        spec.mixing,
        bits / view.weights,
        bits // 8,
    )


def _notes(
    recipe: QuantizeRecipe, subject: Subject, views: Sequence[MatrixView], transform: Transform, change: Change
) -> Iterator[str]:
    if recipe.data is None:
        yield "data-free: no data are used, every weight counts the same"
    if isinstance(transform, Ost):
        yield learned_text(change, transform)
    online = sum(word != "none" for word in change.mixing.values())
    if online:
        yield (
            f"{change.text.partition(':')[0]}: {online} of {len(views)} matrices are mixed at run time, "
            f"{100 * online_cost(views, change.mixing).relative:.1f} % more multiply-adds a token in the blocks"
        )
    yield from fold_notes(subject, change)
