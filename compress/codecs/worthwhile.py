"""Which widths of a trained table are worth offering."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol


class Measured(Protocol):
    """What a table has for a width: among other things, its error."""

    @property
    def mse(self) -> float: ...


def worthwhile(table: Mapping[int, Measured]) -> tuple[int, ...]:
    """The widths of `table`, ascending, whose error is below that of every smaller one.

    A bound on the pulses ends what more bits can buy: with `max` = 7 the best pyramids of 60 to 64 bits are the one of
    59, and their codes would be padded.
    """
    widths: list[int] = []
    for width in sorted(table):
        if not widths or table[width].mse < table[widths[-1]].mse:
            widths.append(width)
    return tuple(widths)
