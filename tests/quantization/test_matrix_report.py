"""The figures of one matrix against numpy in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from compress.codecs import codec
from compress.errors import NumericsError
from compress.quantization.matrix import quantize_matrix, relative_error, require_finite


def test_report_against_numpy() -> None:
    pyramid = codec("pyramid")
    weight = torch.randn(48, 40, generator=torch.Generator().manual_seed(0), dtype=torch.bfloat16)
    matrix, report = quantize_matrix("w", weight, pyramid, pyramid.spec(52))
    original, decoded = weight.double().numpy(), matrix.dequantize().double().numpy()
    expected = np.sum((original - decoded) ** 2) / np.sum(original**2)
    assert report.relative_error == pytest.approx(expected, rel=1e-12)
    assert report.sqnr_db == pytest.approx(-10 * math.log10(expected), rel=1e-12)
    assert 0.01 < expected < 0.03  # between the rate-distortion bound at 3.25 bits and the paper's coder
    assert report.bits_per_weight == 8 * matrix.payload().numel() / (48 * 40)
    assert (report.name, report.shape, report.codec, report.status) == ("w", (48, 40), "pyramid", "quantized")
    assert report.to_dict()["shape"] == [48, 40]


def test_chunks_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    weight, rounded = torch.randn(2, 30, 50, generator=generator)
    whole = relative_error(weight, rounded)
    monkeypatch.setattr("compress.quantization.matrix.CHUNK_WEIGHTS", 70)
    assert relative_error(weight, rounded) == pytest.approx(whole, rel=1e-12)
    assert relative_error(weight.T, rounded.T) == pytest.approx(whole, rel=1e-12)
    weight[0, 0] = weight[29, 49] = torch.nan
    with pytest.raises(NumericsError, match="'w' holds 2 values"):
        require_finite("w", weight)


def test_zero_matrix_is_exact() -> None:
    pyramid = codec("pyramid")
    matrix, report = quantize_matrix("w", torch.zeros(16, 16), pyramid, pyramid.spec(52))
    assert not matrix.dequantize().any()
    assert report.relative_error == 0
    assert report.sqnr_db is None


def test_relative_error_of_nothing() -> None:
    assert relative_error(torch.zeros(2), torch.zeros(2)) == 0
    assert relative_error(torch.zeros(2), torch.ones(2)) == math.inf


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_not_finite(bad: float, dtype: torch.dtype) -> None:
    tensor = torch.zeros(3, 3, dtype=dtype)
    require_finite("fine", tensor)
    tensor[1, 2] = bad
    with pytest.raises(NumericsError, match=r"'model\.w' holds 1 values"):
        require_finite("model.w", tensor)
    require_finite("integers", torch.ones(3, dtype=torch.int8))
