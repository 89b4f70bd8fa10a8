"""Trainer checkpoints that are whole or absent.

A checkpoint is written into a staging folder, gets the list of its files with their checksums (`workspace.seal`), is
synced to the disk and renamed to its name. A training resumes from the newest checkpoint that verifies; what a crash
left behind is never read.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from compress.errors import ArtifactError, WorkspaceError
from compress.storage import seal, sync_folder, sync_tree, verify_seal

PREFIX = "checkpoint-"


def put_in_place(staged: Path, final: Path) -> None:
    """Seal the staged checkpoint, sync it and rename it to `final`."""
    seal(staged)
    sync_tree(staged)
    if final.exists():
        shutil.rmtree(final)
    staged.rename(final)
    sync_folder(final.parent)


def verifies(checkpoint: Path) -> bool:
    """Whether the checkpoint holds the files of its list, unchanged."""
    try:
        return verify_seal(checkpoint) > 0
    except ArtifactError:
        return False


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix(PREFIX))


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a training, oldest first, verified or not."""
    found = [p for p in folder.glob(f"{PREFIX}*") if p.name.removeprefix(PREFIX).isdecimal()]
    return sorted(found, key=step_of)


def last_verified(folder: Path) -> Path | None:
    """The newest checkpoint that verifies, or None."""
    return next((path for path in reversed(checkpoints(folder)) if verifies(path)), None)


def require_verified(checkpoint: Path) -> Path:
    if not verifies(checkpoint):
        raise WorkspaceError(
            f"The checkpoint '{checkpoint}' is not what was written: a file is missing or changed.",
            remedy="Resume from another checkpoint, or begin anew.",
        )
    return checkpoint


def keep_newest(folder: Path, count: int) -> None:
    """Remove all but the newest `count` checkpoints."""
    for path in checkpoints(folder)[:-count]:
        shutil.rmtree(path)
