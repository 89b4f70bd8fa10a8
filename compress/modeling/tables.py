"""The tables of a model: the embedding, where tokens are looked up, and the head, which scores them.

Both are matrices [V, d] outside of the blocks, with a row for each token. transformers says which modules they are
(`get_input_embeddings`, `get_output_embeddings`), and identity of their parameters says whether they are one matrix: a
tied table is held by several modules, the embedding, the head, in T5 also the embeddings of both stacks.

Some families multiply what they look up by a constant, the square root of d mostly. A kind of `nn.Embedding` with a
forward function of its own is tried on a small table: it is understood if that is all it does (`Lookup`), and refused
if not.
"""

from __future__ import annotations

import copy
from collections.abc import Collection
from dataclasses import dataclass
from typing import Final, Literal

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import PreTrainedModel

from compress.errors import ModelError
from compress.modeling.structure import MatrixView, is_map

TableKind = Literal["embedding", "head"]
OPTIONS: Final[dict[TableKind, str]] = {"embedding": "--embedding-bits", "head": "--head-bits"}
NO_BLOCK: Final = -1
"""`MatrixView.block` of a table."""
TRIED: Final = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Table:
    """A matrix [V, d] with what it is used as. `modules` hold it, first the one under whose name it is stored."""

    kinds: tuple[TableKind, ...]
    view: MatrixView
    modules: tuple[str, ...]

    @property
    def parameters(self) -> tuple[str, ...]:
        """All names of the matrix."""
        return tuple(f"{module}.weight" for module in self.modules)


@dataclass(frozen=True)
class Lookup:
    """What an embedding makes of the rows E_t that it finds: scale * E_t in the rows' dtype, with the scale rounded to
    that dtype before if it is `rounded`."""

    scale: float = 1.0
    rounded: bool = False

    def __call__(self, rows: Tensor) -> Tensor:
        if self.scale == 1.0:
            return rows
        return rows * (round_to(self.scale, rows.dtype) if self.rounded else self.scale)


def round_to(number: float, dtype: torch.dtype) -> float:
    """`number` rounded to `dtype`."""
    return float(torch.tensor(number, dtype=torch.float64, device="cpu").to(dtype))


def find_tables(
    model: PreTrainedModel, kinds: Collection[TableKind], untied: Collection[str] = (), declared: bool = False
) -> list[Table]:
    """The tables of `model` that are used as `kinds`, a tied one once; the model may be on meta.

    `untied` names parameters that a transform makes matrices of their own. `declared`: parameters that the model says
    are tied count as one though they are not yet, as in `from_pretrained`. Raises `ModelError` for a model without such
    a table, or with one that does more than look up, or multiply.
    """
    found: dict[str, Table] = {}
    for kind in ("embedding", "head"):
        if kind in kinds:
            table = _table(model, kind, set(untied), declared)
            found[table.view.name] = table
    return list(found.values())


def has_head(model: PreTrainedModel) -> bool:
    """Whether the model scores tokens."""
    return model.get_output_embeddings() is not None


def _table(model: PreTrainedModel, kind: TableKind, untied: set[str], declared: bool) -> Table:
    embedding, head = _embedding(model), model.get_output_embeddings()
    module = embedding if kind == "embedding" else head
    name = type(model).__name__
    if module is None:
        what = "looks up no tokens" if kind == "embedding" else "has no output head"
        raise ModelError(f"{name} {what}.", remedy=f"Leave out {OPTIONS[kind]}.")
    names = {one: where for where, one in model.named_modules()}
    held = _holders(model, names[module], untied, declared)
    holders = {where: model.get_submodule(where) for where in held}
    first = embedding if embedding is not None and embedding in holders.values() else module
    held = sorted(held, key=lambda where: (holders[where] is not first, held.index(where)))
    for where in held:
        _require_known(model, where, holders[where], kind)
    kinds: list[TableKind] = ["embedding"] if embedding in holders.values() else []
    kinds += ["head"] if head in holders.values() else []
    rows, columns = first.get_parameter("weight").shape
    view = MatrixView(held[0], f"{held[0]}.weight", None, (rows, columns), NO_BLOCK, held[0], held[0])
    return Table(tuple(kinds), view, tuple(held))


def _embedding(model: PreTrainedModel) -> nn.Module | None:
    """The module that looks up tokens; None in a model that reads something else."""
    try:
        module = model.get_input_embeddings()
    except NotImplementedError:
        return None
    return module if isinstance(module, nn.Embedding) else None


def _holders(model: PreTrainedModel, module: str, untied: set[str], declared: bool) -> list[str]:
    """The modules whose weight is that of `module`, in the model's order."""
    name = f"{module}.weight"
    if name in untied:
        return [module]
    weight = model.get_submodule(module).get_parameter("weight")
    tied: dict[str, str] = model.all_tied_weights_keys if declared else {}
    root = tied.get(name, name)
    names = {target for target, source in tied.items() if source == root} | {root, name}
    every = model.named_parameters(remove_duplicate=False)
    same = [other for other, one in every if other not in untied and (one is weight or other in names)]
    return [other.rpartition(".")[0] for other in same]


def _require_known(model: PreTrainedModel, name: str, module: nn.Module, kind: TableKind) -> None:
    remedy = f"Leave out {OPTIONS[kind]}."
    if isinstance(module, nn.Embedding):
        if module.max_norm is not None:
            raise ModelError(f"'{name}' changes its rows as it looks them up (max_norm).", remedy=remedy)
        lookup_of(real_embedding(model, name), name)
    elif not isinstance(module, nn.Linear) or not is_map(module):
        raise ModelError(f"'{name}' is a {type(module).__name__}, which is no plain table.", remedy=remedy)


def real_embedding(model: PreTrainedModel, name: str) -> nn.Embedding:
    """The embedding `name` of `model`, or where it has buffers without memory, such as a factor, one of a model of the
    same config that has them. Its weight may be on meta."""
    embedding = model.get_submodule(name)
    assert isinstance(embedding, nn.Embedding)
    if not any(buffer.is_meta for buffer in embedding.buffers()):
        return embedding
    with torch.device("cpu"), init_empty_weights(include_buffers=False):
        built = type(model)(copy.deepcopy(model.config)).get_submodule(name)
    assert isinstance(built, nn.Embedding)
    return built


def lookup_of(embedding: nn.Embedding, name: str) -> Lookup:
    """What `embedding` makes of its rows, by trial. Raises `ModelError`, calling it `name`, where that is more than a
    multiplication."""
    if type(embedding).forward is nn.Embedding.forward:
        return Lookup()
    if list(embedding.state_dict()) == ["weight"]:
        ones = _tried(embedding, torch.ones(5, 3, dtype=torch.float64, device="cpu"))
        scale = float(ones.flatten()[0]) if ones is not None else 0.0
        for lookup in (Lookup(scale), Lookup(scale, rounded=True)):
            if all(_agrees(embedding, lookup, dtype) for dtype in TRIED):
                return lookup
    raise ModelError(
        f"'{name}' is a {type(embedding).__name__}, which does more with its rows than to multiply them.",
        remedy="Leave out --embedding-bits (and --head-bits of a tied head).",
    )


def _agrees(embedding: nn.Embedding, lookup: Lookup, dtype: torch.dtype) -> bool:
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(5, 3, generator=generator, device="cpu").to(dtype)
    found = _tried(embedding, table)
    return found is not None and torch.equal(found, lookup(table[_IDS]))


_IDS: Final = torch.tensor([[3, 1, 0], [4, 4, 2]], device="cpu")


def _tried(embedding: nn.Embedding, table: Tensor) -> Tensor | None:
    """What a copy of `embedding` with this table [5, 3] makes of ids [2, 3]; None where it fails."""
    trial = copy.deepcopy(embedding, {id(embedding.weight): nn.Parameter(table, requires_grad=False)})
    trial.padding_idx = None  # which may be beyond this table, and matters to gradients alone
    try:
        with torch.no_grad():
            found = trial.to("cpu")(_IDS)
    except (RuntimeError, TypeError, ValueError, AttributeError, IndexError):
        return None
    return found if isinstance(found, Tensor) else None
