"""From an exception to one message on stderr and an exit code."""

from __future__ import annotations

import sys
import traceback
from typing import Any

import click

from compress.errors import CompressError, OtherProcessError
from compress.launch import launch

INTERRUPTED = 130
"""128 + SIGINT, as shells count."""


def is_alone(error: BaseException | None) -> bool:
    """Whether only this process of several knows of `error`."""
    return isinstance(error, OtherProcessError) and not error.agreed


class Guarded(click.Command):
    """A command whose known errors are messages. `--verbose` adds the traceback.

    Errors that nobody foresaw keep their traceback: they are ours to repair.
    """

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except CompressError as error:
            self._report(ctx, str(error))
            ctx.exit(error.exit_code)
        except BrokenPipeError:
            raise
        except OSError as error:
            place = f"'{error.filename}': " if error.filename is not None else ""
            self._report(ctx, f"{place}{error.strerror or error}. Check the path, your rights and the free space.")
            ctx.exit(1)
        except KeyboardInterrupt:
            resumable = "restart" in ctx.params
            hint = " The same command takes it up again; --restart begins anew." if resumable else ""
            if not launch().rank:
                click.echo(f"\ninterrupted.{hint}", err=True)
            ctx.exit(INTERRUPTED)

    def _report(self, ctx: click.Context, text: str) -> None:
        """Of several processes the first one speaks, and one that knows what the others do not."""
        if launch().rank and not is_alone(sys.exception()):
            return
        if ctx.params.get("verbose"):
            click.echo(traceback.format_exc(), err=True)
        click.echo(f"error: {text}", err=True)
