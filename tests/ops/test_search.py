"""The encoder of all pyramids with levels from a table, against brute force and dynamic programming in float64."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from compress import ops
from compress.ops import search
from compress.ops.library import LIBRARY_PATH
from compress.ops.native import NativeLibrary
from tests.ops.oracles import Array

GAINS = [0.012, 0.019, 0.027, 0.036, 0.05]
TABLE = (10, 28, 43, 58, 73, 88)
RELATIVE = 2e-6
"""Excess of a float32 argmin over the float64 minimum: a near-tie, decided within rounding (a few 2^-24)."""

needs_library = pytest.mark.skipif(LIBRARY_PATH is None, reason="the native library is not built")


def found_errors(x: torch.Tensor, scale: torch.Tensor, levels: tuple[int, ...], shift: int, pulses: int) -> Array:
    """Squared error of each group as the dispatcher's encoder reconstructs it; its values are checked to be codes."""
    encode = NativeLibrary(LIBRARY_PATH).encode if LIBRARY_PATH is not None else search.encode
    gains = torch.tensor(GAINS)
    values, gain, coset = encode(x, scale, gains, levels, shift, pulses)
    bare = values.long() - torch.where(coset == 0, shift, -shift).unsqueeze(-1)
    m = torch.searchsorted(torch.tensor(levels), bare.abs())
    assert torch.equal(torch.tensor(levels)[m], bare.abs()) and (m.sum(1) == pulses).all()
    container = (scale.double() * gains.double()[gain]).unsqueeze(-1)
    errors: Array = (x.double() - container * values).square().sum(-1).numpy()
    return errors


def least_errors(x: torch.Tensor, levels: tuple[int, ...], shift: int, pulses: int) -> Array:
    """min over gain, coset and m by dynamic programming over (coordinate, pulses spent)."""
    source, best = x.double().numpy(), np.full(x.shape[0], np.inf)
    for gain, side in itertools.product(torch.tensor(GAINS).double().tolist(), (1, -1) if shift else (1,)):
        cost = np.full((x.shape[0], pulses + 1), np.inf)
        cost[:, 0] = 0.0
        for i in range(x.shape[1]):
            after = np.full_like(cost, np.inf)
            for m in range(min(len(levels) - 1, pulses) + 1):
                centre = gain * (np.array([levels[m], -levels[m]]) + side * shift)
                step = np.square(source[:, i, None] - centre).min(1)[:, None]
                after[:, m:] = np.minimum(after[:, m:], cost[:, : pulses + 1 - m] + step)
            cost = after
        best = np.minimum(best, cost[:, pulses])
    return best


def source_of(name: str, groups: int, dim: int, seed: int) -> torch.Tensor:
    x = torch.randn(groups, dim, generator=torch.Generator().manual_seed(seed))
    return x.sign() * x.abs().pow(3) if name == "heavy" else x


@pytest.mark.parametrize("source", ["gaussian", "heavy"])
@pytest.mark.parametrize(
    ("dim", "levels", "shift", "pulses"),
    [
        (8, TABLE, 5, 10),
        (8, TABLE, 0, 12),
        (8, (5, 14, 22, 30, 38, 46, 54, 62, 70, 78, 86, 94, 102, 110, 118), 3, 40),
        (16, TABLE, 0, 22),
        (16, (6, 17, 27, 37, 47, 57, 66, 75), 4, 30),
        (8, (1, 3, 5, 7, 9, 11, 13, 15), 0, 11),
        (16, tuple(range(1, 63, 2)), 1, 90),
    ],
)
def test_encode_equals_dynamic_programming(
    dim: int, levels: tuple[int, ...], shift: int, pulses: int, source: str
) -> None:
    x = source_of(source, 300, dim, pulses)
    found = found_errors(x, torch.ones(300), levels, shift, pulses)
    assert np.abs(found / least_errors(x, levels, shift, pulses) - 1).max() < RELATIVE


@pytest.mark.parametrize(
    ("dim", "levels", "shift", "pulses"),
    [(3, TABLE, 4, 5), (4, (9, 26, 40), 0, 4), (5, TABLE, 6, 6), (6, (3, 8), 1, 3)],
)
def test_encode_equals_brute_force(dim: int, levels: tuple[int, ...], shift: int, pulses: int) -> None:
    x = source_of("gaussian", 200, dim, dim)
    words = [m for m in itertools.product(range(len(levels)), repeat=dim) if sum(m) == pulses]
    least = np.full(200, np.inf)
    for m, signs in itertools.product(words, itertools.product((1, -1), repeat=dim)):
        bare = np.array([sign * levels[place] for sign, place in zip(signs, m, strict=True)])
        for gain, side in itertools.product(torch.tensor(GAINS).double().tolist(), (1, -1)):
            error = np.square(x.double().numpy() - gain * (bare + side * shift)).sum(1)
            least = np.minimum(least, error)
    found = found_errors(x, torch.ones(200), levels, shift, pulses)
    assert np.abs(found / least - 1).max() < RELATIVE


@needs_library
@pytest.mark.parametrize(
    ("dim", "levels", "shift", "pulses"),
    [(8, TABLE, 5, 10), (16, (*TABLE, 103, 118, 127), 0, 22), (13, tuple(range(20)), 0, 30), (32, TABLE, 0, 50)],
)
def test_every_instruction_set_gives_the_bits_of_the_reference(
    dim: int, levels: tuple[int, ...], shift: int, pulses: int
) -> None:
    groups = 200_000 // dim + 3
    x = source_of("gaussian", groups, dim, 1)
    x[: groups // 5] = x[: groups // 5].bfloat16().float() * 3
    x[groups // 5 : groups // 4] = torch.round(x[groups // 5 : groups // 4] * 4) / 4
    x[-groups // 50 :] *= 1e5
    x[-7:] = 0
    scale = torch.rand(groups, generator=torch.Generator().manual_seed(2)) + 0.5
    scale[:3] = 0
    library = NativeLibrary(LIBRARY_PATH)
    true = search.encode(x, scale, torch.tensor(GAINS), levels, shift, pulses)
    for instructions in library.instructions:
        mine = library.encode(x, scale, torch.tensor(GAINS), levels, shift, pulses, instructions)
        assert all(torch.equal(a, b) for a, b in zip(mine, true, strict=True)), instructions


@needs_library
def test_a_million_groups_have_the_codes_of_the_reference() -> None:
    from compress.codecs import codec
    from compress.codecs.half_pyramid.codec import entry_of

    shape = entry_of(codec("half_pyramid").spec(26)).shape
    x = source_of("gaussian", 1_000_000, 8, 5)
    mine = ops.half_pyramid_encode(x, torch.ones(1_000_000), shape)
    true = search.encode(x, torch.ones(1_000_000), torch.tensor(shape.gains), shape.levels, shape.shift, shape.pulses)
    same = (mine[0] == true[0]).all(1) & (mine[1] == true[1]) & (mine[2] == true[2])
    assert float(same.double().mean()) >= 0.9999
    gains = torch.tensor(shape.gains, dtype=torch.float64)
    errors = [(x - gains[gain].unsqueeze(-1) * values).square().mean() for values, gain, _ in (mine, true)]
    assert float(errors[0] / errors[1]) == pytest.approx(1, abs=1e-6)
