"""From what a caller names as calibration data to batches of tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from compress.data import text_source
from compress.data.calibration import Batch, calibration_rows, causal_batches, encoder_batches
from compress.errors import DataError, UsageError
from compress.modeling.loading import positions_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

CONTEXT = 256
"""Tokens of a row where nobody says how many."""

CalibrationData = str | Sequence[str] | Tensor | Sequence[Batch]
"""Sources of text as a recipe names them; rows of token ids int64 [N, T] without filling; or batches of a model's
inputs, `input_ids` int64 [B, T] and `attention_mask` int64 [B, T]."""


def calibration_batches(
    model: PreTrainedModel,
    data: CalibrationData,
    tokenizer: Callable[[], PreTrainedTokenizerBase],
    *,
    rows: int,
    context: int | None,
    seed: int,
) -> list[Batch]:
    """Batches for `model`, of rows of `row_length`. `tokenizer` is called for text alone. Raises `DataError` for data
    without a row or with ids that are no token, `UsageError` for rows longer than the model takes.
    """
    if isinstance(data, Tensor):
        if data.ndim != 2 or data.dtype != torch.int64 or not data.numel():
            raise DataError(
                f"Calibration rows are {list(data.shape)} of {data.dtype}.",
                remedy="Give token ids, int64 [rows, tokens].",
            )
        batches = causal_batches(data)
    elif isinstance(data, str) or all(isinstance(part, str) for part in data):
        source = text_source([data] if isinstance(data, str) else [str(part) for part in data])
        length = row_length(model, context)
        if model.can_generate():
            batches = causal_batches(calibration_rows(source, tokenizer(), rows=rows, context=length, seed=seed))
        else:
            batches = encoder_batches(source, tokenizer(), rows=rows, context=length, seed=seed)
    else:
        batches = [dict(batch) for batch in data if isinstance(batch, dict)]
        if len(batches) != len(data) or not batches or not all("input_ids" in batch for batch in batches):
            raise DataError(
                "Calibration batches are no list of {'input_ids': ...}.", remedy="Give rows or text instead."
            )
    _check_context(model, max(batch["input_ids"].shape[1] for batch in batches))
    vocabulary = model.config.get_text_config().vocab_size
    for batch in batches:
        lowest, highest = int(batch["input_ids"].min()), int(batch["input_ids"].max())
        if lowest < 0 or highest >= vocabulary:
            raise DataError(
                f"Calibration rows have token ids from {lowest} to {highest}; the model knows 0 to {vocabulary - 1}.",
                remedy="Use the model's own tokenizer.",
            )
    return batches


def row_length(model: PreTrainedModel, context: int | None) -> int:
    """Tokens of a row: `context`, or without it `CONTEXT`, or as many as the model takes. Raises `UsageError` for a
    `context` that is more than that."""
    longest = positions_of(model.config)
    if context is None:
        return CONTEXT if longest is None else min(CONTEXT, longest)
    _check_context(model, context)
    return context


def _check_context(model: PreTrainedModel, context: int) -> None:
    longest = positions_of(model.config)
    if longest is not None and context > longest:
        raise UsageError(f"The model takes {longest} tokens, not {context}.", remedy=f"Use a context of {longest}.")
