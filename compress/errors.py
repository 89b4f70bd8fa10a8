"""Errors that a user can act on: what is wrong, where, and what to do.

Every error that `compress` raises on purpose derives from `CompressError`. The message names the thing (a path, a
matrix, a key with its line); `remedy` is one sentence that says what to do about it. The command line prints both and
exits with `exit_code`: 1 when the work failed, 2 when the request itself was wrong.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class CompressError(Exception):
    """Base of all errors raised on purpose. `str(error)` is the message followed by the remedy."""

    exit_code = 1

    def __init__(self, message: str, *, remedy: str = "") -> None:
        super().__init__(f"{message} {remedy}".rstrip())
        self.message = message
        self.remedy = remedy


class UsageError(CompressError):
    """An option, an argument or a combination of them that cannot work."""

    exit_code = 2


class RecipeError(UsageError):
    """A recipe that cannot be read: unknown key, wrong type, value out of range."""


class ModelError(CompressError):
    """A model that cannot be found, read, or is not supported."""


class DataError(CompressError):
    """Data that cannot be found or read, or is empty or too short."""


class ArtifactError(CompressError):
    """A quantized artifact that is damaged, truncated or of an unknown format version."""


class WorkspaceError(CompressError):
    """A work folder that belongs to other arguments, is in use, or cannot be written."""


class CodecError(CompressError):
    """A matrix that a codec cannot carry."""


class NumericsError(CompressError):
    """Numbers that must be finite and are not."""


class ExportError(CompressError):
    """An export that fails, or whose result does not agree with the model."""


class DependencyError(CompressError):
    """An optional package that the request needs and that is not installed."""

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(
            f"The package '{package}' is not installed.",
            remedy=f'Install it with: pip install "model-compress[{extra}]".',
        )


def nearest(word: str, known: Iterable[str], lead: str) -> str:
    """A remedy for a misspelt name: the nearest known one, if one is near, and all of them after `lead`."""
    names = sorted(known)
    close = difflib.get_close_matches(word, names, n=1)
    hint = f"Did you mean '{close[0]}'? " if close else ""
    return f"{hint}{lead}: {', '.join(names) if names else 'none'}."
