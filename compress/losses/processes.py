"""The processes that share a batch, as a loss sees them.

In data-parallel training each of N processes holds some rows of a micro-batch, and the gradients of all are added up. A
loss whose positions are independent needs to know nothing of that. One that compares positions, or keeps statistics,
would without this module compare those of one process alone, and be another loss for every N. Two collectives suffice:

    total(x)   = sum_r x_r                   the same on every process; no gradient
    gather(x)  = [x_0; x_1; ..; x_{N-1}]     rows in the order of ranks, which is that of the rows of one process

`gather` can be differentiated: if process r computes L_r from it, the gradient that x_r gets is that of sum_r L_r.
Every process must come to the same calls in the same order, also one that has no position that counts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable


@dataclass(frozen=True)
class Processes:
    """`size` processes of the default group of torch.distributed, of which this is number `rank`."""

    rank: int = 0
    size: int = 1

    def total(self, tensor: Tensor) -> Tensor:
        """The sum over processes, the same bits on all of them."""
        return self._reduced(tensor, dist.ReduceOp.SUM)

    def largest(self, tensor: Tensor) -> Tensor:
        """The elementwise maximum over processes."""
        return self._reduced(tensor, dist.ReduceOp.MAX)

    def counts(self, rows: int, device: torch.device) -> list[int]:
        """The number of rows of each process."""
        if self.size == 1:
            return [rows]
        counts = torch.zeros(self.size, dtype=torch.int64, device=device)
        counts[self.rank] = rows
        return [int(count) for count in self.total(counts)]

    def gather(self, tensor: Tensor) -> Tensor:
        """The rows [n_0 + .. + n_{N-1}, ..] of all processes; their numbers may differ, the other dimensions not."""
        if self.size == 1:
            return tensor
        gathered: Tensor = _Gather.apply(tensor, self)
        return gathered

    def _reduced(self, tensor: Tensor, operation: Any) -> Tensor:
        if self.size == 1:
            return tensor
        found = tensor.detach().clone(memory_format=torch.contiguous_format)
        dist.all_reduce(found, operation)
        return found


ALONE = Processes()


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, own: Tensor, processes: Processes) -> Tensor:
        counts = processes.counts(len(own), own.device)
        padded = own.new_zeros((max(counts), *own.shape[1:]))
        padded[: len(own)] = own
        found = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(found, padded)
        ctx.processes, ctx.counts = processes, counts
        return torch.cat([rows[:count] for rows, count in zip(found, counts, strict=True)])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return ctx.processes.total(upstream).split(ctx.counts)[ctx.processes.rank], None
