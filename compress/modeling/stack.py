"""Running a model one block at a time, as the model itself would.

A block gets hidden states and much else: masks, positions, rotations. What exactly differs from family to family, so it
is not rebuilt here but recorded: the model runs with a `Recorder` in the place of each block, which keeps what the
block is called with and hands the hidden states on. Nothing is traced; blocks are ordinary modules before and after.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from transformers import PreTrainedModel

from compress.errors import ModelError
from compress.modeling.loading import kind_of
from compress.modeling.structure import find_blocks

Batch = Mapping[str, Tensor]
"""The model's inputs: `input_ids` int64 [B, T], and where rows are filled up `attention_mask` int64 [B, T]; of a model
of images `pixel_values` float32 [B, C, H, W]."""


@dataclass(frozen=True)
class Call:
    """What a block is called with after the hidden states, floats in float32."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def run(self, block: nn.Module, hidden: Tensor) -> Tensor:
        """The block's hidden states [B, T, d]."""
        return _hidden(block(hidden, *self.args, **self.kwargs))


@dataclass(frozen=True)
class Recording:
    """One batch: the hidden states float32 [B, T, d] that the first block gets, and each block's call."""

    hidden: Tensor
    calls: tuple[Call, ...]


Heard = tuple[int, Tensor, Call]
"""The index of a block, the hidden states it was called with, and the rest."""


class _Enough(Exception):
    """Raised by a recorder to end the model's forward pass."""


class Substitute(nn.Module):
    """Stands in the place of `block` in a model. Facts that a model asks of its blocks, such as the kind of attention,
    are those of the block."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("block"), name)


@contextmanager
def substituted(model: nn.Module, stand_in: Callable[[int, str, nn.Module], nn.Module]) -> Iterator[None]:
    """Within this, each block of `model` is `stand_in(index, name, block)`."""
    blocks = find_blocks(model)
    try:
        for index, (name, block) in enumerate(blocks):
            model.set_submodule(name, stand_in(index, name, block))
        yield
    finally:
        for name, block in blocks:
            model.set_submodule(name, block)


class Recorder(Substitute):
    """Stands in the place of `block` in a model that is run for what its blocks are called with."""

    def __init__(self, block: nn.Module, index: int, log: list[Heard], last: bool, tuples: bool) -> None:
        super().__init__(block)
        self._index, self._log, self._last, self._tuples = index, log, last, tuples

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        hidden, rest = (args[0], args[1:]) if args else (kwargs.pop("hidden_states"), ())
        self._log.append((self._index, hidden, Call(tuple(rest), kwargs)))
        if self._last:
            raise _Enough
        return (hidden,) if self._tuples else hidden


class _Passed(Substitute):
    """Stands in the place of a block that was run already: hands on what it gets, or, the first one, `hidden`."""

    def __init__(self, block: nn.Module, hidden: Tensor | None, tuples: bool) -> None:
        super().__init__(block)
        self._hidden, self._tuples = hidden, tuples

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        given = args[0] if args else kwargs["hidden_states"]
        hidden = given if self._hidden is None else self._hidden.to(given.dtype)
        return (hidden,) if self._tuples else hidden


@contextmanager
def after_blocks(model: PreTrainedModel, hidden: Tensor, tuples: bool) -> Iterator[None]:
    """Within this, `model` makes of the batch that led to `hidden`, the hidden states after its last block, what it
    would say; its blocks, which return `tuples` or not, are not run."""

    def stand_in(index: int, name: str, block: nn.Module) -> nn.Module:
        return _Passed(block, None if index else hidden, tuples)

    with substituted(model, stand_in), torch.no_grad():
        yield


def record(model: PreTrainedModel, batches: Sequence[Batch], first: nn.Module) -> Iterator[Recording]:
    """What the blocks of `model` are called with for each of `batches`, one recording at a time.

    The base model's parts before and after the blocks must have their weights; the blocks themselves are not run, so
    they may be on the meta device, but for `first`, the first one with its weights in float32, which tells what blocks
    return. Tensors that are the same for all batches are held once. Raises `ModelError` for a model whose blocks are
    called in a way that is not understood: not each once and in order, with hidden states first, of which nothing but
    hidden states is used.
    """
    blocks = len(find_blocks(model))
    tuples = returns_tuples(model, batches[0], first)
    shared: tuple[Call, ...] | None = None
    for batch in batches:
        whole = shared is None and kind_of(model) != "image"
        log = _run(model, batch, ends_at=None if whole else blocks - 1, tuples=tuples)
        if [index for index, _, _ in log] != list(range(blocks)):
            raise _strange(model, f"{len(log)} calls of {blocks} blocks, numbers {[index for index, _, _ in log]}")
        known: dict[int, Any] = {}
        calls = tuple(_plain(call, known) for _, _, call in log)
        shared = calls if shared is None else tuple(_share(*pair) for pair in zip(calls, shared, strict=True))
        yield Recording(log[0][1].to(torch.float32), shared)


def returns_tuples(model: PreTrainedModel, batch: Batch, first: nn.Module) -> bool:
    """Whether blocks like `first`, with its weights in float32, return a tuple. Raises as `record` does."""
    log = _run(model, batch, ends_at=0, tuples=False)
    if not log:
        raise _strange(model, "they are not called at all")
    hidden, call = log[0][1].to(torch.float32), _plain(log[0][2], {})
    with torch.no_grad():
        output = first(hidden, *call.args, **call.kwargs)
    if _hidden(output).shape != hidden.shape and kind_of(model) != "image":
        raise _strange(model, f"one makes {list(_hidden(output).shape)} of {list(hidden.shape)}")
    return isinstance(output, tuple)


def _run(model: PreTrainedModel, batch: Batch, ends_at: int | None, tuples: bool) -> list[Heard]:
    """The calls of the blocks up to number `ends_at`; None: all that there are, and what follows them."""
    log: list[Heard] = []
    body = model.base_model
    options = {"use_cache": False} if model.can_generate() else {}

    def recorder(index: int, name: str, block: nn.Module) -> Recorder:
        return Recorder(block, index, log, index == ends_at, tuples)

    with substituted(model, recorder), torch.no_grad(), suppress(_Enough):
        try:
            body(**batch, **options)
        except (ValueError, TypeError, IndexError, AttributeError) as error:
            if not log:
                raise
            raise _strange(model, f"it uses more than the hidden states that they return ({error})") from error
    return log


def _hidden(output: Any) -> Tensor:
    hidden: Tensor = output[0] if isinstance(output, tuple) else output
    return hidden


def _plain(call: Call, known: dict[int, Any]) -> Call:
    """The call with its floats in float32; a tensor that `known` has, by identity, is converted once."""

    def convert(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        if id(leaf) not in known:
            known[id(leaf)] = (leaf.to(torch.float32) if leaf.is_floating_point() else leaf, leaf)
        return known[id(leaf)][0]

    return Call(tree_map(convert, call.args), tree_map(convert, dict(call.kwargs)))


def _share(call: Call, before: Call) -> Call:
    """`call`, with the tensors of the call `before` where they are equal."""

    def choose(new: Any, old: Any) -> Any:
        same = isinstance(new, Tensor) and isinstance(old, Tensor) and new.shape == old.shape and torch.equal(new, old)
        return old if same else new

    if len(call.args) != len(before.args) or call.kwargs.keys() != before.kwargs.keys():
        return call
    args = tuple(tree_map(choose, new, old) for new, old in zip(call.args, before.args, strict=True))
    return Call(args, {name: tree_map(choose, value, before.kwargs[name]) for name, value in call.kwargs.items()})


def _strange(model: nn.Module, what: str) -> ModelError:
    return ModelError(
        f"The blocks of {type(model).__name__} cannot be run one by one: {what}.",
        remedy="Quantize it without data.",
    )
