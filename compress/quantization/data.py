"""From what a caller names as calibration data to batches of a model's inputs.

What a batch holds depends on the kind of model: rows of tokens for one that predicts them, documents for an encoder,
halves of rows for an encoder with a decoder, images for one that reads pixels. Batches that the caller has made pass
through as they are, after a look at what is in them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import chain
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.func import functional_call

from compress.data import image_source, require_kind, text_source
from compress.data.calibration import (
    Batch,
    calibration_rows,
    causal_batches,
    decoder_start,
    encoder_batches,
    seq2seq_batches,
)
from compress.data.pixels import (
    ImageProcessor,
    calibration_images,
    channels_of,
    image_processor_of,
    pixel_batches,
)
from compress.errors import DataError, UsageError
from compress.modeling.loading import kind_of, positions_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

CONTEXT = 256
"""Tokens of a row where nobody says how many."""

CalibrationData = str | Sequence[str] | Tensor | Sequence[Batch]
"""Sources as a recipe names them; rows of token ids int64 [N, T] without filling; images [N, C, H, W], uint8 before or
floating-point after the model's image processor; or batches of a model's inputs by name, such as `input_ids` int64
[B, T] with `attention_mask`, for a decoder beside an encoder `decoder_input_ids`, or `pixel_values` [B, C, H, W]."""

IDS = ("input_ids", "decoder_input_ids")


def calibration_batches(
    model: PreTrainedModel,
    data: CalibrationData,
    tokenizer: Callable[[], PreTrainedTokenizerBase],
    *,
    rows: int,
    context: int | None,
    seed: int,
    processor: Callable[[], ImageProcessor] | None = None,
) -> list[Batch]:
    """Batches for `model`: of rows of `row_length`, or of images. `tokenizer` is called for text alone, `processor` for
    images that are not pre-processed; without it they get the processor in the model's own folder.

    Raises `DataError` for data of another kind than the model reads, without a row, or with ids that are no token,
    `UsageError` for rows longer than the model takes, `ModelError` for a model without an image processor.
    """
    images = kind_of(model) == "image"
    process = processor or (lambda: image_processor_of(model))
    if isinstance(data, Tensor):
        batches = _images_of(model, data, process) if images else _rows_of(model, data)
    elif isinstance(data, str) or all(isinstance(part, str) for part in data):
        specs = [data] if isinstance(data, str) else [str(part) for part in data]
        require_kind(kind_of(model), specs, type(model).__name__)
        if images:
            source = image_source(specs)
            batches = calibration_images(source, process(), channels_of(model.config), rows=rows, seed=seed)
        else:
            batches = _text_batches(model, specs, tokenizer, rows, context, seed)
    else:
        batches = _as_given(model, data)
    for batch in batches:
        _check_images(model, batch) if images else _check_ids(model, batch)
    if images:
        _check_size(model, batches[0]["pixel_values"])
    return batches


def row_length(model: PreTrainedModel, context: int | None) -> int:
    """Tokens of a row: `context`, or without it `CONTEXT`, or as many as the model takes. Raises `UsageError` for a
    `context` that is more than that."""
    longest = positions_of(model.config)
    if context is None:
        return CONTEXT if longest is None else min(CONTEXT, longest)
    _check_context(model, context)
    return context


def sample_text(model: PreTrainedModel, data: CalibrationData, rows: int, context: int | None, seed: int) -> str:
    """What `calibration_batches` draws, for a report."""
    specs = [part for part in ([data] if isinstance(data, str) else data) if isinstance(part, str)]
    if not specs:
        return "batches as given"
    what = "images" if kind_of(model) == "image" else f"rows of {row_length(model, context)} tokens"
    return f"{rows} {what} of {' + '.join(specs)}, seed {seed}"


def _text_batches(
    model: PreTrainedModel,
    specs: list[str],
    tokenizer: Callable[[], PreTrainedTokenizerBase],
    rows: int,
    context: int | None,
    seed: int,
) -> list[Batch]:
    source, length = text_source(specs), row_length(model, context)
    if kind_of(model) == "encoder":
        return encoder_batches(source, tokenizer(), rows=rows, context=length, seed=seed)
    drawn = calibration_rows(source, tokenizer(), rows=rows, context=length, seed=seed)
    if kind_of(model) == "seq2seq":
        return seq2seq_batches(drawn, decoder_start(model))
    return causal_batches(drawn)


def _rows_of(model: PreTrainedModel, rows: Tensor) -> list[Batch]:
    if rows.ndim != 2 or rows.dtype != torch.int64 or not rows.numel():
        raise DataError(
            f"Calibration rows are {list(rows.shape)} of {rows.dtype}.", remedy="Give token ids, int64 [rows, tokens]."
        )
    return seq2seq_batches(rows, decoder_start(model)) if kind_of(model) == "seq2seq" else causal_batches(rows)


def _images_of(model: PreTrainedModel, images: Tensor, processor: Callable[[], ImageProcessor]) -> list[Batch]:
    if images.ndim != 4 or not images.numel() or not (images.dtype == torch.uint8 or images.is_floating_point()):
        raise DataError(
            f"Calibration images are {list(images.shape)} of {images.dtype}.",
            remedy="Give [N, C, H, W], uint8 or, as the model reads them, floating-point.",
        )
    return pixel_batches(images, processor, channels_of(model.config))


def _as_given(model: PreTrainedModel, data: Sequence[object]) -> list[Batch]:
    needed = [model.main_input_name]
    if model.config.is_encoder_decoder:
        needed.append("decoder_input_ids")
    batches = [dict(batch) for batch in data if isinstance(batch, dict)]
    if len(batches) != len(data) or not batches or not all(name in batch for batch in batches for name in needed):
        shown = ", ".join(f"'{name}': ..." for name in needed)
        raise DataError(f"Calibration batches are no list of {{{shown}}}.", remedy="Give such batches, or a source.")
    return batches


def _check_ids(model: PreTrainedModel, batch: Batch) -> None:
    for name in IDS:
        if name not in batch:
            continue
        ids = batch[name]
        _check_context(model, ids.shape[1])
        vocabulary = model.config.get_text_config().vocab_size
        lowest, highest = int(ids.min()), int(ids.max())
        if lowest < 0 or highest >= vocabulary:
            raise DataError(
                f"Calibration rows have token ids from {lowest} to {highest}; the model knows 0 to {vocabulary - 1}.",
                remedy="Use the model's own tokenizer.",
            )


def _check_images(model: PreTrainedModel, batch: Batch) -> None:
    pixels, channels = batch["pixel_values"], channels_of(model.config)
    if pixels.ndim != 4 or pixels.shape[1] != channels or not pixels.is_floating_point() or not pixels.numel():
        raise DataError(
            f"Calibration images are {list(pixels.shape)} of {pixels.dtype}.",
            remedy=f"Give pixel_values as the model reads them: floating-point [B, {channels}, H, W].",
        )
    if not pixels.isfinite().all():
        raise DataError("Calibration images have values that are not finite.", remedy="Leave those images out.")


@torch.no_grad()
def _check_size(model: PreTrainedModel, pixels: Tensor) -> None:
    """Raise `DataError` for images of a size that the model refuses: it is run on one without numbers, on the meta
    device, where that costs nothing. What cannot be run there is not checked."""
    named = chain(model.named_parameters(), model.named_buffers())
    hollow = {name: torch.empty_like(tensor, device="meta") for name, tensor in named}
    one = torch.empty_like(pixels[:1], device="meta", dtype=model.dtype)
    try:
        with suppress(RuntimeError):
            functional_call(model, hollow, kwargs={"pixel_values": one})
    except ValueError as error:
        raise DataError(
            f"The {type(model).__name__} refuses images of {pixels.shape[2]} x {pixels.shape[3]}: {error}",
            remedy="Correct the sizes in preprocessor_config.json.",
        ) from error


def _check_context(model: PreTrainedModel, context: int) -> None:
    longest = positions_of(model.config)
    if longest is not None and context > longest:
        raise UsageError(f"The model takes {longest} tokens, not {context}.", remedy=f"Use a context of {longest}.")
