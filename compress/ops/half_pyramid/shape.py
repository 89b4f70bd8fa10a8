"""What the code of one group means, and the tables that ranking it needs.

A group of D weights (D = 8, 16 or 32) is reconstructed as w_i = c v_i with one float32 c = fl32(row scale * gain) and
small integers

    v_i = s_i t[m_i] + e d,     s_i = +-1,   0 <= m_i <= M,   sum m_i = K,   e = +-1 for the whole group

t are the levels (1 <= t[0] < ... < t[M]), odd numbers 1, 3, 5, ... where they are not trained; d is the shift of the
coset, 0 for none. There is no zero among the levels, so every weight has exactly one sign bit, and what is left to
code is the composition m of K, the gain and the coset.

**Ranks.** A composition is ranked by halves. With N_d(k) the number of compositions of k into d parts of at most M,

    rank(m) = T_d(k, k') + rank(left) N_d/2(k - k') + rank(right),       T_d(k, k') = sum_{j < k'} N_d/2(j) N_d/2(k - j)

where k = sum m, k' the sum of the left half. Halves are decoded independently of each other, which a sequential rank
(Fischer 1986) would not allow. All of a group that is no sign is one number, rest = ((rank L + gain) 2 + coset), the
last bit only where d > 0; coset 1 stands for e = -1.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

from compress.errors import CodecError

DIMS = (8, 16, 32)
MOST_LEVELS = 16
"""m fits four bits, so a table of levels fits the 16 bytes that a byte shuffle looks up at once."""
MOST_EVEN_LEVELS = 32
"""Of levels with equal steps, which need no table. Above 4.5 bits a weight 16 are too few."""
LARGEST_VALUE = 127


@dataclass(frozen=True)
class HalfShape:
    """D, K, the levels t, the gains (relative to the row's scale, ascending) and the coset's shift d."""

    dim: int
    pulses: int
    levels: tuple[int, ...]
    gains: tuple[float, ...]
    shift: int = 0

    def __post_init__(self) -> None:
        if self.dim not in DIMS:
            raise CodecError(f"A half-integer pyramid of {self.dim} coordinates; there are those of 8, 16 and 32.")
        most = MOST_EVEN_LEVELS if self.even else MOST_LEVELS
        if not 1 <= len(self.levels) <= most or not 0 <= self.pulses <= self.dim * self.limit:
            raise CodecError(f"{self.dim} coordinates of {len(self.levels)} levels cannot hold {self.pulses} pulses.")
        if not self.gains or self.gains[0] <= 0 or list(self.gains) != sorted(self.gains):
            raise CodecError(f"Gains must be positive and ascending, not {self.gains}.")
        if self.shift < 0 or self.levels[0] < 1 or self.levels[-1] + self.shift > LARGEST_VALUE:
            raise CodecError(f"Levels {self.levels} with a shift of {self.shift} leave 1 to {LARGEST_VALUE}.")
        if not _exact(self.levels):
            raise CodecError(f"Levels {self.levels}: their steps must not grow, those of their squares not shrink.")

    @property
    def limit(self) -> int:
        """M, the most pulses of one coordinate."""
        return len(self.levels) - 1

    @property
    def even(self) -> bool:
        """Whether all steps between levels are equal."""
        return len({b - a for a, b in zip(self.levels, self.levels[1:], strict=False)}) <= 1

    @property
    def coset(self) -> bool:
        return self.shift > 0

    @property
    def ranks(self) -> int:
        """Compositions: the number of ranks, an exact integer of any size."""
        return composition_counts(self.dim, self.pulses, self.limit)[self.dim][self.pulses]

    @property
    def codes(self) -> int:
        """Values of the rest of a group."""
        return self.ranks * len(self.gains) * (2 if self.coset else 1)


def _exact(levels: tuple[int, ...]) -> bool:
    """Whether (a - t[m])^2 is convex in m for every a >= 0: then the encoder's single steps find the optimum."""
    steps = [b - a for a, b in pairwise(levels)]
    squares = [b * b - a * a for a, b in pairwise(levels)]
    return (
        all(step > 0 for step in steps)
        and all(a >= b for a, b in pairwise(steps))
        and all(a <= b for a, b in pairwise(squares))
    )


def uniform_levels(limit: int, coset: bool = False) -> tuple[int, ...]:
    """m + 1/2 for m = 0..limit: 1, 3, 5, ... in units of a half; with a coset 2, 6, 10, ... in units of a quarter, so
    that its shift can be a quarter."""
    unit = 4 if coset else 2
    return tuple(range(unit // 2, unit * (limit + 1), unit))


@lru_cache(maxsize=256)
def composition_counts(dim: int, pulses: int, limit: int) -> dict[int, tuple[int, ...]]:
    """N_d(k) for d = 1, 2, 4, ... dim and k = 0..pulses, exact integers: `composition_counts(...)[d][k]`."""
    counts = {1: tuple(int(k <= limit) for k in range(pulses + 1))}
    while (d := max(counts)) < dim:
        half = counts[d]
        counts[2 * d] = tuple(sum(half[j] * half[k - j] for j in range(k + 1)) for k in range(pulses + 1))
    return counts


@lru_cache(maxsize=256)
def first_ranks(dim: int, pulses: int, limit: int) -> dict[int, tuple[tuple[int, ...], ...]]:
    """T_d(k, k') for d = 2, 4, ... dim: `first_ranks(...)[d][k][k']`, k' = 0..k+1; the last entry is N_d(k)."""
    counts = composition_counts(dim, pulses, limit)
    tables: dict[int, tuple[tuple[int, ...], ...]] = {}
    d = 2
    while d <= dim:
        half, rows = counts[d // 2], []
        for k in range(pulses + 1):
            row = [0]
            for j in range(k + 1):
                row.append(row[-1] + half[j] * half[k - j])
            rows.append(tuple(row))
        tables[d] = tuple(rows)
        d *= 2
    return tables


def plane_widths(bits: int) -> tuple[int, ...]:
    """The planes that `bits` bits of a group's rest are stored in: powers of two, descending, at most 64.

    Plane p holds `width` bits of every group, the next higher ones of the rest; so each group's part of a plane lies
    at a multiple of its own size, whatever the code's width.
    """
    widths = [64] * (bits // 64)
    widths += [1 << place for place in reversed(range(6)) if bits % 64 >> place & 1]
    return tuple(widths)
