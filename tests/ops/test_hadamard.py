"""The transform against the matrix itself in float64, on the processor."""

from __future__ import annotations

import pytest
import torch
from scipy.linalg import hadamard as matrix

from compress import ops
from compress.errors import CompressError


@pytest.mark.parametrize("columns", [1, 2, 8, 64, 1024])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_equals_the_product_with_the_matrix(columns: int, dtype: torch.dtype) -> None:
    x = torch.randn(3, 5, columns, generator=torch.Generator().manual_seed(columns), dtype=torch.float64).to(dtype)
    exact = x.double() @ torch.from_numpy(matrix(columns)).double() / columns**0.5
    tolerance = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 2.0**-8}[dtype]
    found = ops.hadamard(x)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=tolerance * max(1.0, float(exact.abs().max())))


def test_is_its_own_inverse_and_its_own_gradient() -> None:
    x = torch.randn(4, 256, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(ops.hadamard(ops.hadamard(x)), x)
    assert torch.autograd.gradcheck(ops.hadamard, torch.randn(2, 8, dtype=torch.float64, requires_grad=True))
    for x in (torch.randn(2, 16, requires_grad=True), torch.randn(16, 4).t()):
        torch.library.opcheck(torch.ops.compress.hadamard.default, (x,))


@pytest.mark.parametrize("wrong", [torch.zeros(2, 12), torch.zeros(2, 0), torch.zeros(4, dtype=torch.int64)], ids=str)
def test_other_rows_are_refused(wrong: torch.Tensor) -> None:
    with pytest.raises(CompressError, match="2\\^k floats"):
        ops.hadamard(wrong)


def test_empty_batches_and_strides() -> None:
    assert ops.hadamard(torch.zeros(0, 8)).shape == (0, 8)
    x = torch.randn(16, 3, dtype=torch.float64)
    torch.testing.assert_close(ops.hadamard(x.t()), ops.hadamard(x.t().contiguous()))
