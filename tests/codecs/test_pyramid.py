"""The pyramid codec: payloads, exact products, hostile shapes and numbers."""

from __future__ import annotations

import random

import pytest
import torch

from compress import ops
from compress.codecs import CodecSpec, QuantizedMatrix, codec, codec_of
from compress.codecs.pyramid.codec import shape_of, split_codes
from compress.errors import ArtifactError, CodecError, NumericsError, UsageError
from tests.codecs.payloads import check_payload, normal, relative_error


def check_round_trip(weight: torch.Tensor, spec: CodecSpec) -> QuantizedMatrix:
    """Everything that must hold of any matrix: exact size, exact round trip, exact product."""
    matrix = check_payload(codec("pyramid", max=spec.options["max"]), weight, spec)
    integers, scales = matrix.integers()
    assert int(integers.abs().sum()) == shape_of(spec).pulses * scales.numel()
    return matrix


@pytest.mark.parametrize(
    ("rows", "columns"),
    [(1, 16), (1, 1), (3, 15), (3, 17), (7, 172), (0, 64), (5, 0), (0, 0), (33, 96), (1, 4096)],
    ids=lambda size: str(size),
)
def test_hostile_shapes(rows: int, columns: int) -> None:
    check_round_trip(normal(rows, columns), codec("pyramid").spec(52))


def test_random_shapes_and_widths() -> None:
    draw = random.Random(1)
    for trial in range(40):
        pyramid = codec("pyramid", max=draw.choice([7, 127]))
        spec = pyramid.spec(draw.choice(pyramid.widths()))
        rows, columns = draw.randrange(1, 40), draw.randrange(1, 120)
        weight = normal(rows, columns, seed=trial) * 10.0 ** draw.uniform(-30, 30)
        matrix = check_round_trip(weight, spec)
        assert relative_error(weight, matrix) < 0.3


def test_columns_beyond_the_last_whole_group_cost_no_quality() -> None:
    """172 = 10 * 16 + 12: the filled columns must not pull the error up."""
    spec = codec("pyramid").spec(52)
    whole, ragged = (check_round_trip(normal(200, columns), spec) for columns in (176, 172))
    assert relative_error(normal(200, 172), ragged) < 1.02 * relative_error(normal(200, 176), whole)


@pytest.mark.parametrize("factor", [1e-30, 1e-6, 1.0, 1e6, 1e30])
def test_error_is_independent_of_the_unit(factor: float) -> None:
    spec = codec("pyramid").spec(52)
    assert relative_error(normal(16, 64) * factor, check_round_trip(normal(16, 64) * factor, spec)) < 0.018


def test_subnormal_weights_are_carried() -> None:
    check_round_trip(normal(4, 64) * 1e-41, codec("pyramid").spec(52))


def test_rows_of_very_different_size() -> None:
    """A row 2^15 below the largest is still coded; one 10^30 below becomes zero, the nearest there is."""
    weight = normal(4, 64) * torch.tensor([[1.0], [2.0**-7], [2.0**-14.5], [1e-30]])
    matrix = check_round_trip(weight, codec("pyramid").spec(52))
    for row in range(3):
        error = (matrix.dequantize()[row] - weight[row]).square().sum() / weight[row].square().sum()
        assert float(error) < 0.03
    assert not matrix.dequantize()[3].any()


def test_zero_rows_are_exact() -> None:
    weight = normal(6, 48)
    weight[[0, 3]] = 0
    matrix = check_round_trip(weight, codec("pyramid").spec(40))
    assert matrix.tensors["rows"].eq(0).tolist() == [True, False, False, True, False, False]
    assert not matrix.dequantize()[[0, 3]].any()
    assert not check_round_trip(torch.zeros(2, 20), codec("pyramid").spec(64)).payload().any()


@pytest.mark.parametrize("width", [32, 52])
def test_heavy_tails_are_never_worse_than_zeros(width: int) -> None:
    weight = normal(40, 256).pow(5)
    weight[:, 0] = 1000
    matrix = check_round_trip(weight, codec("pyramid").spec(width))
    errors = (matrix.dequantize() - weight).double().square().sum(1)
    assert (errors <= weight.double().square().sum(1)).all()
    assert relative_error(normal(40, 256).pow(3), codec("pyramid").quantize(normal(40, 256).pow(3), matrix.spec)) < 0.5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_other_types_and_layouts_give_the_bytes_of_float32(dtype: torch.dtype) -> None:
    spec = codec("pyramid").spec(45)
    weight = normal(48, 64).bfloat16().clamp(-4, 4).to(dtype)
    expected = check_round_trip(weight.float(), spec).payload()
    assert torch.equal(check_round_trip(weight, spec).payload(), expected)
    assert torch.equal(check_round_trip(weight.t().contiguous().t(), spec).payload(), expected)
    strided = torch.stack([weight, weight], 2)[:, :, 0]
    assert not strided.is_contiguous()
    assert torch.equal(check_round_trip(strided, spec).payload(), expected)


def test_dequantize_rounds_once_to_the_type_asked_for() -> None:
    matrix = codec("pyramid").quantize(normal(3, 20), codec("pyramid").spec(52))
    assert torch.equal(matrix.dequantize(torch.bfloat16), matrix.dequantize().bfloat16())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")], ids=str)
def test_numbers_that_are_not_finite_are_refused_by_position(bad: float) -> None:
    weight = normal(4, 20)
    weight[2, 7] = bad
    with pytest.raises(NumericsError, match="row 2, column 7"):
        codec("pyramid").quantize(weight, codec("pyramid").spec(52))


def test_what_is_not_a_matrix_of_floats_is_refused() -> None:
    pyramid = codec("pyramid")
    for wrong in (torch.zeros(4), torch.zeros(2, 2, 2), torch.zeros(2, 2, dtype=torch.int64)):
        with pytest.raises(CodecError, match="matrix of floats"):
            pyramid.quantize(wrong, pyramid.spec(52))
    with pytest.raises(NumericsError, match="overflows"):
        pyramid.quantize(torch.full((2, 16), 1e37), pyramid.spec(52))


@pytest.mark.parametrize("change", [-1, 1, 8], ids=["short", "long", "longer"])
def test_a_payload_of_another_length_is_refused(change: int) -> None:
    spec = codec("pyramid").spec(52)
    payload = codec("pyramid").quantize(normal(4, 32), spec).payload()
    wrong = payload[:change] if change < 0 else torch.cat([payload, torch.zeros(change, dtype=torch.int8)])
    with pytest.raises(ArtifactError, match="is 60 bytes of int8"):
        QuantizedMatrix.from_payload(spec, (4, 32), wrong)


def test_damaged_codes_are_refused_or_decoded_but_never_crash() -> None:
    spec = codec("pyramid").spec(52)
    payload = codec("pyramid").quantize(normal(4, 64), spec).payload()
    payload[8:] = -1
    with pytest.raises(CodecError, match="outside its codebook"):
        QuantizedMatrix.from_payload(spec, (4, 64), payload).dequantize()


@pytest.mark.parametrize("width", [0, 23, 65])
def test_widths_outside_the_table_are_refused_by_name(width: int) -> None:
    with pytest.raises(UsageError, match=f"no code of {width} bits.*24 to 64"):
        codec("pyramid").spec(width)


def test_widths_of_a_range_of_rates() -> None:
    assert codec("pyramid").widths(2.0, 2.25) == (32, 33, 34, 35, 36)
    assert codec("pyramid").dim == 16


def test_widths_that_buy_nothing_are_read_and_not_offered() -> None:
    bounded, free = codec("pyramid", max=7), codec("pyramid", max=127)
    assert bounded.widths() == tuple(range(24, 60))
    assert free.widths() == tuple(range(24, 65))
    with pytest.raises(UsageError, match=r"no code of 64 bits.*24 to 59"):
        bounded.spec(64)
    padded = CodecSpec("pyramid", 64, 16, dict(bounded.spec(59).options))
    codes = codec_of(padded).quantize(normal(4, 32), padded)
    same = bounded.quantize(normal(4, 32), bounded.spec(59))
    assert torch.equal(codes.dequantize(), same.dequantize())


@pytest.mark.parametrize("gains", [1, 2, 3, 7, 24])
def test_division_of_unsigned_64_bit_codes(gains: int) -> None:
    draw = random.Random(gains)
    codes = [draw.getrandbits(64) for _ in range(500)] if gains > 1 else [draw.getrandbits(63) for _ in range(500)]
    index, gain = split_codes(torch.tensor([c - 2**64 if c >= 2**63 else c for c in codes]), gains)
    assert [(i, g) for i, g in zip(index.tolist(), gain.tolist(), strict=True)] == [divmod(c, gains) for c in codes]


def test_threads_and_chunks_do_not_change_the_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    pyramid, weight = codec("pyramid"), normal(50, 80)
    whole = pyramid.quantize(weight, pyramid.spec(52)).payload()
    monkeypatch.setattr("compress.codecs.row_search.CHUNK_WEIGHTS", 160)
    monkeypatch.setattr("compress.codecs.rows.CHUNK_ROWS", 7)
    monkeypatch.setattr("compress.ops.search.CHUNK_ELEMENTS", 64)
    assert torch.equal(pyramid.quantize(weight, pyramid.spec(52)).payload(), whole)


def test_native_and_reference_write_the_same_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    if ops.backend() != "native":
        pytest.skip("the native library is not built")
    pyramid, weight = codec("pyramid", max=127), normal(60, 172)
    whole = pyramid.quantize(weight, pyramid.spec(64))
    native, decoded = whole.payload(), whole.dequantize()
    for name in ("pyramid_encode", "pyramid_rank", "pyramid_unrank", "pack_bits", "unpack_bits"):
        monkeypatch.setattr(ops, name, getattr(ops.reference, name))
    again = pyramid.quantize(weight, pyramid.spec(64))
    assert torch.equal(again.payload(), native) and torch.equal(again.dequantize(), decoded)
