"""`compress.quantize` and `compress.transform`: a model in memory, changed in place."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers.auto import AutoHfQuantizer

from compress.codecs import registry
from compress.codecs.base import Codec, CodecSpec, QuantizedMatrix
from compress.data.calibration import Batch
from compress.errors import ModelError, UsageError
from compress.events import Events, seconds_left
from compress.formats.config import QUANT_METHOD, QuantizationConfig
from compress.modeling.experts import open_experts
from compress.modeling.loading import load_config, load_model, load_tokenizer, require_unquantized
from compress.modeling.resolve import resolve_model
from compress.modeling.structure import MatrixView, as_matrix, find_blocks, matrices, require_one_stack
from compress.modeling.weights import keep_names
from compress.quantization.allocation import uniform
from compress.quantization.blocks import by_block, mean_error
from compress.quantization.calibrated import Calibration, Scheme
from compress.quantization.data import CalibrationData, calibration_batches
from compress.quantization.matrix import MatrixReport, quantize_matrix
from compress.quantization.modules import pack, packed_modules
from compress.quantization.options import Ldlq, Rounding, rounding_of
from compress.quantization.ost import learn_basis
from compress.quantization.target import Change, learned_fold, require_folded, transformed, unchanged, untouched
from compress.quantization.transforms import Hadamard, Ost, Transform, Untransformed, chosen_transform, parse_transform
from compress.recipe.method import parse_method
from compress.transforms.fold import fold_model
from compress.transforms.incoherence import view_signs
from compress.transforms.signs import Signs

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DEFAULT_BITS = 3.25
"""The rate of codecs that have several."""
PASS_DATA = "Pass data=..., such as 'builtin:python/train'."
Rounded = tuple[MatrixView, QuantizedMatrix, MatrixReport]


def quantize(
    model: nn.Module | str | Path,
    *,
    bits: float | None = None,
    data: CalibrationData | None = None,
    codec: str | Codec = "half_pyramid",
    rounding: str | Rounding | None = None,
    transform: str | Transform = "auto",
    rows: int = 128,
    context: int | None = None,
    seed: int = 0,
    towers: bool = False,
    tokenizer: PreTrainedTokenizerBase | None = None,
    events: Events | None = None,
) -> nn.Module:
    """Quantize the linear maps in the blocks of `model` to at most `bits` a weight on average; returns the model.
    Without `bits` that is the rate of a codec that has only one, such as `nf4`, and else 3.25.

    `model` is a module, changed in place, or the name of one to be loaded (`builtin:teacher`, a folder, a hub id) in
    its stored dtype. `codec` is NAME or NAME:key=value,... as on the command line, or a codec made by
    `compress.codecs.codec`; `rounding` likewise.

    With `data` the rounding is calibrated: `rows` rows of `context` tokens (256, or what the model takes) drawn from
    sources of text by `seed`, or rows of token ids int64 [N, T] as they are. `rounding` is "ldlq" then
    (`compress.quantization.options.Ldlq` has its options), and without data "nearest": each matrix to the nearest that
    the codec has. `transform="hadamard"` mixes both sides of every matrix before, folded into the model where that can
    be, so that other parameters change too; "auto" does so for calibrated `half_pyramid`, unless a head would be
    untied. "ost", which needs data and on the way the model in float32, learns rotations and scalings instead
    (`compress.quantization.transforms.Ost` has its options).
    Of a model that reads images or sound beside text only the language part is quantized, unless `towers` asks for all.
    `tokenizer` is that of a model given as a module whose own folder is not known; rows of ids need none.

    Of a transformers model the config gets a `quantization_config`, so that `save_pretrained` writes an artifact that
    `from_pretrained` loads.

    Raises `ModelError` for a model that is quantized already or whose structure is unknown, `UsageError` for a rate
    that the codec does not have, `DataError` for data of too few tokens, `NumericsError` for weights that are not
    finite.
    """
    events = events or Events()
    if not isinstance(model, nn.Module):
        model = _load(model, dtype=None)
    _require_unquantized(model)
    views = matrices(model, towers)
    rounder = _codec(codec) if isinstance(codec, str) else codec
    asked = parse_transform(transform) if isinstance(transform, str) else transform
    method = _method(rounding, data, asked)
    chosen = chosen_transform(asked, rounder, data is not None)
    change = unchanged(views)
    if not isinstance(chosen, Untransformed):
        change = transformed(_of_transformers(model, "transformed"), views, chosen, seed, model.get_parameter)
    rate = DEFAULT_BITS if bits is None and len(rounder.widths()) > 1 else bits
    specs = uniform(views, rounder, rate, change.mixing)
    ignore = untouched(model, views)
    signs = {view.name: view_signs(view, change.mixing[view.name], seed) for view in views}
    batches: list[Batch] = []
    if data is not None:
        ours = _of_transformers(model, "calibrated")
        require_one_stack(views, ours)
        batches = _batches(ours, data, tokenizer, rows, context, seed)
    if isinstance(chosen, Ost):
        change = _learned(ours, views, chosen, change, rounder, specs, batches, seed, events)
    if isinstance(model, PreTrainedModel):
        fold_model(model, change.fold)
    if isinstance(method, Ldlq):
        scheme = Scheme(rounder, specs, {name: one.to(ours.device) for name, one in signs.items()}, method)
        blocks = _calibrated(ours, by_block(views), Calibration.in_memory(ours, batches, scheme))
    else:
        blocks = _nearest(model, by_block(views), rounder, specs, signs)
    stored_bits = _replace(model, blocks, len(by_block(views)), events)
    if isinstance(model, PreTrainedModel):
        config = QuantizationConfig.from_specs(
            {view.place: specs[view.name] for view in views}, ignore, stored_bits / sum(view.weights for view in views)
        )
        _register(model, config)
    return model


def transform(
    model: PreTrainedModel | str | Path,
    transform: str | Hadamard | Ost = "ost",
    *,
    data: CalibrationData | None = None,
    bits: float | None = None,
    codec: str | Codec = "integer",
    rows: int = 128,
    context: int | None = None,
    seed: int = 0,
    tokenizer: PreTrainedTokenizerBase | None = None,
    events: Events | None = None,
) -> PreTrainedModel:
    """Fold a change of basis into the weights of `model`: the same function, easier to quantize, and an ordinary model
    that `save_pretrained` writes for any tool; returns the model.

    `model` is changed in place, or loaded in float32 by its name; weights of fewer bits are rounded to them once more.
    `transform` is "hadamard", or "ost", learned from `data` (as in `quantize`) for matrices that `codec` will round to
    `bits` a weight; without `bits` for matrices as they are, and for activations and keys and values alone.

    Raises `ModelError` for a model of which nothing can be folded or that is quantized already, `UsageError` for "ost"
    without data, `NumericsError` when what is learned diverges.
    """
    if not isinstance(model, nn.Module):
        model = _load(model)
    _require_unquantized(model)
    views = matrices(model)
    chosen = parse_transform(transform) if isinstance(transform, str) else transform
    if not isinstance(chosen, Hadamard | Ost):
        raise UsageError(f"'{chosen.name}' folds nothing.", remedy="Use hadamard or ost.")
    if isinstance(chosen, Ost):
        chosen = chosen.folded(rounded=bits is not None)
    change = transformed(model, views, chosen, seed, model.get_parameter)
    require_folded(change.fold, (parameter for parameter, _ in model.named_parameters()), type(model).__name__)
    if isinstance(chosen, Ost):
        if data is None:
            raise UsageError("A transform is learned from data.", remedy=PASS_DATA)
        rounder = _codec(codec) if isinstance(codec, str) else codec
        specs = {} if bits is None else uniform(views, rounder, bits)
        batches = _batches(model, data, tokenizer, rows, context, seed)
        change = _learned(model, views, chosen, change, rounder, specs, batches, seed, events or Events())
    fold_model(model, change.fold)
    return model


def _register(model: PreTrainedModel, config: QuantizationConfig) -> None:
    """Make `model` for transformers what a loaded artifact is: `dequantize` works, training all of it is refused, and
    `save_pretrained` writes what is packed."""
    quantizer = AutoHfQuantizer.from_config(config.to_dict(), pre_quantized=True)
    vars(model).update(hf_quantizer=quantizer, is_quantized=True, quantization_method=QUANT_METHOD)
    quantizer.postprocess_model(model)
    keep_names(model)


def _batches(
    model: PreTrainedModel,
    data: CalibrationData,
    tokenizer: PreTrainedTokenizerBase | None,
    rows: int,
    context: int | None,
    seed: int,
) -> list[Batch]:
    name = str(model.config.name_or_path)

    def read() -> PreTrainedTokenizerBase:
        if tokenizer is None and not name:
            raise UsageError("The model's folder, with its tokenizer, is not known.", remedy="Pass tokenizer=...")
        return tokenizer or load_tokenizer(name)

    return calibration_batches(model, data, read, rows=rows, context=context, seed=seed)


def _load(name: str | Path, dtype: torch.dtype | None = torch.float32) -> PreTrainedModel:
    """The model `name`. What is quantized is refused before transformers decodes it or asks for packages."""
    require_unquantized(load_config(resolve_model(str(name))), str(name))
    return load_model(name, dtype=dtype)


def _require_unquantized(model: nn.Module) -> None:
    if isinstance(model, PreTrainedModel):
        require_unquantized(model.config, model.config.name_or_path or type(model).__name__)
    if packed_modules(model):
        raise ModelError("The model is already quantized.", remedy="Quantize the original model instead.")


def _of_transformers(model: nn.Module, done: str) -> PreTrainedModel:
    if isinstance(model, PreTrainedModel):
        return model
    remedies = {"transformed": 'Use transform="none".', "calibrated": "Leave out the data."}
    raise UsageError(f"Only transformers models can be {done}.", remedy=remedies[done])


def _codec(text: str) -> Codec:
    method = parse_method(text)
    return registry.codec(method.name, **method.options)


def _method(rounding: str | Rounding | None, data: CalibrationData | None, transform: Transform) -> Rounding:
    if rounding is None:
        rounding = "nearest" if data is None else "ldlq"
    if isinstance(rounding, str):
        asked = parse_method(rounding)
        rounding = rounding_of(asked.name, asked.options)
    method = rounding
    learns = isinstance(transform, Ost)
    if (isinstance(method, Ldlq) or learns) and data is None:
        what = "A transform is learned from" if learns else "Calibrated rounding needs"
        raise UsageError(f"{what} data.", remedy=PASS_DATA)
    if not isinstance(method, Ldlq) and not learns and data is not None:
        raise UsageError("Rounding to the nearest uses no data.", remedy="Leave out one of the two.")
    return method


def _learned(
    model: PreTrainedModel,
    views: Sequence[MatrixView],
    transform: Ost,
    start: Change,
    codec: Codec,
    specs: Mapping[str, CodecSpec],
    batches: Sequence[Batch],
    seed: int,
    events: Events,
) -> Change:
    """What becomes of `start` by learning, on a copy of the model unless it is in float32."""
    wide = model if model.dtype == torch.float32 else copy.deepcopy(model).float()
    learned = learn_basis(wide, views, transform, codec, specs, batches, seed, events)
    return replace(start, fold=learned_fold(start.fold, learned.tensors, seed, model.get_parameter))


def _nearest(
    model: nn.Module,
    blocks: Sequence[list[MatrixView]],
    codec: Codec,
    specs: Mapping[str, CodecSpec],
    signs: Mapping[str, Signs],
) -> Iterator[Iterator[Rounded]]:
    """The rounded matrices of each block."""

    def rounded(views: Sequence[MatrixView]) -> Iterator[Rounded]:
        for view in views:
            weight = as_matrix(model.get_parameter(view.parameter), view).detach()
            yield view, *quantize_matrix(view.name, weight, codec, specs[view.name], signs[view.name])

    for views in blocks:
        yield rounded(views)


def _calibrated(
    model: PreTrainedModel, blocks: Sequence[list[MatrixView]], calibration: Calibration
) -> Iterator[Iterator[Rounded]]:
    """The same with calibration. The blocks run as copies in float32, of which one is there at a time."""
    originals = [block for _, block in find_blocks(model)]
    inputs = calibration.record_inputs(open_experts(copy.deepcopy(originals[0]).float()))
    for index, views in enumerate(blocks):
        block = open_experts(copy.deepcopy(originals[index]).float().requires_grad_(False))
        yield calibration.round_block(index, block, views, inputs)
        after = calibration.carry_on(index, block, inputs)
        inputs.discard()
        if after is not None:
            inputs = after


def _replace(model: nn.Module, blocks: Iterator[Iterator[Rounded]], total: int, events: Events) -> int:
    """Replace every matrix by its packed form; the stored bits. The model is whole until a block is done."""
    bits = 0
    with events.stage("quantize", total), torch.no_grad():
        started = time.monotonic()
        for index, block in enumerate(blocks, 1):
            reports, rounded = [], []
            for view, matrix, report in block:
                rounded.append((view, matrix))
                bits += matrix.bits
                reports.append(report)
            pack(model, rounded)
            events.emit(
                "step",
                stage="quantize",
                index=index,
                total=total,
                name=f"block {index - 1}",
                seconds_left=seconds_left(started, index, total),
                relative_error=mean_error(reports),
            )
    return bits
