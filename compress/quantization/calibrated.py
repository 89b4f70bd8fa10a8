"""One block after the other, each rounded for the inputs that it will get.

    hidden states of the block before -> for each input within the block: its moments over all batches, then the
    matrices that read it, rounded -> the block's outputs, which are the inputs of the next

The inputs are those of the model as far as it is rounded, within the block too: what the query is rounded to shapes
what the output projection gets. Beside them the original model's hidden states are carried along where rounding aims at
the original outputs. In memory are the block twice in float32, the moments of one input with their factor, and of the
hidden states what the budget allows.

The batches are cut into at most `CHUNKS` chunks. Moments are sums of those of the chunks, in their order, so that the
chunks may be shared by several processes: each carries the hidden states of its own ones, and all have the same
rounded block.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from compress.codecs.base import QuantizedMatrix
from compress.distributed import world
from compress.modeling.experts import OpenExperts
from compress.modeling.loading import kind_of
from compress.modeling.stack import Batch, Call, record
from compress.modeling.structure import MatrixView, find_blocks, module_matrix
from compress.quantization.activations import ChunkedActivations
from compress.quantization.groups import Rounded, Scheme, round_group
from compress.quantization.hessian import Moments, summed
from compress.quantization.inputs import Structure, input_rows, structure_of
from compress.quantization.matrix import MatrixReport
from compress.quantization.passes import Passes

CHUNKS = 16
"""Parts of the batches whose moments are summed up on their own: as many processes can share them."""
UNSEEN = "calibrated (no token reached this expert: with all of its layer's)"
"""The status of an expert that the router chose for no token of the calibration data."""
IN_MEMORY = 4 << 30
"""Bytes of inputs that are kept for a model in memory."""


Chunks = Mapping[int, Sequence[tuple[int, ...]]]
"""The shapes of the batches of each chunk, by its number."""
Place = Callable[[int, str, int], Path | None]


class BlockInputs:
    """The hidden states before a block, batch by batch: of the rounded model, and of the original one if asked for."""

    def __init__(self, rounded: ChunkedActivations, original: ChunkedActivations | None) -> None:
        self.rounded, self.original = rounded, original

    @property
    def both(self) -> tuple[ChunkedActivations, ...]:
        return (self.rounded,) if self.original is None else (self.rounded, self.original)

    @property
    def files(self) -> list[Path]:
        return [path for stream in self.both for path in stream.paths]

    def discard(self) -> None:
        for stream in self.both:
            stream.discard()


class Calibration:
    """A model on its way through calibrated rounding. `record_inputs` begins, `round_block` and `carry_on` take turns.

    `batches` are all there are; this process takes its chunks of them. `place(index, stream, chunk)` names the file for
    a chunk of the hidden states before a block, or None to keep them in memory.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        batches: Sequence[Batch],
        scheme: Scheme,
        device: torch.device,
        budget: int,
        place: Place,
    ) -> None:
        self.world = world()
        self._chunks = min(len(batches), CHUNKS)
        cuts = [number * len(batches) // max(self._chunks, 1) for number in range(self._chunks + 1)]
        self._spans = {number: range(cuts[number], cuts[number + 1]) for number in self.world.mine(self._chunks)}
        batches = [batches[at] for at in self._own]
        self._model, self._batches, self._scheme = model, batches, scheme
        self._device, self._budget, self._place = device, budget, place
        self._prefixes = [name for name, _ in find_blocks(model)]
        self._calls: list[tuple[Call, ...]] = []
        masks = (batch.get("attention_mask") for batch in batches)
        self._after: BlockInputs | None = None
        self._passes: list[Passes] = []
        self._masks = [None if mask is None else mask.bool().to(device) for mask in masks]

    @classmethod
    def in_memory(cls, model: PreTrainedModel, batches: Sequence[Batch], scheme: Scheme) -> Calibration:
        """One that keeps all hidden states in memory, on the model's device."""
        return cls(model, batches, scheme, model.device, IN_MEMORY, lambda index, stream, chunk: None)

    def record_inputs(self, first: nn.Module, swap: Callable[[], None] | None = None) -> BlockInputs:
        """Run what comes before the blocks; `first` is the first block with its weights in float32. `swap` is called
        once and puts a rounded embedding in place of the original one, which the rounded stream then begins with."""
        return self.world.together(lambda: self._record_inputs(first, swap))

    def _record_inputs(self, first: nn.Module, swap: Callable[[], None] | None) -> BlockInputs:
        options = self._scheme.options
        again = swap is not None and options.sequential != "nothing"
        hidden = original = self._recorded(first) if options.asymmetric or not again else []
        if swap is not None:
            swap()
        if again:
            hidden = self._recorded(first)
        inputs = self._fresh(0, self._by_chunk([tuple(tensor.shape) for tensor in hidden]))
        for stream, tensors in zip(inputs.both, (hidden, original), strict=False):
            for tensor in tensors:
                stream.write(tensor)
        return _closed(inputs)

    def _recorded(self, first: nn.Module) -> list[Tensor]:
        """The hidden states before the blocks, batch by batch; and what these are called with is kept."""
        batches = [_to(batch, self._device) for batch in self._batches]
        found = list(record(self._model, batches, first)) if batches else []
        self._calls = [recording.calls for recording in found]
        return [recording.hidden for recording in found]

    def reopen(self, index: int, shapes: Sequence[Sequence[int]]) -> BlockInputs:
        """The inputs of block `index`, of the given shapes of all batches, that earlier processes wrote;
        `record_inputs` has been called."""
        chunks = self._by_chunk([tuple(shapes[at]) for at in self._own])

        def placed(stream: str) -> ChunkedActivations:
            return ChunkedActivations.reopen(chunks, lambda chunk: self._place(index, stream, chunk))

        found = self.world.together(lambda: [placed(stream) for stream in self._streams])
        return BlockInputs(found[0], found[1] if len(found) > 1 else None)

    def all_shapes(self, inputs: BlockInputs) -> list[list[int]]:
        """Those of all batches, of all processes."""
        told = self.world.gather(list(zip(self._own, inputs.rounded.shapes, strict=True)))
        known = {at: list(shape) for each in told for at, shape in each}
        return [known[at] for at in sorted(known)]

    def files(self, index: int) -> list[Path]:
        """Where the inputs of block `index` are, those of all processes."""
        places = [self._place(index, stream, chunk) for stream in self._streams for chunk in range(self._chunks)]
        return [place for place in places if place is not None]

    @property
    def _own(self) -> list[int]:
        """The numbers of this process's batches."""
        return [at for span in self._spans.values() for at in span]

    def _by_chunk(self, shapes: Sequence[tuple[int, ...]]) -> Chunks:
        """The shapes of this process's batches."""
        known = iter(shapes)
        return {number: [next(known) for _ in span] for number, span in self._spans.items()}

    @property
    def _streams(self) -> tuple[str, ...]:
        return ("rounded", "original") if self._scheme.options.asymmetric else ("rounded",)

    def _fresh(self, index: int, chunks: Chunks) -> BlockInputs:
        share = self._budget // (4 * len(self._streams))  # of two blocks at once; the other half is for their passes

        def made_of(stream: str) -> ChunkedActivations:
            return ChunkedActivations(chunks, share, lambda chunk: self._place(index, stream, chunk))

        made = [made_of(stream) for stream in self._streams]
        return BlockInputs(made[0], made[1] if len(made) > 1 else None)

    @torch.no_grad()
    def round_block(
        self, index: int, block: nn.Module, views: Sequence[MatrixView], inputs: BlockInputs
    ) -> Iterator[tuple[MatrixView, QuantizedMatrix, MatrixReport]]:
        """Round the matrices of block `index`, in the order in which they are called, in place: `block`, whose weights
        are float32, has the rounded ones at the end. Raises `NumericsError` as the options say."""
        options = self._scheme.options
        again = options.sequential == "matrix"
        original = copy.deepcopy(block) if options.asymmetric or not again else None
        prefix = f"{self._prefixes[index]}."
        by_module = {view.name.removeprefix(prefix): view for view in views}
        calls = [calls[index] for calls in self._calls]
        found = self._structure(block, list(by_module), calls, inputs)
        groups = [part for names in found.groups for part in self._by_signs([by_module[name] for name in names])]
        firsts = [views[0].name.removeprefix(prefix) for views in groups]
        names = [first for first, views in zip(firsts, groups, strict=True) if views[0].index is None]
        last = index + 1 == len(self._prefixes)
        self._after = None
        if not last:
            shapes = self.world.together(lambda: self._shapes_after(block, calls, inputs.rounded))
            self._after = self._fresh(index + 1, self._by_chunk(shapes))
        share = self._budget // (2 * len(self._streams))

        def passes(source: nn.Module, hidden: ChunkedActivations, **more: Any) -> Passes:
            return Passes(source, names, hidden, calls, self._device, share, **more)

        if again or original is None:
            self._passes = [self.world.together(lambda: passes(block, inputs.rounded, tails=found.tails))]
        else:
            after = self._after.rounded if self._after is not None and options.sequential == "nothing" else None
            self._passes = [passes(original, inputs.rounded, outputs=after)]
        if inputs.original is not None and original is not None:
            original_after = None if self._after is None else self._after.original
            self._passes.append(passes(original, inputs.original, outputs=original_after))
        for first, members in zip(firsts, groups, strict=True):
            moments = self._moments(members[0], first)
            unseen = moments is None and members[0].index is not None
            if unseen:
                moments = self._moments(members[0], first, everything=True)
            for view, matrix, report in self._rounded(members, block, prefix, moments):
                if unseen:
                    report = dataclasses.replace(report, status=UNSEEN)
                module_matrix(block.get_submodule(view.name.removeprefix(prefix))).copy_(matrix.dequantize())
                yield view, matrix, report

    def _rounded(
        self, views: Sequence[MatrixView], block: nn.Module, prefix: str, moments: Moments | None
    ) -> list[Rounded]:
        def original_of(view: MatrixView) -> Tensor:
            return module_matrix(block.get_submodule(view.name.removeprefix(prefix)))

        return self.world.together(lambda: round_group(views, original_of, moments, self._scheme, self.world))

    def _structure(
        self, block: nn.Module, names: Sequence[str], calls: Sequence[Call], inputs: BlockInputs
    ) -> Structure:
        """What the first batch shows of it, which is the first process's: another may call other experts."""

        def seen() -> tuple[list[list[str]], list[tuple[str, tuple[str, int]]]]:
            found = structure_of(block, names, calls[0], inputs.rounded.read(0, self._device))
            return [list(group) for group in found.groups], list(found.tails.items())

        groups, tails = self.world.on_first(seen)
        return Structure(tuple(tuple(group) for group in groups), {last: (name, more) for last, (name, more) in tails})

    def _shapes_after(
        self, block: nn.Module, calls: Sequence[Call], before: ChunkedActivations
    ) -> list[tuple[int, ...]]:
        """The shapes of all batches behind the block: those before it, but in models of images, where blocks change
        sizes and channels."""
        if kind_of(self._model) != "image" or not calls:
            return before.shapes
        _, *after = calls[0].run(block, before.read(0, self._device)).shape
        return [(shape[0], *after) for shape in before.shapes]

    def _by_signs(self, views: Sequence[MatrixView]) -> list[list[MatrixView]]:
        """Matrices with one input in parts that mix it alike: an attention and an MLP side by side have signs each."""
        parts: dict[str, list[MatrixView]] = {}
        for view in views:
            mixed = self._scheme.signs[view.name].input is not None
            parts.setdefault(view.group if mixed else "", []).append(view)
        return list(parts.values())

    def carry_on(self, index: int, block: nn.Module, inputs: BlockInputs) -> BlockInputs | None:
        """The inputs of the next block, given the rounded `block`; None after the last."""
        return self.world.together(lambda: self._carry_on(index, block, inputs))

    def _carry_on(self, index: int, block: nn.Module, inputs: BlockInputs) -> BlockInputs | None:
        after, sources = self._after, self._passes
        self._after, self._passes = None, []
        if after is None:
            return None
        if self._scheme.options.sequential == "block":
            calls = [calls[index] for calls in self._calls]
            sources = [Passes(block, [], inputs.rounded, calls, self._device, 0), *sources[1:]]
        for stream, passes in zip(after.both, sources, strict=True):
            for batch in range(stream.written, len(self._calls)):
                stream.write(passes.output(batch))
        return _closed(after)

    def _moments(self, view: MatrixView, name: str, everything: bool = False) -> Moments | None:
        """The moments over all batches of the input of `view`, the module `name` of the block, or of what an expert
        would get if it got `everything`; None when there is no such input."""
        asymmetric = len(self._passes) > 1
        parts = self._chunk_moments(view, name, everything, asymmetric)
        return summed(parts, self._chunks, view.shape[1], self._device, asymmetric, self.world)

    def _chunk_moments(
        self, view: MatrixView, name: str, everything: bool, asymmetric: bool
    ) -> Iterator[Moments | None]:
        """Those of each chunk of this process."""
        batches = iter(range(len(self._calls)))
        for span in self._spans.values():
            moments = None
            for _, batch in zip(span, batches, strict=False):
                rows = self._rows(name, batch) if view.index is None else self._expert_rows(name, batch, everything)
                if not rows or not len(rows[0]):
                    continue
                if moments is None:
                    moments = Moments(view.shape[1], self._device, asymmetric)
                moments.add(*rows)
            yield moments

    def _rows(self, name: str, batch: int) -> list[Tensor]:
        """The inputs of module `name` in the rounded and the original block."""
        found = [each.input(name, batch) for each in self._passes]
        modules = [each.block.get_submodule(name) for each in self._passes]
        return [
            input_rows(module, x, self._masks[batch]) for module, x in zip(modules, found, strict=True) if x is not None
        ]

    @torch.no_grad()
    def _expert_rows(self, name: str, batch: int, everything: bool) -> list[Tensor]:
        """The same for an expert: of the tokens that the rounded model sends to it, in both blocks."""
        experts, projection, number = name.rsplit(".", 2)
        routed = [each.routed(experts, batch) for each in self._passes]
        chosen = slice(None) if everything else routed[0][1].eq(int(number)).any(1)
        rows = []
        for each, (hidden, _) in zip(self._passes, routed, strict=True):
            module = each.block.get_submodule(experts)
            assert isinstance(module, OpenExperts)
            rows.append(module.inputs(projection, int(number), hidden[chosen]))
        return rows


def _closed(inputs: BlockInputs) -> BlockInputs:
    for stream in inputs.both:
        stream.close()
    return inputs


def _to(batch: Batch, device: torch.device) -> Batch:
    return {name: tensor.to(device) for name, tensor in batch.items()}
