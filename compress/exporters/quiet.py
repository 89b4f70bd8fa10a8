"""Keeping an exporter's chatter off the terminal."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Within the block: no warnings, no log records below errors, nothing printed. Everything is as before afterwards.

    The exporter of torch reports progress on stdout and logs a line for each optional package that it could have used;
    none of it tells the user anything, and what goes wrong is raised.
    """
    before = logging.root.manager.disable
    logging.disable(max(before, logging.WARNING))
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
