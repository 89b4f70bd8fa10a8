"""One row of the table of bad input: what is broken, the command that meets it, and the error that it must get."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import click
import transformers
from click.testing import CliRunner

import compress
from compress.cli.guard import Guarded
from compress.cli.main import main
from compress.errors import CompressError, ModelError
from compress.formats.native import Artifact
from compress.modeling.io import Checkpoint
from tests.limits import bounded

MOST_BYTES = 512 * 2**20
"""New address space that a command on kilobytes may take: code that is imported late, arenas of threads."""
MOST_SECONDS = 60
PYTHON = ">>> "
ADVICE = ("Allowed: ", "Did you mean ", " is needed", " needs ", "key 'out' is missing", " uses no data")
"""Words of a recipe's errors, each of which says in itself what to do."""
NAMESPACE: dict[str, Any] = {
    "Artifact": Artifact,
    "Checkpoint": Checkpoint,
    "Path": Path,
    "compress": compress,
    "AutoModelForCausalLM": transformers.AutoModelForCausalLM,
}


@dataclass(frozen=True)
class Row:
    """`make` breaks something in a folder of good things, and `does` meets it: the words of a command, or a Python
    expression after `>>> `. The message is that of an `error` of exactly this class, holds all `parts` and ends with a
    remedy. `work`: a work folder may stay, which the same command takes up."""

    name: str
    make: Callable[[Path], object]
    does: str
    parts: tuple[str, ...]
    error: type[Exception] = ModelError
    code: int = 1
    work: bool = False


@dataclass(frozen=True)
class Outcome:
    """What a row did. `message` is that of the error alone."""

    message: str
    remedy: str
    error: BaseException
    code: int | None
    stdout: str
    stderr: str


def carry_out(does: str) -> Outcome:
    """Do what a row does, in the present working directory and with bounded memory and time."""
    with bounded(MOST_BYTES, MOST_SECONDS):
        return _python(does.removeprefix(PYTHON)) if does.startswith(PYTHON) else _command(does)


def _python(expression: str) -> Outcome:
    try:
        result = eval(expression, NAMESPACE)
    except CompressError as error:
        return Outcome(error.message, error.remedy, error, None, "", str(error))
    raise AssertionError(f"{expression} gave {result!r}")


def _command(words: str) -> Outcome:
    errors: list[BaseException] = []
    report, show = Guarded._report, click.UsageError.show

    def note(guarded: Guarded, ctx: click.Context, text: str) -> None:
        errors.append(sys.exc_info()[1] or AssertionError(text))
        report(guarded, ctx, text)

    def note_usage(error: click.UsageError, file: Any = None) -> None:
        errors.append(error)
        show(error, file)

    with mock.patch.object(Guarded, "_report", note), mock.patch.object(click.UsageError, "show", note_usage):
        result = CliRunner().invoke(main, words.split())
    if isinstance(result.exception, Exception):
        raise AssertionError("an error that nobody foresaw") from result.exception
    assert len(errors) == 1, result.output
    (error,) = errors
    message, remedy = (error.message, error.remedy) if isinstance(error, CompressError) else (str(error), str(error))
    return Outcome(message, remedy, error, result.exit_code, result.stdout, result.stderr)


def check(row: Row, here: Path) -> Outcome:
    """Carry `row` out in the folder `here` of good things, and compare what happens with what must."""
    row.make(here)
    before = contents(here)
    outcome = carry_out(row.does)
    assert type(outcome.error) is row.error, repr(outcome.error)
    assert outcome.code in (None, row.code), outcome.stderr
    assert outcome.stdout == ""
    assert outcome.remedy or any(words in outcome.message for words in ADVICE), outcome.message
    for part in row.parts:
        assert part in outcome.stderr, outcome.stderr
    assert "Traceback" not in outcome.stderr
    if outcome.code is not None:
        assert outcome.stderr.startswith(("error: ", "Usage: ")), outcome.stderr
        lines = outcome.stderr.splitlines()
        assert sum(line.startswith(("error: ", "Error: ")) for line in lines) == 1, outcome.stderr
        assert "Warning" not in outcome.stderr
    after = contents(here)
    made = {name.partition("/")[0] for name in after.keys() - before.keys()}
    assert made <= ({"q.work"} if row.work else set()), made
    assert {name: after[name] for name in before} == before, "the input was changed"
    return outcome


def contents(folder: Path) -> dict[str, str]:
    """Digest of each regular file below `folder`, links within it not followed."""
    found = {}
    for path in folder.rglob("*"):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink() or not path.is_file():
            found[name] = ""
        else:
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found
