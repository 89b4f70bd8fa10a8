"""Options of the codecs of bitsandbytes, and what a description of them means."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Final, TypeVar

from compress.codecs.base import CodecSpec
from compress.errors import ArtifactError, UsageError

BLOCKS: Final = (32, 64, 128, 256)
"""Weights that may share a scale."""
TABLE_BITS: Final = 4
INTEGER_BITS: Final = 8
BITSANDBYTES: Final = "bitsandbytes"
"""The container that carries these codecs exactly, as `Codec.containers` names it."""


@dataclass(frozen=True)
class TableConfig:
    """block: consecutive weights of the flattened matrix that share a scale. double: scales in 8 bits, with one float32
    to 256 of them and one to the matrix."""

    name: ClassVar[str]
    block: int = 64
    double: bool = False

    def __post_init__(self) -> None:
        if self.block not in BLOCKS:
            raise UsageError(
                f"There are no blocks of {self.block} weights.",
                remedy=f"Take one of {', '.join(map(str, BLOCKS))}, as bitsandbytes has them.",
            )


@dataclass(frozen=True)
class Nf4Config(TableConfig):
    """NF4 of QLoRA: the values are quantiles of a normal distribution. block: weights that share a scale (32, 64, 128,
    256), counted along the flattened matrix. double: the scales themselves in 8 bits."""

    name: ClassVar[str] = "nf4"


@dataclass(frozen=True)
class Fp4Config(TableConfig):
    """FP4 of bitsandbytes: a sign, two bits of exponent, one of mantissa. block: weights that share a scale (32, 64,
    128, 256), counted along the flattened matrix. double: the scales themselves in 8 bits."""

    name: ClassVar[str] = "fp4"


@dataclass(frozen=True)
class Int8Config:
    """LLM.int8: each row has its largest magnitude as a float32, and stands in 127ths of it. No options."""

    name: ClassVar[str] = "int8"


Config = TypeVar("Config", Nf4Config, Fp4Config, Int8Config, TableConfig)


def config_of(spec: CodecSpec, kind: type[Config], width: int) -> Config:
    """The options that wrote `spec`, those of `kind`. Raises `ArtifactError` for a spec that none wrote."""
    known = {"block": int, "double": bool} if issubclass(kind, TableConfig) else {}
    right = (
        spec.codec == kind.name
        and spec.dim == 1
        and spec.width == width
        and {name: type(value) for name, value in spec.options.items()} == known
    )
    try:
        if right:
            options: dict[str, Any] = dict(spec.options)
            return kind(**options)
    except UsageError as error:
        raise ArtifactError(f"Not the description of {kind.name} weights: {spec.to_dict()}. {error}") from error
    raise ArtifactError(
        f"Not the description of {kind.name} weights: {spec.to_dict()}.",
        remedy="The artifact was written by a newer version of compress, or is damaged.",
    )


def require_width(name: str, width: int, only: int) -> None:
    """Raise `UsageError` unless `width` is the `only` one of the codec `name`."""
    if width != only:
        raise UsageError(f"The codec '{name}' has no code of {width} bits.", remedy=f"Its codes have {only} bits.")
