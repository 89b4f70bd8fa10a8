"""Keeping the log lines and progress bars of transformers off the terminal, where ours are."""

from __future__ import annotations


def hush_transformers() -> None:
    """Let transformers speak of errors alone; what matters of its warnings, such as missing weights, we raise."""
    from transformers.utils import logging

    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
