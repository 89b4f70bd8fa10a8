"""The fast Walsh-Hadamard transform: the orthogonal mixing that makes the rows of a matrix look Gaussian.

y = x H_n / sqrt(n), H[i, j] = (-1)^popcount(i & j), n = 2^k, in n log2 n additions a row. It is symmetric and its own
inverse. The definition is a few lines of torch for any device and float type, float64 included; CUDA tensors of up to
32768 columns take the kernel of `compress.ops.cuda.hadamard`.
"""

from __future__ import annotations

import importlib.util
import math
from functools import lru_cache

import torch
from torch import Tensor

from compress.errors import CompressError
from compress.ops.cuda.compile import CupyLauncher
from compress.ops.cuda.hadamard import LARGEST_COLUMNS, TYPES, hadamard_rows


def hadamard(x: Tensor) -> Tensor:
    """x H / sqrt(n) over the last axis of x [..., n], in x's float type; half precision is computed in float32.

    Has a gradient, which is the same transform. Raises `CompressError` unless n is a power of two.
    """
    y: Tensor = torch.ops.compress.hadamard(x)
    return y


def _reference(x: Tensor) -> Tensor:
    columns = x.shape[-1] if x.ndim else 0
    if not x.is_floating_point() or columns < 1 or columns & (columns - 1):
        raise CompressError(
            f"The Hadamard transform takes rows of 2^k floats, not {x.dtype} {list(x.shape)}.",
            remedy="Split or fill the rows to a power of two.",
        )
    y = x.to(torch.float32) if x.element_size() < 4 else x
    half = 1
    while half < columns:
        pairs = y.reshape(-1, columns // (2 * half), 2, half)
        y = torch.stack([pairs[:, :, 0] + pairs[:, :, 1], pairs[:, :, 0] - pairs[:, :, 1]], 2)
        half *= 2
    return (y.reshape(x.shape) / math.sqrt(columns)).to(x.dtype).contiguous()


def _on_cuda(x: Tensor) -> Tensor:
    if x.ndim == 0 or x.dtype not in TYPES or not 1 <= x.shape[-1] <= LARGEST_COLUMNS:
        return _reference(x)
    return hadamard_rows(x, _launcher())


@lru_cache(maxsize=1)
def _launcher() -> CupyLauncher:
    """One, which keeps the kernels that it has loaded."""
    return CupyLauncher()


def _fake(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _backward(context: object, gradient: Tensor) -> Tensor:
    return hadamard(gradient)


torch.library.define("compress::hadamard", "(Tensor x) -> Tensor")
torch.library.register_fake("compress::hadamard", _fake)
torch.library.impl("compress::hadamard", "default", _reference)
torch.library.register_autograd("compress::hadamard", _backward)
if importlib.util.find_spec("cupy") is not None and torch.cuda.is_available():
    torch.library.impl("compress::hadamard", "CUDA", _on_cuda)
