"""The plan of a quantization: each matrix with its bits, and the size of the result, known before a weight is read.

A code's size does not depend on the weights, so bits per weight and the bytes of the files are exact; where the student
is yet to be made from random weights, the bytes leave out the files' headers. Memory is an estimate: one block's
payloads, and a few working copies of the largest matrix in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from compress.codecs import Codec, codec
from compress.modeling.structure import MatrixView, matrices, require_linear
from compress.plan.subject import Subject
from compress.quantization.allocation import uniform
from compress.quantization.target import open_target, predict

if TYPE_CHECKING:
    from compress.recipe import QuantizeRecipe

WORKING_COPIES = 4
"""Of the largest matrix while it is rounded, in float32: measured are 14 to 17 bytes a weight, the allocator's gaps
included, for the weight as stored and in float32, its groups and codes, and what they decode to."""


@dataclass(frozen=True)
class MatrixPlan:
    """One matrix of the target set. `group` names the matrices that share its width; `bytes` is its whole payload."""

    name: str
    shape: tuple[int, int]
    block: int
    group: str
    codec: str
    width: int
    bits_per_weight: float
    bytes: int


@dataclass(frozen=True)
class QuantizationPlan:
    """`bits_per_weight` over the target set, `model_bits_per_weight` = 8 `model_bytes` / parameters."""

    bits_target: float
    bits_per_weight: float
    model_bits_per_weight: float
    model_bytes: int
    data_free: bool
    memory_bytes: int
    codec: str
    containers: tuple[str, ...]
    matrices: tuple[MatrixPlan, ...]


def plan_quantization(recipe: QuantizeRecipe, subject: Subject, trust_remote_code: bool = False) -> QuantizationPlan:
    """Raises `UsageError` for an unknown codec or option, or when `bits` is out of the codec's reach for this model;
    `ModelError` for a model that cannot be quantized."""
    method = codec(recipe.codec.name, **recipe.codec.options)
    views = matrices(subject.model)
    require_linear(views)
    widths = uniform(views, method, recipe.bits)
    rows = tuple(_row(view, method, widths[view.name]) for view in views)
    weights = sum(view.weights for view in views)
    if subject.checkpoint is not None:
        target = open_target(subject.checkpoint.folder, trust_remote_code)
        model_bytes = predict(target, widths, method, recipe.max_shard_bytes).model_bytes
    else:
        model_bytes = subject.bytes - weights * subject.model.dtype.itemsize + sum(row.bytes for row in rows)
    return QuantizationPlan(
        bits_target=recipe.bits,
        bits_per_weight=sum(row.bytes for row in rows) * 8 / weights,
        model_bits_per_weight=model_bytes * 8 / subject.parameters,
        model_bytes=model_bytes,
        data_free=True,
        memory_bytes=_memory(rows),
        codec=str(recipe.codec),
        containers=method.containers(method.spec(rows[0].width)),
        matrices=rows,
    )


def _row(view: MatrixView, method: Codec, width: int) -> MatrixPlan:
    spec = method.spec(width)
    bits = method.bits(spec, view.shape)
    return MatrixPlan(view.name, view.shape, view.block, view.group, spec.codec, width, bits / view.weights, bits // 8)


def _memory(rows: Sequence[MatrixPlan]) -> int:
    payloads: dict[int, int] = {}
    for row in rows:
        payloads[row.block] = payloads.get(row.block, 0) + row.bytes
    return max(payloads.values()) + 4 * WORKING_COPIES * max(row.shape[0] * row.shape[1] for row in rows)
