"""Codecs by name, as recipes, artifacts and the command line write them."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Final, TypeVar

from compress.errors import ArtifactError, UsageError, nearest

if TYPE_CHECKING:
    from compress.codecs.base import Codec, CodecSpec

C = TypeVar("C", bound="type[Codec]")
_CODECS: Final[dict[str, type[Codec]]] = {}
"""Filled by `register_codec` while the package is imported, never after."""


def register_codec(cls: C) -> C:
    """Class decorator: makes `cls` known under the name of its config. A name can be taken once."""
    name = cls.config_type.name
    if name in _CODECS:
        raise UsageError(f"There is a codec '{name}' already.")
    _CODECS[name] = cls
    return cls


def codec_names() -> list[str]:
    """The names that `codec` takes, sorted."""
    return sorted(_CODECS)


def codec(name: str, **options: object) -> Codec:
    """The codec `name` with its options. Raises `UsageError` that names the nearest known name or option."""
    cls = _class_of(name)
    known = {field.name: type(field.default) for field in dataclasses.fields(cls.config_type)}
    for option, value in options.items():
        if option not in known:
            raise UsageError(
                f"The codec '{name}' has no option '{option}'.", remedy=nearest(option, list(known), "It takes")
            )
        if type(value) is not known[option]:
            kind = {bool: "true or false", int: "a whole number", str: "a word"}[known[option]]
            raise UsageError(f"The option '{option}' of the codec '{name}' is {value!r}.", remedy=f"Give {kind}.")
    return cls(cls.config_type(**options))


def codec_of(spec: CodecSpec) -> Codec:
    """The codec that wrote `spec`. Raises `ArtifactError` for a name this version does not know."""
    if spec.codec not in _CODECS:
        raise ArtifactError(
            f"There is no codec '{spec.codec}'.", remedy="A newer version of compress, or another program, wrote this."
        )
    return _CODECS[spec.codec].from_spec(spec)


def _class_of(name: str) -> type[Codec]:
    if name not in _CODECS:
        raise UsageError(f"There is no codec '{name}'.", remedy=nearest(name, codec_names(), "The codecs are"))
    return _CODECS[name]
