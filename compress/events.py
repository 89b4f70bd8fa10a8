"""Progress as plain data: whoever works emits events, whoever wants to know listens.

An `Events` object is passed down as an argument; nothing here is global, and `Events()` is silent. The kinds and what
their `data` holds:

| kind | data |
|---|---|
| `stage_start` | `stage`, `total` (steps it will take) |
| `step` | `stage`, `index` (counted from 1), `total`, `name`, `seconds_left` (or None), and any metrics |
| `stage_end` | `stage`, `seconds` |
| `note`, `warning` | `text` |

Data is plain: strings, numbers, booleans, None, and lists and dicts of them. Two listeners are here: `JsonlLog`
keeps everything, `TerminalProgress` shows a person what matters.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TextIO

Kind = Literal["stage_start", "step", "stage_end", "note", "warning"]

STEP_FIELDS = frozenset({"stage", "index", "total", "name", "seconds_left"})
"""The data of a `step` that are not metrics."""

BAR_WIDTH = 20


@dataclass(frozen=True)
class Event:
    """Something that happened: its kind, and plain data about it."""

    kind: Kind
    data: dict[str, Any]


Listener = Callable[[Event], None]


class Events:
    """Hands each event to every listener, in order."""

    def __init__(self, listeners: Sequence[Listener] = ()) -> None:
        self.listeners = tuple(listeners)

    def emit(self, kind: Kind, **data: Any) -> None:
        """Tell all listeners. An error in a listener is the caller's to see: a log on a full disk is no detail."""
        event = Event(kind, data)
        for listener in self.listeners:
            listener(event)

    @contextmanager
    def stage(self, name: str, total: int) -> Iterator[None]:
        """Emit `stage_start`, run the body, and emit `stage_end` with the seconds it took, unless it raised."""
        started = time.monotonic()
        self.emit("stage_start", stage=name, total=total)
        yield
        self.emit("stage_end", stage=name, seconds=time.monotonic() - started)


def seconds_left(started: float, done: int, total: int) -> float | None:
    """Seconds that `total - done` more steps take at the pace so far; None before the first is done.

    `started` is a reading of `time.monotonic()`; `done` counts the steps since then, not those of an earlier run.
    """
    if done <= 0:
        return None
    return (time.monotonic() - started) / done * (total - done)


def _strict(value: Any) -> Any:
    """`value` with every NaN and infinity as a string, because JSON has no other word for them."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: _strict(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_strict(entry) for entry in value]
    return value


class JsonlLog:
    """Appends each event to a file, one JSON object a line: `kind`, `time` (seconds since 1970) and the data.

    Every line is flushed. A last line that a killed run left unfinished is cut off when the log is opened again.
    """

    def __init__(self, path: Path) -> None:
        self._stream = path.open("ab+")
        self._stream.seek(0)
        whole = self._stream.read().rfind(b"\n") + 1
        self._stream.truncate(whole)

    def __call__(self, event: Event) -> None:
        line = json.dumps({"kind": event.kind, "time": round(time.time(), 3), **_strict(event.data)}, allow_nan=False)
        self._stream.write(line.encode() + b"\n")
        self._stream.flush()

    def close(self) -> None:
        self._stream.close()


def duration(seconds: float) -> str:
    """`seconds` for a person: `0.4 s`, `12 s`, `3 min 05 s`, `2 h 07 min`."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def _metric(name: str, value: Any) -> str:
    return f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"


class TerminalProgress:
    """Writes progress to `stream`: one line that redraws itself on a terminal, plain lines anywhere else.

    `quiet` leaves only warnings; `verbose` keeps a line of every step on a terminal too.
    """

    def __init__(self, stream: TextIO, quiet: bool = False, verbose: bool = False) -> None:
        self._stream, self._quiet = stream, quiet
        self._redraw = stream.isatty() and not verbose
        self._drawn = False

    def __call__(self, event: Event) -> None:
        if event.kind == "warning":
            self._line(f"warning: {event.data['text']}")
        elif self._quiet:
            return
        elif event.kind == "note":
            self._line(event.data["text"])
        elif event.kind == "step":
            self._step(event.data)
        elif event.kind == "stage_end":
            self._line(f"{event.data['stage']}: done in {duration(event.data['seconds'])}")

    def close(self) -> None:
        """End a line that is being redrawn, so that what comes next has a line of its own."""
        if self._drawn:
            self._stream.write("\n")
            self._drawn = False

    def _step(self, data: dict[str, Any]) -> None:
        index, total = data["index"], data["total"]
        parts = [f"{data['stage']} {index}/{total}", str(data["name"])]
        parts += [_metric(name, value) for name, value in data.items() if name not in STEP_FIELDS]
        if data["seconds_left"] is not None:
            parts.append(f"{duration(data['seconds_left'])} left")
        if not self._redraw:
            self._line("  ".join(parts))
            return
        filled = BAR_WIDTH * index // max(total, 1)
        text = "  ".join([f"[{'#' * filled}{'.' * (BAR_WIDTH - filled)}]", *parts])
        self._stream.write("\r\x1b[K" + text[: shutil.get_terminal_size().columns - 1])
        self._stream.flush()
        self._drawn = True

    def _line(self, text: str) -> None:
        self._stream.write(("\r\x1b[K" if self._drawn else "") + text + "\n")
        self._stream.flush()
        self._drawn = False
