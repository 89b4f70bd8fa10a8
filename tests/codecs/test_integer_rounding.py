"""Group integers column by column."""

from __future__ import annotations

import math
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from compress.codecs import codec
from compress.codecs.integer.rounding import IntegerRounding
from compress.errors import NumericsError
from tests.codecs.payloads import normal

CPU = torch.device("cpu")


def scaled(weight: Tensor, bits: int, options: Mapping[str, object]) -> IntegerRounding:
    """All scales from the weights themselves."""
    rounder = codec("integer", **options)
    rows, columns = weight.shape
    rounding = rounder.rounding((rows, columns), rounder.spec(bits), CPU)
    assert isinstance(rounding, IntegerRounding)
    for start in range(0, columns, rounding.scope):
        rounding.scale(start, weight[:, start : start + rounding.scope])
    return rounding


def rounded(weight: Tensor, bits: int, step: int = 1, **options: object) -> IntegerRounding:
    """All scales from the weights themselves, then codes `step` columns at a time."""
    rounding = scaled(weight, bits, options)
    for start in range(0, weight.shape[1], step):
        value = rounding.round(start, weight[:, start : start + step])
        assert value.shape == weight[:, start : start + step].shape
    return rounding


@pytest.mark.parametrize("step", [1, 7, 200])
@pytest.mark.parametrize("options", [{}, {"symmetric": True}, {"group": 0}, {"group": 16, "clip": False}], ids=str)
@pytest.mark.parametrize(("bits", "columns"), [(3, 192), (4, 172), (8, 5)])
def test_scales_of_the_weights_give_what_quantize_gives(
    bits: int, columns: int, options: dict[str, int | bool], step: int
) -> None:
    weight = normal(33, columns, seed=bits)
    weight[4] = 0
    rounding, rounder = rounded(weight, bits, step, **options), codec("integer", **options)
    expected = rounder.quantize(weight, rounder.spec(bits))
    assert torch.equal(rounding.finish().payload(), expected.payload())
    assert torch.equal(rounding.decoded(), expected.dequantize())
    assert rounding.dim == 1 and rounding.scope == min(options.get("group", 64) or columns, columns)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_code_is_the_nearest_of_all(bits: int) -> None:
    """Targets far from the weights that chose the scales, as carried errors make them, against every code there is."""
    rounding = scaled(normal(20, 64), bits, {})
    target = 2 * normal(20, 40, seed=1)
    value = rounding.round(16, target, torch.full((1, 1), 3.0))
    levels = (torch.arange(2**bits) - rounding.zeros) * rounding.scales
    least = (target.unsqueeze(2) - levels.unsqueeze(1)).abs().amin(2)
    torch.testing.assert_close((target - value).abs(), least, rtol=1e-5, atol=1e-5)
    assert torch.equal(rounding.decoded()[:, 16:56], value)


def test_a_column_is_rounded_anew() -> None:
    weight = normal(9, 64)
    rounding = rounded(weight, 3)
    before = rounding.decoded()
    again = rounding.round(5, -weight[:, 5:6])
    after = rounding.finish().dequantize()
    assert torch.equal(after[:, 5:6], again) and not torch.equal(again, before[:, 5:6])
    after[:, 5] = before[:, 5]
    assert torch.equal(after, before)


def test_keep_leaves_what_is_as_near() -> None:
    """Half-way between two codes each is as near: the present one stays, a nearer one does not."""
    rounding = rounded(torch.tensor([[-4.0, 3.0, *[0.0] * 6]] * 2), 3, clip=False)
    assert rounding.scales.flatten().tolist() == [1.0, 1.0]
    rounding.round(2, torch.tensor([[1.0], [2.0]]))
    assert rounding.round(2, torch.tensor([[1.5], [1.5]]), keep=True).flatten().tolist() == [1.0, 2.0]
    assert rounding.round(2, torch.tensor([[1.6], [1.4]]), keep=True).flatten().tolist() == [2.0, 1.0]
    assert rounding.round(2, torch.tensor([[1.5], [1.5]])).flatten().tolist() == [2.0, 2.0]


def test_rescale_multiplies_what_is_decoded() -> None:
    rounding = rounded(normal(9, 160), 4, group=32)
    before, codes = rounding.decoded(), rounding.codes.clone()
    factors = 1 + 0.2 * normal(9, 5, seed=2).clamp(-2, 2)
    rounding.rescale(factors)
    expected = before * factors.repeat_interleave(32, 1)
    torch.testing.assert_close(rounding.decoded(), expected, rtol=2.0**-11, atol=0)
    assert torch.equal(rounding.codes, codes)
    assert torch.equal(rounding.finish().dequantize(), rounding.decoded())


def test_rescale_ends_where_float16_ends() -> None:
    rounding = rounded(normal(2, 64), 4)
    for factor, scale in ((1e9, 65504.0), (1e-30, 0.0), (7.0, 0.0)):
        rounding.rescale(torch.full((2, 1), factor))
        assert rounding.scales.flatten().tolist() == [scale, scale]
    rounding = rounded(normal(2, 64), 4)
    rounding.rescale(torch.full((2, 1), -1.0))
    assert not rounding.decoded().any()
    with pytest.raises(NumericsError, match="factors"):
        rounding.rescale(torch.tensor([[1.0], [math.nan]]))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_values_that_are_not_finite_are_refused(bad: float) -> None:
    rounder = codec("integer")
    rounding = rounder.rounding((2, 128), rounder.spec(3), CPU)
    values = normal(2, 64)
    values[1, 3] = bad
    with pytest.raises(NumericsError, match="from column 64 on"):
        rounding.scale(64, values)


@pytest.mark.parametrize("columns", [64, 96])
def test_error_feedback_lowers_the_error_of_the_outputs(columns: int) -> None:
    """Carrying each column's error to the next ones, as GPTQ writes it with the inverse of H, must beat rounding each
    column alone, in the metric H of correlated inputs."""
    inputs = normal(400, columns, seed=3) @ normal(columns, columns, seed=4) + normal(400, 1, seed=5)
    hessian = inputs.double().T @ inputs.double() / 400 + 0.01 * torch.eye(columns)
    weight = normal(16, columns)
    rounder = codec("integer", group=32)
    rounding = rounder.rounding((16, columns), rounder.spec(3), CPU)
    upper = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
    left = weight.double()
    for column in range(columns):
        if column % 32 == 0:
            rounding.scale(column, left[:, column : column + 32].float())
        value = rounding.round(column, left[:, column : column + 1].float())
        error = (left[:, column : column + 1] - value) / upper[column, column]
        left[:, column + 1 :] -= error * upper[column, column + 1 :]
    alone = rounder.quantize(weight, rounder.spec(3)).dequantize()

    def output_error(value: Tensor) -> float:
        difference = (weight - value).double()
        return float(((difference @ hessian) * difference).sum())

    assert output_error(rounding.finish().dequantize()) < 0.7 * output_error(alone)
