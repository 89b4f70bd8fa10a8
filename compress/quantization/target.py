"""What a checkpoint holds and what of it will be packed: read from headers and config, before any weight is.

`open_target` answers everything that a plan needs; `predict` adds the specs and knows the artifact's size to the byte,
because the same plan of entries is what the writer follows.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from compress.codecs.base import CodecSpec
from compress.codecs.registry import codec_of
from compress.errors import ModelError
from compress.modeling.bounds import check_complete, check_tensors
from compress.modeling.io import Checkpoint
from compress.modeling.layout import DTYPES, Entry, plan_shards
from compress.modeling.loading import load_config, parameter_count, require_unquantized, skeleton
from compress.modeling.scalings import Scalings
from compress.modeling.sites import Sites
from compress.modeling.structure import Convolution, MatrixView, matrices, require_linear
from compress.modeling.tables import Table
from compress.modeling.weights import StoredWeights
from compress.modeling.writer import MAX_SHARD_BYTES
from compress.quantization.tables import NO_TABLES, Chosen, TableBits, choose_tables, require_same
from compress.quantization.transforms import Auto, Hadamard, Ost, Transform, Untransformed
from compress.transforms.basis import Basis, hadamard_basis
from compress.transforms.fold import Fold, Read, make_fold
from compress.transforms.incoherence import online_mixing, view_signs
from compress.transforms.learned import is_rotation, learned_basis, learned_shapes
from compress.transforms.probe import proven_scalings, proven_sites
from compress.transforms.signs import Signs

NOTHING = Untransformed()
MAPS = (nn.Linear, nn.Embedding, Conv1D, *get_args(Convolution))


@dataclass(frozen=True)
class Target:
    """A checkpoint to be quantized. `weights` are its tensors as the model spells them; `ignore` names the embeddings
    and linear maps outside of the target set; `parameters` counts tied ones once.

    `fold` is what a transform makes of the parameters before they are rounded, `mixing` which sides of each matrix, by
    its name, are mixed at run time, with signs from `seed`; `transform` is what was chosen, as text. `tables` are the
    embedding and the head where they will be packed.
    """

    source: Path
    weights: StoredWeights
    views: tuple[MatrixView, ...]
    known: frozenset[str]
    ignore: tuple[str, ...]
    parameters: int
    fold: Fold
    mixing: Mapping[str, str]
    seed: int
    transform: str
    tables: Chosen = ()

    def read(self, parameter: str, dtype: torch.dtype | None = None) -> Tensor:
        """`parameter` after the transform, in `dtype` (None: the stored one)."""
        tensor = self.fold.tensor(parameter, self.weights.read, dtype)
        return tensor if dtype is None else tensor.to(dtype)

    def signs(self, view: MatrixView) -> Signs:
        """Those of a matrix of the target set."""
        return view_signs(view, self.mixing[view.name], self.seed)

    def learned(self, tensors: Mapping[str, Tensor]) -> Target:
        """The same, changed by what `Ost` learned."""
        return replace(self, fold=learned_fold(self.fold, tensors, self.seed, self.weights.read))

    def read_table(self, table: Table) -> Tensor:
        """The matrix [V, d] of a table after the transform, in the stored dtype. Raises `ModelError` when it is stored
        under several names with different values."""
        names = self.names(table)
        tensor = self.read(names[0])
        if len(names) > 1:
            require_same(table, [tensor, *(self.read(name) for name in names[1:])], str(self.source))
        return tensor

    def names(self, table: Table) -> list[str]:
        """Those under which a table is stored in the checkpoint, or after the transform."""
        return [name for name in table.parameters if name in self.weights or name in self.fold.added]

    @property
    def original_bytes(self) -> int:
        """Bytes of the checkpoint's weight files."""
        return self.weights.checkpoint.total_bytes


@dataclass(frozen=True)
class Prediction:
    """The size of an artifact: bytes of all its weight files, headers included, and both bit figures."""

    model_bytes: int
    bits_per_weight: float
    model_bits_per_weight: float


def open_target(
    source: Path,
    trust_remote_code: bool = False,
    transform: Transform = NOTHING,
    seed: int = 0,
    towers: bool = False,
    tables: TableBits = NO_TABLES,
) -> Target:
    """Read config and headers of the model in `source`, which `transform` is to change with signs from `seed`. Its
    `towers` are in the target set if asked for, and its `tables` are packed beside it.

    Raises `ModelError` for a model that is damaged, already quantized, of unknown structure, or whose checkpoint lacks
    a matrix of the target set or has it in another shape.
    """
    config = load_config(source, trust_remote_code)
    require_unquantized(config, str(source))
    checkpoint = Checkpoint(source)
    model = skeleton(config, trust_remote_code)
    views = matrices(model, towers)
    weights = StoredWeights(checkpoint, model)
    check_complete(model, weights)
    check_tensors(model, weights)
    change = transformed(model, views, transform, seed, weights.read)
    chosen = choose_tables(model, tables, change.fold.added)
    return Target(
        source=source,
        weights=weights,
        views=tuple(views),
        known=frozenset(model.state_dict()),
        ignore=untouched(model, views, chosen),
        parameters=parameter_count(model),
        fold=change.fold,
        mixing=change.mixing,
        seed=seed,
        transform=change.text,
        tables=chosen,
    )


@dataclass(frozen=True)
class Change:
    """What a transform does to a model: what is folded, which sides of each matrix, by its name, are mixed at run time,
    and what it is called."""

    fold: Fold
    mixing: Mapping[str, str]
    text: str


def transformed(
    model: PreTrainedModel,
    views: Sequence[MatrixView],
    transform: Transform,
    seed: int,
    read: Read,
) -> Change:
    """What `transform` does to `model`, which may be on the meta device, and its matrices `views`. `read` gives the
    original tensor of a parameter. That of `Ost` is the one it starts with: the same parameters change, and the same
    matrices are mixed, as when it has learned (`learned_fold`).

    Raises `ModelError` for a model that has no place for what `Ost` learns.
    """
    nothing = {view.name: "none" for view in views}
    if isinstance(transform, Untransformed):
        return unchanged(views)
    sites = proven_sites(model)
    basis = hadamard_basis(sites, seed)
    if isinstance(transform, Ost):
        require_linear(views, model)
        scalings = require_places(model, sites, transform)
        resting = learned_shapes(sites, scalings, transform.parts)
        tensors = {name: torch.zeros(shape) for name, shape in resting.items() if not is_rotation(name)}
        basis = learned_basis(sites, scalings, tensors, seed)
    fold = make_fold(basis, read)
    if isinstance(transform, Auto) and fold.added:
        return unchanged(views)
    online = not isinstance(transform, Ost) or transform.online
    text = transform.text if isinstance(transform, Ost) else Hadamard.name
    return Change(fold, online_mixing(views, sites) if online else nothing, text)


def learned_fold(start: Fold, tensors: Mapping[str, Tensor], seed: int, read: Read) -> Fold:
    """The fold of the `tensors` that `Ost` learned, in the places of the one it started with."""
    return make_fold(learned_basis(start.basis.sites, start.basis.scalings, tensors, seed), read)


def unchanged(views: Sequence[MatrixView]) -> Change:
    """No transform."""
    return Change(Fold(Basis()), {view.name: "none" for view in views}, Untransformed.name)


def require_folded(fold: Fold, names: Iterable[str], model: str) -> None:
    """Raise `ModelError` unless `fold` changes some of the parameters `names` of `model`."""
    if not any(fold.changes(name) for name in names):
        raise ModelError(
            f"Nothing of '{model}' can be folded. {' '.join(fold.reasons)}",
            remedy="Use `compress quantize --transform hadamard`, which mixes at run time.",
        )


def require_places(model: PreTrainedModel, sites: Sites, transform: Ost) -> Scalings:
    """The scalings of `model`, of those that `transform` learns. Raises `ModelError` when there is nothing to learn, or
    no next token to learn from."""
    scalings = proven_scalings(model)
    scalings = Scalings(
        scalings.gates if transform.gates else (), scalings.queries if transform.queries else (), scalings.reasons
    )
    if not model.can_generate() or not learned_shapes(sites, scalings, transform.parts):
        reasons = " ".join((*sites.reasons, *scalings.reasons))
        raise ModelError(
            f"{type(model).__name__} has no place for a learned transform. {reasons}".rstrip(),
            remedy="Use `compress quantize --transform hadamard`, which mixes at run time.",
        )
    return scalings


def untouched(model: nn.Module, views: Sequence[MatrixView], tables: Chosen = ()) -> tuple[str, ...]:
    """Names of the embeddings and linear maps of `model` that are not among `views`, nor among `tables`."""
    packed = {view.place for view in views} | {name for table, _ in tables for name in table.modules}
    left = [view.place for view in matrices(model, towers=True)]
    left += [name for name, module in model.named_modules() if isinstance(module, MAPS)]
    return tuple(name for name in dict.fromkeys(left) if name not in packed)


def entries(
    target: Target, specs: Mapping[str, CodecSpec], dtype: Literal["stored", "float32"] = "stored"
) -> list[Entry]:
    """Every tensor of the result, in the model's order: payloads for the matrices that have a spec, the rest in
    `dtype`."""
    packed: dict[str, tuple[int, ...]] = {}
    for view in target.views:
        if view.name in specs:
            length = _bits(specs[view.name], view) // 8
            packed[view.parameter] = (length,) if view.index is None else (view.index + 1, length)
    planned = []
    tables = {name: (table, spec) for table, spec in target.tables for name in target.names(table)}
    for name, like in (*((name, name) for name in target.weights), *target.fold.added.items()):
        info = target.weights.entry(like)
        if name in tables:
            table, spec = tables[name]
            if name == target.names(table)[0]:
                planned.append(Entry(table.view.parameter, "I8", (_bits(spec, table.view) // 8,)))
        elif name in packed:
            planned.append(Entry(name, "I8", packed[name]))
        else:
            wide = dtype == "float32" and DTYPES[info.dtype].is_floating_point
            planned.append(Entry(name, "F32" if wide else info.dtype, info.shape))
    return planned


def predict(target: Target, specs: Mapping[str, CodecSpec], max_shard_bytes: int = MAX_SHARD_BYTES) -> Prediction:
    """The artifact's size for these `specs`, exact, without reading a weight."""
    size = sum(shard.nbytes for shard in plan_shards(entries(target, specs), max_shard_bytes))
    bits = sum(_bits(specs[view.name], view) for view in target.views)
    return Prediction(size, bits / sum(view.weights for view in target.views), 8 * size / target.parameters)


def _bits(spec: CodecSpec, view: MatrixView) -> int:
    return codec_of(spec).bits(spec, view.shape)
