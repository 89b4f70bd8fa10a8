"""Rounding a model's tables: its embedding and its head, in grouped integers of a rate of their own.

    E [V, d] ~ s_g (q - z_g) in groups of 64 columns      (`compress.codecs.integer`)

A row is a token, so a lookup decodes what it needs and no more. Rounding is to the nearest under the scales of least
squared error. For an embedding that is the optimum given these: what reads it is one-hot, E[x x^T] is diagonal, and the
error of a row does not depend on how others were rounded.

A table is the largest matrix of a small model, so it is rounded some rows at a time.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor
from transformers import PreTrainedModel

from compress.codecs.base import CodecSpec, QuantizedMatrix
from compress.codecs.integer.codec import IntegerCodec
from compress.codecs.integer.config import WIDTHS, IntegerConfig
from compress.codecs.registry import codec_of
from compress.errors import ModelError, UsageError
from compress.modeling.tables import OPTIONS, Table, TableKind, find_tables
from compress.quantization.matrix import MatrixReport, require_finite, sqnr

CHUNK_WEIGHTS: Final = 2**20
"""Weights that are rounded at once."""


@dataclass(frozen=True)
class TableBits:
    """Bits of a weight's code in the embedding and in the head, None for one that stays."""

    embedding: int | None = None
    head: int | None = None

    def __post_init__(self) -> None:
        for kind, bits in self.asked.items():
            if type(bits) is not int or bits not in WIDTHS:
                raise UsageError(
                    f"The {kind} is to have {bits!r} bits.",
                    remedy=f"Take a whole number from {WIDTHS[0]} to {WIDTHS[-1]}, or leave out the option.",
                )

    @property
    def asked(self) -> dict[TableKind, int]:
        """The bits of those that do not stay."""
        both: dict[TableKind, int | None] = {"embedding": self.embedding, "head": self.head}
        return {kind: bits for kind, bits in both.items() if bits is not None}


NO_TABLES = TableBits()
Chosen = tuple[tuple[Table, CodecSpec], ...]
"""Tables with what they are stored as."""


def choose_tables(model: PreTrainedModel, asked: TableBits, untied: Collection[str] = ()) -> Chosen:
    """The tables of `model` that are to be rounded, after a transform that makes the parameters `untied` matrices of
    their own. The model may be on meta.

    Raises `ModelError` for one that lacks such a table or whose table is not understood, `UsageError` for two rates of
    what is one matrix.
    """
    codec, chosen = IntegerCodec(IntegerConfig()), []
    for table in find_tables(model, asked.asked, untied):
        rates = {kind: bits for kind, bits in asked.asked.items() if kind in table.kinds}
        if len(set(rates.values())) > 1:
            both = " and ".join(f"{OPTIONS[kind]} {bits}" for kind, bits in rates.items())
            raise UsageError(
                f"Embedding and head of {type(model).__name__} are one matrix ('{table.view.parameter}'), and {both} "
                "are two rates.",
                remedy="Give one of the two options, or the same number to both.",
            )
        chosen.append((table, codec.spec(next(iter(rates.values())))))
    return tuple(chosen)


def round_table(table: Table, weight: Tensor, spec: CodecSpec) -> tuple[QuantizedMatrix, MatrixReport]:
    """Round `weight` [V, d] to the nearest, and measure the result; the same as all rows at once.

    Raises `NumericsError` for NaN or infinity, and for weights beyond what a scale can be.
    """
    name = table.view.name
    require_finite(name, weight)
    codec, rows = codec_of(spec), 8 * max(1, CHUNK_WEIGHTS // (8 * weight.shape[1]))  # every part begins with a byte
    parts: list[QuantizedMatrix] = []
    energy = error = 0.0
    for chunk in weight.split(rows):
        part = codec.quantize(chunk.to(torch.float32), spec)
        parts.append(part)
        reference = chunk.double()
        energy += float(reference.square().sum())
        error += float(reference.sub_(part.dequantize()).square_().sum())
    tensors = {field: torch.cat([part.tensors[field] for part in parts]) for field in parts[0].tensors}
    matrix = QuantizedMatrix(spec, (weight.shape[0], weight.shape[1]), tensors)
    lost = error / energy if energy else 0.0
    return matrix, MatrixReport(name, matrix.shape, spec.codec, matrix.bits_per_weight, lost, sqnr(lost), "quantized")


def require_same(table: Table, tensors: Collection[Tensor], where: str) -> None:
    """Raise `ModelError` unless a checkpoint that holds a tied table under several names holds it once in truth."""
    first, *others = tensors
    if not all(torch.equal(first, other) for other in others):
        raise ModelError(
            f"'{where}' holds {' and '.join(map(repr, table.parameters))} with different values, and its config.json "
            "says that they are one matrix.",
            remedy='Correct "tie_word_embeddings" in config.json, or save the model again.',
        )
