"""One matrix: rounded, and measured against what it was.

The error is that of the weights alone, relative to their energy: ||W - Q||^2 / ||W||^2, which is
tr(E H E^T) / tr(W H W^T) with H = I, the case without calibration data. Both sums run in float64, a chunk of weights
at a time: a copy of the whole matrix in float64 would be twice as large as everything else.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

import torch
from torch import Tensor

from compress.codecs.base import Codec, CodecSpec, QuantizedMatrix
from compress.errors import NumericsError
from compress.transforms.matrices import mix_weight
from compress.transforms.signs import Signs

LARGE_ERROR = 0.25
"""Relative error of a matrix that somebody should look at; at 2 bits a weight .15 is much."""
CHUNK_WEIGHTS = 2**20
"""Weights that are checked or measured at once."""


@dataclass(frozen=True)
class MatrixReport:
    """What became of a matrix. `relative_error` as above, `sqnr_db` = -10 log10 of it (None for an exact copy).

    `calibration`, where there was one: `tokens` summed, `dead_channels` that no token reached, `broken_channels` with
    NaN or infinity, and `damping` relative to the mean diagonal of the Hessian.
    """

    name: str
    shape: tuple[int, int]
    codec: str
    bits_per_weight: float
    relative_error: float
    sqnr_db: float | None
    status: str
    calibration: dict[str, float] | None = None

    def doubts(self) -> Iterator[str]:
        """What somebody should know who reads no report."""
        if self.status.startswith("nearest"):
            yield f"'{self.name}' was rounded to the nearest: {self.status.removeprefix('nearest ')}."
        if self.relative_error > LARGE_ERROR:
            yield (
                f"'{self.name}' lost {self.relative_error:.0%} of its energy: some of its weights may be far larger "
                "than others, which --transform hadamard spreads, or the rate is too low."
            )
        broken = (self.calibration or {}).get("broken_channels", 0)
        if broken:
            yield f"{broken} of the {self.shape[1]} inputs of '{self.name}' are not finite; they were left out."

    @classmethod
    def from_dict(cls, row: Mapping[str, Any]) -> Self:
        """The report that `to_dict` made plain."""
        return cls(**{**row, "shape": tuple(row["shape"])})

    def to_dict(self) -> dict[str, Any]:
        plain = {**asdict(self), "shape": list(self.shape)}
        return {name: value for name, value in plain.items() if name != "calibration" or value is not None}


def require_finite(name: str, tensor: Tensor) -> None:
    """Raise `NumericsError`, naming the tensor, when it holds NaN or infinity. Integers always pass."""
    if not tensor.is_floating_point() or tensor.element_size() == 1:
        return
    bad = tensor.numel() - sum(int(torch.isfinite(chunk).sum()) for chunk in _chunks(tensor))
    if bad:
        raise NumericsError(
            f"The weight '{name}' holds {bad} values that are NaN or infinite.",
            remedy="The checkpoint is damaged, or its training diverged; take an earlier one.",
        )


def relative_error(original: Tensor, decoded: Tensor) -> float:
    """||original - decoded||^2 / ||original||^2 in float64; 0 when both are zero everywhere."""
    energy = error = 0.0
    for weight, rounded in zip(_chunks(original), _chunks(decoded), strict=True):
        reference = weight.double()
        energy += float(reference.square().sum())
        error += float(reference.sub_(rounded).square_().sum())
    if error == 0:
        return 0.0
    return error / energy if energy > 0 else math.inf


def sqnr(error: float) -> float | None:
    """The ratio of signal to rounding noise in decibels; None without noise."""
    return -10 * math.log10(error) if error > 0 else None


def _chunks(tensor: Tensor) -> Sequence[Tensor]:
    return tensor.flatten().split(CHUNK_WEIGHTS)


def quantize_matrix(
    name: str, weight: Tensor, codec: Codec, spec: CodecSpec, signs: Signs | None = None
) -> tuple[QuantizedMatrix, MatrixReport]:
    """Round `weight` [out, in] to the nearest with `codec`, mixed by `signs` if there are any, and measure the result.

    Raises `NumericsError` for NaN or infinity, `CodecError` for a matrix that the codec cannot carry.
    """
    require_finite(name, weight)
    signs = signs or Signs()
    weight = mix_weight(weight, signs, torch.float32)
    plain = codec.quantize(weight, spec.plain)
    error = relative_error(weight, plain.dequantize())
    matrix = plain.mixed(signs)
    return matrix, MatrixReport(name, matrix.shape, spec.codec, matrix.bits_per_weight, error, sqnr(error), "quantized")
