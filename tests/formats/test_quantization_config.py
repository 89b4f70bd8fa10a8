"""The configuration of an artifact: there and back, and refused when it is not what it should be."""

from __future__ import annotations

import json
from typing import Any

import pytest

from compress.codecs import codec
from compress.errors import ArtifactError
from compress.formats.config import QuantizationConfig

PYRAMID = codec("pyramid")


def sample() -> QuantizationConfig:
    specs = {f"layers.{i}": PYRAMID.spec(52 if i == 1 else 51) for i in range(3)}
    return QuantizationConfig.from_specs(specs, ["lm_head", "embed"], 3.2)


def test_only_what_differs_is_listed() -> None:
    data = sample().to_dict()
    assert data["default"] == PYRAMID.spec(51).to_dict()
    assert data["modules"] == {"layers.1": {"width": 52}}
    assert data["ignore"] == ["embed", "lm_head"]
    assert (data["quant_method"], data["format_version"], data["bits_per_weight"]) == ("compress", 1, 3.2)
    assert data["producer"].startswith("compress ")


def test_round_trip_through_json() -> None:
    config = QuantizationConfig.from_dict(json.loads(json.dumps(sample().to_dict())))
    assert config.to_dict() == sample().to_dict()
    assert config == sample()


def test_specs_by_module() -> None:
    """Also for a model that has the prefix more or less than the one that was quantized, and less of the head."""
    expected = {"layers.0": PYRAMID.spec(51), "layers.1": PYRAMID.spec(52), "layers.2": PYRAMID.spec(51)}
    assert sample().by_module([*expected, "lm_head"], "model") == expected
    longer = {f"model.{name}": spec for name, spec in expected.items()}
    assert sample().by_module([*longer, "model.embed"], "model") == longer
    whole = QuantizationConfig.from_specs(longer, ["model.embed", "lm_head"], 3.2)
    assert list(whole.by_module([*expected, "embed"], "model").items()) == list(expected.items())
    with pytest.raises(ArtifactError, match=r"'layers\.1', which the model does not have"):
        sample().by_module(["layers.0"], "model")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quant_method": "gptq"}, "quant_method is 'gptq'"),
        ({"format_version": 2}, "format version 2"),
        ({"default": None}, "damaged"),
        ({"modules": []}, "damaged"),
        ({"modules": {"a": {"width": "52"}}}, "'52' as its 'width'"),
        ({"modules": {"a": {"wdth": 52}}}, "unknown field 'wdth'"),
        ({"ignore": 3}, "damaged"),
        ({"bits_per_weight": "many"}, "damaged"),
    ],
)
def test_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ArtifactError, match=message):
        QuantizationConfig.from_dict({**sample().to_dict(), **change})


def test_missing_field() -> None:
    data = sample().to_dict()
    del data["ignore"]
    with pytest.raises(ArtifactError, match="damaged"):
        QuantizationConfig.from_dict(data)
