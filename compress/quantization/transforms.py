"""What is done to a model before it is rounded: the transforms and their options."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from compress.codecs.base import Codec, Option
from compress.errors import UsageError
from compress.losses.targets import Tail, TopKKL
from compress.quantization.dynamic import Dynamic
from compress.quantization.methods import check_words, method_of, method_text
from compress.recipe.method import parse_method
from compress.transforms.learned import PARTS, Part, Start


@dataclass(frozen=True)
class Auto:
    """Mixing where it is known to help and costs nothing else (`chosen_transform`)."""

    name: ClassVar[str] = "auto"


@dataclass(frozen=True)
class Untransformed:
    """Nothing."""

    name: ClassVar[str] = "none"


@dataclass(frozen=True)
class Hadamard:
    """Both sides of every matrix are mixed, in the weights where that can be folded, or else at run time."""

    name: ClassVar[str] = "hadamard"


@dataclass(frozen=True)
class Ost:
    """Rotations and scalings that are learned and folded (Hu et al. 2025, OSTQuant, arXiv 2501.13987); what cannot be
    folded is mixed at run time, as in `Hadamard`.

    steps: of the optimisation. batch: calibration rows of a step. k, tail: KL-Top's classes, and what becomes of the
    others (`compress.losses.TopKKL`). optimizer: of the rotations, Riemannian "adam" or "cayley" SGD. rotation_rate:
    its peak, about the radians by which adam turns a plane in a step; that of cayley multiplies the gradient, and 10 is
    about right. scale_rate: of the logarithms of scales. start: of the rotations. residual, values: which rotations
    are learned; norms, value_scales, gates, queries: which scalings. weights: matrices are rounded in the loop.
    activations, kv: their bits in the loop, 16 for none; kv_group: channels of a group of keys or values, 0 for a head.
    online: what cannot be folded is mixed at run time.
    """

    name: ClassVar[str] = "ost"
    steps: int = 100
    batch: int = 8
    k: int = 1000
    tail: Tail = "residual"
    optimizer: Literal["adam", "cayley"] = "adam"
    rotation_rate: float = 0.01
    scale_rate: float = 0.01
    start: Start = "hadamard"
    residual: bool = True
    values: bool = True
    norms: bool = True
    value_scales: bool = True
    gates: bool = True
    queries: bool = True
    weights: bool = True
    activations: int = 16
    kv: int = 16
    kv_group: int = 0
    online: bool = True

    def __post_init__(self) -> None:
        check_words("transform", self)
        if self.steps < 1 or self.batch < 1 or self.k < 1:
            raise UsageError(
                f"ost has {self.steps} steps, {self.batch} rows a step and k = {self.k}.",
                remedy="Each is at least 1.",
            )
        if not (0 <= self.rotation_rate < math.inf and 0 <= self.scale_rate <= 1):
            raise UsageError(
                f"ost has the rates {self.rotation_rate} and {self.scale_rate}.",
                remedy="Take at least 0, and at most 1 for scale_rate.",
            )
        if not self.weights and (self.activations, self.kv) == (16, 16):
            raise UsageError(
                "Nothing is quantized while ost learns, so there is nothing to learn.",
                remedy="Give --bits for the matrices, or ost:activations=8 or ost:kv=8.",
            )
        TopKKL(k=self.k, tail=self.tail)
        if not self.parts:
            raise UsageError("ost has nothing to learn.", remedy=f"Leave one of {', '.join(PARTS)} true.")
        _ = self.dynamic

    @property
    def text(self) -> str:
        """As on the command line, with what differs from the defaults."""
        return method_text(self)

    def folded(self, rounded: bool) -> Ost:
        """This without anything at run time, for matrices that are `rounded` in the loop, or not."""
        return replace(self, online=False, weights=self.weights and rounded)

    @property
    def parts(self) -> tuple[Part, ...]:
        """What is learned."""
        chosen: dict[Part, bool] = {
            "residual": self.residual,
            "values": self.values,
            "norms": self.norms,
            "value_scales": self.value_scales,
            "gates": self.gates,
            "queries": self.queries,
        }
        return tuple(part for part in PARTS if chosen[part])

    @property
    def dynamic(self) -> Dynamic:
        """What is quantized in the loop besides the weights."""
        activations, kv = (None if bits == 16 else bits for bits in (self.activations, self.kv))
        return Dynamic.of_bits(activations, kv, self.kv_group or None)


Transform = Auto | Untransformed | Hadamard | Ost
TRANSFORMS: Mapping[str, type[Auto] | type[Untransformed] | type[Hadamard] | type[Ost]] = {
    cls.name: cls for cls in (Auto, Untransformed, Hadamard, Ost)
}
AUTO_CODECS = ("half_pyramid",)
"""Codecs that are not chosen for the stock containers that hold them, which no mixed matrix fits."""


def transform_of(name: str, options: Mapping[str, Option | None] | None = None) -> Transform:
    """The transform `name` with its options. Raises `UsageError` that names the nearest known name or option."""
    return method_of("transform", TRANSFORMS, name, options)


def parse_transform(text: str) -> Transform:
    """The same of NAME or NAME:key=value,..."""
    method = parse_method(text)
    return transform_of(method.name, method.options)


def chosen_transform(transform: Transform, codec: Codec, calibrated: bool, exported: bool = False) -> Transform:
    """`transform`, where `Auto` stays for calibrated rounding with a codec of `AUTO_CODECS` of a model that is not
    exported, and is nothing for everything else."""
    mixes = calibrated and not exported and codec.config_type.name in AUTO_CODECS
    return transform if not isinstance(transform, Auto) or mixes else Untransformed()
