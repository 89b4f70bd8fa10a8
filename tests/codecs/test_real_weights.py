"""Trained weights are near enough to Gaussian for the table: no matrix is much worse, the model is about as good."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file

from compress.codecs import codec
from compress.codecs.pyramid.codec import shape_of


@pytest.mark.parametrize("model", ["stories260k", "babyllama"])
def test_error_of_trained_matrices(real_data: Path, model: str) -> None:
    pyramid = codec("pyramid")
    spec = pyramid.spec(52)
    table = shape_of(spec).mse
    error = energy = 0.0
    for file in sorted((real_data / "models" / model).glob("*.safetensors")):
        for name, weight in load_file(file).items():
            if weight.ndim != 2 or "layers" not in name:
                continue
            difference = pyramid.quantize(weight, spec).dequantize() - weight
            here, there = float(difference.double().square().sum()), float(weight.double().square().sum())
            assert here / there < 2 * table, name
            error, energy = error + here, energy + there
    assert 0.8 * table < error / energy < 1.25 * table
