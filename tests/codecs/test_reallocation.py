"""Codes in another metric against all codewords of a pyramid small enough to list them."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from compress import ops
from compress.codecs.reallocation import reallocate
from compress.codecs.row_search import Groups
from tests.codecs.payloads import normal

DIM = 8
GAINS = torch.tensor([0.35, 0.6, 0.95])


def encoder(pulses: int, targets: Tensor) -> Groups:
    y, gain = ops.pyramid_encode(targets.contiguous(), torch.ones(len(targets)), GAINS, pulses, pulses)
    return Groups(y, GAINS[gain], (gain,))


def decode(found: Groups) -> Tensor:
    return found.values * found.gains.unsqueeze(-1)


def codewords(pulses: int) -> Tensor:
    """Every vector of integers whose magnitudes sum up to `pulses`, times every gain: [N, 8]."""
    words = set()
    for places in itertools.combinations_with_replacement(range(DIM), pulses):
        for signs in itertools.product((-1, 1), repeat=DIM):
            words.add(tuple(sign * places.count(place) for place, sign in enumerate(signs)))
    vectors = torch.tensor(sorted(words), dtype=torch.float32)
    return (GAINS.view(-1, 1, 1) * vectors).flatten(0, 1)


def metric_of(seed: int, spread: float = 1.0) -> Tensor:
    """Positive definite with largest eigenvalue 1; the logarithms of the eigenvalues vary by `spread`."""
    basis, _ = torch.linalg.qr(normal(DIM, DIM, seed=seed))
    values = torch.exp(spread * normal(DIM, seed=seed + 1))
    metric = basis @ torch.diag(values) @ basis.T
    return metric / torch.linalg.eigvalsh(metric)[-1]


def cost(error: Tensor, metric: Tensor) -> Tensor:
    exact = error.double()
    return ((exact @ metric.double()) * exact).sum(-1)


def test_all_codewords_are_listed() -> None:
    """As many as N(8, K) of Fischer (1986): 2 D, 2 D^2, and 4 D (D^2 + 1/2) / 3 for one, two and three pulses."""
    assert [len(codewords(pulses)) // len(GAINS) for pulses in (1, 2, 3)] == [16, 128, 688]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("pulses", [2, 3])
def test_the_search_finds_the_best_codeword_more_often(pulses: int, seed: int) -> None:
    targets, metric, words = normal(400, DIM, seed=seed), metric_of(10 + seed), codewords(pulses)
    costs = cost(targets.unsqueeze(1) - words, metric)
    least = costs.amin(1)
    start = encoder(pulses, targets)
    before = cost(targets - decode(start), metric)
    value = reallocate(start, targets, metric, lambda x: encoder(pulses, x), decode)
    after = cost(targets - value, metric)
    assert torch.equal(value, decode(start)), "what is returned is what the codes in place decode to"
    assert bool((after <= before * (1 + 1e-6)).all())
    assert bool((after >= least * (1 - 1e-5)).all())
    optimal = [int((found <= least * (1 + 1e-5)).sum()) for found in (before, after)]
    assert optimal[1] > 1.1 * optimal[0]
    assert float((after - least).sum()) < 0.7 * float((before - least).sum())


def test_the_code_of_a_vector_is_whole() -> None:
    """Integers, gain and index of the gain belong together, and the pulses are all there."""
    targets = normal(300, DIM)
    found = encoder(3, targets)
    reallocate(found, targets, metric_of(1), lambda x: encoder(3, x), decode)
    assert found.values.dtype == torch.int8
    assert torch.equal(found.values.abs().sum(1), torch.full((300,), 3))
    assert torch.equal(found.gains, GAINS[found.fields[0]])


def test_the_nearest_is_best_in_the_plain_metric() -> None:
    """An exact encoder leaves nothing to improve."""
    targets = normal(300, DIM)
    found = encoder(3, targets)
    expected = decode(found).clone()
    assert torch.equal(reallocate(found, targets, torch.eye(DIM), lambda x: encoder(3, x), decode), expected)


def test_a_code_that_is_the_best_stays() -> None:
    """The target is a codeword: no other costs nothing."""
    targets = codewords(2)[::7]
    found = encoder(2, targets)
    torch.testing.assert_close(reallocate(found, targets, metric_of(3), lambda x: encoder(2, x), decode), targets)
