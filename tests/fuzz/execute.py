"""One execution: a seed is copied, mutated by a number, and read within bounds. The same number does the same again."""

from __future__ import annotations

import random
import shutil
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.fuzz.mutate import mutate
from tests.fuzz.reader import read
from tests.limits import bounded

MOST_BYTES = 256 * 2**20
MOST_SECONDS = 20
BASE_BYTES = 8 * 2**20
"""What Python may allocate for a folder of any size: the model's modules without memory, parsed JSON."""
FACTOR = 2
"""What it may allocate beyond that, over the bytes of the folder."""
MEASURED = 4
"""One in so many executions measures its memory, which makes it slow."""


@dataclass(frozen=True)
class Result:
    """`outcome`: "refused", "accepted", or the traceback of a finding. `ratio`: allocated bytes over those of the
    folder's files, None if not measured."""

    number: int
    seed: str
    mutations: tuple[str, ...]
    outcome: str
    loaded: bool = False
    peak: int | None = None
    size: int = 0

    @property
    def is_finding(self) -> bool:
        return self.outcome not in ("refused", "accepted")


def prepare(number: int, seeds: Sequence[Path], folder: Path) -> tuple[str, tuple[str, ...]]:
    """Make the input of execution `number` at `folder`, which is replaced; the seed's name and what was done to it."""
    draw = random.Random(number)
    seed = draw.choice(list(seeds))
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(seed, folder)
    return seed.name, tuple(mutate(draw, folder))


def execute(number: int, seeds: Sequence[Path], folder: Path) -> Result:
    """Carry out execution `number`; its input stays in `folder`."""
    seed, mutations = prepare(number, seeds, folder)
    size = sum(path.stat().st_size for path in folder.iterdir() if path.is_file() and not path.is_symlink())
    try:
        with bounded(MOST_BYTES + FACTOR * size, MOST_SECONDS):
            reading = read(folder, measure=number % MEASURED == 0, transformers=not _resizes(mutations))
        if reading.peak is not None and reading.peak > BASE_BYTES + FACTOR * size:
            raise MemoryError(f"{reading.peak} bytes were allocated for {size}")
    except Exception:  # noqa: BLE001 whatever nobody foresaw is what is looked for
        return Result(number, seed, mutations, traceback.format_exc(), size=size)
    outcome = "accepted" if reading.refused is None else "refused"
    return Result(number, seed, mutations, outcome, reading.loaded, reading.peak, size)


def _resizes(mutations: Sequence[str]) -> bool:
    """Whether config.json was changed outside of what is ours in it: transformers builds whatever that asks for."""
    return any("config.json: " in text and "quantization_config/" not in text for text in mutations)
