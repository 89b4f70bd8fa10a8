"""Codecs by name, and their descriptions as plain data."""

from __future__ import annotations

import json

import pytest
import torch

from compress.codecs import CodecSpec, PyramidCodec, QuantizedMatrix, codec, codec_names, codec_of, register_codec
from compress.errors import ArtifactError, UsageError


def test_names_and_options() -> None:
    assert "pyramid" in codec_names()
    pyramid = codec("pyramid", max=127)
    assert isinstance(pyramid, PyramidCodec) and pyramid.config.max == 127


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("pyramyd", {}, "no codec 'pyramyd'.*Did you mean 'pyramid'"),
        ("pyramid", {"mx": 7}, "no option 'mx'.*Did you mean 'max'"),
        ("pyramid", {"max": 9}, "no table of gain levels for dim=16 max=9.*max=127"),
        ("pyramid", {"dim": 8}, "no table"),
    ],
    ids=["name", "option", "bound", "dim"],
)
def test_mistakes_are_answered_with_what_there_is(name: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        codec(name, **options)


def test_a_name_is_taken_once() -> None:
    with pytest.raises(UsageError, match="already"):
        register_codec(PyramidCodec)


def test_specs_survive_json() -> None:
    spec = codec("pyramid").spec(52)
    again = CodecSpec.from_dict(json.loads(json.dumps(spec.to_dict())))
    assert again == spec and hash(again) == hash(spec)
    assert codec_of(again).spec(52) == spec


@pytest.mark.parametrize(
    "change",
    [{"width": "52"}, {"width": True}, {"more": 1}, {"options": [7]}],
    ids=["text", "truth", "unknown", "list"],
)
def test_wrong_descriptions_are_refused(change: dict[str, object]) -> None:
    with pytest.raises(ArtifactError, match="description"):
        CodecSpec.from_dict(codec("pyramid").spec(52).to_dict() | change)


@pytest.mark.parametrize(
    "change",
    [{"width": 65}, {"dim": 8}, {"options": {"max": 7, "table": 99}}, {"options": {"max": 7}}],
    ids=["width", "dim", "table", "missing"],
)
def test_descriptions_of_no_known_table_are_refused(change: dict[str, object]) -> None:
    spec = CodecSpec.from_dict(codec("pyramid").spec(52).to_dict() | change)
    with pytest.raises(ArtifactError):
        codec_of(spec)


@pytest.mark.parametrize(
    ("name", "option", "value"),
    [
        ("half_pyramid", "dim", 8.0),
        ("half_pyramid", "coset", 1),
        ("half_pyramid", "levels", ["a"]),
        ("pyramid", "max", 7.0),
    ],
)
def test_options_of_another_type_are_refused(name: str, option: str, value: object) -> None:
    with pytest.raises(UsageError, match=f"'{option}' of the codec '{name}'"):
        codec(name, **{option: value})


def test_a_description_of_an_unknown_codec_is_a_damaged_artifact() -> None:
    with pytest.raises(ArtifactError, match="no codec 'other'"):
        codec_of(CodecSpec("other", 26, 8, {}))


@pytest.mark.parametrize("name", ["half_pyramid", "pyramid", "pvq"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0], ids=str)
def test_scales_that_are_none_are_refused(name: str, value: float) -> None:
    rounder = codec(name)
    matrix = rounder.quantize(torch.ones(2, 32), rounder.spec(rounder.widths(3.0)[0]))
    matrix.tensors["scale"].fill_(value)
    with pytest.raises(ArtifactError, match="'scale'"):
        QuantizedMatrix.from_payload(matrix.spec, (2, 32), matrix.payload())
