"""Losses by name, as recipes and the command line write them."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from compress.errors import UsageError, nearest
from compress.losses.balanced import AdaptiveKL, BalancedKL, EntropyGatedKL, TokenwiseKL
from compress.losses.base import Loss
from compress.losses.clipped import ClippedKL
from compress.losses.correlation import Dist
from compress.losses.decoupled import DecoupledKD, NormalisedKD, UniversalSelfKD
from compress.losses.features import NormDirection
from compress.losses.kl import KL, ReverseKL, SymmetricKL
from compress.losses.labels import CrossEntropy
from compress.losses.mixtures import JensenShannon, ReverseSkewKL, SkewKL
from compress.losses.mutual_information import ConditionalMutualInformation
from compress.losses.one_for_all import OneForAll, StagedOneForAll
from compress.losses.plackett_luce import PlackettLuce
from compress.losses.power import Alpha, AlphaBeta, ChiSquare, Renyi, TotalVariation
from compress.losses.sinkhorn import Sinkhorn
from compress.losses.spans import SpanCorrelation
from compress.losses.targets import SampledKL, TopKKL
from compress.losses.uld import UniversalLogit

LOSSES: Mapping[str, type[Loss]] = {
    "adaptive_kl": AdaptiveKL,
    "alpha": Alpha,
    "alpha_beta": AlphaBeta,
    "balanced_kl": BalancedKL,
    "chi_square": ChiSquare,
    "clipped_kl": ClippedKL,
    "cmi": ConditionalMutualInformation,
    "cross_entropy": CrossEntropy,
    "dist": Dist,
    "dkd": DecoupledKD,
    "entropy_gated_kl": EntropyGatedKL,
    "jensen_shannon": JensenShannon,
    "kl": KL,
    "nd": NormDirection,
    "nkd": NormalisedKD,
    "ofa": OneForAll,
    "ofa_staged": StagedOneForAll,
    "plackett_luce": PlackettLuce,
    "renyi": Renyi,
    "reverse_kl": ReverseKL,
    "reverse_skew_kl": ReverseSkewKL,
    "sampled_kl": SampledKL,
    "sinkhorn": Sinkhorn,
    "skew_kl": SkewKL,
    "span": SpanCorrelation,
    "symmetric_kl": SymmetricKL,
    "todi": TokenwiseKL,
    "top_kl": TopKKL,
    "total_variation": TotalVariation,
    "uld": UniversalLogit,
    "uskd": UniversalSelfKD,
}


@dataclass(frozen=True)
class Setting:
    """What some losses must know about the models that they will see. A parameter of a loss's constructor with one of
    these names is filled from here when a loss is made by name; in Python the caller gives it."""

    classes: int
    student_width: int
    teacher_width: int = 0
    student_layers: int = 0
    pieces: Callable[[Sequence[int]], list[str]] | None = None
    """The text of each of some tokens, one by one."""


SETTING = frozenset(Setting.__dataclass_fields__)


def loss_names() -> list[str]:
    return sorted(LOSSES)


def loss_class(name: str) -> type[Any]:
    """The class of the loss `name`. Raises `UsageError` with the nearest name for one that is not known."""
    if name not in LOSSES:
        raise UsageError(f"There is no loss '{name}'.", remedy=nearest(name, LOSSES, "The losses are"))
    return LOSSES[name]


def loss_options(name: str) -> dict[str, Any]:
    """The options that the loss `name` takes, with their defaults; without the reduction and the classes' treatment
    (the trainer's business) and what a `Setting` fills."""
    hidden = SETTING | {"self", "reduction", "vocabulary"}
    found: dict[str, Any] = {}
    for constructor in _constructors(name):
        for parameter in inspect.signature(constructor).parameters.values():
            if parameter.kind is not parameter.VAR_KEYWORD and parameter.name not in hidden:
                found.setdefault(parameter.name, parameter.default)
    return found


def make_loss(
    name: str,
    options: Mapping[str, object] | None = None,
    setting: Setting | None = None,
    **common: Any,
) -> Loss:
    """The loss `name` with its options; `common` holds the reduction and the treatment of unequal vocabularies.

    Raises `UsageError` for an unknown name or option, with the nearest known one, and for a value of the wrong type.
    """
    kind, known, annotations = loss_class(name), loss_options(name), _annotations(name)
    given = dict(options or {})
    for option, value in given.items():
        if option not in known:
            raise UsageError(f"The loss '{name}' has no option '{option}'.", remedy=nearest(option, known, "It takes"))
        if not _fits(value, annotations[option]):
            allowed = _described(annotations[option])
            raise UsageError(f"The option '{option}' of the loss '{name}' is {value!r}.", remedy=f"Give {allowed}.")
    if setting is not None:
        wanted = SETTING & set(inspect.signature(kind).parameters)
        given |= {field: getattr(setting, field) for field in wanted}
    return kind(**given, **common)


def _constructors(name: str) -> Iterator[Callable[..., None]]:
    """The constructor of the loss, and those that it passes further options on to."""
    for kind in loss_class(name).mro():
        constructor = vars(kind).get("__init__")
        if constructor is not None:
            yield constructor
            if all(each.kind is not each.VAR_KEYWORD for each in inspect.signature(constructor).parameters.values()):
                return


def _annotations(name: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for constructor in _constructors(name):
        found = get_type_hints(constructor) | found
    return found


def _fits(value: object, annotation: Any) -> bool:
    if get_origin(annotation) is Literal:
        return value in get_args(annotation)
    if get_origin(annotation) in (Union, types.UnionType):
        return any(_fits(value, part) for part in get_args(annotation))
    if annotation is float:
        return type(value) in (int, float)
    return type(value) is annotation


def _described(annotation: Any) -> str:
    if get_origin(annotation) is Literal:
        return f"one of {', '.join(map(str, get_args(annotation)))}"
    if get_origin(annotation) in (Union, types.UnionType):
        return " or ".join(_described(part) for part in get_args(annotation) if part is not type(None))
    return {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}[annotation]
