"""The `compress` command."""

from __future__ import annotations

import click

import compress

from .look import evaluate, inspect, list_
from .planning import plan
from .work import distill, export, quantize, run, transform


class Commands(click.Group):
    """Commands in the order in which a person meets them, not in that of the alphabet."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(compress.__version__, message="%(version)s")
def main() -> None:
    """Make large models small: distil a student from a teacher, give its weights few bits, write a file that runs.

    A model M is a folder, a hub id, builtin:teacher or builtin:student. Data D is builtin:python/train,
    builtin:python/val, text:FILE, json:FILE#FIELD, images:FOLDER or another of `compress list data`.

    \b
    compress quantize builtin:teacher --bits 3.25 --out small
    compress eval small --reference builtin:teacher --data builtin:python/val
    compress run demo

    Exit code 0: done. 1: the work failed, and the message says what to do. 2: wrong usage. 130: interrupted.
    """


for command in (plan, run, distill, transform, quantize, evaluate, export, inspect, list_):
    main.add_command(command)

if __name__ == "__main__":
    main()
