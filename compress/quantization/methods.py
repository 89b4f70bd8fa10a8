"""Methods by name: a frozen dataclass each, whose fields are the options that a command line gives."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Protocol, TypeVar

from compress.codecs.base import Option
from compress.errors import UsageError, nearest

KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a word"}


class Method(Protocol):
    """A dataclass with the method's name on the class; its defaults tell the types of its options."""

    name: ClassVar[str]
    __dataclass_fields__: ClassVar[dict[str, Any]]


Chosen = TypeVar("Chosen", bound=Method)


def method_of(
    kind: str, known: Mapping[str, type[Chosen]], name: str, options: Mapping[str, Option | None] | None = None
) -> Chosen:
    """The method `name` of `known` with its options. Raises `UsageError` that calls it a `kind`, and names the nearest
    known name or option."""
    if name not in known:
        raise UsageError(f"There is no {kind} '{name}'.", remedy=nearest(name, list(known), "There are"))
    types = {field.name: type(field.default) for field in dataclasses.fields(known[name])}
    given: dict[str, Any] = {}
    for option, value in (options or {}).items():
        if option not in types:
            raise UsageError(
                f"The {kind} '{name}' has no option '{option}'.", remedy=nearest(option, list(types), "It takes")
            )
        if types[option] is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if type(value) is not types[option]:
            raise UsageError(
                f"The option '{option}' of the {kind} '{name}' is {value!r}.", remedy=f"Give {KINDS[types[option]]}."
            )
        given[option] = value
    return known[name](**given)


def method_text(method: Method) -> str:
    """As on the command line, with what differs from the defaults."""
    fields = [(field.name, getattr(method, field.name), field.default) for field in dataclasses.fields(method)]
    changed = [
        f"{name}={str(value).lower() if isinstance(value, bool) else value}"
        for name, value, default in fields
        if value != default
    ]
    return f"{method.name}:{','.join(changed)}" if changed else method.name


def check_words(kind: str, method: Method) -> None:
    """Raise `UsageError` for an option whose type is a `Literal` and whose value is none of its words."""
    for name, annotation in typing.get_type_hints(type(method)).items():
        if typing.get_origin(annotation) is Literal and getattr(method, name) not in typing.get_args(annotation):
            raise UsageError(
                f"The {kind}'s {name} is {getattr(method, name)!r}.",
                remedy=f"It is one of {', '.join(typing.get_args(annotation))}.",
            )
