"""NF4, FP4 and int8: sizes, tables, nearest values, payloads; against bitsandbytes in `test_normal_float_peers`."""

from __future__ import annotations

import statistics

import pytest
import torch
from torch import Tensor

from compress.codecs import Codec, CodecSpec, QuantizedMatrix, codec, codec_of
from compress.codecs.normal_float.nibbles import pack, unpack
from compress.codecs.normal_float.tables import NF4, table
from compress.errors import ArtifactError, CodecError, NumericsError, UsageError
from tests.codecs.payloads import check_payload, normal, relative_error

FLOAT32_SLACK = 1.3e-7
"""How far the published table lies from its equation: it went through float32 on its way."""


def only(rounder: Codec) -> CodecSpec:
    (width,) = rounder.widths()
    return rounder.spec(width)


def check(rounder: Codec, weight: Tensor) -> QuantizedMatrix:
    """Exact size, exact round trip; the matrix as read back from its payload."""
    spec, shape = only(rounder), (weight.shape[0], weight.shape[1])
    matrix = rounder.quantize(weight, spec)
    payload = matrix.payload()
    assert matrix.bits == rounder.bits(spec, shape) == 8 * payload.numel()
    again = QuantizedMatrix.from_payload(spec, shape, payload)
    assert torch.equal(again.payload(), payload)
    assert torch.equal(again.dequantize(), matrix.dequantize())
    return again


def test_nf4_is_the_quantiles_of_its_definition() -> None:
    """QLoRA, section 3: eight values from one side of the normal, seven from the other, zero; the ends at -1 and 1."""
    quantile = statistics.NormalDist().inv_cdf
    end = 0.9677083
    positive = [quantile(end + (0.5 - end) * i / 8) for i in range(8)]
    negative = [-quantile(end + (0.5 - end) * i / 7) for i in range(7)]
    expected = [value / quantile(end) for value in sorted([*positive, 0.0, *negative])]
    assert max(abs(found - right) for found, right in zip(NF4, expected, strict=True)) < FLOAT32_SLACK
    assert table("nf4").values.tolist() == list(NF4)


def test_fp4_is_a_sign_two_bits_of_exponent_and_one_of_mantissa() -> None:
    values = table("fp4").values
    assert torch.equal(values[8:], -values[:8])
    normals = {2.0**exponent * (1 + mantissa / 2) for exponent in (1, 2, 3) for mantissa in (0, 1)}
    expected = torch.tensor(sorted({0.0, 1 / 16, *normals})) / 12
    assert torch.equal(values[:8].sort().values, expected)


def test_the_dynamic_map_has_seven_decades() -> None:
    values = table("dynamic").values
    assert values.numel() == 256 and values[127] == 0 and values[255] == 1
    assert torch.equal(values[:127], -values[128:255].flip(0))
    start = 128
    for exponent in range(7):
        middles = 0.1 + 0.9 * (torch.arange(2**exponent).double() + 0.5) / 2**exponent
        expected = middles * 10.0 ** (exponent - 6)
        torch.testing.assert_close(values[start : start + 2**exponent].double(), expected, rtol=2e-7, atol=0)
        start += 2**exponent


@pytest.mark.parametrize("name", ["nf4", "fp4", "dynamic"])
def test_a_code_is_the_nearest_of_all(name: str) -> None:
    values, units = table(name), 2 * torch.rand(4000, generator=torch.Generator().manual_seed(0)) - 1
    found = values.decode(values.nearest(units))
    least = (units.double().unsqueeze(1) - values.values.double()).abs().amin(1)
    assert torch.equal((found.double() - units.double()).abs(), least)


@pytest.mark.parametrize("count", [0, 1, 6, 7])
def test_two_codes_to_a_byte(count: int) -> None:
    codes = torch.arange(count, dtype=torch.uint8) * 2 + 1
    packed = pack(codes, torch.tensor([7], dtype=torch.uint8))
    assert torch.equal(unpack(packed, count), codes)
    if count == 7:
        assert packed.tolist() == [0x13, 0x57, 0x9B, 0xD7]


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("name", ["nf4", "fp4"])
@pytest.mark.parametrize("shape", [(64, 192), (5, 33), (3, 100), (1, 1), (300, 129)], ids=str)
def test_tables_by_their_definition(shape: tuple[int, int], name: str, double: bool) -> None:
    """Block after block of the flattened matrix, in float64, for the scales as they are stored."""
    rounder, weight = codec(name, block=32, double=double), normal(*shape)
    decoded = check(rounder, weight).dequantize().flatten()
    for start in range(0, weight.numel(), 32):
        part = weight.flatten()[start : start + 32]
        scale = part.abs().max()
        best = (part.double() / scale.double()).unsqueeze(1) - table(name).values.double()
        near = table(name).values[best.abs().argmin(1)] * scale
        if double:
            assert float((decoded[start : start + 32] - near).abs().max() / scale) < 0.02
        else:
            assert torch.equal(decoded[start : start + 32], near)


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("nf4", {}, 4.5),
        ("fp4", {"block": 128}, 4.25),
        ("nf4", {"double": True}, 4 + (8 + 32 / 256) / 64 + 32 / (512 * 512)),
        ("int8", {}, 8 + 32 / 512),
    ],
)
def test_bits_a_weight(name: str, options: dict[str, object], expected: float) -> None:
    rounder = codec(name, **options)
    assert rounder.bits(only(rounder), (512, 512)) / 512**2 == expected
    assert check(rounder, normal(512, 512)).bits_per_weight == expected


def test_error_of_gaussian_weights() -> None:
    """NF4 is for normal weights: less error than 4-bit integers of as many bits, and FP4 more. A step of int8 leaves a
    twelfth of its square."""
    weight = normal(512, 1024)
    integer = codec("integer", group=64, symmetric=True, clip=False)
    integers = relative_error(weight, integer.quantize(weight, integer.spec(4)))
    errors = {name: relative_error(weight, check(codec(name), weight)) for name in ("nf4", "fp4", "int8")}
    assert errors["nf4"] < 0.9 * integers < errors["fp4"] < 2 * errors["nf4"]
    step = weight.double().abs().amax(1, keepdim=True) / 127
    assert errors["int8"] == pytest.approx(float(step.square().mean() / 12 / weight.double().square().mean()), rel=0.02)


@pytest.mark.parametrize("name", ["nf4", "fp4"])
def test_there_are_no_integers(name: str) -> None:
    matrix = check(codec(name), normal(4, 64))
    with pytest.raises(CodecError, match=f"'{name}' are no integers"):
        matrix.integers()


@pytest.mark.parametrize("shape", [(16, 64), (7, 33), (1, 1), (3, 0), (0, 3)], ids=str)
def test_int8_is_an_integer_times_a_scale(shape: tuple[int, int]) -> None:
    rounder, weight = codec("int8"), normal(*shape)
    if 0 in shape:
        assert rounder.quantize(weight, rounder.spec(8)).dequantize().shape == shape
        return
    matrix = rounder.quantize(weight, rounder.spec(8))
    integers, scales = matrix.integers()
    assert torch.equal(integers * scales, matrix.dequantize())
    step = weight.double().abs().amax(1, keepdim=True) / 127
    assert float(((matrix.dequantize().double() - weight.double()) / step).abs().max()) <= 0.5 + 1e-4
    if shape[1] % 2 == 0:
        check(rounder, weight)


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("name", ["nf4", "fp4"])
@pytest.mark.parametrize("shape", [(0, 64), (64, 0)], ids=str)
def test_matrices_without_weights(shape: tuple[int, int], name: str, double: bool) -> None:
    rounder = codec(name, double=double)
    matrix = rounder.quantize(torch.zeros(shape), only(rounder))
    assert matrix.dequantize().shape == shape and matrix.bits == rounder.bits(only(rounder), shape)


@pytest.mark.parametrize("name", ["nf4", "fp4", "int8"])
def test_zeros_stay_zeros(name: str) -> None:
    weight = normal(4, 128)
    weight[1], weight[2, 3] = 0, -0.0
    decoded = check(codec(name), weight).dequantize()
    assert not decoded[1].any() and decoded[2, 3] == 0


def test_rows_too_small_for_their_scale_are_zeros() -> None:
    weight = torch.tensor([[1e-38, -2e-38], [1.0, 0.5]])
    assert codec("int8").quantize(weight, codec("int8").spec(8)).dequantize()[0].tolist() == [0.0, 0.0]


def test_scales_beyond_float32_are_refused() -> None:
    rounder = codec("nf4", double=True)
    with pytest.raises(NumericsError, match=r"beyond float32.*double"):
        rounder.quantize(torch.full((4, 64), 3e38), only(rounder))
    assert codec("nf4").quantize(torch.full((4, 64), 3e38), only(codec("nf4"))).dequantize().isfinite().all()


@pytest.mark.parametrize("name", ["nf4", "fp4", "int8"])
def test_weights_that_are_not_finite_are_refused(name: str) -> None:
    weight = normal(4, 64)
    weight[2, 5] = float("nan")
    with pytest.raises(NumericsError, match="row 2, column 5"):
        codec(name).quantize(weight, only(codec(name)))


@pytest.mark.parametrize("name", ["nf4", "fp4", "int8"])
def test_one_width(name: str) -> None:
    rounder = codec(name)
    (width,) = rounder.widths()
    assert rounder.widths(width, width) == (width,) and rounder.widths(width + 1) == ()
    with pytest.raises(UsageError, match=f"'{name}' has no code of 3 bits"):
        rounder.spec(3)
    assert codec_of(rounder.spec(width)).spec(width) == rounder.spec(width)


@pytest.mark.parametrize("block", [0, 16, 48, 512])
def test_blocks_there_are(block: int) -> None:
    with pytest.raises(UsageError, match=f"no blocks of {block}"):
        codec("nf4", block=block)


@pytest.mark.parametrize(
    "change",
    [
        {"width": 3},
        {"dim": 2},
        {"options": {}},
        {"options": {"block": 48, "double": False}},
        {"options": {"block": 64, "double": 1}},
    ],
    ids=str,
)
def test_descriptions_that_none_wrote_are_refused(change: dict[str, object]) -> None:
    spec = CodecSpec.from_dict(only(codec("nf4")).to_dict() | change)
    with pytest.raises(ArtifactError, match="Not the description of nf4"):
        codec_of(spec)
    with pytest.raises(ArtifactError, match="Not the description of int8"):
        codec_of(CodecSpec("int8", 8, 1, {"block": 64}))


@pytest.mark.parametrize("double", [False, True])
def test_every_byte_is_a_matrix_but_scales_that_are_none(double: bool) -> None:
    rounder = codec("nf4", double=double)
    spec = only(rounder)
    matrix = rounder.quantize(normal(6, 70), spec)
    payload, part = matrix.payload(), matrix.tensors["nested_absmax" if double else "absmax"]
    payload[part.nbytes + (4 + 7 if double else 0) :] = -1
    assert QuantizedMatrix.from_payload(spec, (6, 70), payload).dequantize().isfinite().all()
    part[0] = -1.0
    with pytest.raises(ArtifactError, match="absmax"):
        QuantizedMatrix.from_payload(spec, (6, 70), matrix.payload())
    with pytest.raises(ArtifactError, match="bytes"):
        QuantizedMatrix.from_payload(spec, (6, 70), payload[:-1])


def test_spread_is_the_scale_of_each_weight() -> None:
    weight = normal(3, 50)
    flat = weight.flatten()
    expected = torch.stack([flat[i // 32 * 32 : i // 32 * 32 + 32].abs().max() for i in range(150)]).view(3, 50)
    assert torch.equal(codec("nf4", block=32).spread(weight), expected)
    assert torch.equal(codec("int8").spread(weight), weight.abs().amax(1, keepdim=True))


def test_integers_of_int8_fit_their_check() -> None:
    """The product of `check_payload` has one scale to `dim` columns; a single column is one such matrix."""
    check_payload(codec("int8"), normal(9, 1), codec("int8").spec(8))
