"""Losses by name, as recipes and the command line write them."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping

from compress.errors import UsageError
from compress.losses.base import TokenLoss
from compress.losses.divergences import KL
from compress.losses.labels import CrossEntropy

LOSSES: Mapping[str, Callable[..., TokenLoss]] = {"kl": KL, "cross_entropy": CrossEntropy}
NEEDS_TEACHER = frozenset({"kl"})


def loss_names() -> list[str]:
    return sorted(LOSSES)


def loss_options(name: str) -> list[str]:
    """The options that the loss `name` takes, without the reduction (the trainer's business)."""
    return [option for option in inspect.signature(_class_of(name)).parameters if option != "reduction"]


def make_loss(name: str, *, reduction: str = "mean", **options: object) -> TokenLoss:
    """The loss `name` with its options. Raises `UsageError` that names the nearest known name or option."""
    known = loss_options(name)
    for option in options:
        if option not in known:
            raise UsageError(f"The loss '{name}' has no option '{option}'.", remedy=_nearest(option, known, "It takes"))
    return _class_of(name)(reduction=reduction, **options)


def _class_of(name: str) -> Callable[..., TokenLoss]:
    if name not in LOSSES:
        raise UsageError(f"There is no loss '{name}'.", remedy=_nearest(name, loss_names(), "The losses are"))
    return LOSSES[name]


def _nearest(word: str, known: list[str], lead: str) -> str:
    close = difflib.get_close_matches(word, known, n=1)
    hint = f"Did you mean '{close[0]}'? " if close else ""
    return f"{hint}{lead}: {', '.join(known) if known else 'no option'}."
