"""Makes compress/codecs/half_pyramid/tables.json: what each width means, trained on a Gaussian source.

A code of B bits holds D signs, a coset bit where there is one, and a number below N(D, K, M) L. For each width, K and
M run over the values near those of the width before that leave room for 1 to `MOST_GAINS` gains. What belongs to them
is trained by Lloyd's algorithm on the joint encoder, for groups x under values v = s t[m] + e d and gain S:

    S_j = sum <x, v> / sum <v, v>                        over the groups of gain j
    t[m] = sum S s (x - S e d) / sum S^2                 over the coordinates of level m
    d = sum S e (x - S s t) / sum S^2                    over all coordinates

Levels and shift are then rounded to integers, in the unit that costs least, under what keeps the encoder exact: steps
that do not grow, steps of squares that do not shrink. More than 16 levels keep equal steps. A small sample finds the
best few (K, M), larger ones train them, and a fresh one measures what is written. Run it with the native backend; all
twelve tables take about half an hour on two cores.

    python benchmarks/train_half_pyramid.py --out compress/codecs/half_pyramid/tables.json

Several runs (--dims, --only, --rates, --weights) may write to one file: the lower error of each width stays.
"""

from __future__ import annotations

import argparse
import itertools
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress import ops
from compress.ops.half_pyramid.shape import MOST_LEVELS, HalfShape, composition_counts, uniform_levels

VERSION = 1
MOST_GAINS = 24
MOST_LIMIT = 31
LARGEST_VALUE = 127
COLUMNS = 1024


@dataclass(frozen=True)
class Candidate:
    """A shape with its error per weight. Gains are relative to rows of unit RMS."""

    shape: HalfShape
    mse: float


@dataclass(frozen=True)
class Family:
    """What one table is for."""

    dim: int
    coset: bool
    trained: bool

    @property
    def key(self) -> dict[str, Any]:
        return {"dim": self.dim, "coset": self.coset, "levels": "trained" if self.trained else "uniform"}


def sample(groups: int, dim: int, seed: int) -> Tensor:
    """Groups [groups, dim] of N(0, 1), normalised to unit RMS over rows of `COLUMNS`."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(-(-groups * dim // COLUMNS), COLUMNS, generator=generator)
    rows /= rows.double().square().mean(1, keepdim=True).sqrt().float()
    return rows.view(-1, dim)[:groups].contiguous()


def start_shape(x: Tensor, family: Family, pulses: int, limit: int, number: int) -> HalfShape:
    """Uniform levels, and quantiles of the gain that a group's L1 norm asks for."""
    if family.trained:
        pitch = min(16, (LARGEST_VALUE - 3) // (limit + 1))
        levels = tuple(pitch * m + max(1, round(0.58 * pitch)) for m in range(limit + 1))
    else:
        levels = uniform_levels(limit, family.coset)
        pitch = 2 * levels[0]
    gains = x.abs().sum(-1).div(pitch * (pulses + family.dim / 2)).clamp_min(1e-4).sort().values
    places = (torch.arange(number) + 0.5) / number * (gains.numel() - 1)
    shift = max(1, round(0.28 * pitch)) if family.coset else 0
    return HalfShape(family.dim, pulses, levels, tuple(gains[places.long()].tolist()), shift)


def lloyd(x: Tensor, candidate: Candidate, family: Family, rounds: int) -> Candidate:
    """`candidate` after rounds of Lloyd's algorithm; its error is that before the last update. Levels and shift move
    in the first half of the rounds only, so that the gains end at their best for the integers."""
    unit = torch.ones(x.shape[0])
    shape, mse = candidate.shape, float("inf")
    for step in range(rounds):
        values, gain, coset = ops.half_pyramid_encode(x, unit, shape)
        gains = torch.tensor(shape.gains, dtype=torch.float64)
        v = values.double()
        mse = float((x.double() - gains[gain].unsqueeze(-1) * v).square().mean())
        if family.trained and len(shape.levels) <= MOST_LEVELS and step < rounds // 2 and step % 2:
            shape = moved_levels(x.double(), v, gains[gain], coset, shape)
            continue
        across = torch.zeros(len(gains), dtype=torch.float64).index_add_(0, gain, (x * v).sum(-1))
        energy = torch.zeros(len(gains), dtype=torch.float64).index_add_(0, gain, v.square().sum(-1))
        gains = torch.where(energy > 0, across / energy.clamp_min(1e-30), gains)
        shape = replace(shape, gains=tuple(gains.float().clamp_min(1e-6).sort().values.tolist()))
    return Candidate(shape, mse)


def moved_levels(x: Tensor, v: Tensor, gain: Tensor, coset: Tensor, shape: HalfShape) -> HalfShape:
    """`shape` with the levels and the shift that serve these groups best, as integers."""
    side = torch.where(coset == 0, 1.0, -1.0).double().unsqueeze(-1)
    gain = gain.unsqueeze(-1)
    bare = v - side * shape.shift
    place = torch.full((128,), -1)
    place[torch.tensor(shape.levels)] = torch.arange(len(shape.levels))
    m = place[bare.abs().long()].flatten()
    weight = gain.square().expand_as(x).flatten()
    number = len(shape.levels)
    wanted = (gain * bare.sign() * (x - gain * side * shape.shift)).flatten()
    across = torch.zeros(number, dtype=torch.float64).index_add_(0, m, wanted)
    weights = torch.zeros(number, dtype=torch.float64).index_add_(0, m, weight) + 1e-9 * float(weight.sum())
    prior = torch.tensor(shape.levels, dtype=torch.float64)
    levels = (across + prior * 1e-9 * float(weight.sum())) / weights
    shift = float((gain * side * (x - gain * bare)).sum() / weight.sum()) if shape.shift else 0.0
    return replace_levels(shape, levels, weights, shift)


def replace_levels(shape: HalfShape, levels: Tensor, weights: Tensor, shift: float) -> HalfShape:
    """The integers nearest to `levels` in the unit that costs least, for the weighted square; gains follow the unit."""
    best, least = shape, float("inf")
    largest = LARGEST_VALUE / (float(levels[-1]) * 1.02 + shift)
    for unit in torch.linspace(0.55 * largest, largest, 60).tolist():
        whole = admissible([round(value * unit) for value in levels.tolist()])
        moved = max(1, round(shift * unit)) if shape.shift else 0
        if whole is None or whole[-1] + moved > LARGEST_VALUE:
            continue
        cost = float((weights * (torch.tensor(whole) / unit - levels).square()).sum())
        cost += float(weights.sum()) * (moved / unit - shift) ** 2
        if cost < least:
            gains = tuple(float(torch.tensor(gain / unit)) for gain in shape.gains)
            best, least = replace(shape, levels=tuple(whole), shift=moved, gains=gains), cost
    return best


def admissible(levels: list[int]) -> list[int] | None:
    """`levels` with each step cut to the one before; None where the squares' steps then shrink."""
    levels = [max(1, levels[0]), *levels[1:]]
    steps = list(itertools.accumulate((b - a for a, b in itertools.pairwise(levels)), min))
    if any(step < 1 for step in steps):
        return None
    whole = list(itertools.accumulate(steps, initial=levels[0]))
    squares = [b * b - a * a for a, b in itertools.pairwise(whole)]
    return whole if squares == sorted(squares) else None


def shapes(family: Family, width: int, limits: list[int]) -> list[tuple[int, int, int]]:
    """(pulses, limit, number of gains) that fit `width` bits."""
    room = 1 << (width - family.dim - family.coset)
    found = {(0, 0, room)} if room <= MOST_GAINS else set()  # signs and gains alone
    for limit in limits:
        most = family.dim * limit // 2 + 1
        counts = composition_counts(family.dim, most, limit)[family.dim]
        for pulses in range(1, most):
            number = room // counts[pulses]
            if 1 <= number <= MOST_GAINS and pulses >= limit:
                found.add((pulses, limit, number))
            if number < 1:
                break
    return sorted(found)


def train(family: Family, width: int, limits: list[int], before: Candidate | None, samples: list[Tensor]) -> Candidate:
    """The best shape of one width; its `mse` is measured on the last of `samples`. A wider code is never worse."""
    small, middle, large, fresh = samples
    kinds = {family, replace(family, trained=False)}  # trained levels begin as uniform ones too
    starts = [
        Candidate(start_shape(small, kind, pulses, limit, number), 0.0)
        for pulses, limit, number in shapes(family, width, limits)
        for kind in kinds
    ]
    first = _best([lloyd(small, start, family, 12) for start in starts], 5)
    second = _best([lloyd(middle, candidate, family, 20) for candidate in first], 2)
    third = [lloyd(large, candidate, family, 30) for candidate in second]
    finals = [replace(candidate, mse=lloyd(fresh, candidate, family, 1).mse) for candidate in third]
    return _best(finals + ([before] if before is not None else []), 1)[0]


def _best(candidates: list[Candidate], number: int) -> list[Candidate]:
    return sorted(candidates, key=lambda candidate: candidate.mse)[:number]


def row_of(candidate: Candidate) -> dict[str, Any]:
    shape = candidate.shape
    gains = [float(f"{gain:.9g}") for gain in shape.gains]
    return {
        "pulses": shape.pulses, "levels": list(shape.levels), "shift": shape.shift, "gains": gains,
        "mse": round(candidate.mse, 7),
    }  # fmt: skip


def write(path: Path, tables: list[tuple[Family, dict[int, Candidate]]]) -> None:
    """The tables as JSON, one width a line. What the file has already stays where its error is lower."""
    rows: dict[str, dict[int, dict[str, Any]]] = {}
    if path.is_file():
        for table in json.loads(path.read_text(encoding="utf-8"))["tables"]:
            widths = table.pop("widths")
            rows[json.dumps(table)] = {int(width): row for width, row in widths.items()}
    for family, found in tables:
        kept = rows.setdefault(json.dumps({"version": VERSION, **family.key}), {})
        for width, candidate in found.items():
            row = row_of(candidate)
            if width not in kept or row["mse"] < kept[width]["mse"]:
                kept[width] = row
    parts = []
    for head, by_width in sorted(rows.items()):
        lines = ",\n".join(f'   "{width}": {json.dumps(row)}' for width, row in sorted(by_width.items()))
        parts.append(f'  {head[:-1]}, "widths": {{\n{lines}\n  }}}}')
    path.write_text('{"tables": [\n' + ",\n".join(parts) + "\n]}\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--weights", type=int, default=800_000, help="weights of the largest samples")
    parser.add_argument("--dims", default="8,16,32")
    parser.add_argument("--only", default="", help="such as coset-trained; all four kinds otherwise")
    parser.add_argument("--rates", default="1.25-5", help="bits a weight")
    arguments = parser.parse_args()
    low, high = (float(part) for part in arguments.rates.split("-"))
    tables: list[tuple[Family, dict[int, Candidate]]] = []
    for dim in (int(part) for part in arguments.dims.split(",")):
        groups = arguments.weights // dim
        samples = [sample(count, dim, s) for s, count in enumerate((groups // 12, groups // 4, groups, groups))]
        for trained, coset in itertools.product((True, False), (True, False)):
            family = Family(dim, coset, trained)
            kind = f"{'coset' if coset else 'plain'}-{'trained' if trained else 'uniform'}"
            if arguments.only and kind not in arguments.only.split(","):
                continue
            widths: dict[int, Candidate] = {}
            tables.append((family, widths))
            for width in range(round(low * dim), round(high * dim) + 1):
                before = widths.get(width - 1)
                centre = None if before is None else before.shape.limit
                least, most = (1, MOST_LIMIT) if centre is None else (max(1, centre - 1), min(centre + 2, MOST_LIMIT))
                limits = list(range(least, most + 1))
                found = widths[width] = train(family, width, limits, before, samples)
                shape = found.shape
                print(
                    f"{dim:2d} {kind} {width / dim:.4f} {found.mse:.5f} K {shape.pulses} M {shape.limit} "
                    f"L {len(shape.gains)} d {shape.shift} {shape.levels}",
                    flush=True,
                )
                write(arguments.out, tables)


if __name__ == "__main__":
    main()
