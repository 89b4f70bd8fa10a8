"""An orthogonal mixing Q [n, n] of any width n, fast enough to apply to activations at run time.

    n = 2^k m, m odd:    Q = diag(signs) (H_{2^k} kron C_m),    x Q = ((x * signs) as [2^k, m]  ->  H X C)  flattened

H is the Walsh-Hadamard matrix over 2^(k/2), symmetric, and C the orthonormal cosine transform (DCT-II),

    C[i, j] = s_j cos(pi (2 i + 1) j / 2m),    s_0 = sqrt(1 / m),  s_j = sqrt(2 / m),

so every entry of Q is at most sqrt(2 / n) in magnitude: what sat in a few coordinates is spread over all of them, and
with random signs the coordinates of the result look Gaussian. Hadamard matrices exist for other orders than 2^k, but
only as tables, and not for every width; the cosine transform exists for all and is a formula.

On a processor n is split into a b with a = 2^i and b = 2^j m, both near sqrt(n), and X [a, b] -> H_a X (H_{2^j} kron C)
is two products with small matrices: a + b multiply-adds a coordinate instead of k + m, and faster all the same, since
matrix products run at the processor's full rate. On a GPU the butterflies of `compress.ops.hadamard` run, after a
product with C. A large odd part stays a dense product: n m multiply-adds a row, n^2 for a prime n.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from compress import ops


def mix(x: Tensor, signs: Tensor) -> Tensor:
    """x Q over the last axis of x [..., n], in x's float type.

    `signs` holds +1 and -1 in any type, on any device, and broadcasts against x; [g, n] with x [..., g, n] mixes g
    heads, each with its own signs. Types of less than 32 bits are computed in float32. The gradient is `unmix`.
    """
    wide = _wide(x)
    return _kronecker(wide * signs.to(wide.device, wide.dtype), transposed=False).to(x.dtype)


def unmix(x: Tensor, signs: Tensor) -> Tensor:
    """x Q^T over the last axis: the inverse of `mix` with the same signs."""
    wide = _wide(x)
    return (_kronecker(wide, transposed=True) * signs.to(wide.device, wide.dtype)).to(x.dtype)


def split_width(n: int) -> tuple[int, int]:
    """(2^k, m) with n = 2^k m and m odd; (1, 0) for 0."""
    power = n & -n if n else 1
    return power, n // power


def mixing_cost(n: int) -> int:
    """Multiply-adds that one `mix` of a row of n takes: n k by butterflies, and n m for the cosine transform."""
    power, odd = split_width(n)
    return n * (power.bit_length() - 1) + (n * odd if odd > 1 else 0)


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.element_size() < 4 else x


def _kronecker(x: Tensor, transposed: bool) -> Tensor:
    """x (H kron C), or x (H kron C)^T, over the last axis."""
    power, odd = split_width(x.shape[-1])
    if odd == 0:
        return x
    return _butterflies(x, power, odd, transposed) if x.is_cuda else _products(x, power, odd, transposed)


def _butterflies(x: Tensor, power: int, odd: int, transposed: bool) -> Tensor:
    columns = x.reshape(*x.shape[:-1], power, odd)
    if odd > 1:
        columns = columns @ _factor(1, odd, transposed, x.dtype, x.device)
    return ops.hadamard(columns.transpose(-1, -2).contiguous()).transpose(-1, -2).reshape(x.shape)


def _products(x: Tensor, power: int, odd: int, transposed: bool) -> Tensor:
    left = _left(power, odd)
    right = _factor(power // left, odd, transposed, x.dtype, x.device)
    rows = x.reshape(-1, left, right.shape[0]) @ right
    if left > 1:
        rows = _factor(left, 1, transposed, x.dtype, x.device) @ rows
    return rows.reshape(x.shape)


def _left(power: int, odd: int) -> int:
    """a, the power of two for which a + b is least."""
    return min((1 << i for i in range(power.bit_length())), key=lambda left: left + power // left * odd)


@lru_cache(maxsize=64)
def _factor(power: int, odd: int, transposed: bool, dtype: torch.dtype, device: torch.device) -> Tensor:
    """H_power kron C_odd [n, n], or its transpose: exact to the last bits of float64, then rounded to `dtype`."""
    with torch.inference_mode(False), torch.no_grad():
        factor = torch.kron(_hadamard(power), _cosines(odd))
        return (factor.t() if transposed else factor).contiguous().to(device, dtype)


def _hadamard(n: int) -> Tensor:
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while matrix.shape[0] < n:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix / math.sqrt(n)


def _cosines(m: int) -> Tensor:
    """C float64 [m, m]; the angle is reduced as an integer, so that large m lose nothing."""
    places = torch.arange(m)
    angles = (2 * places + 1).unsqueeze(1) * places % (4 * m)
    matrix = torch.cos(angles.double() * (math.pi / (2 * m))) * math.sqrt(2 / m)
    matrix[:, 0] = 1 / math.sqrt(m)
    return matrix
