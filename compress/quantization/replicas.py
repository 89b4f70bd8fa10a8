"""Whether the processes of somebody's job begin with the same model and data, as they must to share the work."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from compress.distributed import World
from compress.errors import UsageError


def require_same(what: str, tensors: Iterable[Tensor], world: World) -> None:
    """Raise `UsageError` when `tensors`, called `what`, are sharded, or their shapes or sums differ between processes.
    A process alone is not asked."""
    if world.size == 1:
        return
    found = list(tensors)
    if world.together(lambda: any(isinstance(tensor, DTensor) for tensor in found)):
        raise UsageError(f"The {what} of this process is a part of a whole.", remedy="Give every process all of it.")
    sums = [[list(tensor.shape), repr(float(tensor.detach().sum(dtype=torch.float64)))] for tensor in found]
    if any(told != sums for told in world.gather(sums)):
        raise UsageError(
            f"The processes of this job have different {what}.",
            remedy="Give every process the same: load one checkpoint, or seed alike; rows are shared out here.",
        )
