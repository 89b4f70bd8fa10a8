"""The half-integer pyramid codec: payloads, exact products, hostile shapes and numbers, and the quality it is for."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from torch.nn import functional

from compress import ops
from compress.codecs import CodecSpec, QuantizedMatrix, codec, codec_of
from compress.codecs.half_pyramid.codec import entry_of, planes_of
from compress.codecs.half_pyramid.table import VERSION, shipped_tables
from compress.codecs.rows import row_scales
from compress.errors import ArtifactError, CodecError, NumericsError, UsageError
from compress.ops.half_pyramid import reference
from tests.codecs.payloads import check_payload, normal, relative_error

KINDS = [key[1:] for key in shipped_tables() if key[0] == VERSION]
RATES = (2.0, 2.5, 3.0, 3.25, 3.5, 4.0)
FAST = (0.0990, 0.0503, 0.0241, 0.0176, 0.0125, 0.0064)
QUALITY = (0.0957, 0.0485, 0.0243, 0.0172, 0.0123, 0.0061)
"""Errors that are to be reached, per weight of N(0, 1), in groups of 8 and of 16."""


def check_round_trip(weight: torch.Tensor, spec: CodecSpec) -> QuantizedMatrix:
    """Everything that must hold of any matrix: exact size, exact round trip, exact product, values of the codebook."""
    matrix = check_payload(codec_of(spec), weight, spec)
    integers, scales = matrix.integers()
    planes, code = planes_of(matrix), entry_of(spec).shape
    values, gain = reference.unpack(planes, scales.numel(), code, spec.width)
    assert torch.equal(values.view(integers.shape), integers)
    containers = row_scales(matrix.tensors["scale"], matrix.tensors["rows"]).unsqueeze(-1)
    assert torch.equal(containers * torch.tensor(code.gains)[gain].view(scales.shape), scales)
    return matrix


@pytest.mark.parametrize(
    ("rows", "columns"),
    [(1, 16), (1, 1), (3, 7), (3, 17), (7, 172), (0, 64), (5, 0), (0, 0), (33, 96), (1, 4096)],
    ids=lambda size: str(size),
)
@pytest.mark.parametrize(("dim", "coset", "levels"), KINDS)
def test_hostile_shapes(dim: int, coset: bool, levels: str, rows: int, columns: int) -> None:
    rounder = codec("half_pyramid", dim=dim, coset=coset, levels=levels)
    check_round_trip(normal(rows, columns), rounder.spec(rounder.widths(3.2, 3.3)[0]))


def test_random_shapes_and_widths() -> None:
    draw = random.Random(1)
    for trial in range(60):
        dim, coset, levels = draw.choice(KINDS)
        rounder = codec("half_pyramid", dim=dim, coset=coset, levels=levels)
        rows, columns = draw.randrange(1, 40), draw.randrange(1, 120)
        weight = normal(rows, columns, seed=trial) * 10.0 ** draw.uniform(-30, 30)
        matrix = check_round_trip(weight, rounder.spec(draw.choice(rounder.widths())))
        assert relative_error(weight, matrix) < 0.37  # at 1.25 bits a weight


@pytest.mark.parametrize("dim", [8, 16, 32])
def test_columns_beyond_the_last_whole_group_cost_no_quality(dim: int) -> None:
    rounder = codec("half_pyramid", dim=dim)
    spec = rounder.spec(rounder.widths(3.25)[0])
    whole, ragged = (check_round_trip(normal(200, columns), spec) for columns in (192, 172))
    assert relative_error(normal(200, 172), ragged) < 1.03 * relative_error(normal(200, 192), whole)


@pytest.mark.parametrize("factor", [1e-30, 1e-6, 1.0, 1e6, 1e30])
def test_error_is_independent_of_the_unit(factor: float) -> None:
    spec = codec("half_pyramid").spec(26)
    assert relative_error(normal(16, 64) * factor, check_round_trip(normal(16, 64) * factor, spec)) < 0.018


@pytest.mark.parametrize("name", ["half_pyramid", "pyramid"])
@pytest.mark.parametrize("columns", [1, 3])
def test_equal_weights_of_a_short_row_keep_their_pulses(name: str, columns: int) -> None:
    """What fills up the group must not take them."""
    rounder, weight = codec(name), torch.full((20, columns), 0.7)
    matrix = rounder.quantize(weight, rounder.spec(rounder.widths(3.25)[0]))
    assert relative_error(weight, matrix) < 0.06


def test_zero_rows_are_exact() -> None:
    weight = normal(6, 48)
    weight[[0, 3]] = 0
    matrix = check_round_trip(weight, codec("half_pyramid").spec(20))
    assert matrix.tensors["rows"].eq(0).tolist() == [True, False, False, True, False, False]
    assert not matrix.dequantize()[[0, 3]].any()
    assert not check_round_trip(torch.zeros(2, 20), codec("half_pyramid").spec(26)).payload().any()


def test_heavy_tails_are_never_worse_than_zeros() -> None:
    weight = normal(40, 256).pow(5)
    weight[:, 0] = 1000
    matrix = check_round_trip(weight, codec("half_pyramid").spec(16))
    errors = (matrix.dequantize() - weight).double().square().sum(1)
    assert (errors <= weight.double().square().sum(1)).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_other_types_and_layouts_give_the_bytes_of_float32(dtype: torch.dtype) -> None:
    spec = codec("half_pyramid").spec(25)
    weight = normal(48, 64).bfloat16().clamp(-4, 4).to(dtype)
    expected = check_round_trip(weight.float(), spec).payload()
    for same in (weight, weight.t().contiguous().t(), torch.stack([weight, weight], 2)[:, :, 0]):
        assert torch.equal(check_round_trip(same, spec).payload(), expected)


def test_chunks_do_not_change_the_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    rounder, weight = codec("half_pyramid"), normal(50, 84)
    whole = rounder.quantize(weight, rounder.spec(26)).payload()
    monkeypatch.setattr("compress.codecs.row_search.CHUNK_WEIGHTS", 160)
    assert torch.equal(rounder.quantize(weight, rounder.spec(26)).payload(), whole)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")], ids=str)
def test_numbers_that_are_not_finite_are_refused_by_position(bad: float) -> None:
    weight = normal(4, 20)
    weight[2, 7] = bad
    with pytest.raises(NumericsError, match="row 2, column 7"):
        codec("half_pyramid").quantize(weight, codec("half_pyramid").spec(26))


def test_damaged_codes_are_refused() -> None:
    spec = codec("half_pyramid").spec(26)
    payload = codec("half_pyramid").quantize(normal(4, 64), spec).payload()
    payload[8:] = -1
    damaged = QuantizedMatrix.from_payload(spec, (4, 64), payload)
    for read in (damaged.dequantize, damaged.integers):
        with pytest.raises(CodecError, match="outside its codebook"):
            read()
    with pytest.raises(ArtifactError, match="bytes of int8"):
        QuantizedMatrix.from_payload(spec, (4, 64), payload[:-1])


def test_descriptions_that_no_table_has_are_refused() -> None:
    good = codec("half_pyramid").spec(26)
    for options in ({}, {**good.options, "table": 99}, {**good.options, "levels": "other"}):
        with pytest.raises(ArtifactError, match="half-integer pyramid"):
            codec_of(CodecSpec("half_pyramid", 26, 8, options))
    with pytest.raises(UsageError, match="no code of 99 bits"):
        codec("half_pyramid").spec(99)
    with pytest.raises(UsageError, match="dim=12"):
        codec("half_pyramid", dim=12)


@pytest.mark.parametrize(("dim", "coset", "levels"), KINDS)
def test_every_width_fits_and_buys_something(dim: int, coset: bool, levels: str) -> None:
    table = shipped_tables()[VERSION, dim, coset, levels]
    assert min(table) == round(1.25 * dim) and max(table) == 5 * dim
    for width, entry in table.items():
        assert entry.shape.codes <= 1 << (width - dim)
        assert entry.shape.coset == coset
    errors = [entry.mse for _, entry in sorted(table.items())]
    assert errors == sorted(set(errors), reverse=True)


@pytest.mark.parametrize(
    ("dim", "rate", "asked"), [*((8, *pair) for pair in zip(RATES, FAST, strict=True)),
                               *((16, *pair) for pair in zip(RATES, QUALITY, strict=True))],
)  # fmt: skip
def test_gaussian_error(dim: int, rate: float, asked: float) -> None:
    """256 rows of 1024: the standard error of the mean is about .2 %."""
    rounder, weight = codec("half_pyramid", dim=dim), normal(256, 1024, seed=9)
    matrix = rounder.quantize(weight, rounder.spec(round(rate * dim)))
    assert relative_error(weight, matrix) <= asked


@pytest.mark.parametrize(("dim", "coset", "levels"), KINDS)
def test_product_with_packed_weights(dim: int, coset: bool, levels: str) -> None:
    rounder = codec("half_pyramid", dim=dim, coset=coset, levels=levels)
    for (rate, columns), rows in itertools.product(((2.0, 172), (3.25, 256), (4.9, 64)), (1, 3, 12)):
        matrix = rounder.quantize(normal(24, columns), rounder.spec(rounder.widths(rate)[0]))
        x = normal(rows, columns, seed=1)
        exact = functional.linear(x.double(), matrix.dequantize(torch.float64))
        multiply = rounder.prepare(matrix)
        if ops.backend() == "native":
            assert multiply is not None
            torch.testing.assert_close(multiply(x).double(), exact, rtol=0, atol=1e-5 * float(exact.abs().max()))


def test_the_operations_trace() -> None:
    """Through torch.compile's front end and torch.export, in one graph."""
    rounder = codec("half_pyramid")
    matrix = rounder.quantize(normal(16, 64), rounder.spec(26))
    shape, planes = entry_of(matrix.spec).shape, planes_of(matrix)
    scales = row_scales(matrix.tensors["scale"], matrix.tensors["rows"])

    class Product(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return ops.half_pyramid_linear(x, planes, scales, shape, 26) + 1

    x = normal(2, 64)
    expected = Product()(x)
    assert torch.equal(torch.compile(Product(), backend="eager", fullgraph=True)(x), expected)
    assert torch.equal(torch.export.export(Product(), (x,)).module()(x), expected)


@pytest.mark.parametrize("name", ["encode", "pack", "unpack", "decode", "linear"])
def test_fake_kernels_agree_with_the_real_ones(name: str) -> None:
    rounder = codec("half_pyramid")
    shape = entry_of(rounder.spec(26)).shape
    numbers = (shape.dim, shape.pulses, list(shape.levels), list(shape.gains), shape.shift)
    x, scale = normal(40, 8), torch.ones(40)
    values, gain, coset = ops.half_pyramid_encode(x, scale, shape)
    planes = ops.half_pyramid_pack(values, gain, coset, shape, 26)
    rows = torch.rand(8)
    arguments = {
        "encode": (x, scale, *numbers),
        "pack": (values, gain, coset, *numbers, 26),
        "unpack": (planes, 40, *numbers, 26),
        "decode": (planes, rows, 37, *numbers, 26, torch.bfloat16),
        "linear": (normal(3, 37), planes, rows, *numbers, 26, "int8"),
    }[name]
    torch.library.opcheck(getattr(torch.ops.compress, f"half_pyramid_{name}").default, arguments)
