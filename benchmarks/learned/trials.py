"""Which models are quantized in which ways, part by part of the table of learned transforms.

A trial is one cell: weights in some codec, behind some transform, with so many bits of activations and of keys and
values while it is measured. Trials of one `comparison` are judged against the first of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from peers.subjects import GROUPS

from compress.errors import UsageError

CHANNEL = "integer:group=0,symmetric=true"
"""A scale to an output channel, symmetric: the weights of the published W4A4KV4 and W4A16."""
OUTLIERS = "outliers"
"""The built-in teacher with function-preserving outliers."""
STUDENT = "student"
"""The built-in student, on the teacher's texts: small enough for tables of many learned transforms."""
PARTS = ("w4a4kv4", "weight_only", "kl_top", "parts", "cost")
KS = (5, 50, 1000)
TAILS = ("residual", "partial", "renormalised")
CHANGES = {
    "rotations only": "norms=false,value_scales=false,gates=false,queries=false",
    "scales only": "residual=false,values=false",
    "without the residual rotation": "residual=false",
    "without value rotations": "values=false",
    "without norm scales": "norms=false",
    "without value scales": "value_scales=false",
    "without up/down scales": "gates=false",
    "without query/key scales": "queries=false",
    "exact weights in the loop": "weights=false",
    "womi start": "start=womi",
    "Cayley SGD": "optimizer=cayley,rotation_rate=10",
}
"""What is changed in the default, as options of the transform, by the name of the change."""


@dataclass(frozen=True)
class Weights:
    """`codec` as on the command line, at a rate of `bits` a weight, or, if `fixed`, with codes of so many bits and
    their scales on top."""

    codec: str
    bits: float
    fixed: bool = True


@dataclass(frozen=True)
class Quantization:
    """What `compress.quantize` is asked for on the model called `model`."""

    model: str
    weights: Weights
    transform: str


@dataclass(frozen=True)
class Trial:
    part: str
    label: str
    quantization: Quantization
    activations: int | None = None
    kv: int | None = None

    @property
    def mix_keys(self) -> bool:
        """Keys are mixed wherever anything is."""
        return self.quantization.transform != "none"

    @property
    def comparison(self) -> tuple[object, ...]:
        """Equal for trials that are compared with each other."""
        return self.part, self.quantization.model, self.quantization.weights, self.activations, self.kv


def trials(part: str, models: Sequence[str], steps: int, classes: int) -> Iterator[Trial]:
    """Those of `part`. `steps` of learning; `classes`: a k that takes all there are. Raises `UsageError` for a part
    that does not exist."""
    if part == "w4a4kv4":
        yield from _running(part, models, steps)
    elif part == "weight_only":
        yield from _weight_only(part, [model for model in models if model != OUTLIERS], steps)
    elif part == "kl_top":
        for model in models[:1]:
            yield from _losses(part, model, steps, classes)
    elif part == "parts":
        for model in models[:1]:
            yield from _ingredients(part, model, steps)
    elif part == "cost":
        for model in models:
            yield from _three(part, model, Weights(CHANNEL, 4), steps, 4, 4, ("hadamard", "ost"))
    else:
        raise UsageError(f"There is no part '{part}'.", remedy=f"They are {', '.join(PARTS)}.")


def learned(steps: int, activations: int | None = None, kv: int | None = None, *changes: str) -> str:
    """The transform "ost" that learns for activations and a cache of so many bits."""
    bits = [f"{name}={value}" for name, value in (("activations", activations), ("kv", kv)) if value is not None]
    return f"ost:{','.join([f'steps={steps}', *bits, *changes])}"


def _three(
    part: str,
    model: str,
    weights: Weights,
    steps: int,
    activations: int | None = None,
    kv: int | None = None,
    names: Sequence[str] = ("hadamard", "none", "ost"),
) -> Iterator[Trial]:
    for name in names:
        transform = learned(steps, activations, kv) if name == "ost" else name
        yield Trial(part, name, Quantization(model, weights, transform), activations, kv)


def _running(part: str, models: Sequence[str], steps: int) -> Iterator[Trial]:
    for model in models:
        for activations, kv in ((4, 4), (8, None)):
            yield from _three(part, model, Weights(CHANNEL, 4), steps, activations, kv)


def _weight_only(part: str, models: Sequence[str], steps: int) -> Iterator[Trial]:
    for model in models:
        for weights in (
            Weights(CHANNEL, 4),
            Weights(f"integer:group={GROUPS[model]}", 4),
            Weights("half_pyramid", 3.0, fixed=False),
        ):
            yield from _three(part, model, weights, steps)


def _losses(part: str, model: str, steps: int, classes: int) -> Iterator[Trial]:
    cells = [(k, tail) for k in sorted(KS, reverse=True) for tail in TAILS if k < classes]
    for k, tail in [*cells, (classes, TAILS[0])]:
        name = f"k=all of {classes}" if k == classes else f"k={k} {tail}"
        transform = learned(steps, 4, 4, f"k={k}", f"tail={tail}")
        yield Trial(part, name, Quantization(model, Weights(CHANNEL, 4), transform), 4, 4)


def _ingredients(part: str, model: str, steps: int) -> Iterator[Trial]:
    weights = Weights(CHANNEL, 4)
    yield Trial(part, "default", Quantization(model, weights, learned(steps, 4, 4)), 4, 4)
    for name, change in CHANGES.items():
        yield Trial(part, name, Quantization(model, weights, learned(steps, 4, 4, change)), 4, 4)
    yield Trial(part, "nothing learned", Quantization(model, weights, "hadamard"), 4, 4)
