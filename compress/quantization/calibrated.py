"""One block after the other, each rounded for the inputs that it will get.

    hidden states of the block before -> for each input within the block: its moments over all batches, then the
    matrices that read it, rounded -> the block's outputs, which are the inputs of the next

The inputs are those of the model as far as it is rounded, within the block too: what the query is rounded to shapes
what the output projection gets. Beside them the original model's hidden states are carried along where rounding aims at
the original outputs. In memory are the block twice in float32, the moments of one input with their factor, and of the
hidden states what the budget allows.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from compress.codecs.base import Codec, CodecSpec, GainRule, QuantizedMatrix
from compress.errors import NumericsError
from compress.modeling.experts import OpenExperts
from compress.modeling.loading import kind_of
from compress.modeling.stack import Batch, Call, record
from compress.modeling.structure import MatrixView, find_blocks, module_matrix
from compress.quantization.activations import Activations
from compress.quantization.hessian import Factor, Moments, factorize, output_energy
from compress.quantization.inputs import input_rows, structure_of
from compress.quantization.ldlq import Order, round_matrix
from compress.quantization.matrix import MatrixReport, quantize_matrix, sqnr
from compress.quantization.options import Ldlq
from compress.quantization.passes import Passes
from compress.transforms.matrices import mix_moment, mix_weight
from compress.transforms.signs import Signs

UNSEEN = "calibrated (no token reached this expert: with all of its layer's)"
"""The status of an expert that the router chose for no token of the calibration data."""
IN_MEMORY = 4 << 30
"""Bytes of inputs that are kept for a model in memory."""


@dataclass(frozen=True)
class Scheme:
    """How the matrices of a model are rounded: the codec, each matrix's spec, as it is stored, and signs by its name,
    the options."""

    codec: Codec
    specs: Mapping[str, CodecSpec]
    signs: Mapping[str, Signs]
    options: Ldlq


class BlockInputs:
    """The hidden states before a block, batch by batch: of the rounded model, and of the original one if asked for."""

    def __init__(self, rounded: Activations, original: Activations | None) -> None:
        self.rounded, self.original = rounded, original

    @property
    def both(self) -> tuple[Activations, ...]:
        return (self.rounded,) if self.original is None else (self.rounded, self.original)

    @property
    def files(self) -> list[Path]:
        return [stream.path for stream in self.both if stream.path is not None]

    def discard(self) -> None:
        for stream in self.both:
            stream.discard()


class Calibration:
    """A model on its way through calibrated rounding. `record_inputs` begins, `round_block` and `carry_on` take turns.

    `place(index, stream)` names the file for the hidden states before a block, or None to keep them in memory.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        batches: Sequence[Batch],
        scheme: Scheme,
        device: torch.device,
        budget: int,
        place: Callable[[int, str], Path | None],
    ) -> None:
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
        return cls(model, batches, scheme, model.device, IN_MEMORY, lambda index, stream: None)

    def record_inputs(self, first: nn.Module) -> BlockInputs:
        """Run what comes before the blocks; `first` is the first block with its weights in float32."""
        hidden = []
        for recording in record(self._model, [_to(batch, self._device) for batch in self._batches], first):
            self._calls.append(recording.calls)
            hidden.append(recording.hidden)
        inputs = self._fresh(0, [tuple(tensor.shape) for tensor in hidden])
        for tensor in hidden:
            for stream in inputs.both:
                stream.write(tensor)
        return _closed(inputs)

    def reopen(self, index: int, shapes: Sequence[Sequence[int]]) -> BlockInputs:
        """The inputs of block `index`, of the given shapes, that an earlier process wrote; `record_inputs` has been
        called."""
        paths = [self._place(index, stream) for stream in self._streams]
        found = [Activations.reopen([tuple(shape) for shape in shapes], path) for path in paths if path is not None]
        return BlockInputs(found[0], found[1] if len(found) > 1 else None)

    @property
    def _streams(self) -> tuple[str, ...]:
        return ("rounded", "original") if self._scheme.options.asymmetric else ("rounded",)

    def _fresh(self, index: int, shapes: Sequence[tuple[int, ...]]) -> BlockInputs:
        share = self._budget // (4 * len(self._streams))  # of two blocks at once; the other half is for their passes
        made = [Activations(shapes, share, self._place(index, stream)) for stream in self._streams]
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
        found = structure_of(block, list(by_module), calls[0], inputs.rounded.read(0, self._device))
        groups = [part for names in found.groups for part in self._by_signs([by_module[name] for name in names])]
        firsts = [views[0].name.removeprefix(prefix) for views in groups]
        names = [first for first, views in zip(firsts, groups, strict=True) if views[0].index is None]
        last = index + 1 == len(self._prefixes)
        self._after = None if last else self._fresh(index + 1, self._shapes_after(block, calls[0], inputs.rounded))
        share = self._budget // (2 * len(self._streams))

        def passes(source: nn.Module, hidden: Activations, **more: Any) -> Passes:
            return Passes(source, names, hidden, calls, self._device, share, **more)

        if again or original is None:
            self._passes = [passes(block, inputs.rounded, tails=found.tails)]
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
            for view, matrix, report in _round_group(members, block, prefix, moments, self._scheme):
                if unseen:
                    report = dataclasses.replace(report, status=UNSEEN)
                module_matrix(block.get_submodule(view.name.removeprefix(prefix))).copy_(matrix.dequantize())
                yield view, matrix, report

    def _shapes_after(self, block: nn.Module, call: Call, before: Activations) -> list[tuple[int, ...]]:
        """The shapes of all batches behind the block: those before it, but in models of images, where blocks change
        sizes and channels."""
        if kind_of(self._model) != "image":
            return before.shapes
        _, *after = call.run(block, before.read(0, self._device)).shape
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
        moments = None
        for batch in range(len(self._calls)):
            rows = self._rows(name, batch) if view.index is None else self._expert_rows(name, batch, everything)
            if not rows or not len(rows[0]):
                continue
            if moments is None:
                moments = Moments(rows[0].shape[-1], self._device, len(rows) > 1)
            moments.add(*rows)
        if moments is not None:
            moments.close()
        return moments

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


def _round_group(
    views: Sequence[MatrixView], block: nn.Module, prefix: str, moments: Moments | None, scheme: Scheme
) -> Iterator[tuple[MatrixView, QuantizedMatrix, MatrixReport]]:
    """Round matrices that share an input."""

    def original_of(view: MatrixView) -> Tensor:
        return module_matrix(block.get_submodule(view.name.removeprefix(prefix)))

    def weight_of(view: MatrixView) -> Tensor:
        return mix_weight(original_of(view), scheme.signs[view.name], torch.float32)

    if moments is None:
        yield from _fall_back(views, original_of, scheme, "never called")
        return
    facts = {"tokens": moments.tokens, "dead_channels": moments.dead, "broken_channels": moments.broken}
    signs = scheme.signs[views[0].name].input
    if signs is not None:
        mix_moment(moments.hessian, signs)
        if moments.shift is not None:
            mix_moment(moments.shift, signs)
    probe = scheme.codec.rounding(views[0].shape, scheme.specs[views[0].name].plain, moments.hessian.device)
    order = Order.of(moments.hessian.diagonal(), probe.dim, probe.scope, scheme.options.order)
    columns = order.columns
    diagonal = moments.hessian.diagonal()[columns].clone()
    moved = [_moved(weight_of(view), moments, columns) for view in views]
    moments.shift = None
    hessian = moments.hessian[columns.unsqueeze(1), columns]
    moments.release()
    try:
        factor = factorize(hessian, scheme.options.damping, views[0].name)
    except NumericsError:
        if scheme.options.fallback == "error":
            raise
        yield from _fall_back(views, original_of, scheme, "indefinite Hessian")
        return
    del hessian
    for view, shift in zip(views, moved, strict=True):
        weight = weight_of(view)
        plain, error = _round_one(view, weight[:, columns], shift, factor, diagonal, order, scheme)
        matrix = plain.mixed(scheme.signs[view.name])
        report = MatrixReport(
            view.name,
            view.shape,
            matrix.spec.codec,
            matrix.bits_per_weight,
            error,
            sqnr(error),
            "calibrated",
            {**facts, "damping": factor.damping / float(diagonal.mean() or 1.0)},
        )
        yield view, matrix, report


def _moved(weight: Tensor, moments: Moments, columns: Tensor) -> Tensor | None:
    """W C float32 [o, n], columns in order; None without C."""
    if moments.shift is None:
        return None
    return (weight @ moments.shift.to(torch.float32))[:, columns]


def _round_one(
    view: MatrixView,
    weight: Tensor,
    moved: Tensor | None,
    factor: Factor,
    diagonal: Tensor,
    order: Order,
    scheme: Scheme,
) -> tuple[QuantizedMatrix, float]:
    """The matrix of the gain rule that serves the output best, and its relative error; `weight` is in `order`."""
    options = scheme.options
    target = weight
    if moved is not None:
        target = weight + options.asymmetric * torch.cholesky_solve(moved.T, factor.lower).T
    rules: tuple[GainRule, ...] = ("projection", "norm") if options.gain == "best" else (options.gain,)
    found: list[tuple[float, QuantizedMatrix, Tensor]] = []
    for rule in rules:
        rounding = scheme.codec.rounding(
            view.shape, scheme.specs[view.name].plain, weight.device, gain=rule, search=options.search
        )
        round_matrix(target, factor, order, rounding, sweeps=options.sweeps, refit=options.refit)
        value = rounding.decoded()[:, order.columns]
        loss = output_energy(target - value, factor, diagonal) if len(rules) > 1 else 0.0
        found.append((loss, rounding.finish(), value))
    _, matrix, value = min(found, key=lambda one: one[0])
    energy = output_energy(weight, factor, diagonal)
    return matrix, output_energy(weight - value, factor, diagonal) / energy if energy > 0 else 0.0


def _fall_back(
    views: Sequence[MatrixView], original_of: Callable[[MatrixView], Tensor], scheme: Scheme, why: str
) -> Iterator[tuple[MatrixView, QuantizedMatrix, MatrixReport]]:
    """Rounding to the nearest where calibration says nothing, if the options allow it."""
    if scheme.options.fallback == "error":
        raise NumericsError(
            f"'{views[0].name}' cannot be calibrated: {why}.",
            remedy="Give other data, or allow rounding to the nearest with --rounding ldlq:fallback=nearest.",
        )
    for view in views:
        signs, spec = scheme.signs[view.name], scheme.specs[view.name]
        matrix, report = quantize_matrix(view.name, original_of(view), scheme.codec, spec, signs)
        yield view, matrix, dataclasses.replace(report, status=f"nearest ({why})")
