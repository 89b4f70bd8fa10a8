"""Group integers: payloads, errors of Gaussian weights, and choices against plain Python and against torch's own."""

from __future__ import annotations

import itertools
import math
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from compress.codecs import Codec, CodecSpec, IntegerConfig, QuantizedMatrix, codec, codec_of
from compress.codecs.integer.grid import Grid
from compress.errors import ArtifactError, CodecError, NumericsError, UsageError
from tests.codecs.payloads import normal, relative_error

WIDTHS = tuple(range(2, 9))


def fl16(value: float) -> float:
    return float(struct.unpack("<e", struct.pack("<e", value))[0])


def spans_and_codes(weight: Tensor, bits: int, group: int, symmetric: bool) -> tuple[list[float], list[int], Tensor]:
    """Scales, zero points and decoded weights of the min-max rule, one weight at a time in Python's floats."""
    top, middle = 2**bits - 1, 2 ** (bits - 1)
    scales, zeros, decoded = [], [], []
    for row in weight.double().tolist():
        values: list[float] = []
        for start in range(0, len(row), group):
            part = row[start : start + group]
            low, high = min(0.0, *part), max(0.0, *part)
            scale = fl16(max(low / -middle, high / (middle - 1)) if symmetric else (high - low) / top)
            zero = middle if symmetric else round(-low / scale) if scale else 0
            zero = min(max(zero, 0), top)
            scales.append(scale)
            zeros.append(zero)
            codes = [min(max((round(w / scale) if scale else 0) + zero, 0), top) for w in part]
            values += [scale * (code - zero) for code in codes]
        decoded.append(values)
    return scales, zeros, torch.tensor(decoded)


def check(rounder: Codec, weight: Tensor, bits: int) -> QuantizedMatrix:
    """Exact size without data, exact round trip, exact product of the two factors."""
    spec, shape = rounder.spec(bits), (weight.shape[0], weight.shape[1])
    matrix = rounder.quantize(weight, spec)
    payload = matrix.payload()
    assert matrix.bits == rounder.bits(spec, shape) == 8 * payload.numel()
    again = QuantizedMatrix.from_payload(spec, shape, payload)
    assert torch.equal(again.payload(), payload)
    integers, scales = again.integers()
    assert integers.dtype == torch.int8 and scales.dtype == torch.float32
    assert integers.shape[0] == scales.shape[0] == shape[0] and integers.shape[1] >= shape[1]
    each = integers.shape[1] // max(scales.shape[1], 1)
    product = integers.double() * scales.double().repeat_interleave(each, 1)
    assert torch.equal(product[:, : shape[1]], matrix.dequantize().double())
    return again


@pytest.mark.parametrize("symmetric", [False, True], ids=["asymmetric", "symmetric"])
@pytest.mark.parametrize("bits", WIDTHS)
def test_without_clip_it_is_the_rule_in_plain_python(bits: int, symmetric: bool) -> None:
    weight = normal(9, 83, seed=bits) * torch.logspace(-3, 3, 9).unsqueeze(1)
    weight[2], weight[3, :40], weight[4] = weight[2].abs(), 0, -weight[4].abs()
    rounder = codec("integer", group=16, symmetric=symmetric, clip=False)
    matrix = check(rounder, weight, bits)
    scales, zeros, decoded = spans_and_codes(weight, bits, 16, symmetric or bits == 8)
    assert matrix.tensors["scales"].flatten().tolist() == scales
    if not symmetric and bits < 8:
        stream = int.from_bytes(bytes(matrix.tensors["zeros"].tolist()), "little")
        assert [stream >> bits * place & 2**bits - 1 for place in range(len(zeros))] == zeros
    found, exact = matrix.dequantize().double(), weight.double()
    steps = torch.tensor(scales, dtype=torch.float64).view(9, -1).repeat_interleave(16, 1)[:, :83]
    same = (found - decoded.double()).abs() <= 1e-6 * steps
    ties = ((exact / steps.clamp_min(1e-30)) % 1 - 0.5).abs() < 1e-5
    assert bool((same | ties).all()) and float(same.double().mean()) > 0.999


@pytest.mark.parametrize("symmetric", [False, True], ids=["asymmetric", "symmetric"])
@pytest.mark.parametrize("bits", [2, 3, 4, 7, 8])
def test_a_scale_for_each_row_agrees_with_fake_quantize(bits: int, symmetric: bool) -> None:
    """Spans that are a power of two times 2^b - 1 have scales that float16 and torch's float32 share."""
    top = 2**bits - 1
    weight = torch.rand(6, 70, generator=torch.Generator().manual_seed(bits))
    powers = 2.0 ** torch.arange(-3, 3).float()
    low = torch.full((6,), -(2.0 ** (bits - 1))) if symmetric or bits == 8 else -torch.arange(6).float().clamp_max(top)
    weight = (low.unsqueeze(1) + weight * top) * powers.unsqueeze(1)
    weight[:, 0], weight[:, 1] = low * powers, (low + top) * powers
    matrix = check(codec("integer", group=0, symmetric=symmetric, clip=False), weight, bits)
    assert torch.equal(matrix.tensors["scales"].float().squeeze(1), powers)
    zeros = (-low).to(torch.int32)
    expected = torch.fake_quantize_per_channel_affine(weight, powers, zeros, 0, 0, top)
    assert torch.equal(matrix.dequantize(), expected)


@pytest.mark.parametrize(
    ("bits", "group", "spanned", "clipped"),
    [(3, 64, 0.0380, 0.0309), (4, 128, 0.0101, 0.0090), (4, 32, 0.0065, 0.0059), (2, 64, 0.208, 0.1235)],
)
def test_errors_of_gaussian_weights(bits: int, group: int, spanned: float, clipped: float) -> None:
    weight = normal(512, 1024)
    for clip, expected in ((False, spanned), (True, clipped)):
        rounder = codec("integer", group=group, clip=clip)
        error = float((rounder.quantize(weight, rounder.spec(bits)).dequantize() - weight).square().mean())
        assert error == pytest.approx(expected, rel=0.015)


@pytest.mark.parametrize(("bits", "centred"), [(2, False), (3, False), (3, True), (4, False)])
def test_the_search_is_nearly_exhaustive(bits: int, centred: bool) -> None:
    """Against all zero points and 400 scales up to a tenth above the span."""
    values = normal(300, 32, seed=bits)
    grid, top = Grid(bits, centred), 2**bits - 1
    low, high = values.amin(1).clamp_max(0), values.amax(1).clamp_min(0)
    span = torch.maximum(low / -grid.middle, high / (grid.middle - 1)) if centred else (high - low) / top
    least = torch.full_like(low, math.inf)
    zeros = [grid.middle] if centred else range(top + 1)
    for factor, zero in itertools.product(torch.linspace(0.2, 1.1, 400).tolist(), zeros):
        scale = (span * factor).half().float().unsqueeze(1)
        after = (torch.round(values / scale) + zero).clamp(0, top).sub(zero) * scale
        least = torch.minimum(least, (after - values).square().sum(1))
    scales, offsets = (tensor.unsqueeze(1) for tensor in grid.choose(values, clip=True))
    found = (grid.nearest(values, scales, offsets) * scales - values).square().sum(1)
    assert float(found.sum() / least.sum()) == pytest.approx(1.0, abs=0.01)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    bits=st.sampled_from(WIDTHS),
    group=st.sampled_from([0, 8, 11, 64, 1000]),
    symmetric=st.booleans(),
    clip=st.booleans(),
    rows=st.integers(0, 20),
    columns=st.integers(0, 90),
    unit=st.sampled_from([1e-30, 1e-8, 1e-5, 1.0, 100.0]),
    power=st.sampled_from([1, 3, 5]),
    seed=st.integers(0, 1000),
)
def test_any_matrix_survives_its_payload_and_is_no_worse_than_zeros(
    bits: int, group: int, symmetric: bool, clip: bool, rows: int, columns: int, unit: float, power: int, seed: int
) -> None:
    weight = normal(rows, columns, seed=seed).clamp(-3, 3).pow(power) * unit
    matrix = check(codec("integer", group=group, symmetric=symmetric, clip=clip), weight, bits)
    errors = (matrix.dequantize() - weight).double().square().sum(1)
    assert bool((errors <= weight.double().square().sum(1)).all())


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    bits=st.sampled_from(WIDTHS),
    symmetric=st.booleans(),
    rows=st.integers(1, 9),
    columns=st.integers(1, 40),
    seed=st.integers(0, 1000),
)
def test_any_bytes_with_good_scales_are_a_matrix(
    bits: int, symmetric: bool, rows: int, columns: int, seed: int
) -> None:
    """Codes and zero points are all there is to a payload: drawn at random, cut from a big integer, they decode."""
    spec, generator = codec("integer", group=16, symmetric=symmetric).spec(bits), torch.Generator().manual_seed(seed)
    size = min(16, columns)
    groups = -(-columns // size)
    scales = torch.rand(rows, groups, generator=generator).half()
    codes = torch.randint(2**bits, (rows, columns), generator=generator)
    zeros = torch.full((rows, groups), 2 ** (bits - 1))
    fields = [scales.numpy().tobytes()]
    if not symmetric and bits < 8:
        zeros = torch.randint(2**bits, (rows, groups), generator=generator)
        fields.append(stream_of(zeros, bits))
    fields.append(stream_of(codes, bits))
    payload = torch.frombuffer(bytearray(b"".join(fields)), dtype=torch.int8)
    matrix = QuantizedMatrix.from_payload(spec, (rows, columns), payload)
    expected = codes - zeros.repeat_interleave(size, 1)[:, :columns]
    assert torch.equal(matrix.integers()[0][:, :columns].long(), expected)
    each = scales.float().repeat_interleave(size, 1)[:, :columns]
    assert torch.equal(matrix.dequantize(), expected.float() * each)
    assert torch.equal(matrix.payload(), payload)


def stream_of(numbers: Tensor, bits: int) -> bytes:
    stream = sum(number << place * bits for place, number in enumerate(numbers.flatten().tolist()))
    return stream.to_bytes((numbers.numel() * bits + 7) // 8, "little")


@pytest.mark.parametrize(
    ("bits", "group", "symmetric", "shape", "rate"),
    [
        (3, 64, False, (256, 512), 3 + 19 / 64),
        (4, 128, False, (64, 1024), 4 + 20 / 128),
        (4, 32, True, (64, 1024), 4 + 16 / 32),
        (8, 64, False, (64, 1024), 8 + 16 / 64),
        (3, 0, False, (256, 512), 3 + 19 / 512),
        (3, 64, False, (256, 172), 3 + 3 * 19 / 172),
        (5, 64, True, (8, 7), 5 + 16 / 7),
    ],
)
def test_bits_are_counted_exactly(bits: int, group: int, symmetric: bool, shape: tuple[int, int], rate: float) -> None:
    rounder = codec("integer", group=group, symmetric=symmetric)
    assert rounder.bits(rounder.spec(bits), shape) / (shape[0] * shape[1]) == pytest.approx(rate, rel=1e-12)
    assert check(rounder, normal(*shape), bits).bits_per_weight == pytest.approx(rate, rel=1e-12)


@pytest.mark.parametrize("power", [1, 5])
@pytest.mark.parametrize("options", [{}, {"symmetric": True}, {"group": 0}, {"group": 8}], ids=str)
@pytest.mark.parametrize("bits", [2, 3, 5, 8])
def test_clip_is_never_worse_than_the_span(bits: int, options: dict[str, int | bool], power: int) -> None:
    weight = normal(60, 200).pow(power)
    errors = []
    for clip in (True, False):
        rounder = codec("integer", clip=clip, **options)
        difference = rounder.quantize(weight, rounder.spec(bits)).dequantize().double() - weight.double()
        size = rounder.config.columns(200)
        filled = torch.nn.functional.pad(difference, (0, -200 % size))
        errors.append(filled.square().view(60, -1, size).sum(2))
    clipped, spanned = errors
    assert bool((clipped <= spanned * (1 + 1e-5) + 1e-12).all())
    assert float(clipped.sum()) < float(spanned.sum())


def test_zeros_stay_zeros() -> None:
    weight = normal(8, 96)
    weight[normal(8, 96, seed=1) > 0] = 0
    weight[3] = 0
    for options in ({}, {"symmetric": True}, {"clip": False}):
        found = check(codec("integer", group=32, **options), weight, 3).dequantize()
        assert not bool(found[weight == 0].any())
    assert not check(codec("integer"), torch.zeros(4, 70), 3).payload().any()


def test_groups_of_one_value_and_of_one_sign() -> None:
    weight = torch.tensor([[0.75] * 16, [-3.0] * 16, [*[0.0] * 8, *[7.0] * 8]])
    rounder = codec("integer", group=16)
    found = check(rounder, weight, 3).dequantize()
    assert bool(((found - weight).abs() <= weight.abs() * 2.0**-11).all())
    found = check(rounder, normal(20, 64).abs() + 1, 4).dequantize()
    assert bool((found >= 0).all())


def test_magnitudes_at_the_ends_of_float16() -> None:
    tiny = normal(4, 64) * 2e-7  # the scales are subnormal: a few units of 2^-24
    error = relative_error(tiny, check(codec("integer"), tiny, 4))
    assert 0.005 < error < 0.2
    assert not check(codec("integer"), normal(4, 64) * 1e-9, 4).payload().any()
    large = normal(4, 64).clamp(-2, 2) * 1e5
    assert relative_error(large, check(codec("integer"), large, 4)) < 0.012
    for weight in (large * 100, torch.tensor([[3e38, -3e38] * 8])):
        with pytest.raises(NumericsError, match=r"float16 ends at 65504.*Scale the matrix down"):
            codec("integer").quantize(weight, codec("integer").spec(4))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_other_types_and_layouts_give_the_bytes_of_float32(dtype: torch.dtype) -> None:
    rounder = codec("integer", group=16)
    weight = normal(48, 64).bfloat16().to(dtype)
    expected = check(rounder, weight.float(), 3).payload()
    assert torch.equal(check(rounder, weight, 3).payload(), expected)
    assert torch.equal(check(rounder, weight.t().contiguous().t(), 3).payload(), expected)
    assert check(rounder, weight, 3).dequantize(dtype).dtype == dtype


def test_rows_are_alone() -> None:
    """Parts of a matrix that is too large for one chunk are the parts of what the whole becomes."""
    weight = normal(700, 1000)
    rounder = codec("integer")
    whole = rounder.quantize(weight, rounder.spec(3)).dequantize()
    part = rounder.quantize(weight[300:400], rounder.spec(3)).dequantize()
    assert torch.equal(whole[300:400], part)


def test_mistakes() -> None:
    rounder = codec("integer")
    with pytest.raises(UsageError, match=r"no group integers of 9 bits.*2 to 8"):
        rounder.spec(9)
    for group in (4, -1):
        with pytest.raises(UsageError, match=f"no groups of {group} columns.*8 or more"):
            codec("integer", group=group)
    with pytest.raises(UsageError, match="no option 'bits'"):
        codec("integer", bits=3)
    weight = normal(4, 20)
    weight[2, 7] = math.nan
    with pytest.raises(NumericsError, match="row 2, column 7"):
        rounder.quantize(weight, rounder.spec(3))
    with pytest.raises(CodecError, match="matrix of floats"):
        rounder.quantize(torch.zeros(4), rounder.spec(3))


@pytest.mark.parametrize(
    "change",
    [{"width": 9}, {"dim": 64}, {"options": {}}, {"options": {"group": 4, "symmetric": False, "clip": True}},
     {"options": {"group": 64, "symmetric": 0, "clip": True}}, {"options": {"group": 64, "symmetric": False}}],
    ids=["width", "dim", "none", "group", "type", "missing"],
)  # fmt: skip
def test_descriptions_that_nobody_wrote_are_refused(change: dict[str, object]) -> None:
    spec = CodecSpec.from_dict(codec("integer").spec(3).to_dict() | change)
    with pytest.raises(ArtifactError, match="group integers"):
        codec_of(spec)


def test_damaged_payloads_are_refused() -> None:
    spec = codec("integer").spec(3)
    payload = codec("integer").quantize(normal(4, 128), spec).payload()
    for wrong in (payload[:-1], torch.cat([payload, payload[:1]]), payload.to(torch.int16)):
        with pytest.raises(ArtifactError, match="is 211 bytes of int8"):
            QuantizedMatrix.from_payload(spec, (4, 128), wrong)
    for bad in (math.nan, math.inf, -1.0):
        damaged = payload.clone()
        damaged[2:4] = torch.tensor([bad], dtype=torch.float16).view(torch.int8)
        with pytest.raises(ArtifactError, match="'scales'"):
            QuantizedMatrix.from_payload(spec, (4, 128), damaged)


def test_options_survive_a_description() -> None:
    rounder = codec("integer", group=0, symmetric=True, clip=False)
    assert codec_of(CodecSpec.from_dict(rounder.spec(5).to_dict())).config == IntegerConfig(0, True, False)
    assert rounder.widths() == WIDTHS and rounder.widths(2.5, 4.0) == (3, 4)
