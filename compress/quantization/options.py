"""How a matrix is rounded: to the nearest, each by itself, or so that the model's outputs stay."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from compress.codecs.base import Option
from compress.errors import UsageError
from compress.quantization.methods import check_words, method_of, method_text


@dataclass(frozen=True)
class Nearest:
    """Each weight, or group of weights, to the nearest code. Needs no data."""

    name: ClassVar[str] = "nearest"


@dataclass(frozen=True)
class Ldlq:
    """Rounding with the second moments of the inputs (`compress.quantization.ldlq`).

    damping: added to the diagonal of the Hessian, times its mean. sweeps: how often each group is rounded again when
    all others are. order: groups of the strongest inputs first. search: pulses move to where the output, not the
    weight, is nearest. gain: of a group, the "projection" of least error, the "norm" that keeps its length, or the
    "best" of the two for each matrix. refit: scales of least error once there are codes. sequential: what is rounded
    already when the inputs of a matrix are taken, every "matrix" before it, every "block" before its own, or "nothing".
    asymmetric: 1 aims at the outputs for the original model's inputs, 0 at those for
    the inputs as they are, between them is between. fallback: "nearest" rounds a matrix whose Hessian stays indefinite
    or that no input reached to the nearest and reports it; "error" ends the run.
    """

    name: ClassVar[str] = "ldlq"
    damping: float = 0.01
    sweeps: int = 2
    order: bool = True
    search: bool = True
    gain: Literal["projection", "norm", "best"] = "projection"
    refit: bool = False
    sequential: Literal["matrix", "block", "nothing"] = "matrix"
    asymmetric: float = 1.0
    fallback: Literal["error", "nearest"] = "error"

    @property
    def text(self) -> str:
        """As on the command line, with what differs from the defaults."""
        return method_text(self)

    def __post_init__(self) -> None:
        check_words("rounding", self)
        if not (0 <= self.asymmetric <= 1 and 0 <= self.damping < 10 and 0 <= self.sweeps <= 100):
            raise UsageError(
                f"The rounding has damping {self.damping}, {self.sweeps} sweeps, asymmetric {self.asymmetric}.",
                remedy="Damping is 0 or more and below 10, sweeps 0 to 100, asymmetric between 0 and 1.",
            )
        if self.asymmetric and self.sequential == "nothing":
            raise UsageError(
                "With the original inputs there is nothing asymmetric.", remedy="Write sequential=nothing,asymmetric=0."
            )


Rounding = Nearest | Ldlq
ROUNDINGS: Mapping[str, type[Nearest] | type[Ldlq]] = {"nearest": Nearest, "ldlq": Ldlq}


def rounding_of(name: str, options: Mapping[str, Option | None] | None = None) -> Rounding:
    """The rounding `name` with its options. Raises `UsageError` that names the nearest known name or option."""
    return method_of("rounding", ROUNDINGS, name, options)
