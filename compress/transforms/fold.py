"""Folding a change of basis into a model's weights: the same function, other numbers.

    embedding rows        E' = E R
    what reads a norm     W' = W diag(g) R S       g the norm's gain, which becomes 1 / S
    what writes           W' = R^T W,  b' = R^T b
    values, head h        W_v' = (R_h / S_h)^T W_v,  b_v' the same
    output projection     W_o' = W_o R_h S_h       for each query head, R_h and S_h those of its values
    up, down projection   W_u' = W_u / S on the rows, b_u' the same;  W_d' = W_d S on the columns
    keys, queries         W_k' = S W_k,  W_q' = W_q / S on the rows, and biases; with norms of their own, the gains

R are orthogonal, S diagonal (`compress.transforms.basis`). A tensor that stands on several of these lines gets all of
it. Each folded tensor is a function of one original tensor and at most one norm, so a checkpoint is folded while it
streams through, and a model in memory in place. Everything is computed in float64, a chunk of rows at a time, and
rounded once, or, if both sides of a matrix change, once more to at least float32 in between.

A head that shares the embedding's tensor cannot take up the gain of the last norm: it becomes a tensor of its own, and
the model larger by that. Only if all gains of the last norm are equal, which commutes with R, does the pair stay tied.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from compress.modeling.scalings import QuerySite
from compress.modeling.sites import Residual, ValueSite
from compress.transforms.basis import Basis
from compress.transforms.changes import Changes, Scaling, apply, dual, repeated
from compress.transforms.matrices import map_rows

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Read = Callable[[str], Tensor]
"""A parameter's original tensor by the name that the model gives it."""


@dataclass(frozen=True)
class Step:
    """What becomes of one parameter: read `source`; multiply its columns with a norm's gain (`offset` + the parameter
    `gain`); change the last axis by `columns` and the first one by `rows`. A norm that multiplies with `shift` + its
    weight has that sum changed. With `constant` the original does not matter: `columns` change a row of ones.
    """

    source: str
    gain: str | None = None
    offset: float = 0.0
    columns: Changes = ()
    rows: Changes = ()
    shift: float = 0.0
    constant: bool = False

    def apply(self, original: Tensor, read: Read) -> Tensor:
        """The changed tensor in the original's dtype, as a function that autograd can follow."""
        matrix = original.reshape(-1, original.shape[-1])
        result = self.change_columns(matrix, None if self.gain is None else read(self.gain))
        if self.rows:
            result = apply(self.rows, result.t()).t()
        return result.reshape(original.shape)

    def change_columns(self, rows: Tensor, gain: Tensor | None) -> Tensor:
        """Some rows of the original as a matrix, changed but for what `rows` does."""
        rows = torch.ones_like(rows) if self.constant else rows + self.shift if self.shift else rows
        if gain is not None:
            rows = rows * (gain.to(rows.dtype) + self.offset)
        changed = apply(self.columns, rows)
        return changed - self.shift if self.shift else changed


class Fold:
    """The folded form of every parameter of a model.

    `added` maps the parameters that the folded model has besides its original ones (an untied head) to the ones whose
    shape and type they have; `config_changes` is what config.json must say then.
    """

    def __init__(self, basis: Basis, untie: bool = False) -> None:
        self.basis = basis
        self._steps: dict[str, Step] = {}
        residual = basis.sites.residual if basis.residual or basis.norms else None
        if residual is not None:
            self._fold_residual(residual, untie)
        for site in basis.sites.values:
            if site.value in basis.values:
                self._fold_values(site, basis.values[site.value])
        for gate in basis.scalings.gates:
            if gate.up in basis.gates:
                self._scale(gate.up, rows=basis.gates[gate.up].dual)
                self._step(f"{gate.down}.weight", columns=(basis.gates[gate.up],))
        for query in basis.scalings.queries:
            if query.key in basis.queries:
                self._fold_queries(query, basis.queries[query.key])
        self.added: Mapping[str, str] = {}
        self.config_changes: Mapping[str, bool] = {}
        if residual is not None and untie:
            self.added = {f"{residual.head}.weight": f"{residual.embedding}.weight"}
            self.config_changes = {"tie_word_embeddings": False}

    @property
    def reasons(self) -> tuple[str, ...]:
        """Why what is not folded is not, a sentence each."""
        return (*self.basis.sites.reasons, *self.basis.scalings.reasons)

    def changes(self, name: str) -> bool:
        """Whether the parameter `name` is another one in the folded model, or one that only that has."""
        return name in self._steps

    def tensor(self, name: str, read: Read, dtype: torch.dtype | None = None) -> Tensor:
        """The parameter `name` of the folded model in `dtype` (None: that of the original), a new tensor; one that does
        not change as it was read. `read` is called for the original tensor and, where a norm stands in front, for that
        norm's weight."""
        step = self._steps.get(name)
        if step is None:
            return read(name)
        with torch.no_grad():
            original = read(step.source).detach()
            return _carry_out(step, original, read, dtype or original.dtype)

    def differentiable(self, name: str, read: Read) -> Tensor:
        """The same in the original's dtype and not chunk by chunk, as a function of the basis that autograd follows."""
        step = self._steps.get(name)
        return read(name) if step is None else step.apply(read(step.source), read)

    def _fold_residual(self, residual: Residual, untie: bool) -> None:
        stream = self.basis.residual
        last = residual.readers[residual.head]
        self._step(f"{residual.embedding}.weight", columns=stream)
        for name, norm in residual.readers.items():
            if residual.tied and name == residual.head and not untie:
                continue
            scaling = self.basis.norms.get(norm)
            columns = (*stream, *(() if scaling is None else (scaling,)))
            self._step(f"{name}.weight", gain=f"{norm}.weight", offset=residual.offset, columns=columns)
        if untie:
            self._step(f"{residual.head}.weight", source=f"{residual.embedding}.weight")
        for norm in set(residual.readers.values()):
            if norm != last or untie or not residual.tied:
                scaling = self.basis.norms.get(norm)
                gains = () if scaling is None else (scaling.dual,)
                self._step(f"{norm}.weight", columns=gains, shift=residual.offset, constant=True)
        for name in residual.writers:
            self._step(f"{name}.weight", rows=stream)
            self._step(f"{name}.bias", columns=stream)

    def _fold_values(self, site: ValueSite, changes: Changes) -> None:
        """`changes` are orthogonal ones and scalings S: values get R / S, and what reads them R S."""
        self._step(f"{site.value}.weight", rows=dual(changes))
        self._step(f"{site.value}.bias", columns=dual(changes))
        self._step(f"{site.output}.weight", columns=repeated(changes, site.heads // site.kv_heads))

    def _fold_queries(self, site: QuerySite, scaling: Scaling) -> None:
        if site.norms is not None:
            for norm, one in zip(site.norms, (scaling.dual, scaling), strict=True):
                self._step(f"{norm}.weight", columns=(one,), shift=site.offset)
            return
        self._scale(site.key, rows=scaling)
        self._scale(site.query, rows=scaling.dual.repeated(site.heads // site.kv_heads))

    def _scale(self, linear: str, rows: Scaling) -> None:
        """Scale what a linear map puts out."""
        self._step(f"{linear}.weight", rows=(rows,))
        self._step(f"{linear}.bias", columns=(rows,))

    def _step(self, name: str, columns: Changes = (), rows: Changes = (), **others: object) -> None:
        """Add to what becomes of the parameter `name`: changes come after those that are there."""
        step = self._steps.get(name, Step(name))
        step = replace(step, columns=(*step.columns, *columns), rows=(*step.rows, *rows))
        self._steps[name] = replace(step, **others)  # type: ignore[arg-type]


def make_fold(basis: Basis, read: Read) -> Fold:
    """The fold of `basis`. Reads the last norm's weight of a model with a tied head whose residual stream is rotated,
    to see whether the head must get a tensor of its own."""
    residual = basis.sites.residual
    untie = False
    if residual is not None and residual.tied and basis.residual:
        gain = read(f"{residual.readers[residual.head]}.weight")
        untie = not bool((gain == gain[0]).all())
    return Fold(basis, untie)


def fold_model(model: PreTrainedModel, fold: Fold) -> None:
    """Fold a model in memory, in place; its parameters stay the same objects in the same types. An untied head gets a
    parameter of its own, and the config says so."""
    added = {name: fold.tensor(name, model.get_parameter) for name in fold.added}
    residual = fold.basis.sites.residual
    norms = {f"{norm}.weight" for norm in residual.readers.values()} if residual else set()
    names = [name for name, _ in model.named_parameters() if fold.changes(name)]
    for name in sorted(names, key=norms.__contains__):
        model.get_parameter(name).data = fold.tensor(name, model.get_parameter)
    for name, tensor in added.items():
        module, _, parameter = name.rpartition(".")
        model.get_submodule(module).register_parameter(parameter, nn.Parameter(tensor))
    for key, value in fold.config_changes.items():
        model.config.update({key: value})


def _carry_out(step: Step, original: Tensor, read: Read, dtype: torch.dtype) -> Tensor:
    between = dtype if not step.rows else torch.promote_types(dtype, torch.float32)
    matrix = original.view(-1, original.shape[-1])
    gain = None if step.gain is None else read(step.gain).detach().double()
    result = torch.empty_like(matrix, dtype=between)
    map_rows(matrix, lambda rows: step.change_columns(rows, gain), result)
    if step.rows:
        map_rows(result.t(), lambda rows: apply(step.rows, rows), result.t())
    return result.view(original.shape).to(dtype)
