"""An export that appears whole or not at all."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from compress.exporters.base import ExportReport
from compress.storage import check_free, discard_staged, publish, seal, stage_beside


def write_whole(folder: Path, overwrite: bool, build: Callable[[Path], ExportReport]) -> ExportReport:
    """`build` an export in a new folder beside `folder`, then put it there. Raises `UsageError` when the folder is
    taken, and what `build` raises."""
    check_free(folder, overwrite)
    staged = stage_beside(folder)
    try:
        report = build(staged)
        seal(staged)
        publish(staged, folder, overwrite)
    except BaseException:
        discard_staged(folder)
        raise
    return report
