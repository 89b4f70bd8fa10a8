"""What the tests of every codec ask of a payload."""

from __future__ import annotations

import torch

from compress.codecs import Codec, CodecSpec, QuantizedMatrix


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def relative_error(weight: torch.Tensor, matrix: QuantizedMatrix) -> float:
    exact = weight.double()
    return float((matrix.dequantize(torch.float64) - exact).square().sum() / exact.square().sum())


def check_payload(rounder: Codec, weight: torch.Tensor, spec: CodecSpec) -> QuantizedMatrix:
    """Exact size, exact round trip, exact product; the matrix as read back from its payload."""
    matrix, shape = rounder.quantize(weight, spec), (weight.shape[0], weight.shape[1])
    payload = matrix.payload()
    assert payload.dtype == torch.int8 and payload.ndim == 1
    assert matrix.bits == rounder.bits(spec, shape) == 8 * payload.numel()
    again = QuantizedMatrix.from_payload(spec, shape, payload)
    assert torch.equal(again.payload(), payload)
    integers, scales = again.integers()
    assert integers.dtype == torch.int8 and scales.dtype == torch.float32
    product = integers.to(torch.float32) * scales.repeat_interleave(spec.dim, 1)
    assert torch.equal(product[:, : shape[1]], matrix.dequantize())
    return again
