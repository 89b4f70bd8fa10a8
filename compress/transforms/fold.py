"""Folding a rotation of the residual stream and of the values into a model's weights: the same function, other numbers.

    embedding rows        E' = E R
    what reads a norm     W' = W diag(g) R          g the norm's gain, which becomes 1
    what writes           W' = R^T W,  b' = R^T b
    values, head h        W_v' = R_h^T W_v,  b_v' = R_h^T b_v
    output projection     W_o' = W_o R_h            for each query head, R_h that of its values

R and R_h are mixings (`compress.transforms.mixing`). A matrix that stands on two of these lines gets both. Each folded
tensor is a function of one original tensor and at most one norm, so a checkpoint is folded while it streams through,
and a model in memory in place. Everything is computed in float64, a chunk of rows at a time, and rounded once, or, if
both sides of a matrix change, once more to at least float32 in between.

A head that shares the embedding's tensor cannot take up the gain of the last norm: it becomes a tensor of its own, and
the model larger by that. Only if all gains of the last norm are equal, which commutes with R, does the pair stay tied.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from compress.modeling.sites import Residual, Sites, ValueSite
from compress.transforms.matrices import map_rows
from compress.transforms.mixing import mix
from compress.transforms.signs import random_signs

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Read = Callable[[str], Tensor]
"""A parameter's original tensor by the name that the model gives it."""


@dataclass(frozen=True)
class Step:
    """What becomes of one parameter: read `source`; multiply its columns with a norm's gain (`offset` + the parameter
    `gain`); mix the last axis with the signs `columns` [g, n / g], the first one with `rows`. `constant`: all entries
    become that."""

    source: str
    gain: str | None = None
    offset: float = 0.0
    columns: Tensor | None = None
    rows: Tensor | None = None
    constant: float | None = None


class Fold:
    """The folded form of every parameter of a model.

    `added` maps the parameters that the folded model has besides its original ones (an untied head) to the ones whose
    shape and type they have; `config_changes` is what config.json must say then.
    """

    def __init__(self, sites: Sites, seed: int = 0, untie: bool = False) -> None:
        self.sites, self.seed = sites, seed
        self._steps: dict[str, Step] = {}
        residual = sites.residual
        if residual is not None:
            self._fold_residual(residual, untie)
        for site in sites.values:
            self._fold_values(site)
        self.added: Mapping[str, str] = {}
        self.config_changes: Mapping[str, bool] = {}
        if residual is not None and untie:
            self.added = {f"{residual.head}.weight": f"{residual.embedding}.weight"}
            self.config_changes = {"tie_word_embeddings": False}

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

    def _fold_residual(self, residual: Residual, untie: bool) -> None:
        signs = random_signs(residual.width, self.seed, "residual").unsqueeze(0)
        last = residual.readers[residual.head]
        self._step(f"{residual.embedding}.weight", columns=signs)
        for name, norm in residual.readers.items():
            if residual.tied and name == residual.head and not untie:
                continue
            self._step(f"{name}.weight", gain=f"{norm}.weight", offset=residual.offset, columns=signs)
        if untie:
            self._step(f"{residual.head}.weight", source=f"{residual.embedding}.weight")
        for norm in set(residual.readers.values()):
            if norm != last or untie or not residual.tied:
                self._step(f"{norm}.weight", constant=1.0 - residual.offset)
        for name in residual.writers:
            self._step(f"{name}.weight", rows=signs)
            self._step(f"{name}.bias", columns=signs)

    def _fold_values(self, site: ValueSite) -> None:
        signs = random_signs(site.kv_heads * site.head_dim, self.seed, f"{site.value}.heads")
        signs = signs.view(site.kv_heads, site.head_dim)
        self._step(f"{site.value}.weight", rows=signs)
        self._step(f"{site.value}.bias", columns=signs)
        self._step(f"{site.output}.weight", columns=signs.repeat_interleave(site.heads // site.kv_heads, 0))

    def _step(self, name: str, **changes: object) -> None:
        self._steps[name] = replace(self._steps.get(name, Step(name)), **changes)  # type: ignore[arg-type]


def make_fold(sites: Sites, seed: int, read: Read) -> Fold:
    """The fold of everything in `sites`, with signs from `seed`. Reads the last norm's weight of a model with a tied
    head, to see whether the head must get a tensor of its own."""
    residual = sites.residual
    untie = False
    if residual is not None and residual.tied:
        gain = read(f"{residual.readers[residual.head]}.weight")
        untie = not bool((gain == gain[0]).all())
    return Fold(sites, seed, untie)


def fold_model(model: PreTrainedModel, fold: Fold) -> None:
    """Fold a model in memory, in place; its parameters stay the same objects in the same types. An untied head gets a
    parameter of its own, and the config says so."""
    added = {name: fold.tensor(name, model.get_parameter) for name in fold.added}
    norms = {f"{norm}.weight" for norm in fold.sites.residual.readers.values()} if fold.sites.residual else set()
    names = [name for name, _ in model.named_parameters() if fold.changes(name)]
    for name in sorted(names, key=norms.__contains__):
        model.get_parameter(name).data = fold.tensor(name, model.get_parameter)
    for name, tensor in added.items():
        module, _, parameter = name.rpartition(".")
        model.get_submodule(module).register_parameter(parameter, nn.Parameter(tensor))
    for key, value in fold.config_changes.items():
        model.config.update({key: value})


def _carry_out(step: Step, original: Tensor, read: Read, dtype: torch.dtype) -> Tensor:
    if step.constant is not None:
        return torch.full_like(original, step.constant, dtype=dtype)
    between = dtype if step.rows is None else torch.promote_types(dtype, torch.float32)
    matrix = original.view(-1, original.shape[-1])
    result = torch.empty_like(matrix, dtype=between)
    if step.columns is not None:
        gain = None if step.gain is None else step.offset + read(step.gain).detach().double()
        map_rows(matrix, mix, step.columns, result, gain)
    else:
        result.copy_(matrix)
    if step.rows is not None:
        map_rows(result.t(), mix, step.rows, result.t())
    return result.view(original.shape).to(dtype)
