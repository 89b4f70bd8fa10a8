"""The matrices of a model in memory: rounded block by block, and each block replaced by its packed form."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import nn
from transformers import PreTrainedModel

from compress.codecs.base import Codec, CodecSpec, QuantizedMatrix
from compress.distributed import world
from compress.events import Events, seconds_left
from compress.modeling.experts import open_experts
from compress.modeling.structure import MatrixView, as_matrix, find_blocks
from compress.quantization.blocks import mean_error
from compress.quantization.calibrated import Calibration
from compress.quantization.embedding import pack_tables
from compress.quantization.matrix import MatrixReport, quantize_matrix
from compress.quantization.modules import pack
from compress.quantization.pieces import share_matrices
from compress.quantization.tables import Chosen, round_table
from compress.transforms.signs import Signs

Rounded = tuple[MatrixView, QuantizedMatrix, MatrixReport]


def swap_of(model: nn.Module, tables: Chosen) -> Callable[[], None] | None:
    """What puts packed tables, which are rounded now, in their places; None without any."""
    if not isinstance(model, PreTrainedModel) or not tables:
        return None
    weights = [model.get_parameter(table.view.parameter).detach() for table, _ in tables]
    rounded = [
        (table, round_table(table, weight, spec)[0]) for (table, spec), weight in zip(tables, weights, strict=True)
    ]
    return lambda: pack_tables(model, rounded)


def nearest_blocks(
    model: nn.Module,
    blocks: Sequence[list[MatrixView]],
    codec: Codec,
    specs: Mapping[str, CodecSpec],
    signs: Mapping[str, Signs],
) -> Iterator[Iterator[Rounded]]:
    """The rounded matrices of each block."""

    def rounded(view: MatrixView) -> tuple[QuantizedMatrix, MatrixReport]:
        weight = as_matrix(model.get_parameter(view.parameter), view).detach()
        return quantize_matrix(view.name, weight, codec, specs[view.name], signs[view.name])

    for views in blocks:
        device = model.get_parameter(views[0].parameter).device
        yield share_matrices(views, specs, rounded, world(), device)


def calibrated_blocks(
    model: PreTrainedModel,
    blocks: Sequence[list[MatrixView]],
    calibration: Calibration,
    swap: Callable[[], None] | None,
) -> Iterator[Iterator[Rounded]]:
    """The same with calibration, which calls `swap` on its way. The blocks run as copies in float32, of which one is
    there at a time."""
    originals = [block for _, block in find_blocks(model)]
    inputs = calibration.record_inputs(open_experts(copy.deepcopy(originals[0]).float()), swap)
    for index, views in enumerate(blocks):
        block = open_experts(copy.deepcopy(originals[index]).float().requires_grad_(False))
        yield calibration.round_block(index, block, views, inputs)
        after = calibration.carry_on(index, block, inputs)
        inputs.discard()
        if after is not None:
            inputs = after


def replace_matrices(model: nn.Module, blocks: Iterator[Iterator[Rounded]], total: int, events: Events) -> int:
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
