"""`compress.quantize` and `compress.transform`: a model in memory, changed in place."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers.auto import AutoHfQuantizer

from compress.codecs import registry
from compress.codecs.base import Codec, CodecSpec
from compress.data.calibration import Batch
from compress.distributed import world
from compress.errors import ModelError, UsageError
from compress.events import Events
from compress.formats.config import QUANT_METHOD, QuantizationConfig
from compress.modeling.loading import load_config, load_model, load_tokenizer, require_unquantized
from compress.modeling.resolve import resolve_model
from compress.modeling.structure import MatrixView, matrices, require_one_stack
from compress.modeling.weights import keep_names
from compress.quantization.allocation import (
    Allocation,
    Evolve,
    Rates,
    Sensitivity,
    Uniform,
    allocate,
    allocation_of,
    make_groups,
    specs_of,
    uniform,
    uniformly,
)
from compress.quantization.allocation.choose import Data, Problem
from compress.quantization.allocation.course import Subject
from compress.quantization.allocation.source import BlocksInMemory, Resident
from compress.quantization.allocation.store import StoreInMemory
from compress.quantization.blocks import by_block
from compress.quantization.calibrated import IN_MEMORY, Calibration
from compress.quantization.data import CalibrationData, calibration_batches
from compress.quantization.groups import Scheme
from compress.quantization.in_memory import calibrated_blocks, nearest_blocks, replace_matrices, swap_of
from compress.quantization.modules import packed_modules
from compress.quantization.options import Ldlq, Rounding, rounding_of
from compress.quantization.ost import learn_basis
from compress.quantization.replicas import require_same
from compress.quantization.tables import Chosen, TableBits, choose_tables
from compress.quantization.target import Change, learned_fold, require_folded, transformed, unchanged, untouched
from compress.quantization.transforms import Hadamard, Ost, Transform, Untransformed, chosen_transform, parse_transform
from compress.recipe.method import parse_method
from compress.transforms.fold import fold_model
from compress.transforms.incoherence import view_signs

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DEFAULT_BITS = 3.25
"""The rate of codecs that have several."""
PASS_DATA = "Pass data=..., such as 'builtin:python/train'."


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
    allocation: str | Allocation = "uniform",
    first_bits: float | None = None,
    last_bits: float | None = None,
    embedding_bits: int | None = None,
    head_bits: int | None = None,
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
    `allocation` says how the bits are spent: "uniform", "sensitivity", by what each group of matrices loses at each
    rate, which is measured on the data, or "evolve", a search from there (`compress.quantization.allocation.options`).
    `first_bits` and `last_bits` give the first and the last block rates of their own, within the whole.
    `embedding_bits` and `head_bits`, 2 to 8, quantize the table in which tokens are looked up, and the head that scores
    them, to grouped integers of so many bits; without, they stay. `bits` is the rate of the blocks alone.
    `tokenizer` is that of a model given as a module whose own folder is not known; rows of ids need none.

    In a job of several processes (`torch.distributed`) all call this with the same model and data, share the work, and
    end with the same model (docs/distributed.md). `events` of the first are told.

    Of a transformers model the config gets a `quantization_config`, so that `save_pretrained` writes an artifact that
    `from_pretrained` loads.

    Raises `ModelError` for a model that is quantized already or whose structure is unknown, `UsageError` for a rate
    that the codec does not have, `DataError` for data of too few tokens, `NumericsError` for weights that are not
    finite.
    """
    events = _of_first(events)
    if not isinstance(model, nn.Module):
        model = _load(model, dtype=None)
    _require_unquantized(model)
    require_same("weights", model.parameters(), world())
    views = matrices(model, towers)
    rounder = _codec(codec) if isinstance(codec, str) else codec
    asked = parse_transform(transform) if isinstance(transform, str) else transform
    method = _method(rounding, data, asked)
    chosen = chosen_transform(asked, rounder, data is not None)
    change = unchanged(views)
    of_tables = TableBits(embedding_bits, head_bits)
    if not isinstance(chosen, Untransformed):
        change = transformed(_of_transformers(model, "transformed"), views, chosen, seed, model.get_parameter)
    rate = DEFAULT_BITS if bits is None and len(rounder.widths()) > 1 else bits
    rates, groups = Rates(rate, first_bits, last_bits), make_groups(views, rounder, change.mixing)
    spending = _allocation(allocation, data)
    widths = allocate(groups, rounder, rates, uniformly(rounder))
    specs = specs_of(groups, widths, rounder, change.mixing)
    tables: Chosen = ()
    if of_tables.asked:
        tables = choose_tables(_of_transformers(model, "given quantized tables"), of_tables, change.fold.added)
    ignore = untouched(model, views, tables)
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
    if not isinstance(spending, Uniform) and data is not None:
        subject = Subject(views, rounder, signs, method if isinstance(method, Ldlq) else None)
        draws = Data(lambda: batches, *_draws(ours, data, tokenizer, spending, context, seed))
        blocks_there = Resident(BlocksInMemory(ours), IN_MEMORY)
        store = StoreInMemory()
        problem = Problem(blocks_there, subject, groups, rates, spending, draws, store, seed, events)
        specs = specs_of(groups, problem.solve().widths, rounder, change.mixing)
    swap = swap_of(model, tables)
    if isinstance(method, Ldlq):
        scheme = Scheme(rounder, specs, {name: one.to(ours.device) for name, one in signs.items()}, method)
        blocks = calibrated_blocks(ours, by_block(views), Calibration.in_memory(ours, batches, scheme), swap)
    else:
        if swap is not None:
            swap()
        blocks = nearest_blocks(model, by_block(views), rounder, specs, signs)
    stored_bits = replace_matrices(model, blocks, len(by_block(views)), events)
    if isinstance(model, PreTrainedModel):
        config = QuantizationConfig.from_specs(
            {view.place: specs[view.name] for view in views},
            ignore,
            stored_bits / sum(view.weights for view in views),
            tables,
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
    require_same("weights", model.parameters(), world())
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
        change = _learned(model, views, chosen, change, rounder, specs, batches, seed, _of_first(events))
    fold_model(model, change.fold)
    return model


def _of_first(events: Events | None) -> Events:
    """Where to tell of progress: nowhere, but from the first process."""
    return events if events is not None and world().first else Events()


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

    batches = calibration_batches(model, data, read, rows=rows, context=context, seed=seed)
    require_same("calibration data", [tensor for batch in batches for tensor in batch.values()], world())
    return batches


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
    remedies = {
        "transformed": 'Use transform="none".',
        "calibrated": "Leave out the data.",
        "given quantized tables": "Leave out embedding_bits and head_bits.",
    }
    raise UsageError(f"Only transformers models can be {done}.", remedy=remedies[done])


def _codec(text: str) -> Codec:
    method = parse_method(text)
    return registry.codec(method.name, **method.options)


def _allocation(allocation: str | Allocation, data: CalibrationData | None) -> Allocation:
    if isinstance(allocation, str):
        asked = parse_method(allocation)
        allocation = allocation_of(asked.name, asked.options)
    if not isinstance(allocation, Uniform) and data is None:
        raise UsageError(f"The allocation {allocation.name} is measured on data.", remedy=PASS_DATA)
    return allocation


def _draws(
    model: PreTrainedModel,
    data: CalibrationData,
    tokenizer: PreTrainedTokenizerBase | None,
    allocation: Sensitivity | Evolve,
    context: int | None,
    seed: int,
) -> tuple[Callable[[], list[Batch]], Callable[[], list[Batch]]]:
    """Batches that a table is measured on, and those of a search; of rows as they are given all."""
    sample = allocation.sample if isinstance(allocation, Evolve) else allocation.rows
    return (
        lambda: _batches(model, data, tokenizer, allocation.rows, context, seed + 1),
        lambda: _batches(model, data, tokenizer, sample, context, seed + 2),
    )


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
    tensors = world().tensors_of_first(
        lambda: learn_basis(wide, views, transform, codec, specs, batches, seed, events).tensors, wide.device
    )
    return replace(start, fold=learned_fold(start.fold, tensors, seed, model.get_parameter))
