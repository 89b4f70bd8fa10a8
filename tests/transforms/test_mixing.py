"""The mixing against the matrix written out, entry by entry."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from compress.transforms.matrices import mix_moment, mix_weight, unmix_weight
from compress.transforms.mixing import _butterflies, _products, mix, mixing_cost, split_width, unmix
from compress.transforms.signs import Signs, random_signs
from tests.codecs.payloads import normal

WIDTHS = (1, 2, 3, 8, 12, 43, 44, 96, 172, 352, 704, 1000)


def written_out(signs: Tensor) -> Tensor:
    """Q float64 [n, n] by its definition: the parity of bits for Hadamard, a cosine for the odd factor."""
    n = signs.numel()
    power, odd = n & -n, n // (n & -n)
    hadamard = [[(-1.0) ** (i & j).bit_count() / math.sqrt(power) for j in range(power)] for i in range(power)]
    cosine = [
        [math.sqrt((1 if j == 0 else 2) / odd) * math.cos(math.pi * (2 * i + 1) * j / (2 * odd)) for j in range(odd)]
        for i in range(odd)
    ]
    matrix = torch.kron(torch.tensor(hadamard, dtype=torch.float64), torch.tensor(cosine, dtype=torch.float64))
    return signs.double().unsqueeze(1) * matrix


def double(*shape: int) -> Tensor:
    return normal(*shape).double()


@pytest.mark.parametrize("n", WIDTHS)
def test_is_the_matrix_written_out(n: int) -> None:
    signs = random_signs(n, 0, "test")
    matrix, x = written_out(signs), double(2, 3, n)
    torch.testing.assert_close(mix(x, signs), x @ matrix, rtol=0, atol=1e-12)
    torch.testing.assert_close(unmix(x, signs), x @ matrix.t(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("n", WIDTHS)
@pytest.mark.parametrize("transposed", [False, True])
def test_butterflies_are_the_products(n: int, transposed: bool) -> None:
    """The way of a GPU and that of a processor, both on the processor."""
    x = double(2, 3, n)
    ways = [way(x, *split_width(n), transposed) for way in (_butterflies, _products)]
    torch.testing.assert_close(ways[0], ways[1], rtol=0, atol=1e-12)


@pytest.mark.parametrize("n", [*WIDTHS, 4096, 11008])
def test_is_orthogonal_and_flat(n: int) -> None:
    signs = random_signs(n, 1, "test")
    places = torch.arange(0, n, max(1, n // 64))
    rows = torch.zeros(len(places), n, dtype=torch.float64).scatter_(1, places.unsqueeze(1), 1.0)
    mixed = mix(rows, signs)
    torch.testing.assert_close(mixed @ mixed.t(), torch.eye(len(rows), dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(unmix(mixed, signs), rows, rtol=0, atol=1e-12)
    assert float(mixed.abs().max()) <= math.sqrt(2 / n) * (1 + 1e-12)


@pytest.mark.parametrize("n", [96, 172, 256])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2**-8), (torch.float16, 2**-11)]
)
def test_other_types_round_once(n: int, dtype: torch.dtype, tolerance: float) -> None:
    signs, x = random_signs(n, 0, "test"), normal(5, n).to(dtype)
    for transform in (mix, unmix):
        exact, found = transform(x.double(), signs), transform(x, signs)
        assert found.dtype == dtype
        torch.testing.assert_close(found.double(), exact, rtol=tolerance, atol=4e-7)


def test_heads_are_mixed_each_by_itself() -> None:
    signs = random_signs(3 * 20, 0, "heads").view(3, 20)
    x = double(4, 3, 20)
    for head in range(3):
        torch.testing.assert_close(mix(x, signs)[:, head], x[:, head] @ written_out(signs[head]))


def test_gradient() -> None:
    signs = random_signs(12, 0, "test")
    x = double(2, 12).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: mix(x, signs), (x,))
    assert torch.autograd.gradcheck(lambda x: unmix(x, signs), (x,))
    y = double(2, 12)
    (gradient,) = torch.autograd.grad((mix(x, signs) * y).sum(), x)
    torch.testing.assert_close(gradient, unmix(y, signs))
    with torch.inference_mode():
        mix(torch.ones(1, 20), random_signs(20, 0, "first seen in inference mode"))
    leaf = torch.ones(1, 20, requires_grad=True)
    mix(leaf, random_signs(20, 0, "and then with a gradient")).sum().backward()
    assert leaf.grad is not None


def test_empty() -> None:
    assert mix(torch.zeros(0, 8), random_signs(8, 0, "")).shape == (0, 8)
    assert mix(torch.zeros(3, 0), random_signs(0, 0, "")).shape == (3, 0)


@pytest.mark.parametrize(
    ("n", "split", "cost"), [(172, (4, 43), 172 * 45), (4096, (4096, 1), 4096 * 12), (7, (1, 7), 49)]
)
def test_cost(n: int, split: tuple[int, int], cost: int) -> None:
    assert (split_width(n), mixing_cost(n)) == (split, cost)


@pytest.mark.parametrize("shape", [(44, 172), (96, 32), (5, 352)])
def test_weight_and_back(shape: tuple[int, int]) -> None:
    outputs, inputs = random_signs(shape[0], 0, "out"), random_signs(shape[1], 0, "in")
    left, right = written_out(outputs), written_out(inputs)
    weight = double(*shape)
    for signs, expected in (
        (Signs(inputs, outputs), left.t() @ weight @ right),
        (Signs(inputs, None), weight @ right),
        (Signs(None, outputs), left.t() @ weight),
        (Signs(), weight),
    ):
        mixed = mix_weight(weight, signs)
        torch.testing.assert_close(mixed, expected, rtol=0, atol=1e-12)
        torch.testing.assert_close(unmix_weight(mixed, signs), weight, rtol=0, atol=1e-12)
        x = double(3, shape[1])
        y = signs.unmix_outputs(signs.mix_inputs(x) @ mixed.t())
        torch.testing.assert_close(y, x @ weight.t(), rtol=0, atol=1e-12)
    rounded = mix_weight(weight.bfloat16(), Signs(inputs, outputs), torch.float32)
    exact = left.t() @ weight.bfloat16().double() @ right
    torch.testing.assert_close(rounded.double(), exact, rtol=0, atol=2e-6)


def test_weight_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    signs = Signs(random_signs(24, 0, "in"), random_signs(40, 0, "out"))
    weight = double(40, 24)
    whole = mix_weight(weight, signs)
    monkeypatch.setattr("compress.transforms.matrices.CHUNK_WEIGHTS", 100)
    torch.testing.assert_close(mix_weight(weight, signs), whole, rtol=0, atol=1e-14)


def test_moments_are_those_of_mixed_inputs() -> None:
    signs = random_signs(44, 0, "in")
    x, wrong = double(100, 44), double(100, 44) * 0.1
    for left in (x, wrong):
        moment = left.t() @ x
        found = mix_moment(moment, signs)
        assert found.data_ptr() == moment.data_ptr()
        torch.testing.assert_close(found, mix(left, signs).t() @ mix(x, signs), rtol=0, atol=1e-11)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("n", [1, 96, 172, 4096, 11008])
def test_cuda_agrees(n: int) -> None:
    signs, x = random_signs(n, 0, "test"), double(7, n)
    for transform in (mix, unmix):
        found = transform(x.cuda(), signs.cuda()).cpu()
        torch.testing.assert_close(found, transform(x, signs), rtol=0, atol=1e-12)
        found = transform(x.float().cuda(), signs.cuda()).cpu()
        torch.testing.assert_close(found.double(), transform(x, signs), rtol=0, atol=1e-5)
