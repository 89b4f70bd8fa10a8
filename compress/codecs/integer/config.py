"""Options of the integer codec, and what a description of it means."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Final

from compress.codecs.base import CodecSpec
from compress.errors import ArtifactError, UsageError

WIDTHS: Final = tuple(range(2, 9))
"""Bits of a weight."""
LEAST_GROUP: Final = 8
"""Fewest columns of a group: with 16 bits of scale, fewer would cost more than the weights."""


@dataclass(frozen=True)
class IntegerConfig:
    """group: columns that share a scale; 0 for the whole row. symmetric: no zero points, integers around 0.
    clip: search the scale of least squared error; without, it spans the group from least to largest weight."""

    name: ClassVar[str] = "integer"
    group: int = 64
    symmetric: bool = False
    clip: bool = True

    def __post_init__(self) -> None:
        if self.group != 0 and self.group < LEAST_GROUP:
            raise UsageError(
                f"There are no groups of {self.group} columns.",
                remedy=f"Take {LEAST_GROUP} or more, or group=0 for one scale a row.",
            )

    def columns(self, columns: int) -> int:
        """Columns that share a scale in a matrix of so many, at least 1."""
        return max(1, min(self.group or columns, columns))

    def groups(self, columns: int) -> int:
        """Scales of a row."""
        return -(-columns // self.columns(columns))

    def centred(self, bits: int) -> bool:
        """Whether all zero points are 2^(bits-1) and none are stored: symmetric, and always at 8 bits, where integers
        from any other zero point would leave a signed byte."""
        return self.symmetric or bits == WIDTHS[-1]


def config_of(spec: CodecSpec) -> IntegerConfig:
    """The options that wrote `spec`. Raises `ArtifactError` for a spec that none wrote."""
    kinds = {"group": int, "symmetric": bool, "clip": bool}
    right = (
        spec.codec == IntegerConfig.name
        and spec.dim == 1
        and spec.width in WIDTHS
        and {name: type(value) for name, value in spec.options.items()} == kinds
    )
    try:
        if right:
            options: dict[str, Any] = dict(spec.options)
            return IntegerConfig(**options)
    except UsageError as error:
        raise ArtifactError(f"Not the description of group integers: {spec.to_dict()}. {error}") from error
    raise ArtifactError(
        f"Not the description of group integers: {spec.to_dict()}.",
        remedy="The artifact was written by a newer version of compress, or is damaged.",
    )
