"""Dynamic integers against a search over every number of the grid, in float64, and numpy integers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from compress.codecs.dynamic import GroupQuantizer, TokenQuantizer
from compress.errors import NumericsError, UsageError

BITS = range(2, 9)


def rows(count: int = 7, width: int = 33, dtype: torch.dtype = torch.float32) -> Tensor:
    """Rows of both signs with an outlier, one that is only positive, one only negative, one of zeros, one constant."""
    x = torch.randn(count, width, generator=torch.Generator().manual_seed(0))
    x[0, 3] = 40.0
    x[1], x[2], x[3], x[4] = x[1].abs() + 1, -x[2].abs() - 1, 0, 3.7
    return x.to(dtype)


def grid(row: np.ndarray, bits: int, symmetric: bool, clip: float) -> np.ndarray:
    """Every number that a row of float64 can become."""
    if symmetric:
        top = 2 ** (bits - 1) - 1
        scale = clip * np.abs(row).max() / top or 1.0
        return scale * np.arange(-top, top + 1)
    low, high = clip * min(row.min(), 0), clip * max(row.max(), 0)
    scale = (high - low) / (2**bits - 1) or 1.0
    return scale * (np.arange(2**bits) - np.rint(-low / scale))


def nearest(x: Tensor, bits: int, symmetric: bool, clip: float) -> tuple[Tensor, Tensor]:
    """Of each number the nearest of its row's grid, float64, and its place in the grid."""
    values, places = [], []
    for row in x.double().numpy():
        levels = grid(row, bits, symmetric, clip)
        place = np.abs(row[:, None] - levels).argmin(1)
        values.append(levels[place])
        places.append(place)
    return torch.tensor(np.stack(values)), torch.tensor(np.stack(places))


@pytest.mark.parametrize("clip", [1.0, 0.8])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", BITS)
def test_the_nearest_of_the_grid(bits: int, symmetric: bool, clip: float) -> None:
    quantizer = TokenQuantizer(bits, symmetric, clip)
    x = rows(dtype=torch.float64)
    expected, places = nearest(x, bits, symmetric, clip)
    torch.testing.assert_close(quantizer(x), expected, rtol=0, atol=1e-12)
    codes, scale, zero = quantizer.encode(x)
    assert codes.dtype == zero.dtype == (torch.int8 if symmetric else torch.uint8) and scale.dtype == torch.float64
    assert codes.shape == x.shape and scale.shape == zero.shape == (7, 1)
    assert torch.equal(codes.long(), places - (2 ** (bits - 1) - 1 if symmetric else 0))


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", BITS)
def test_numpy_integers(bits: int, symmetric: bool) -> None:
    """The same operations in float32 with integers of numpy, bit for bit."""
    x = rows().numpy()
    if symmetric:
        top, bottom = 2 ** (bits - 1) - 1, -(2 ** (bits - 1) - 1)
        scale = np.abs(x).max(1, keepdims=True) / np.float32(top)
        zero = np.zeros((7, 1), np.int64)
    else:
        top, bottom = 2**bits - 1, 0
        low, high = np.minimum(x.min(1, keepdims=True), 0), np.maximum(x.max(1, keepdims=True), 0)
        scale = (high - low) / np.float32(top)
    scale = np.where(scale == 0, np.float32(1), scale)
    if not symmetric:
        zero = np.rint(-low / scale).astype(np.int64)
    codes = np.clip(np.rint(x / scale).astype(np.int64) + zero, bottom, top)
    found = TokenQuantizer(bits, symmetric).encode(torch.from_numpy(x))
    for tensor, expected in zip(found, (codes, scale, zero), strict=True):
        assert np.array_equal(tensor.numpy(), expected)
    assert found[1].dtype == torch.float32
    decoded = (codes - zero).astype(np.float32) * scale
    assert np.array_equal(TokenQuantizer(bits, symmetric)(torch.from_numpy(x)).numpy(), decoded)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("quantizer", [TokenQuantizer(4), TokenQuantizer(8, True), GroupQuantizer(4, 8, clip=0.9)])
def test_a_call_is_decode_of_encode(quantizer: TokenQuantizer | GroupQuantizer, dtype: torch.dtype) -> None:
    x = rows(dtype=dtype)
    found = quantizer(x)
    assert found.dtype == dtype
    assert torch.equal(found, quantizer.decode(*quantizer.encode(x)).to(dtype))


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", BITS)
def test_half_a_step(bits: int, symmetric: bool) -> None:
    quantizer = TokenQuantizer(bits, symmetric)
    x = torch.randn(200, 65, generator=torch.Generator().manual_seed(1))
    scale = quantizer.encode(x)[1]
    error = (quantizer(x) - x).abs() / scale
    assert 0.49 < float(error.max()) < 0.5 + 1e-4
    again = quantizer(quantizer(x))
    torch.testing.assert_close(again, quantizer(x), rtol=0, atol=float(2e-6 * x.abs().max()))


def test_zeros_and_constants_are_exact() -> None:
    x = torch.tensor([[0.0, 0.0, 0.0], [2.5, 2.5, 2.5], [-0.3, -0.3, -0.3], [0.0, 5.0, -1.25]], dtype=torch.float64)
    for quantizer in (TokenQuantizer(2), TokenQuantizer(7), GroupQuantizer(3)):
        found = quantizer(x)
        torch.testing.assert_close(found[:3], x[:3], rtol=1e-15, atol=0)
        assert found[3, 0] == 0
    assert TokenQuantizer(4).encode(x)[1][0] == 1


@pytest.mark.parametrize("group", [1, 5, 8, 33, 64, None])
@pytest.mark.parametrize("clip", [1.0, 0.7])
def test_groups_are_rows_of_their_own(group: int | None, clip: float) -> None:
    x = rows().view(7, 33)
    width = group or 33
    parts = [TokenQuantizer(4, clip=clip)(part.contiguous()) for part in x.split(width, 1)]
    quantizer = GroupQuantizer(4, group, clip=clip)
    assert torch.equal(quantizer(x), torch.cat(parts, 1))
    codes, scale, zero = quantizer.encode(x)
    assert codes.shape == (7, 33) and scale.shape == zero.shape == (7, math.ceil(33 / width))


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (2, 0, 4), (1, 1), (6,)])
def test_shapes(shape: tuple[int, ...]) -> None:
    for quantizer in (TokenQuantizer(4), TokenQuantizer(4, True, 0.5), GroupQuantizer(4, 3)):
        x = torch.ones(shape, requires_grad=True)
        found = quantizer(x)
        assert found.shape == shape
        found.sum().backward()
        assert x.grad is not None and quantizer.encode(x.detach())[0].shape == shape


def moving(x: Tensor, quantizer: TokenQuantizer) -> Tensor:
    """x' of a grid that moves with the row, by autograd: its offsets are parts of the range, which has its gradient."""
    low, high = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True).clamp(min=0)
    if quantizer.symmetric:
        high = x.abs().amax(-1, keepdim=True)
        low = -high
    low, high = low * quantizer.clip, high * quantizer.clip
    span, rounded = high - low, quantizer(x.detach())
    covered = (low <= x) & (x <= high)
    found = torch.where(covered, x + span * ((rounded - x) / span).detach(), span * (rounded / span).detach())
    return torch.where(span == 0, x, found)


@pytest.mark.parametrize("clip", [1.0, 0.7])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_gradient_of_a_grid_that_moves(bits: int, symmetric: bool, clip: float) -> None:
    quantizer = TokenQuantizer(bits, symmetric, clip)
    x, direction = rows(dtype=torch.float64)[[0, 1, 2, 5, 6]].requires_grad_(), torch.randn(5, 33).double()
    (quantizer(x) * direction).sum().backward()
    y = x.detach().requires_grad_()
    (moving(y, quantizer) * direction).sum().backward()
    assert x.grad is not None and y.grad is not None
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-12, atol=1e-12)
    # a row twice as large has a grid twice as large: x' is homogeneous, and Euler's theorem holds
    torch.testing.assert_close((x.grad * x).sum(1), (direction * quantizer(x)).sum(1), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("symmetric", [False, True])
def test_gradients_of_rows_without_a_range_and_of_equal_ends(symmetric: bool) -> None:
    x = torch.tensor([[0.0, 0.0, 0.0], [2.5, 2.5, 2.5], [1.0, -1.0, 1.0]], dtype=torch.float64, requires_grad=True)
    direction = torch.tensor([[1.0, 2.0, 3.0], [1.0, 2.0, 3.0], [1.0, 2.0, 4.0]]).double()
    quantizer = TokenQuantizer(4, symmetric)
    (quantizer(x) * direction).sum().backward()
    assert x.grad is not None and torch.equal(x.grad[0], direction[0])
    torch.testing.assert_close((x.grad * x).sum(1), (direction * quantizer(x)).sum(1), rtol=1e-12, atol=1e-12)


def test_gradients_of_groups_are_those_of_rows() -> None:
    x, direction = rows().requires_grad_(), torch.randn(7, 33)
    y = x.detach().requires_grad_()
    (GroupQuantizer(4, 8, clip=0.8)(x) * direction).sum().backward()
    parts = [TokenQuantizer(4, clip=0.8)(part) for part in y.split(8, 1)]
    (torch.cat(parts, 1) * direction).sum().backward()
    assert x.grad is not None and y.grad is not None
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("symmetric", [False, True])
def test_a_row_that_is_not_finite_is_nan_and_its_neighbours_are_not(bad: float, symmetric: bool) -> None:
    x = rows()
    x[5, 2] = bad
    quantizer = TokenQuantizer(4, symmetric)
    found = quantizer(x)
    assert found[5].isnan().all()
    assert torch.equal(found[:5], quantizer(rows())[:5]) and torch.equal(found[6], quantizer(rows())[6])
    with pytest.raises(NumericsError, match="wider type"):
        quantizer.encode(x)


def test_the_ends_of_float16() -> None:
    x = torch.tensor([[65504.0, -65504.0 * 0.3, 1.0], [6e-8, -6e-8, 0.0]], dtype=torch.float16)
    for bits in BITS:
        found = TokenQuantizer(bits)(x)
        assert found.isfinite().all()
        assert float((found.double() - x.double()).abs()[0].max()) <= 1.3 * 65504 / (2**bits - 1) / 2 + 32
        assert found[1, 2] == 0 and found[1, 0] > found[1, 1]


def test_compiled_in_one_graph() -> None:
    compiled = torch.compile(
        lambda x: TokenQuantizer(4)(x) + GroupQuantizer(4, 8)(x), backend="aot_eager", fullgraph=True
    )
    x, y = rows().requires_grad_(), rows().requires_grad_()
    expected = TokenQuantizer(4)(y) + GroupQuantizer(4, 8)(y)
    found = compiled(x)
    assert torch.equal(found, expected)
    found.square().sum().backward()
    expected.square().sum().backward()
    assert x.grad is not None and y.grad is not None and torch.equal(x.grad, y.grad)


@pytest.mark.parametrize("options", [{"bits": 1}, {"bits": 9}, {"clip": 0.0}, {"clip": 1.5}])
def test_impossible_grids(options: dict[str, float]) -> None:
    for kind in (TokenQuantizer, GroupQuantizer):
        with pytest.raises(UsageError, match=r"Integers have|Choose a clip"):
            kind(**options)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="at least 1"):
        GroupQuantizer(group=0)
