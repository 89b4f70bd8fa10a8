"""Options of the codec `pvq` and the pyramid that a code's width buys."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

from compress.errors import UsageError
from compress.ops.tables import counts

LARGEST = 127
"""Bound on |y_i|: vectors are handed out as int8. Taller ones are not counted."""
LARGEST_DIM = 128
MOST_GAIN_BITS = 8
GAINS = ("beta", "lloyd")
ENCODERS = ("exact", "round")
LOWEST_RATE, HIGHEST_RATE = 1.5, 5.0
"""Bits a weight, index and gain together, between which `pvq` offers widths where the pulses are not fixed."""


@dataclass(frozen=True)
class PvqConfig:
    """dim: weights in a group, 1 to 128. pulses: K, or 0 for the most that the width holds. gain: the levels,
    "beta" (quantile transform of the group's norm, as published) or "lloyd" (Lloyd-Max, of the projection).
    gain_bits: bits of a gain, 0 to 8. encoder: of the direction, "exact" or "round" (round and fix, as published).
    """

    name: ClassVar[str] = "pvq"
    dim: int = 16
    pulses: int = 0
    gain: str = "lloyd"
    gain_bits: int = 3
    encoder: str = "exact"

    def __post_init__(self) -> None:
        for name, value, least, most in (
            ("dim", self.dim, 1, LARGEST_DIM),
            ("gain_bits", self.gain_bits, 0, MOST_GAIN_BITS),
            ("pulses", self.pulses, 0, self.dim * LARGEST),
        ):
            if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
                raise UsageError(f"{name}={value!r} in pvq.", remedy=f"It takes whole numbers from {least} to {most}.")
        for name, text, known in (("gain", self.gain, GAINS), ("encoder", self.encoder, ENCODERS)):
            if text not in known:
                raise UsageError(f"{name}={text!r} in pvq.", remedy=f"It takes {' or '.join(known)}.")


def limit_of(pulses: int) -> int:
    """The bound m of the pyramid of K pulses."""
    return min(pulses, LARGEST)


@lru_cache(maxsize=256)
def widths_of(config: PvqConfig) -> dict[int, int]:
    """Code width -> pulses K, ascending. Widths whose K a smaller one has too are left out: their codes are padding."""
    if config.pulses:
        sizes = _sizes(config.dim, 1 << config.pulses.bit_length())
        return {(sizes[config.pulses] - 1).bit_length() + config.gain_bits: config.pulses}
    widths: dict[int, int] = {}
    most = int(HIGHEST_RATE * config.dim)
    for pulses, bits in enumerate(_growing(config.dim, most - config.gain_bits), start=1):
        width = bits + config.gain_bits
        if width >= LOWEST_RATE * config.dim:
            widths[width] = pulses
    return widths


def _growing(dim: int, most: int) -> list[int]:
    """Index bits of K = 1, 2, ... pulses, as long as the codebook grows with K and its index has <= `most` bits."""
    pulses = 64
    while True:
        sizes = _sizes(dim, pulses)
        bits = [(size - 1).bit_length() for size in sizes]
        for k in range(1, pulses + 1):
            if sizes[k] <= sizes[k - 1] or bits[k] > most:
                return bits[1:k]
        pulses *= 2


@lru_cache(maxsize=64)
def _sizes(dim: int, most: int) -> tuple[int, ...]:
    """N(dim, K) of the bounded pyramids for K = 0..most; asked for by powers of two, so that few are computed."""
    return counts(dim, most, LARGEST)[dim]
