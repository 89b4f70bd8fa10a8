"""Errors that a user can act on: what is wrong, where, and what to do.

Every error that `compress` raises on purpose derives from `CompressError`. The message names the thing (a path, a
matrix, a key with its line); `remedy` is one sentence that says what to do about it. The command line prints both and
exits with `exit_code`: 1 when the work failed, 2 when the request itself was wrong.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

LONGEST_MESSAGE = 2000
"""Characters of a message; it may repeat what a file says, and files may say a lot."""


class CompressError(Exception):
    """Base of all errors raised on purpose. `str(error)` is the message followed by the remedy."""

    exit_code = 1
    agreed = False
    """Whether all processes of a run of several raise it, so that the first one speaks for all."""

    def __init__(self, message: str, *, remedy: str = "") -> None:
        self.message = printable(message if len(message) <= LONGEST_MESSAGE else f"{message[:LONGEST_MESSAGE]}...")
        self.remedy = printable(remedy)
        super().__init__(f"{self.message} {self.remedy}".rstrip())


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


class OtherProcessError(CompressError):
    """Of several processes: what happened to another one, and is no error of this family there; or what happened to
    this one alone, and the first cannot tell."""


class DependencyError(CompressError):
    """An optional package that the request needs and that is not installed."""

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(
            f"The package '{package}' is not installed.",
            remedy=f'Install it with: pip install "model-compress[{extra}]".',
        )


def error_of(kind: str, message: str, remedy: str) -> CompressError:
    """The error of the class named `kind`, as another process raised it."""
    known = {one.__name__: one for one in _family(CompressError)}
    error = CompressError.__new__(known.get(kind, CompressError))
    CompressError.__init__(error, message, remedy=remedy)
    return error


def _family(kind: type[CompressError]) -> Iterator[type[CompressError]]:
    yield kind
    for below in kind.__subclasses__():
        yield from _family(below)


LONGEST_QUOTE = 120
"""Characters of a name or value from a file that a message repeats."""


def printable(text: str) -> str:
    """`text` with control characters (but for ends of lines) and lone surrogates escaped: a name in a hostile file can
    then neither steer the terminal nor make printing itself fail."""
    return "".join(
        mark if mark.isprintable() or mark == "\n" else mark.encode("unicode_escape").decode() for mark in text
    )


def quoted(value: object) -> str:
    """`value` from a file as a message shows it: in quotes if it is text, on one line, cut when it is long."""
    text = repr(value if not isinstance(value, str) else value[: LONGEST_QUOTE + 1])
    return text if len(text) <= LONGEST_QUOTE + 2 else f"{text[:LONGEST_QUOTE]}..."


@contextmanager
def located(place: object, kind: type[CompressError], remedy: str) -> Iterator[None]:
    """Within the block a `CompressError` is raised again as a `kind` about `place`, for code that knows what is wrong
    and not where. `remedy` is for an error that has none of its own."""
    try:
        yield
    except CompressError as error:
        raise kind(f"'{place}': {error.message}", remedy=error.remedy or remedy) from error


def nearest(word: str, known: Iterable[str], lead: str) -> str:
    """A remedy for a misspelt name: the nearest known one, if one is near, and all of them after `lead`."""
    names = sorted(known)
    close = difflib.get_close_matches(word, names, n=1)
    hint = f"Did you mean '{close[0]}'? " if close else ""
    return f"{hint}{lead}: {', '.join(names) if names else 'none'}."
