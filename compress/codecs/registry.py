"""Codecs by name, as recipes, artifacts and the command line write them."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Final, TypeVar

from compress.errors import UsageError, nearest

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
    known = [field.name for field in dataclasses.fields(cls.config_type)]
    for option in options:
        if option not in known:
            raise UsageError(f"The codec '{name}' has no option '{option}'.", remedy=nearest(option, known, "It takes"))
    return cls(cls.config_type(**options))


def codec_of(spec: CodecSpec) -> Codec:
    """The codec that wrote `spec`. Raises `UsageError` for a name this version does not know."""
    return _class_of(spec.codec).from_spec(spec)


def _class_of(name: str) -> type[Codec]:
    if name not in _CODECS:
        raise UsageError(f"There is no codec '{name}'.", remedy=nearest(name, codec_names(), "The codecs are"))
    return _CODECS[name]
