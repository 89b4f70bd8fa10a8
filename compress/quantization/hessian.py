"""Second moments of a matrix's inputs, and what rounding needs of them.

The error that rounding W [o, n] to V makes in the outputs of T tokens x_t is

    sum_t ||(W - V) x_t||^2 = tr((W - V) H (W - V)^T),     H = sum_t x_t x_t^T   [n, n].

Where the block gets inputs x_t from blocks that are rounded already and x'_t from the original ones, the best matrix
for the inputs that there will be is not W but W + W C H^-1 with C = sum_t (x'_t - x_t) x_t^T: it minimizes
sum_t ||W x'_t - V x_t||^2, of which rounding then adds the least (GPTAQ: Li et al. 2025, arXiv 2504.02692, which
reaches for the same least squares column by column).

Products of `CHUNK_TOKENS` tokens at a time are taken in float32 and summed up in float64, in the order of the rows: the
same sums however often they are made, and a relative error of 1e-6 where damping is 1e-2. Sums of parts of the rows are
added in the order of the parts (`summed`), so that several processes that share them come to the same sums as one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from compress.distributed import World
from compress.errors import NumericsError

CHUNK_TOKENS = 1024
"""Tokens whose products are taken at once."""
CHUNK_CHANNELS = 512
"""Rows of H that are added to at once; of H what lies left of them is the mirror image of what lies above."""
STRONGER = 10.0
ATTEMPTS = 4
"""How often a matrix that has no Cholesky factor gets stronger damping, and how much."""


class Moments:
    """H, and C where there are original inputs too. Channels that are not finite count as never active.

    `tokens`: summed so far. `dead`: channels without any input, after `close`. `broken`: channels with NaN or infinity.
    """

    def __init__(self, channels: int, device: torch.device, asymmetric: bool) -> None:
        self.hessian = torch.zeros(channels, channels, dtype=torch.float64, device=device)
        self.shift = torch.zeros_like(self.hessian) if asymmetric else None
        self._broken = torch.zeros(channels, dtype=torch.bool, device=device)
        self.tokens = 0

    def add(self, x: Tensor, original: Tensor | None = None) -> None:
        """Sum the tokens x [T, n], and the original inputs of the same tokens."""
        for start in range(0, len(x), CHUNK_TOKENS):
            part = slice(start, start + CHUNK_TOKENS)
            chunk = self._finite(x[part])
            _add_products(self.hessian, chunk, chunk, symmetric=True)
            if self.shift is not None and original is not None:
                _add_products(self.shift, self._finite(original[part]) - chunk, chunk, symmetric=False)
        self.tokens += len(x)

    def merge(self, other: Moments) -> None:
        """Add the sums of the rows that follow."""
        self.hessian.add_(other.hessian)
        if self.shift is not None and other.shift is not None:
            self.shift.add_(other.shift)
        self._merge_facts(other.tokens, other._broken)

    def _merge_facts(self, tokens: int, broken: Tensor) -> None:
        self.tokens += tokens
        self._broken |= broken

    def _panels(self) -> Iterator[Tensor]:
        """All that was summed: of H what is not the mirror image of something else."""
        for start in range(0, len(self.hessian), CHUNK_CHANNELS):
            yield self.hessian[start : start + CHUNK_CHANNELS, start:]
        if self.shift is not None:
            yield self.shift

    def _finite(self, chunk: Tensor) -> Tensor:
        if math.isfinite(float(chunk.sum())):
            return chunk
        bad = ~torch.isfinite(chunk).all(0)
        self._broken |= bad
        return chunk.masked_fill(bad, 0.0)

    @property
    def broken(self) -> int:
        return int(self._broken.sum())

    @property
    def dead(self) -> int:
        return int((self.hessian.diagonal() == 0).sum()) - self.broken

    def release(self) -> None:
        """Let go of the sums."""
        self.hessian, self.shift = torch.empty(0, 0, dtype=torch.float64), None

    def close(self) -> None:
        """End of the sums: H and C become means over tokens, and channels that broke somewhere are none everywhere."""
        for start in range(0, len(self.hessian), CHUNK_CHANNELS):
            part = slice(start, start + CHUNK_CHANNELS)
            self.hessian[start + CHUNK_CHANNELS :, part] = self.hessian[part, start + CHUNK_CHANNELS :].T
        for moment in (self.hessian, self.shift):
            if moment is not None:
                moment.div_(max(self.tokens, 1))
                moment.masked_fill_(self._broken, 0.0).masked_fill_(self._broken.unsqueeze(1), 0.0)


def summed(
    parts: Iterator[Moments | None], number: int, channels: int, device: torch.device, asymmetric: bool, world: World
) -> Moments | None:
    """The moments of all rows, of which `parts` are those of each `number`th that is `world.mine`, in order, None for
    one without rows; None when no process has any. Adds in the order of the parts, whoever has them, and closes."""
    total: Moments | None = None
    if world.size == 1:
        for part in parts:
            if part is not None and total is not None:
                total.merge(part)
            total = total or part
    else:
        facts = torch.zeros(channels, dtype=torch.bool, device=device)
        tokens = 0

        def flat() -> Iterator[Tensor | None]:
            nonlocal tokens
            for part in parts:
                if part is None:
                    yield None
                    continue
                tokens += part.tokens
                facts.logical_or_(part._broken)
                yield torch.cat([panel.reshape(-1) for panel in part._panels()])

        sums = world.summed(flat(), number, device)
        if sums is not None:
            total = Moments(channels, device, asymmetric)
            for start, panel in _placed(total._panels()):
                panel.copy_(sums[start : start + panel.numel()].view(panel.shape))
            for broken in world.gather_tensors(facts):
                total._merge_facts(0, broken)
            total.tokens = sum(world.gather(tokens))
    if total is not None:
        total.close()
    return total


def _placed(panels: Iterator[Tensor]) -> Iterator[tuple[int, Tensor]]:
    """Each panel with where it begins when all are laid behind one another."""
    start = 0
    for panel in panels:
        yield start, panel
        start += panel.numel()


def _add_products(moment: Tensor, left: Tensor, right: Tensor, symmetric: bool) -> None:
    """moment += left^T right, or, if that is symmetric, its blocks on and above the diagonal."""
    for start in range(0, len(moment), CHUNK_CHANNELS):
        first = start if symmetric else 0
        moment[start : start + CHUNK_CHANNELS, first:] += left[:, start : start + CHUNK_CHANNELS].T @ right[:, first:]


@dataclass(frozen=True)
class Factor:
    """L lower triangular float32 with L L^T = H + damping I, and H + damping I itself in float32."""

    lower: Tensor
    hessian: Tensor
    damping: float


def factorize(hessian: Tensor, damping: float, name: str) -> Factor:
    """The factor of `hessian` float64 [n, n] damped by `damping` times its mean diagonal, which is added in place.

    Channels without input get the mean diagonal: they depend on no other and are rounded to the nearest. A matrix that
    is not positive definite gets ten times the damping, three times; `NumericsError` if it stays indefinite.
    """
    diagonal = hessian.diagonal()
    if not bool(torch.isfinite(diagonal).all()):
        raise NumericsError(f"The inputs of '{name}' overflow.", remedy="Look at the calibration data and the model.")
    mean = float(diagonal.mean()) or 1.0
    diagonal.masked_fill_(diagonal == 0, mean)
    added, wanted = 0.0, damping * mean
    for _ in range(ATTEMPTS):
        diagonal.add_(wanted - added)
        added = wanted
        lower, failed = torch.linalg.cholesky_ex(hessian)
        if not int(failed):
            factor = lower.to(torch.float32)
            del lower  # one float64 matrix less while the other is converted
            return Factor(factor, hessian.to(torch.float32), added)
        del lower
        wanted = max(added * STRONGER, 1e-6 * mean)
    raise NumericsError(
        f"The Hessian of '{name}' is indefinite, even with {added / mean:.2g} of its mean diagonal added.",
        remedy="Raise the damping (rounding ldlq:damping=...), or give more rows of calibration data.",
    )


def output_energy(matrix: Tensor, factor: Factor, diagonal: Tensor) -> float:
    """tr(E H E^T) of E float32 [o, n].

    H is that of `factor` without its damping: `diagonal` float64 [n] is what the diagonal was. Products run in float32,
    sums in float64.
    """
    added = factor.hessian.diagonal().double() - diagonal
    total = 0.0
    for part in matrix.split(CHUNK_TOKENS):
        total += float(((part @ factor.hessian) * part).sum(dtype=torch.float64))
        total -= float((part.square().sum(0, dtype=torch.float64) @ added).sum())
    return max(total, 0.0)
