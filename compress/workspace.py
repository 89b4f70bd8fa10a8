"""What has been done, and whether it can be trusted after a crash.

A work folder holds the intermediate results of one run:

| file | what |
|---|---|
| `lock` | locked (flock) by the process that works here; the kernel frees it when that process dies |
| `fingerprint.json` | the arguments of the run; other arguments are refused |
| `manifest.json` | the units that are done: a record of each, with size and sha256 of its files |
| `log.jsonl` | every event |

The rule that survives kill -9 and power loss: a unit's files are written and synced first, and only then does the
manifest, replaced by one atomic rename, say that the unit exists. What the manifest does not name never happened. A
whole result appears the same way: it is built beside its final place, synced, and renamed (`publish`). Before the
rename `Workspace.publish` notes the digest of what will appear, so that a run killed right after it still knows that
the folder in the final place is its own.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from compress.errors import CompressError, WorkspaceError
from compress.events import Events, JsonlLog
from compress.plain_json import parse_json
from compress.storage import (
    FORMAT_VERSION,
    Json,
    check_free,
    disk_errors,
    file_entry,
    lock_file,
    publish,
    sync_file,
    sync_folder,
    tree_sha256,
    write_json,
)


def _read_json(path: Path, table: str) -> dict[str, Json]:
    """The JSON object in `path`, which has a table called `table`. Raises `WorkspaceError` for anything else."""
    try:
        value = parse_json(path.read_bytes())
    except ValueError as error:
        raise WorkspaceError(f"'{path}' is damaged: {error}.", remedy="Begin anew with --restart.") from error
    if not isinstance(value, dict) or not isinstance(value.get(table), dict):
        raise WorkspaceError(f"'{path}' is damaged: it has no table '{table}'.", remedy="Begin anew with --restart.")
    return value


def _differences(stored: Mapping[str, Json], given: Mapping[str, Json]) -> list[str]:
    """One text for each argument whose value is not the stored one: first what was asked for, then what files hold."""
    shared = sorted(stored.keys() & given.keys())
    changed = [name for name in shared if stored[name] != given[name]]
    texts = [
        *(f"{name} was {stored[name]!r} and is now {given[name]!r}" for name in changed if not _is_contents(name)),
        *(f"{name} was {stored[name]!r} and is not given now" for name in sorted(stored.keys() - given.keys())),
        *(f"{name} is {given[name]!r} and was not given" for name in sorted(given.keys() - stored.keys())),
    ]
    plain = [text for text in texts if not _is_contents(text)]
    return plain or [f"the {name} changed" for name in changed] or texts


def _is_contents(name: str) -> bool:
    """Whether an argument stands for what files hold, by a hash."""
    return name.startswith(("files of ", "hash of "))


class Workspace:
    """An open work folder. Made by `Workspace.open`; its methods may be called until the `with` block ends.

    `events` are the caller's, with the folder's log added. `overwrite` says that the run was begun with `restart`, so
    its results may replace older ones; this is remembered by the folder, for a run that is taken up later.
    """

    def __init__(self, folder: Path, events: Events, overwrite: bool) -> None:
        self.folder = folder
        self.events = events
        self.overwrite = overwrite
        manifest = folder / "manifest.json"
        self._units: dict[str, Json] = _read_json(manifest, "units")["units"] if manifest.exists() else {}

    @classmethod
    @contextmanager
    def open(
        cls, folder: Path, arguments: Mapping[str, Json], restart: bool = False, events: Events | None = None
    ) -> Iterator[Workspace]:
        """Lock `folder` (made if missing) for a run with `arguments`: flat, dotted names and plain values.

        Raises `WorkspaceError` when a live process works there, when the folder was made with other arguments (each is
        named, with both values), when it is no work folder, or cannot be written. `restart` discards what was done.
        A run that ends with a `CompressError` before any work leaves a folder that takes any arguments, like a new one.
        """
        with disk_errors(folder):
            if folder.is_dir() and not _is_ours(folder):
                raise WorkspaceError(
                    f"'{folder}' is not empty and no work folder.", remedy="Name a new or empty folder with --work."
                )
            folder.mkdir(parents=True, exist_ok=True)
            lock = lock_file(
                folder / "lock", f"works in '{folder}'", "Wait for it, or name another folder with --work."
            )
        with lock:
            if restart:
                _clear(folder)
            fresh = not (folder / "fingerprint.json").exists()
            overwrite = _settle_fingerprint(folder, json.loads(json.dumps(arguments)), restart)
            with disk_errors(folder):
                log = JsonlLog(folder / "log.jsonl")
            listeners = events.listeners if events is not None else ()
            workspace = cls(folder, Events((*listeners, log)), overwrite)
            try:
                yield workspace
            except CompressError:
                if fresh and not workspace.holds_work:
                    _clear(folder)
                raise
            finally:
                log.close()

    def path(self, *parts: str) -> Path:
        """A path inside the folder; its parent is made."""
        path = self.folder.joinpath(*parts)
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        return path

    @property
    def holds_work(self) -> bool:
        """Whether a committed unit has files, or was published: something that would have to be done again."""
        return any(entry["files"] or "published" in entry["record"] for entry in self._units.values())

    def units(self) -> tuple[str, ...]:
        """The committed units, oldest first. Their files are verified only by `done`."""
        return tuple(self._units)

    def done(self, unit: str) -> dict[str, Json] | None:
        """The record of a committed unit whose files are all there with the same bytes; otherwise None.

        A unit with a missing or changed file counts as not done, and a `warning` says so.
        """
        entry = self._units.get(unit)
        if entry is None:
            return None
        for name, stored in entry["files"].items():
            path = self.folder / name
            if not path.is_file() or path.stat().st_size != stored["bytes"] or file_entry(path) != stored:
                self.events.emit("warning", text=f"'{path}' is missing or changed; '{unit}' is done again.")
                return None
        return dict(entry["record"])

    def commit(self, unit: str, files: Sequence[Path], record: Mapping[str, Json]) -> None:
        """Say that `unit` is done: `files`, already written below the folder, and a plain record of it.

        Returns when files and manifest are durable. A unit that exists is replaced.
        """
        self.commit_all({unit: (files, record)})

    def commit_all(self, units: Mapping[str, tuple[Sequence[Path], Mapping[str, Json]]]) -> None:
        """`commit` of several units that belong together: after a crash all of them are done, or none."""
        made: dict[str, Json] = {}
        with disk_errors(self.folder):
            for unit, (files, record) in units.items():
                entries: dict[str, Json] = {}
                for path in files:
                    sync_file(path)
                    name = path.relative_to(self.folder).as_posix()
                    entries[name] = file_entry(path)
                for parent in {folder for path in files for folder in self._between(path)}:
                    sync_folder(parent)
                made[unit] = {"files": entries, "record": dict(record)}
        self._write({**self._units, **made})

    def drop(self, unit: str) -> None:
        """Forget a unit and remove its files; in this order, so that the manifest never names a file that is gone."""
        entry = self._units.get(unit)
        if entry is None:
            return
        self._write({name: kept for name, kept in self._units.items() if name != unit})
        for name in entry["files"]:
            (self.folder / name).unlink(missing_ok=True)

    def publish(self, unit: str, staged: Path, final: Path, record: Mapping[str, Json]) -> None:
        """Let the finished folder `staged` appear at `final` (see `publish`), and know it again after any crash."""
        check_free(final, self.overwrite)
        self.commit(unit, [], {**record, "published": {"path": str(final), "sha256": tree_sha256(staged)}})
        publish(staged, final, self.overwrite)

    def published(self, unit: str, final: Path) -> dict[str, Json] | None:
        """The record of a unit that was published to `final` and is still there unchanged; otherwise None."""
        record = self.done(unit)
        if record is None or not final.is_dir():
            return None
        stamp = record.pop("published")
        return record if tree_sha256(final) == stamp["sha256"] else None

    def _between(self, path: Path) -> list[Path]:
        """The folders from the parent of `path` up to this work folder."""
        folders = [path.parent]
        while folders[-1] != self.folder:
            folders.append(folders[-1].parent)
        return folders

    def _write(self, units: dict[str, Json]) -> None:
        write_json(self.folder / "manifest.json", {"format_version": FORMAT_VERSION, "units": units})
        self._units = units


def _is_ours(folder: Path) -> bool:
    """Whether `folder` is a work folder, or so empty that it may become one (a killed start leaves only the lock).

    A restart removes what is in a work folder, so a file of the right name is not enough: it must say what ours says.
    """
    if {path.name for path in folder.iterdir()} <= {"lock", ".fingerprint.json.tmp"}:
        return True
    try:
        fingerprint = json.loads((folder / "fingerprint.json").read_bytes())
    except (OSError, ValueError):
        return False
    return (
        isinstance(fingerprint, dict)
        and isinstance(fingerprint.get("format_version"), int)
        and isinstance(fingerprint.get("arguments"), dict)
    )


def _clear(folder: Path) -> None:
    """Remove what earlier runs left, the manifest first (nothing is done any more) and the fingerprint last."""
    (folder / "manifest.json").unlink(missing_ok=True)
    for path in folder.iterdir():
        if path.name in ("lock", "fingerprint.json"):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    (folder / "fingerprint.json").unlink(missing_ok=True)


def _settle_fingerprint(folder: Path, arguments: dict[str, Json], restart: bool) -> bool:
    """Store the arguments of a fresh folder, or compare with the stored ones. Returns the folder's `overwrite`."""
    path = folder / "fingerprint.json"
    if not path.exists():
        write_json(path, {"format_version": FORMAT_VERSION, "overwrite": restart, "arguments": arguments})
        return restart
    stored = _read_json(path, "arguments")
    if stored.get("format_version") != FORMAT_VERSION:
        raise WorkspaceError(
            f"'{folder}' was made by another version of compress.", remedy="Begin anew with --restart."
        )
    if changed := _differences(stored["arguments"], arguments):
        raise WorkspaceError(
            f"The work folder '{folder}' belongs to a run with other arguments: {'; '.join(changed)}.",
            remedy="Use the same arguments to go on, --restart to begin anew, or another --out (or --work).",
        )
    return bool(stored.get("overwrite"))
