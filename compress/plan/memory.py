"""Estimates of the memory that rounding takes, in bytes, the program itself left out.

To the nearest: one block's payloads, and a few working copies of the largest matrix in float32.

With calibration, the larger of two moments. When the calls of the blocks are recorded: what lies outside of the blocks
and one block, in float32. When a block is rounded: the block in float32, twice where the original's outputs are aimed
at; of the widest input the sums in float64 and as much again while they are factorized; a few copies of its largest
matrix. And always the hidden states that are kept, those of a block and of the next.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from compress.modeling.loading import parameter_count
from compress.modeling.structure import MatrixView, find_blocks
from compress.quantization.options import Ldlq
from compress.recipe.schema import parse_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from compress.plan.quantize import MatrixPlan
    from compress.recipe import QuantizeRecipe

FLOAT, DOUBLE = 4, 8
WORKING_COPIES = 4
"""Of the largest matrix while it is rounded, in float32: measured are 14 to 17 bytes a weight, the allocator's gaps
included, for the weight as stored and in float32, its groups and codes, and what they decode to."""
MOMENTS = 3
"""Float64 matrices of the widest input at once: the sums, what moves the target, and the one they are put in order in
or the factor."""


def nearest_memory(rows: Sequence[MatrixPlan]) -> int:
    """Of rounding each matrix by itself."""
    payloads: dict[int, int] = {}
    for row in rows:
        payloads[row.block] = payloads.get(row.block, 0) + row.bytes
    return max(payloads.values()) + FLOAT * WORKING_COPIES * max(row.shape[0] * row.shape[1] for row in rows)


def calibrated_memory(
    model: PreTrainedModel,
    views: Sequence[MatrixView],
    rows: Sequence[MatrixPlan],
    recipe: QuantizeRecipe,
    options: Ldlq,
) -> int:
    """Of calibrated rounding, for a decoder's rows of the full length."""
    blocks = [FLOAT * parameter_count(block) for _, block in find_blocks(model)]
    outside = FLOAT * parameter_count(model.base_model) - sum(blocks)
    streams = 2 if options.asymmetric else 1
    hidden = FLOAT * recipe.rows * recipe.context * int(model.config.get_text_config().hidden_size)
    kept = hidden if 2 * streams * hidden <= parse_bytes(recipe.memory) else 0
    widest = max(view.shape[1] for view in views)
    largest = FLOAT * max(view.weights for view in views)
    payload = nearest_memory(rows) - WORKING_COPIES * largest
    rounding = streams * max(blocks) + MOMENTS * DOUBLE * widest**2 + WORKING_COPIES * largest + payload
    return max(outside + max(blocks), rounding) + 2 * streams * kept
