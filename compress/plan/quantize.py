"""The plan of a quantization: each matrix with its bits, and the size of the result, known before a weight is read.

A code's size does not depend on the weights, so bits per weight and the bytes of the files are exact; where the student
is yet to be made from random weights, the bytes leave out the files' headers. Memory is an estimate (`memory`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from compress.codecs import codec
from compress.codecs.base import Codec, CodecSpec
from compress.codecs.registry import codec_of
from compress.errors import UsageError
from compress.modeling.structure import MatrixView, find_stacks, matrices, require_one_stack
from compress.plan.memory import (
    calibrated_memory,
    learning_memory,
    measuring_memory,
    nearest_memory,
    table_memory,
)
from compress.plan.structure import structure_notes
from compress.plan.subject import Subject
from compress.plan.transform import fold_notes, learned_text
from compress.quantization.allocation import (
    Choose,
    Group,
    Rates,
    Table,
    allocate,
    allocation_of,
    by_table,
    make_groups,
    specs_of,
    uniformly,
)
from compress.quantization.options import Ldlq, Rounding, rounding_of
from compress.quantization.tables import Chosen, TableBits, choose_tables
from compress.quantization.target import Change, Target, open_target, predict, transformed
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
    None where the only rate of a codec was taken. `tables` are the embedding and the head if they are quantized, of
    whose bits only `model_bits_per_weight` knows."""

    bits_target: float | None
    bits_per_weight: float
    model_bits_per_weight: float
    model_bytes: int
    data_free: bool
    rounding: str
    allocation: str
    transform: str
    memory_bytes: int
    codec: str
    containers: tuple[str, ...]
    notes: tuple[str, ...]
    guesses: tuple[str, ...]
    matrices: tuple[MatrixPlan, ...]
    tables: tuple[MatrixPlan, ...] = ()


@dataclass(frozen=True)
class Draft:
    """What of a quantization does not depend on its widths. `target` is None where the model is yet to be made;
    `tables` are the embedding and the head, if they are quantized."""

    recipe: QuantizeRecipe
    subject: Subject
    codec: Codec
    options: Rounding | None
    views: tuple[MatrixView, ...]
    groups: tuple[Group, ...]
    transform: Transform
    change: Change
    target: Target | None
    tables: Chosen

    def widths(self, choose: Choose) -> dict[str, int]:
        """The width of every group, as `choose` chooses."""
        return allocate(self.groups, self.codec, rates_of(self.recipe), choose)

    def specs(self, widths: Mapping[str, int]) -> dict[str, CodecSpec]:
        """The spec of every matrix, with these widths of the groups."""
        return specs_of(self.groups, widths, self.codec, self.change.mixing)

    def bits_per_weight(self, specs: Mapping[str, CodecSpec]) -> float:
        """Over the matrices of the blocks."""
        bits = sum(self.codec.bits(specs[view.name], view.shape) for view in self.views)
        return bits / sum(view.weights for view in self.views)

    def model_bytes(self, specs: Mapping[str, CodecSpec]) -> int:
        """Of the files of the result."""
        if self.target is not None:
            return predict(self.target, specs, self.recipe.max_shard_bytes).model_bytes
        packed = [*self.views, *(table.view for table, _ in self.tables)]
        rows = [
            *((view, specs[view.name]) for view in self.views),
            *((table.view, spec) for table, spec in self.tables),
        ]
        kept = self.subject.bytes - sum(view.weights for view in packed) * self.subject.model.dtype.itemsize
        return kept + sum(codec_of(spec).bits(spec, view.shape) // 8 for view, spec in rows)


def draft_quantization(
    recipe: QuantizeRecipe, subject: Subject, trust_remote_code: bool = False, exported: bool = False
) -> Draft:
    """`exported`: the result will be written in another format too. Raises `UsageError` for an unknown codec or option,
    `ModelError` for a model that cannot be quantized."""
    method = codec(recipe.codec.name, **recipe.codec.options)
    calibration = recipe.calibration
    options = None if calibration is None else rounding_of(calibration.name, calibration.options)
    allocation_of(recipe.allocation.name, recipe.allocation.options)
    views = matrices(subject.model, recipe.towers)
    if recipe.towers and not any(stack.tower for stack in find_stacks(subject.model)):
        raise UsageError(f"'{subject.name}' has no towers.", remedy="Leave out --towers.")
    if recipe.data is not None:
        require_one_stack(views, subject.model)
    asked = transform_of(recipe.transform.name, recipe.transform.options)
    transform = chosen_transform(asked, method, recipe.data is not None, exported)
    bits = TableBits(recipe.embedding_bits, recipe.head_bits)
    target = None
    if subject.checkpoint is not None:
        folder = subject.checkpoint.folder
        target = open_target(folder, trust_remote_code, transform, towers=recipe.towers, tables=bits)
        change, tables = Change(target.fold, target.mixing, target.transform), target.tables
    else:
        change = transformed(subject.model, views, transform, 0, subject.read)
        tables = choose_tables(subject.model, bits, change.fold.added)
    groups = make_groups(views, method, change.mixing)
    return Draft(recipe, subject, method, options, tuple(views), tuple(groups), transform, change, target, tables)


def rates_of(recipe: QuantizeRecipe) -> Rates:
    """The rates that a recipe asks for."""
    return Rates(recipe.bits, recipe.first_bits, recipe.last_bits)


def plan_quantization(draft: Draft, kept: Table | None) -> QuantizationPlan:
    """The plan of `draft`, with the widths that follow from the `kept` table of an allocation. Raises `UsageError` when
    a rate is out of the codec's reach for this model."""
    recipe, subject, views = draft.recipe, draft.subject, draft.views
    widths = draft.widths(uniformly(draft.codec) if kept is None else by_table(kept))
    specs = draft.specs(widths)
    rows = tuple(_row(view, specs[view.name]) for view in views)
    tables = tuple(_row(table.view, spec) for table, spec in draft.tables)
    model_bytes = draft.model_bytes(specs)
    return QuantizationPlan(
        bits_target=recipe.bits,
        bits_per_weight=draft.bits_per_weight(specs),
        model_bits_per_weight=model_bytes * 8 / subject.parameters,
        model_bytes=model_bytes,
        data_free=recipe.data is None,
        rounding="nearest" if recipe.calibration is None else str(recipe.calibration),
        allocation=str(recipe.allocation),
        memory_bytes=_memory(draft, rows, tables),
        codec=str(recipe.codec),
        transform=draft.change.text,
        containers=()
        if set(draft.change.mixing.values()) != {"none"}
        else draft.codec.containers(specs[views[0].name]),
        notes=tuple(_notes(draft, kept, widths)),
        guesses=tuple(structure_notes(subject.model, views, recipe.towers)),
        matrices=rows,
        tables=tables,
    )


def _memory(draft: Draft, rows: Sequence[MatrixPlan], tables: Sequence[MatrixPlan]) -> int:
    recipe, model = draft.recipe, draft.subject.model
    found = [nearest_memory(rows), table_memory(tables, model.dtype.itemsize)]
    if isinstance(draft.options, Ldlq):
        found[0] = calibrated_memory(model, draft.views, rows, recipe, draft.options)
    if isinstance(draft.transform, Ost):
        found.append(learning_memory(model, draft.views, draft.transform, recipe.context))
    if recipe.allocation.name != "uniform":
        found.append(measuring_memory(model, draft.views, recipe))
    return max(found)


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


def _notes(draft: Draft, kept: Table | None, widths: Mapping[str, int]) -> Iterator[str]:
    recipe, change = draft.recipe, draft.change
    if recipe.data is None:
        yield "data-free: no data are used, every weight counts the same"
    if recipe.allocation.name != "uniform" and kept is None:
        yield (
            f"{recipe.allocation.name}: the widths are chosen when it is measured what each group loses; shown is the "
            "same rate spent uniformly, which the result does not exceed"
        )
    elif kept is not None:
        more = ", from which the search begins" if recipe.allocation.name == "evolve" else ""
        yield f"{recipe.allocation.name}: the table predicts a {kept.label} of {kept.predict(widths):.4g}{more}"
    if isinstance(draft.transform, Ost):
        yield learned_text(change, draft.transform)
    online = sum(word != "none" for word in change.mixing.values())
    if online:
        yield (
            f"{change.text.partition(':')[0]}: {online} of {len(draft.views)} matrices are mixed at run time, "
            f"{100 * online_cost(draft.views, change.mixing).relative:.1f} % more multiply-adds a token in the blocks"
        )
    yield from fold_notes(draft.subject, change)
