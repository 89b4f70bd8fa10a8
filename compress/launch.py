"""Which process of a run of several this one is, as its launcher says; without torch.

`torchrun` starts the same command several times and tells each by variables of the environment which one it is and
where the others are found. The same four are set by other launchers, and nothing else of the environment is read.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

NEEDED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Launch:
    """`rank` of `size` processes, and `local`, its number on this machine: that of its GPU."""

    rank: int = 0
    size: int = 1
    local: int = 0


def launch() -> Launch:
    """What the launcher said; one process alone if there is none."""
    if not all(name in os.environ for name in NEEDED):
        return Launch()
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    return Launch(rank, size, int(os.environ.get("LOCAL_RANK", rank)))
