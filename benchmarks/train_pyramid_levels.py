"""Makes compress/codecs/pyramid/levels.json: pulses, bound and gain levels of every width, for a Gaussian source.

For each width B and each bound m near the best of the width before, K runs over the values that leave room for 1 to
`--most-levels` gains, L = floor(2^B / N(D, K, m)); the L levels are trained by Lloyd's algorithm on the joint encoder:

    (j, y) = argmin ||x - l_j y||^2 for every group,     l_j = sum <x, y> / sum <y, y> over the groups that chose j.

A small sample finds the best few (K, m), a larger one trains them, and a fresh one measures what is written. Run it as

    python benchmarks/train_pyramid_levels.py --out compress/codecs/pyramid/levels.json

with the native backend (a quarter of an hour on one core). It prints the MSE of each
width, at some beside the literature's.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress import ops

NO_BOUND = 127
BOUNDS = (7, NO_BOUND)
LITERATURE = {32: 0.1048, 36: 0.0737, 40: 0.0535, 48: 0.0266, 52: 0.01760, 56: 0.0131, 64: 0.00646}
"""Exact encoder and Lloyd-Max gains, D = 16: best power-of-two number of gains, and at 52 bits radix gains."""


@dataclass(frozen=True)
class Candidate:
    pulses: int
    limit: int
    levels: Tensor
    mse: float


@dataclass(frozen=True)
class Samples:
    """Groups to choose shapes on, to narrow the choice, to train the levels, and to measure the result."""

    small: Tensor
    middle: Tensor
    large: Tensor
    fresh: Tensor


def sample(groups: int, dim: int, seed: int, columns: int = 1024) -> Tensor:
    """Groups [groups, dim] of N(0, 1), normalised to unit RMS over rows of `columns`."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(-(-groups * dim // columns), columns, generator=generator)
    rows /= rows.double().square().mean(1, keepdim=True).sqrt().float()
    return rows.view(-1, dim)[:groups].contiguous()


def lloyd(x: Tensor, start: Candidate, rounds: int) -> Candidate:
    """`start` after `rounds` rounds of Lloyd's algorithm, with the MSE per weight before the last update."""
    unit = torch.ones(x.shape[0])
    levels, mse = start.levels, float("inf")
    for _ in range(rounds):
        y, gain = ops.pyramid_encode(x, unit, levels, start.pulses, start.limit)
        mse = float((x - levels[gain].unsqueeze(-1) * y).double().square().mean())
        number = levels.numel()
        across = torch.zeros(number, dtype=torch.float64).index_add_(0, gain, (x * y).sum(-1).double())
        energy = torch.zeros(number, dtype=torch.float64).index_add_(0, gain, y.double().square().sum(-1))
        moved = torch.where(energy > 0, across / energy.clamp_min(1e-30), levels.double())
        levels = moved.float().clamp_min(1e-6).sort().values
    return replace(start, levels=levels, mse=mse)


def start_levels(x: Tensor, pulses: int, limit: int, number: int) -> Tensor:
    """Quantiles of the best gain under one pass: what a group's L1 norm asks for."""
    gains = x.abs().sum(-1).div(pulses).clamp_min(1e-3).sort().values
    places = (torch.arange(number) + 0.5) / number * (gains.numel() - 1)
    levels = gains[places.long()]
    return levels * max(1.0, 0.6 * float(x.abs().amax(-1).mean()) / (limit * float(gains.mean())))


def shapes(dim: int, width: int, limits: Iterable[int], most: int) -> set[tuple[int, int, int]]:
    """(pulses, limit, number of levels) that fit `width` bits, at most `most` levels."""
    found = set()
    for limit in limits:
        for pulses in range(1, dim * limit // 2 + 1):
            bound = min(pulses, limit)
            size = ops.codebook_size(dim, pulses, bound)
            number = 2**width // size
            if 1 <= number <= most and size < 2**63:
                found.add((pulses, bound, number))
    return found


def train(width: int, limits: Sequence[int], before: Candidate | None, samples: Samples, most: int) -> Candidate:
    """The best shape of one width, trained; its `mse` is measured on a fresh sample.

    The shape of the width `before` is tried with as many levels as fit now, and its levels are kept when nothing new
    is better: a wider code is never worse.
    """
    dim = samples.small.shape[1]
    trial = shapes(dim, width, limits, most)
    if before is not None:
        size = ops.codebook_size(dim, before.pulses, before.limit)
        trial.add((before.pulses, before.limit, min(most, 2**width // size)))
    starts = [
        Candidate(pulses, limit, start_levels(samples.small, pulses, limit, number), 0.0)
        for pulses, limit, number in sorted(trial)
    ]
    first = _best([lloyd(samples.small, start, 5) for start in starts], 6)
    second = _best([lloyd(samples.middle, candidate, 15) for candidate in first], 2)
    third = [lloyd(samples.large, candidate, 20) for candidate in second]
    finals = [replace(candidate, mse=lloyd(samples.fresh, candidate, 1).mse) for candidate in third]
    return _best(finals + ([before] if before is not None else []), 1)[0]


def _best(candidates: list[Candidate], number: int) -> list[Candidate]:
    return sorted(candidates, key=lambda candidate: candidate.mse)[:number]


def row_of(candidate: Candidate) -> dict[str, Any]:
    levels = [float(f"{level:.9g}") for level in candidate.levels.tolist()]
    return {"pulses": candidate.pulses, "limit": candidate.limit, "levels": levels, "mse": round(candidate.mse, 7)}


def write(path: Path, tables: dict[int, dict[int, Candidate]], dim: int) -> None:
    """The table as JSON, one width a line."""
    parts = []
    for bound, widths in tables.items():
        lines = ",\n".join(f'   "{width}": {json.dumps(row_of(found))}' for width, found in widths.items())
        parts.append(f'  {{"version": 1, "dim": {dim}, "max": {bound}, "widths": {{\n{lines}\n  }}}}')
    path.write_text('{"tables": [\n' + ",\n".join(parts) + "\n]}\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--dim", type=int, default=16)
    parser.add_argument("--widths", default="24-64", help="FIRST-LAST bits per group")
    parser.add_argument("--groups", type=int, default=60_000, help="groups of the large sample")
    parser.add_argument("--most-levels", type=int, default=24)
    arguments = parser.parse_args()
    first, last = (int(part) for part in arguments.widths.split("-"))
    print(f"backend {ops.backend()}; MSE per weight of N(0, 1), no row scale", file=sys.stderr)
    print("bits/16   max 7 (K, m, L)            max 127 (K, m, L)          index of all vectors (K, L)   literature")
    dim, most, groups = arguments.dim, arguments.most_levels, arguments.groups
    sizes = (groups // 20, groups // 8, groups, groups)
    samples = Samples(*(sample(size, dim, seed) for seed, size in enumerate(sizes)))
    tables: dict[int, dict[int, Candidate]] = {bound: {} for bound in BOUNDS}
    for width in range(first, last + 1):
        for bound, table in tables.items():
            before = table.get(width - 1)
            centre = before.limit if before is not None else 4
            limits = [limit for limit in range(max(2, centre - 2), centre + 3) if limit <= bound]
            table[width] = train(width, limits, before, samples, most)
        cells = [_cell(table[width]) for table in tables.values()]
        if width in LITERATURE:
            cells += [_cell(train(width, [NO_BOUND], None, samples, most)), f"{LITERATURE[width]:.5f}"]
        print(f"{width / dim:7.4f}   " + "   ".join(cells), flush=True)
        write(arguments.out, tables, dim)


def _cell(found: Candidate) -> str:
    return f"{found.mse:.5f} ({found.pulses:3d},{found.limit:3d},{found.levels.numel():3d})"


if __name__ == "__main__":
    main()
