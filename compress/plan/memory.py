"""Estimates of the memory that rounding takes, in bytes, the imported program left out.

To the nearest: one block's payloads, and a few working copies of the largest matrix in float32.

With calibration, the largest of three moments. When the calls of the blocks are recorded: what lies outside of the
blocks, and one block, in float32. When the widest input is summed up: the block, twice where the original's outputs are
aimed at, the sums in float64, and what a batch leaves on its way through the block. When it is factorized: two and a
half times the sums instead, and a few copies of the largest matrix that reads it. And always what is kept between, up
to the budget: hidden states of a block and of the next, and inputs that are needed again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from compress.data.calibration import BATCH_TOKENS
from compress.modeling.loading import parameter_count
from compress.modeling.structure import MatrixView, find_blocks
from compress.quantization.allocation.evolve import KEPT_WEIGHTS
from compress.quantization.allocation.table import MOST_LEVELS
from compress.quantization.data import row_length
from compress.quantization.options import Ldlq
from compress.quantization.tables import CHUNK_WEIGHTS
from compress.recipe.schema import parse_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from compress.plan.quantize import MatrixPlan
    from compress.quantization.transforms import Ost
    from compress.recipe import QuantizeRecipe

FLOAT, DOUBLE = 4, 8
WORKING_COPIES = 4
"""Of the largest matrix while it is rounded, in float32: measured are 14 to 17 bytes a weight, the allocator's gaps
included, for the weight as stored and in float32, its groups and codes, and what they decode to."""
FACTORS = 2.5
"""Float64 matrices of the widest input at once when it is factorized: the sums, the factor, and its float32 form."""
BATCH_COPIES = 4
"""Of a batch's widest activations on their way through a block."""
WEIGHT_FORMS, ACTIVATION_FORMS, LOGIT_FORMS = 8, 3, 6
"""Of a block's weights while a transform is learned (gain, rotation, mixing, rounding, and their gradients), of its
inputs and outputs, and of the logits of two models with the gradient of one."""
LIBRARIES = 200_000_000
"""What tokenizer, threads and the first call of everything take: measured 180 to 220 MB."""


def nearest_memory(rows: Sequence[MatrixPlan]) -> int:
    """Of rounding each matrix by itself."""
    payloads: dict[int, int] = {}
    for row in rows:
        payloads[row.block] = payloads.get(row.block, 0) + row.bytes
    return max(payloads.values()) + FLOAT * WORKING_COPIES * max(row.shape[0] * row.shape[1] for row in rows)


def table_memory(rows: Sequence[MatrixPlan], itemsize: int) -> int:
    """Of rounding the embedding and the head: each as it is stored, `itemsize` bytes a weight, its codes at a byte
    each, its payload twice, and working copies of a chunk."""
    tables = [(1 + itemsize) * row.shape[0] * row.shape[1] + 2 * row.bytes for row in rows]
    return max(tables, default=0) + (FLOAT * WORKING_COPIES * CHUNK_WEIGHTS if rows else 0)


def learning_memory(model: PreTrainedModel, views: Sequence[MatrixView], transform: Ost, context: int | None) -> int:
    """Of learning a transform: the whole model in float32, hidden states between the blocks, and the larger of two
    moments: a block runs, with its weights in several forms and its activations; or logits are compared."""
    blocks = [FLOAT * parameter_count(block) for _, block in find_blocks(model)]
    config = model.config.get_text_config()
    tokens = transform.batch * row_length(model, context)
    between = FLOAT * tokens * int(config.hidden_size) * len(blocks)
    widths = sum(sum(view.shape) for view in views if view.block == 0)
    block = WEIGHT_FORMS * max(blocks) + ACTIVATION_FORMS * FLOAT * tokens * widths
    logits = LOGIT_FORMS * FLOAT * tokens * int(config.vocab_size)
    return FLOAT * parameter_count(model) + between + max(block, logits) + LIBRARIES


def measuring_memory(model: PreTrainedModel, views: Sequence[MatrixView], recipe: QuantizeRecipe) -> int:
    """Of measuring what each group of matrices loses: what lies outside of the blocks, and of the blocks what the
    budget holds and two more, in float32; the calibration rows before a block and behind it; the sums over the inputs
    of a block, one of them in a few forms; a block's payloads; logits; of a search the matrices that it keeps."""
    blocks = [FLOAT * parameter_count(block) for _, block in find_blocks(model)]
    outside = FLOAT * parameter_count(model) - sum(blocks)
    resident = min(sum(blocks), parse_bytes(recipe.memory)) + 2 * max(blocks)
    config = model.config.get_text_config().to_dict()
    tokens = recipe.rows * row_length(model, recipe.context)
    hidden = 2 * FLOAT * tokens * int(config.get("hidden_size", max(view.shape[1] for view in views)))
    inputs = {view.group: DOUBLE * view.shape[1] ** 2 for view in views if view.block == 0}
    moments = sum(inputs.values()) + int(FACTORS * max(inputs.values()))
    payloads = 4 * sum(view.weights for view in views if view.block == 0)
    logits = LOGIT_FORMS * FLOAT * BATCH_TOKENS * int(config.get("vocab_size", 0))
    weights = sum(view.weights for view in views)
    decoded = FLOAT * min(KEPT_WEIGHTS, MOST_LEVELS * weights) if recipe.allocation.name == "evolve" else 0
    return outside + resident + hidden + moments + payloads + logits + decoded + LIBRARIES


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
    tokens = recipe.rows * row_length(model, recipe.context)
    widths = {view.group: view.shape[1] for view in views if view.block == 0}
    hidden = int(model.config.get_text_config().to_dict().get("hidden_size", max(widths.values())))
    wanted = FLOAT * tokens * streams * (2 * hidden + sum(widths.values()))
    kept = min(parse_bytes(recipe.memory), wanted)
    widest = max(view.shape[1] for view in views)
    largest = FLOAT * max(view.weights for view in views)
    moment = DOUBLE * widest**2
    summing = streams * moment + BATCH_COPIES * FLOAT * BATCH_TOKENS * widest
    factorizing = int(FACTORS * moment) + WORKING_COPIES * largest
    payload = nearest_memory(rows) - WORKING_COPIES * largest
    rounding = streams * max(blocks) + max(summing, factorizing) + payload + kept
    return max(outside + max(blocks), rounding) + LIBRARIES
