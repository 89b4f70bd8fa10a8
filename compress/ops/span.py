"""What rounding a span of columns of a matrix works with, as plain tensors."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Pyramid:
    """A codebook: D, the pulses, the levels t and the shift as small integers, the gains float32 [L]."""

    dim: int
    pulses: int
    levels: tuple[int, ...]
    shift: int
    gains: Tensor


@dataclass(frozen=True)
class Codes:
    """The groups of a matrix [o, G]: values int8 [o, G, D], gain and coset int64, and the gain itself float32, all
    contiguous. They are written to."""

    values: Tensor
    gain: Tensor
    coset: Tensor
    gains: Tensor


@dataclass(frozen=True)
class Span:
    """Columns to be rounded, in blocks of D, from the last block to the first.

    base, carried float32 [o, s]; scale float32 [o] of the rows; inverses, metrics float32 [b, D, D]; coupling float32
    [s, s]; places int64 [b], of a block's groups in a row. `keep`: a row keeps a present code that is as near.
    """

    base: Tensor
    carried: Tensor
    scale: Tensor
    inverses: Tensor
    metrics: Tensor
    coupling: Tensor
    places: Tensor
    keep: bool
