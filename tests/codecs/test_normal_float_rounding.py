"""NF4, FP4 and int8 column by column."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import compress
from compress.codecs import codec
from compress.codecs.base import Rounding
from compress.codecs.normal_float.int8 import Int8Rounding
from compress.codecs.normal_float.rounding import TableRounding
from compress.codecs.normal_float.tables import table
from compress.errors import NumericsError
from tests import families
from tests.codecs.payloads import normal

CPU = torch.device("cpu")
CASES = [("nf4", {}), ("nf4", {"block": 32}), ("fp4", {"block": 128}), ("int8", {})]


def scaled(weight: Tensor, name: str, options: dict[str, object]) -> Rounding:
    rounder = codec(name, **options)
    rounding = rounder.rounding((weight.shape[0], weight.shape[1]), rounder.spec(rounder.widths()[0]), CPU)
    assert rounding.dim == 1 and rounding.scope == weight.shape[1]
    rounding.scale(0, weight)
    return rounding


def rounded(weight: Tensor, name: str, options: dict[str, object], step: int = 1) -> Rounding:
    rounding = scaled(weight, name, options)
    for start in range(0, weight.shape[1], step):
        value = rounding.round(start, weight[:, start : start + step])
        assert value.shape == weight[:, start : start + step].shape
    return rounding


def levels(rounding: Rounding) -> Tensor:
    """All values that a weight can have, [o, n, codes], written down anew."""
    rows, columns = rounding.finish().shape
    if isinstance(rounding, Int8Rounding):
        steps = rounding.absmax.double() / 127
        return (steps[:, None, None] * torch.arange(-127, 128)).expand(rows, columns, 255)
    assert isinstance(rounding, TableRounding)
    blocks = torch.arange(rows * columns) // rounding.config.block
    scales = rounding.scales.double()[blocks].view(rows, columns, 1)
    return scales * table(rounding.config.name).values.double()


@pytest.mark.parametrize("step", [1, 7, 200])
@pytest.mark.parametrize("columns", [192, 100, 33])
@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
def test_scales_of_the_weights_give_what_quantize_gives(
    columns: int, name: str, options: dict[str, object], step: int
) -> None:
    weight = normal(33, columns, seed=columns)
    weight[4] = 0
    rounding, rounder = rounded(weight, name, options, step), codec(name, **options)
    expected = rounder.quantize(weight, rounder.spec(rounder.widths()[0]))
    assert torch.equal(rounding.finish().payload(), expected.payload())
    assert torch.equal(rounding.decoded(), expected.dequantize())


@pytest.mark.parametrize("columns", [128, 90])
@pytest.mark.parametrize(("name", "options"), [*CASES, ("nf4", {"double": True})], ids=str)
def test_a_code_is_the_nearest_of_all(columns: int, name: str, options: dict[str, object]) -> None:
    """Targets far from the weights that chose the scales, as carried errors make them, against every code there is; a
    metric of one column changes nothing."""
    rounding = scaled(normal(20, columns), name, options)
    target = 2 * normal(20, 40, seed=1)
    value = rounding.round(16, target, torch.full((1, 1), 3.0))
    least = (target.double().unsqueeze(2) - levels(rounding)[:, 16:56]).abs().amin(2)
    torch.testing.assert_close((target.double() - value.double()).abs(), least, rtol=1e-5, atol=1e-6)
    assert torch.equal(rounding.decoded()[:, 16:56], value)
    assert torch.equal(rounding.finish().dequantize(), rounding.decoded())


@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
def test_a_column_is_rounded_anew(name: str, options: dict[str, object]) -> None:
    weight = normal(9, 64)
    rounding = rounded(weight, name, options)
    before = rounding.decoded()
    again = rounding.round(5, -weight[:, 5:6])
    after = rounding.finish().dequantize()
    assert torch.equal(after[:, 5:6], again) and not torch.equal(again, before[:, 5:6])
    after[:, 5] = before[:, 5]
    assert torch.equal(after, before)


@pytest.mark.parametrize(("name", "one", "other"), [("fp4", 4.0, 6.0), ("int8", 4.0, 5.0)])
def test_keep_leaves_what_is_as_near(name: str, one: float, other: float) -> None:
    """Half-way between two values each is as near: the present one stays, a nearer one does not."""
    weight = torch.zeros(2, 32)
    weight[:, 0] = 127.0 if name == "int8" else 12.0
    rounding = rounded(weight, name, {} if name == "int8" else {"block": 32})
    middle = (one + other) / 2
    rounding.round(2, torch.tensor([[one], [other]]))
    kept = rounding.round(2, torch.full((2, 1), middle), keep=True)
    torch.testing.assert_close(kept.flatten(), torch.tensor([one, other]))
    moved = rounding.round(2, torch.tensor([[middle + 0.1], [middle - 0.1]]), keep=True)
    torch.testing.assert_close(moved.flatten(), torch.tensor([other, one]))


@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
def test_rescale_multiplies_what_is_decoded(name: str, options: dict[str, object]) -> None:
    rounding = rounded(normal(9, 128), name, options)
    before = rounding.decoded()
    factors = 1 + 0.2 * normal(9, 1, seed=2).clamp(-2, 2)
    rounding.rescale(factors)
    torch.testing.assert_close(rounding.decoded(), before * factors, rtol=1e-6, atol=0)
    assert torch.equal(rounding.finish().dequantize(), rounding.decoded())


def test_a_block_of_several_rows_takes_the_mean_of_their_factors() -> None:
    rounding = rounded(normal(3, 24), "nf4", {"block": 32})
    assert isinstance(rounding, TableRounding)
    before = rounding.scales.clone()
    rounding.rescale(torch.tensor([[1.0], [2.0], [4.0]]))
    expected = torch.tensor([(24 * 1 + 8 * 2) / 32, (16 * 2 + 16 * 4) / 32, 4.0])
    torch.testing.assert_close(rounding.scales / before, expected)


@pytest.mark.parametrize(("name", "options"), [*CASES, ("nf4", {"double": True})], ids=str)
def test_factors_at_the_ends(name: str, options: dict[str, object]) -> None:
    rounding = rounded(normal(2, 64), name, options)
    with pytest.raises(NumericsError, match="factors"):
        rounding.rescale(torch.tensor([[1.0], [math.nan]]))
    rounding.rescale(torch.full((2, 1), -1.0))
    assert not rounding.decoded().any()
    if "double" not in options:
        rounding = rounded(normal(2, 64), name, options)
        rounding.rescale(torch.full((2, 1), 3e38))
        assert rounding.decoded().isfinite().all()


@pytest.mark.parametrize("name", ["nf4", "int8"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_values_that_are_not_finite_are_refused(bad: float, name: str) -> None:
    weight = normal(2, 128)
    weight[1, 3] = bad
    with pytest.raises(NumericsError, match="not all finite"):
        scaled(weight, name, {})


@pytest.mark.parametrize("name", ["nf4", "fp4", "int8"])
def test_calibration_lowers_the_error_of_the_outputs(name: str) -> None:
    """Of a whole model, on the ids that it was calibrated with, against rounding to the nearest."""
    ids, errors = families.token_ids(24, 8), {}
    plain = families.logits(families.llama(), ids)
    for data in (None, ids):
        model = compress.quantize(families.llama(), codec=name, data=data)
        errors[data is None] = float((families.logits(model, ids) - plain).norm() / plain.norm())
    assert errors[False] < 0.85 * errors[True]
