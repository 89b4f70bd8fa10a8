"""Files that are whole or absent: atomic writes, hashes, and results that appear by one rename.

A file or folder is built beside its place, made durable (fsync), and renamed; until then the place is as it was.
Errors of a full disk, a quota or missing rights become a `WorkspaceError` that says what to do.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from safetensors import SafetensorError

import compress
from compress.errors import ArtifactError, UsageError, WorkspaceError, quoted
from compress.plain_json import parse_json

FORMAT_VERSION = 1
ARTIFACT_MARK = "compress.json"
"""A folder that holds this file was written by us; only such a folder, or an empty one, is ever replaced."""

WEIGHT_SUFFIX = ".safetensors"
READ_BY_LOADERS = (WEIGHT_SUFFIX, ".bin", ".json", ".py", ".model", ".jinja")
"""Files of these kinds change what a folder loads as, so none is to be there that was not sealed."""
COPY = "Copy the folder again."
LONGEST_NAME, LONGEST_PATH = 255, 1000
"""Bytes of a name that file systems take, and characters of a path that leave room for the folder's own."""

Json = Any
"""Whatever `json.loads` can return."""

FULL_DISK = ("No space left on device", "inline_container.cc", "PytorchStreamWriter")
"""What safetensors and torch say, in errors of their own, when a file cannot be written to its end."""


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn the errors of a full disk, a quota or missing rights at `path` into a `WorkspaceError`."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise _disk_full(path) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            remedy = "Name a folder that you may write to."
            raise WorkspaceError(f"Cannot write '{path}': {error.strerror}.", remedy=remedy) from error
        if error.errno in (errno.ENOTDIR, errno.EEXIST, errno.ELOOP, errno.ENAMETOOLONG):
            remedy = "Name another folder, or remove what is in the way."
            raise WorkspaceError(f"Cannot make '{path}': {error.strerror}.", remedy=remedy) from error
        raise
    except (RuntimeError, SafetensorError) as error:
        if any(words in str(error) for words in FULL_DISK):
            raise _disk_full(path) from error
        raise


def _disk_full(path: Path) -> WorkspaceError:
    return WorkspaceError(
        f"Cannot write '{path}': no space left on the device.",
        remedy="Free some space and run the same command again: it takes up where it stopped.",
    )


def sync_folder(folder: Path) -> None:
    """Make the entries of `folder` durable (an fsync of the folder itself)."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_file(path: Path) -> None:
    """Make the content of a file durable."""
    with path.open("rb") as stream:
        os.fsync(stream.fileno())


def sync_tree(folder: Path) -> None:
    """Make a folder with all that is in it durable, the inner ones first."""
    for root, _, names in os.walk(folder, topdown=False):
        for name in names:
            sync_file(Path(root, name))
        sync_folder(Path(root))


def atomic_write(path: Path, payload: bytes) -> None:
    """Write a file so that `path` holds the old content or the new, whatever happens in between.

    Raises `WorkspaceError` on a full disk or missing rights, and leaves nothing behind then.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    with disk_errors(path):
        try:
            with temporary.open("wb") as stream:
                stream.write(payload)
                stream.flush()
                os.fsync(stream.fileno())
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)


def write_json(path: Path, value: Json) -> None:
    """Write JSON that a person can read, atomically."""
    atomic_write(path, (json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode())


def file_sha256(path: Path) -> str:
    """Hex SHA-256 of a file's content."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def tree_sha256(folder: Path) -> str:
    """One hex SHA-256 over the relative paths and contents of all files below `folder`, in the order of the paths."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        digest.update(f"{path.relative_to(folder).as_posix()}\0{file_sha256(path)}\n".encode())
    return digest.hexdigest()


def seal(folder: Path) -> None:
    """Write `compress.json` into a finished folder: size and sha256 of every file in it.

    Files get the rights that the umask gives (safetensors writes with those of a private temporary file).
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / ARTIFACT_MARK)
    umask = os.umask(0)
    os.umask(umask)
    for path in files:
        path.chmod(0o666 & ~umask)
    entries = {path.relative_to(folder).as_posix(): file_entry(path) for path in files}
    producer = f"compress {compress.__version__}"
    write_json(folder / ARTIFACT_MARK, {"format_version": FORMAT_VERSION, "producer": producer, "files": entries})


def verify_seal(folder: Path) -> int:
    """Compare every file that `compress.json` lists with what was sealed; returns how many there are.

    Raises `ArtifactError` that names the first file which is missing, changed, or not listed although a loader would
    read it, or the list itself. Sizes are compared before any content.
    """
    sealed = _sealed(folder)
    for name in sealed:
        if not (folder / name).is_file():
            raise ArtifactError(f"'{folder / name}' is listed in {ARTIFACT_MARK} and missing.", remedy=COPY)
    for path in sorted(folder.iterdir()):
        if path.suffix in READ_BY_LOADERS and path.name not in sealed and path.name != ARTIFACT_MARK:
            raise ArtifactError(
                f"'{path}' is not listed in {ARTIFACT_MARK}, and a loader may read it.", remedy="Move it elsewhere."
            )
    _compare(folder, sealed)
    return len(sealed)


def verify_weights(folder: Path) -> None:
    """Compare the weight files of a sealed folder with what was sealed: a payload in which one byte is wrong is read
    like any other, and the numbers are wrong silently. A folder without `compress.json` has nothing to compare with.

    Raises `ArtifactError` that names the first file which is changed, or the list itself.
    """
    if (folder / ARTIFACT_MARK).is_file():
        sealed = _sealed(folder)
        _compare(folder, {name: sealed[name] for name in sealed if name.endswith(WEIGHT_SUFFIX)})


def _sealed(folder: Path) -> dict[str, dict[str, Json]]:
    """The entries of `compress.json`. Raises `ArtifactError` unless each is a file's size and sha256, in the folder."""
    path = folder / ARTIFACT_MARK
    try:
        seal = parse_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ArtifactError(f"'{path}' is damaged: {error}.", remedy=COPY) from error
    if isinstance(seal, dict) and seal.get("format_version", FORMAT_VERSION) != FORMAT_VERSION:
        raise ArtifactError(
            f"'{path}' has format version {quoted(seal['format_version'])}; this version reads {FORMAT_VERSION}.",
            remedy="Install the version of model-compress that wrote it.",
        )
    files = seal.get("files") if isinstance(seal, dict) else None
    if not isinstance(files, dict):
        raise ArtifactError(f"'{path}' is damaged: it has no table 'files'.", remedy=COPY)
    for name, entry in files.items():
        match entry:
            case {"bytes": int(), "sha256": str()} if is_inside(name):
                pass
            case _:
                raise ArtifactError(
                    f"'{path}' is damaged: {quoted(name)} is no file of the folder with its bytes and sha256.",
                    remedy=COPY,
                )
    return files


def is_inside(name: str) -> bool:
    """Whether `name`, from a file, is a relative path that cannot lead out of the folder that it is relative to, and
    that a file system can hold."""
    path = PurePosixPath(name)
    parts = path.parts
    if not parts or path.is_absolute() or ".." in parts or "\\" in name or not name.isprintable():
        return False
    return len(name) <= LONGEST_PATH and all(len(part.encode()) <= LONGEST_NAME for part in parts)


def _compare(folder: Path, sealed: dict[str, dict[str, Json]]) -> None:
    """Raise `ArtifactError` for the first file of another size, or else of another content; missing ones pass."""
    present = {folder / name: entry for name, entry in sealed.items() if (folder / name).is_file()}
    for path, entry in present.items():
        if path.stat().st_size != entry["bytes"]:
            raise ArtifactError(
                f"'{path}' is not what was written: it has {path.stat().st_size} bytes and had {entry['bytes']}.",
                remedy="Copy it again.",
            )
    for path, entry in present.items():
        if file_sha256(path) != entry["sha256"]:
            raise ArtifactError(f"'{path}' is not what was written: its sha256 differs.", remedy="Copy it again.")


def file_entry(path: Path) -> dict[str, Json]:
    """Size and hash of a file, as manifests hold them."""
    return {"bytes": path.stat().st_size, "sha256": file_sha256(path)}


def check_free(final: Path, overwrite: bool = False) -> None:
    """Refuse a place that a result may not take: something is there and is not to be, or must not be, replaced.

    A missing or empty folder is free. Raises `UsageError`.
    """
    if final.is_symlink() and not final.exists():
        raise UsageError(f"'{final}' is a link that leads nowhere.", remedy="Name another --out, or remove the link.")
    if not final.exists() or (final.is_dir() and not any(final.iterdir())):
        return
    if not final.is_dir():
        raise UsageError(f"'{final}' exists and is no folder.", remedy="Name another --out.")
    if not overwrite:
        raise UsageError(
            f"The folder '{final}' exists and is not empty.",
            remedy="Name another --out, or replace an older result with --restart.",
        )
    if not (final / ARTIFACT_MARK).is_file():
        raise UsageError(
            f"The folder '{final}' holds something that compress did not write (there is no {ARTIFACT_MARK} in it).",
            remedy="Name another --out, or remove the folder yourself.",
        )


def stage_beside(final: Path) -> Path:
    """A path beside `final`, hence on its file system, to build it in. What a killed run left there is removed."""
    staged = staged_path(final)
    with disk_errors(final):
        if staged.exists():
            shutil.rmtree(staged)
        staged.parent.mkdir(parents=True, exist_ok=True)
    return staged


def discard_staged(final: Path) -> None:
    """Remove what was built beside `final` and did not become it."""
    shutil.rmtree(staged_path(final), ignore_errors=True)


def staged_path(final: Path) -> Path:
    """The path of `stage_beside`."""
    return final.with_name(f".{final.name}.compress-partial")


def _aside_path(final: Path) -> Path:
    return final.with_name(f".{final.name}.compress-old")


def discard_replaced(final: Path) -> None:
    """Remove the older result beside `final` that a run killed while publishing did not come to remove.

    While nothing is at `final`, the older result stays: it goes once a new one has taken its place.
    """
    if final.exists():
        shutil.rmtree(_aside_path(final), ignore_errors=True)


def publish(staged: Path, final: Path, overwrite: bool = False) -> None:
    """Move the finished folder `staged` to `final`, on the same file system, so that it appears whole or not at all.

    With `overwrite` an older artifact of ours gives way; it is moved aside first and removed last. Raises `UsageError`
    where `check_free` does, `WorkspaceError` on a full disk or missing rights.
    """
    check_free(final, overwrite)
    with disk_errors(final):
        sync_tree(staged)
        final.parent.mkdir(parents=True, exist_ok=True)
        aside = _aside_path(final)
        if final.exists() and any(final.iterdir()):
            if aside.exists():
                shutil.rmtree(aside)
            final.rename(aside)
        staged.rename(final)
        sync_folder(final.parent)
        if aside.exists():
            shutil.rmtree(aside)


@contextmanager
def reserve(final: Path) -> Iterator[None]:
    """Keep other processes from making a result at `final` while the block runs, whatever work folder they use.

    A hidden file beside `final` is locked and in the end removed; of a killed process it stays, unlocked and harmless.
    Raises `WorkspaceError` when a live process holds it.
    """
    path = final.with_name(f".{final.name}.compress-lock")
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = lock_file(path, f"makes '{final}'", "Wait for it, or name another --out.")
    with lock:
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def lock_file(path: Path, what: str, remedy: str) -> BinaryIO:
    """Open the file `path` (made if missing), lock it (flock), and write this process into it; closing it unlocks.

    Raises `WorkspaceError` with the words "Another process (pid) `what`" when a live process holds the lock.
    """
    while True:
        lock = path.open("ab")
        try:
            fcntl.flock(lock.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            raise WorkspaceError(f"Another process ({_holder(path)}) {what}.", remedy=remedy) from None
        if _is_file_at(lock, path):
            lock.truncate(0)
            lock.write(f"pid {os.getpid()}".encode())
            lock.flush()
            return lock
        lock.close()  # its last holder removed it between our opening and our locking


def _holder(path: Path) -> str:
    try:
        return path.read_text().strip() or "unknown"
    except FileNotFoundError:
        return "just ending"


def _is_file_at(stream: BinaryIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(stream.fileno()), path.stat())
    except FileNotFoundError:
        return False
