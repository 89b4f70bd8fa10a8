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

A folder that several processes work in (`compress.distributed`) is locked, read and written by the first of them, and
all get its answers and errors, so that the code of a stage is the same for one process and for many: each of them makes
the same calls in the same order. Files are written by whoever has what is in them.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TypeVar

from compress.distributed import World, works_alone, world
from compress.errors import CompressError, UsageError, WorkspaceError
from compress.events import Event, Events, JsonlLog, Listener
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

T = TypeVar("T")


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

    All methods but `path` and `units` are for all processes that work here to call.
    `events` are the caller's, with the folder's log added; of later processes only warnings are heard, which the first
    repeats unless it had the same. `overwrite` says that the run was begun with `restart`, so its results may replace
    older ones; this is remembered by the folder, for a run that is taken up later.
    """

    def __init__(self, folder: Path, events: Events, overwrite: bool, world: World | None = None) -> None:
        self.folder = folder
        self.overwrite = overwrite
        self._crowd = world or World()
        self._warnings: list[str] = []
        self.events = events if self.world.size == 1 else Events((*events.listeners, self._hear))
        self._units: dict[str, Json] = self.world.on_first(self._stored)

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
        crowd, plain = world(), json.loads(json.dumps(arguments))
        _require_alike(crowd, plain)
        with ExitStack() as held:
            fresh, overwrite = crowd.on_first(lambda: _begin(held, folder, plain, restart))
            crowd.together(lambda: _require_shared(folder, crowd))
            log = crowd.together(lambda: _open_log(folder) if crowd.first else None)
            listeners: tuple[Listener, ...] = ()
            if log is not None:
                held.callback(log.close)
                listeners = (*(events.listeners if events is not None else ()), log)
            workspace = cls(folder, Events(listeners), overwrite, crowd)
            try:
                yield workspace
                workspace._repeat_warnings()
            except CompressError:
                if fresh and not workspace.holds_work and crowd.first:
                    _clear(folder)
                raise

    @property
    def world(self) -> World:
        """The processes that make these calls."""
        return World() if works_alone() else self._crowd

    def on_first(self, work: Callable[[], T]) -> T:
        """The first process does `work`, in which the folder is its alone; its plain result, or its error, for all."""
        result = self.world.on_first(work)
        self._units = self.world.on_first(lambda: self._units)
        return result

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
        if entry is None or not self.world.on_first(lambda: self._is_whole(unit, entry["files"])):
            return None
        return dict(entry["record"])

    def commit(self, unit: str, files: Sequence[Path], record: Mapping[str, Json]) -> None:
        """Say that `unit` is done: `files`, already written below the folder, and a plain record of it, that of the
        first process. Each process names the files that it wrote itself.

        Returns when files and manifest are durable. A unit that exists is replaced.
        """
        self.commit_all({unit: (files, record)})

    def commit_all(self, units: Mapping[str, tuple[Sequence[Path], Mapping[str, Json]]]) -> None:
        """`commit` of several units that belong together: after a crash all of them are done, or none."""
        named = self.world.gather([str(path) for files, _ in units.values() for path in files])
        others = set() if self.world.first else set(named[0])

        def write() -> dict[str, Json]:
            with disk_errors(self.folder):
                return {
                    unit: self._entries([path for path in files if str(path) not in others])
                    for unit, (files, _) in units.items()
                }

        written = self.world.together(write)
        parts, (records, *_) = (
            self.world.gather(written),
            self.world.gather({unit: dict(units[unit][1]) for unit in units}),
        )
        made: dict[str, Json] = {}
        for unit, record in records.items():
            files = {name: entry for part in reversed(parts) for name, entry in part[unit].items()}
            made[unit] = {"files": files, "record": record}
        self._write({**self._units, **made})
        self._repeat_warnings()

    def drop(self, unit: str) -> None:
        """Forget a unit and remove its files; in this order, so that the manifest never names a file that is gone."""
        entry = self._units.get(unit)
        if entry is None:
            return
        self._write({name: kept for name, kept in self._units.items() if name != unit})
        if self.world.first:
            for name in entry["files"]:
                (self.folder / name).unlink(missing_ok=True)

    def publish(self, unit: str, staged: Path, final: Path, record: Mapping[str, Json]) -> None:
        """Let the finished folder `staged` appear at `final` (see `publish`), and know it again after any crash."""
        self.world.on_first(lambda: check_free(final, self.overwrite))
        digest = self.world.on_first(lambda: tree_sha256(staged))
        self.commit(unit, [], {**record, "published": {"path": str(final), "sha256": digest}})
        self.world.on_first(lambda: publish(staged, final, self.overwrite))

    def published(self, unit: str, final: Path) -> dict[str, Json] | None:
        """The record of a unit that was published to `final` and is still there unchanged; otherwise None."""
        record = self.done(unit)
        if record is None:
            return None
        stamp = record.pop("published")
        same = self.world.on_first(lambda: final.is_dir() and tree_sha256(final) == stamp["sha256"])
        return record if same else None

    def _stored(self) -> dict[str, Json]:
        manifest = self.folder / "manifest.json"
        return dict(_read_json(manifest, "units")["units"]) if manifest.exists() else {}

    def _is_whole(self, unit: str, files: Mapping[str, Json]) -> bool:
        for name, stored in files.items():
            path = self.folder / name
            if not path.is_file() or path.stat().st_size != stored["bytes"] or file_entry(path) != stored:
                self.events.emit("warning", text=f"'{path}' is missing or changed; '{unit}' is done again.")
                return False
        return True

    def _entries(self, files: Sequence[Path]) -> dict[str, Json]:
        """Size and hash of `files` by their names, all made durable."""
        entries: dict[str, Json] = {}
        for path in files:
            sync_file(path)
            entries[path.relative_to(self.folder).as_posix()] = file_entry(path)
        for parent in {folder for path in files for folder in self._between(path)}:
            sync_folder(parent)
        return entries

    def _hear(self, event: Event) -> None:
        if event.kind == "warning":
            self._warnings.append(str(event.data["text"]))

    def _repeat_warnings(self) -> None:
        """The first process emits what the others had to warn of and it had not."""
        if self.world.size == 1:
            return
        ours, *others = self.world.gather(self._warnings)
        self._warnings.clear()
        if self.world.first:
            for text in dict.fromkeys(text for texts in others for text in texts if text not in ours):
                self.events.emit("warning", text=text)
            self._warnings.clear()

    def _between(self, path: Path) -> list[Path]:
        """The folders from the parent of `path` up to this work folder."""
        folders = [path.parent]
        while folders[-1] != self.folder:
            folders.append(folders[-1].parent)
        return folders

    def _write(self, units: dict[str, Json]) -> None:
        manifest = {"format_version": FORMAT_VERSION, "units": units}
        self.world.on_first(lambda: write_json(self.folder / "manifest.json", manifest))
        self._units = units


def read_records(folder: Path, arguments: Mapping[str, Json]) -> dict[str, Json] | None:
    """The records of all units in a work folder that belongs to `arguments`, read without locking it; None where there
    is no such folder yet. Raises `WorkspaceError` that names each argument that is another."""
    if not (folder / "fingerprint.json").is_file():
        return None
    stored = _read_json(folder / "fingerprint.json", "arguments")["arguments"]
    if changed := _differences(stored, json.loads(json.dumps(arguments))):
        raise WorkspaceError(
            f"The table in '{folder}' is of other arguments: {'; '.join(changed)}.",
            remedy="Use the same arguments, or name another folder with --table; one that is not there is measured.",
        )
    manifest = folder / "manifest.json"
    units = _read_json(manifest, "units")["units"] if manifest.exists() else {}
    return {unit: entry["record"] for unit, entry in units.items()}


def _begin(held: ExitStack, folder: Path, arguments: dict[str, Json], restart: bool) -> tuple[bool, bool]:
    """Lock the folder until `held` ends; whether it is fresh, and its `overwrite`."""
    with disk_errors(folder):
        if folder.is_dir() and not _is_ours(folder):
            raise WorkspaceError(
                f"'{folder}' is not empty and no work folder.", remedy="Name a new or empty folder with --work."
            )
        folder.mkdir(parents=True, exist_ok=True)
        lock = lock_file(folder / "lock", f"works in '{folder}'", "Wait for it, or name another folder with --work.")
    held.enter_context(lock)
    if restart:
        _clear(folder)
    fresh = not (folder / "fingerprint.json").exists()
    return fresh, _settle_fingerprint(folder, arguments, restart)


def _open_log(folder: Path) -> JsonlLog:
    with disk_errors(folder):
        return JsonlLog(folder / "log.jsonl")


def _require_alike(crowd: World, arguments: dict[str, Json]) -> None:
    """Raise `UsageError` when the processes of this run were given different arguments."""
    ours, *others = crowd.gather(arguments)
    changed = next((found for other in others if (found := _differences(ours, other))), None)
    if changed is not None:
        error = UsageError(
            f"The processes of this run have other arguments than its first: {'; '.join(changed)}.",
            remedy="Start all of them with the same command, and the same files.",
        )
        error.agreed = True
        raise error


def _require_shared(folder: Path, crowd: World) -> None:
    if not (folder / "fingerprint.json").exists():
        raise WorkspaceError(
            f"Process {crowd.rank} of {crowd.size} does not see the work folder '{folder}' of the first.",
            remedy="Name one with --work on a file system that all machines share.",
        )


def _is_ours(folder: Path) -> bool:
    """Whether `folder` is a work folder, or so empty that it may become one (a killed start leaves only the lock).

    A restart removes what is in a work folder, so a file of the right name is not enough: it must say what ours says.
    """
    names = {path.name for path in folder.iterdir() if not _is_inner(path)}
    if names <= {"lock", ".fingerprint.json.tmp"}:
        return True
    return _has_fingerprint(folder)


def _is_inner(path: Path) -> bool:
    """Whether `path` is a work folder inside of another, which has arguments of its own and outlives it."""
    return path.is_dir() and not path.is_symlink() and _has_fingerprint(path)


def _has_fingerprint(folder: Path) -> bool:
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
    """Remove what earlier runs left, the manifest first (nothing is done any more) and the fingerprint last. A work
    folder inside stays."""
    (folder / "manifest.json").unlink(missing_ok=True)
    for path in folder.iterdir():
        if path.name in ("lock", "fingerprint.json") or _is_inner(path):
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
