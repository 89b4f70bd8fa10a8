"""The encoder is exact: its error is the least there is, found independently in float64."""

from __future__ import annotations

from types import ModuleType

import numpy as np
import pytest
import torch

from compress import ops
from compress.errors import CodecError
from tests.ops.oracles import all_vectors, least_error_by_dynamic_programming, least_error_by_enumeration

LEVELS = [0.13, 0.21, 0.3, 0.42, 0.7]
RELATIVE = 2e-6
"""Excess of a float32 argmin over the float64 minimum: a near-tie, decided within rounding (a few 2^-24)."""


def errors_of(kernels: ModuleType, x: torch.Tensor, scale: torch.Tensor, pulses: int, limit: int) -> np.ndarray:
    levels = torch.tensor(LEVELS)
    y, gain = kernels.pyramid_encode(x, scale, levels, pulses, limit)
    assert y.dtype == torch.int8 and gain.dtype == torch.int64
    assert (y.abs().sum(-1, dtype=torch.int64) == pulses).all() and int(y.abs().max()) <= limit
    container = (scale.double() * levels.double()[gain]).unsqueeze(-1)
    return (x.double() - container * y).square().sum(-1).numpy()


@pytest.mark.parametrize(
    ("dim", "pulses", "limit"),
    [(1, 3, 3), (2, 5, 4), (3, 7, 3), (4, 7, 7), (4, 2, 1), (5, 6, 3), (6, 5, 5), (6, 9, 2)],
)
def test_encode_equals_brute_force(kernels: ModuleType, dim: int, pulses: int, limit: int) -> None:
    x = torch.randn(300, dim, generator=torch.Generator().manual_seed(dim))
    least = least_error_by_enumeration(
        x.double().numpy(), torch.tensor(LEVELS).double().numpy(), all_vectors(dim, pulses, limit)
    )
    found = errors_of(kernels, x, torch.ones(300), pulses, limit)
    assert np.abs(found / least - 1).max() < RELATIVE


@pytest.mark.parametrize(
    ("dim", "pulses", "limit"), [(16, 11, 11), (16, 12, 2), (16, 28, 28), (16, 30, 7), (16, 50, 127), (12, 20, 7)]
)
@pytest.mark.parametrize("source", ["gaussian", "heavy"])
def test_encode_equals_dynamic_programming(kernels: ModuleType, dim: int, pulses: int, limit: int, source: str) -> None:
    x = torch.randn(300, dim, generator=torch.Generator().manual_seed(pulses))
    if source == "heavy":
        x = x.sign() * x.abs().pow(3)
    levels = torch.tensor(LEVELS).double().numpy()
    least = least_error_by_dynamic_programming(x.double().numpy(), levels, pulses, limit)
    found = errors_of(kernels, x, torch.ones(300), pulses, limit)
    assert np.abs(found / least - 1).max() < RELATIVE


@pytest.mark.parametrize("exponent", [-30, -12, 12, 30])
def test_encode_is_independent_of_the_unit(kernels: ModuleType, exponent: int) -> None:
    x = torch.randn(200, 16, generator=torch.Generator().manual_seed(0))
    unit = 2.0 ** round(exponent * 3.3219)
    plain = kernels.pyramid_encode(x, torch.ones(200), torch.tensor(LEVELS), 28, 7)
    scaled = kernels.pyramid_encode(x * unit, torch.full((200,), unit), torch.tensor(LEVELS), 28, 7)
    assert torch.equal(plain[0], scaled[0]) and torch.equal(plain[1], scaled[1])


def test_zero_scale_gives_the_first_codeword(kernels: ModuleType) -> None:
    y, gain = kernels.pyramid_encode(torch.randn(3, 16), torch.zeros(3), torch.tensor(LEVELS), 30, 7)
    assert gain.tolist() == [0, 0, 0]
    assert y[0].tolist() == [0] * 11 + [2, 7, 7, 7, 7]
    assert kernels.pyramid_rank(y, 30, 7).tolist() == [0, 0, 0]


def test_ties_go_to_the_lowest_index_and_level(kernels: ModuleType) -> None:
    """Rounding gives [2, 2, 2, 2], two pulses too many; the first two coordinates give them up."""
    y, gain = kernels.pyramid_encode(torch.ones(1, 4), torch.ones(1), torch.tensor([0.5, 0.5]), 6, 7)
    assert y.tolist() == [[1, 1, 2, 2]] and gain.tolist() == [0]


def test_all_zero_groups_and_no_groups(kernels: ModuleType) -> None:
    y, _ = kernels.pyramid_encode(torch.zeros(2, 16), torch.ones(2), torch.tensor(LEVELS), 20, 7)
    assert (y.sum(-1) == 20).all()
    y, gain = kernels.pyramid_encode(torch.zeros(0, 16), torch.ones(0), torch.tensor(LEVELS), 20, 7)
    assert y.shape == (0, 16) and gain.shape == (0,)


def test_native_equals_reference_on_100k_groups(native: None) -> None:
    x = torch.randn(100_000, 16, generator=torch.Generator().manual_seed(5))
    x[:20_000] = x[:20_000].bfloat16().float() * 4
    x[20_000:30_000] = torch.round(x[20_000:30_000] * 2)
    levels = torch.linspace(0.22, 0.6, 6)
    scale = torch.rand(100_000, generator=torch.Generator().manual_seed(6)) + 0.5
    for pulses, limit in ((30, 7), (12, 2), (47, 47)):
        mine = ops.pyramid_encode(x, scale, levels, pulses, limit)
        true = ops.reference.pyramid_encode(x, scale, levels, pulses, limit)
        assert torch.equal(mine[0], true[0]) and torch.equal(mine[1], true[1])


@pytest.mark.parametrize("dim", [1, 3, 7, 24, 64, 128])
def test_native_equals_reference_for_any_dim(native: None, dim: int) -> None:
    x = torch.randn(500, dim, generator=torch.Generator().manual_seed(dim))
    arguments = (x, torch.ones(500), torch.tensor(LEVELS), 2 * dim, 9)
    mine, true = ops.pyramid_encode(*arguments), ops.reference.pyramid_encode(*arguments)
    assert torch.equal(mine[0], true[0]) and torch.equal(mine[1], true[1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pulses": 113}, "cannot hold 113 pulses"),
        ({"limit": 128}, "fit the int8"),
        ({"limit": 0}, "fit the int8"),
        ({"levels": torch.tensor([0.5, 0.2])}, "ascending"),
        ({"levels": torch.zeros(2)}, "positive"),
        ({"scale": torch.ones(3)}, r"not \[2, 16\], \[3\]"),
        ({"x": torch.ones(2, 16, dtype=torch.float64)}, "float32"),
    ],
    ids=["pulses", "limit-above", "limit-below", "order", "zero-level", "shape", "dtype"],
)
def test_wrong_arguments_are_refused(change: dict[str, object], message: str) -> None:
    arguments: dict[str, object] = {
        "x": torch.ones(2, 16), "scale": torch.ones(2), "levels": torch.tensor(LEVELS), "pulses": 20, "limit": 7,
    }  # fmt: skip
    with pytest.raises(CodecError, match=message):
        ops.pyramid_encode(**(arguments | change))  # type: ignore[arg-type]
