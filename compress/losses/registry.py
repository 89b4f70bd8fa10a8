"""Losses by name, as recipes and the command line write them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, get_type_hints

from compress.errors import UsageError, nearest
from compress.losses.base import TokenLoss
from compress.losses.divergences import KL
from compress.losses.labels import CrossEntropy

LOSSES: Mapping[str, type[TokenLoss]] = {"kl": KL, "cross_entropy": CrossEntropy}
NEEDS_TEACHER = frozenset({"kl"})


def loss_names() -> list[str]:
    return sorted(LOSSES)


def loss_options(name: str) -> list[str]:
    """The options that the loss `name` takes, without the reduction (the trainer's business)."""
    return [option for option in inspect.signature(_class_of(name)).parameters if option != "reduction"]


def make_loss(name: str, reduction: str = "mean", options: Mapping[str, object] | None = None) -> TokenLoss:
    """The loss `name` with its options.

    Raises `UsageError` for an unknown name or option, with the nearest known one, and for a value of the wrong type.
    """
    given: dict[str, Any] = dict(options or {})
    known, types = loss_options(name), get_type_hints(_class_of(name).__init__)
    for option, value in given.items():
        if option not in known:
            raise UsageError(f"The loss '{name}' has no option '{option}'.", remedy=nearest(option, known, "It takes"))
        expected = types[option]
        fits = type(value) in (int, float) if expected is float else type(value) is expected
        if not fits:
            raise UsageError(
                f"The option '{option}' of the loss '{name}' is {value!r}.", remedy=f"Give a {expected.__name__}."
            )
    return _class_of(name)(reduction=reduction, **given)


def _class_of(name: str) -> type[Any]:
    if name not in LOSSES:
        raise UsageError(f"There is no loss '{name}'.", remedy=nearest(name, LOSSES, "The losses are"))
    return LOSSES[name]
