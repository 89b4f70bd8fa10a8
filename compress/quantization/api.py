"""`compress.quantize`: a model in memory, quantized in place."""

from __future__ import annotations

import time
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from compress.codecs import registry
from compress.codecs.base import Codec, CodecSpec
from compress.errors import ModelError
from compress.events import Events, seconds_left
from compress.formats.config import QuantizationConfig
from compress.modeling.loading import load_model, require_unquantized
from compress.modeling.structure import MatrixView, matrices, read_view, require_linear
from compress.quantization.allocation import uniform
from compress.quantization.blocks import by_block, mean_error, quantize_block
from compress.quantization.modules import PackedLinear, packed_modules
from compress.quantization.target import untouched


def quantize(
    model: nn.Module | str | Path,
    *,
    bits: float = 3.25,
    codec: str | Codec = "half_pyramid",
    events: Events | None = None,
) -> nn.Module:
    """Quantize the linear maps in the blocks of `model` to at most `bits` a weight on average; returns the model.

    `model` is a module, changed in place, or the name of one to be loaded (`builtin:teacher`, a folder, a hub id) in
    its stored dtype. `codec` is a name or a codec made by `compress.codecs.codec`. Every matrix is rounded to the
    nearest that the codec has; no data are used. Of a transformers model the config gets a `quantization_config`, so
    that `save_pretrained` writes an artifact that `from_pretrained` loads.

    Raises `ModelError` for a model that is quantized already or whose structure is unknown, `UsageError` for a rate
    that the codec does not have, `NumericsError` for weights that are not finite.
    """
    events = events or Events()
    if not isinstance(model, nn.Module):
        model = load_model(model, dtype=None)
    if isinstance(model, PreTrainedModel):
        require_unquantized(model.config, model.config.name_or_path or type(model).__name__)
    if packed_modules(model):
        raise ModelError("The model is already quantized.", remedy="Quantize the original model instead.")
    views = matrices(model)
    require_linear(views)
    rounder = registry.codec(codec) if isinstance(codec, str) else codec
    widths = uniform(views, rounder, bits)
    ignore = untouched(model, views)
    stored_bits = _quantize_in_place(model, views, rounder, widths, events)
    if isinstance(model, PreTrainedModel):
        specs: dict[str, CodecSpec] = {view.module: rounder.spec(widths[view.name]) for view in views}
        config = QuantizationConfig.from_specs(specs, ignore, stored_bits / sum(view.weights for view in views))
        model.config.quantization_config = config.to_dict()
    return model


def _quantize_in_place(
    model: nn.Module, views: list[MatrixView], codec: Codec, widths: dict[str, int], events: Events
) -> int:
    """Replace every matrix of `views` by its packed form; the stored bits. The model is whole until a block is done."""
    blocks = by_block(views)
    bits = 0
    with events.stage("quantize", len(blocks)), torch.no_grad():
        started = time.monotonic()
        for index, block in enumerate(blocks, 1):
            reports = []
            for view, matrix, report in quantize_block(
                block, lambda view: read_view(model.get_parameter(view.parameter), view), codec, widths
            ):
                linear = model.get_submodule(view.module)
                if not isinstance(linear, nn.Linear):
                    raise TypeError(f"'{view.module}' is a {type(linear).__name__}, not an nn.Linear")
                model.set_submodule(view.module, PackedLinear.from_matrix(linear, matrix))
                bits += matrix.bits
                reports.append(report)
            events.emit(
                "step",
                stage="quantize",
                index=index,
                total=len(blocks),
                name=f"block {index - 1}",
                seconds_left=seconds_left(started, index, len(blocks)),
                relative_error=mean_error(reports),
            )
    return bits
