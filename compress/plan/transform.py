"""The plan of a transform: what is learned and folded, and what the checkpoint grows by."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import TYPE_CHECKING

from compress.modeling.loading import require_unquantized
from compress.modeling.structure import matrices
from compress.plan.memory import learning_memory
from compress.plan.stage import StagePlan
from compress.plan.subject import Subject
from compress.quantization.target import Change, require_folded, transformed
from compress.quantization.transforms import Ost, transform_of
from compress.transforms.learned import is_rotation, learned_shapes

if TYPE_CHECKING:
    from compress.recipe import TransformRecipe


def plan_transform(recipe: TransformRecipe, subject: Subject, source: str | None, out: str | None) -> StagePlan:
    """The stage. Raises `UsageError` for an unknown option, `ModelError` for a model that has no place for it
    or is quantized."""
    require_unquantized(subject.model.config, subject.name)
    transform = transform_of(recipe.transform.name, recipe.transform.options)
    if isinstance(transform, Ost):
        transform = transform.folded(rounded=recipe.bits is not None)
    views = matrices(subject.model)
    change = transformed(subject.model, views, transform, 0, subject.read)
    require_folded(change.fold, subject.model.state_dict(), subject.name)
    memory = 0
    if isinstance(transform, Ost):
        memory = learning_memory(subject.model, views, transform, recipe.context)
    what = learned_text(change, transform) if isinstance(transform, Ost) else "fold mixings"
    text = f"{what} in {subject.name}, an ordinary checkpoint again"
    return StagePlan("transform", source, out, text, memory or None, tuple(fold_notes(subject, change)))


def learned_text(change: Change, transform: Ost) -> str:
    """How much is learned, and how long."""
    basis = change.fold.basis
    shapes = learned_shapes(basis.sites, basis.scalings, transform.parts)
    rotations = sum(is_rotation(name) for name in shapes)
    numbers = sum(prod(shape) for shape in shapes.values())
    return (
        f"learn {rotations} rotations and {len(shapes) - rotations} scalings ({numbers:,} numbers) in "
        f"{transform.steps:,} steps of {transform.batch} rows"
    )


def fold_notes(subject: Subject, change: Change) -> Iterator[str]:
    """What is not folded and why, and what the model grows by."""
    yield from (f"not folded: {reason}" for reason in change.fold.reasons)
    for name, like in change.fold.added.items():
        size = subject.model.get_parameter(like).numel() * subject.model.dtype.itemsize
        yield f"the head is untied from the embedding: '{name}' adds {size:,} bytes"
