"""Events reach every listener; the log survives a torn line; the terminal shows what a person needs."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from compress.events import Event, Events, JsonlLog, TerminalProgress, duration


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def step(index: int = 1, **metrics: object) -> Event:
    return Event(
        "step", {"stage": "quantize", "index": index, "total": 4, "name": "layers.0", "seconds_left": 65.0, **metrics}
    )


def test_listeners_hear_events_in_order() -> None:
    heard: list[Event] = []
    events = Events([heard.append, heard.append])
    with events.stage("distill", 10):
        events.emit("note", text="hello")
    kinds = [event.kind for event in heard]
    assert kinds == ["stage_start"] * 2 + ["note"] * 2 + ["stage_end"] * 2
    assert heard[0].data == {"stage": "distill", "total": 10}
    assert heard[-1].data["seconds"] >= 0


def test_a_stage_that_raises_has_no_end() -> None:
    heard: list[Event] = []
    with pytest.raises(RuntimeError), Events([heard.append]).stage("distill", 1):
        raise RuntimeError
    assert [event.kind for event in heard] == ["stage_start"]


def test_log_appends_json_lines_and_cuts_a_torn_one(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    log = JsonlLog(path)
    log(step(loss=0.1, bad=float("nan"), shape=[1, float("inf")]))
    log.close()
    with path.open("a") as stream:
        stream.write('{"kind": "step", "sta')
    log = JsonlLog(path)
    log(Event("note", {"text": "später"}))
    log.close()
    first, second = [json.loads(line) for line in path.read_text().splitlines()]
    assert first["loss"] == 0.1
    assert first["bad"] == "nan"
    assert first["shape"] == [1, "inf"]
    assert (second["kind"], second["text"]) == ("note", "später")


def test_log_refuses_what_is_not_plain(tmp_path: Path) -> None:
    log = JsonlLog(tmp_path / "log.jsonl")
    with pytest.raises(TypeError):
        log(step(loss=object()))
    log.close()


def test_plain_lines_when_stderr_is_no_terminal() -> None:
    stream = io.StringIO()
    progress = TerminalProgress(stream)
    progress(step(error=0.01236))
    assert stream.getvalue() == "quantize 1/4  layers.0  error 0.01236  1 min 05 s left\n"


def test_terminal_redraws_one_line_and_clears_it_for_a_note() -> None:
    stream = Terminal()
    progress = TerminalProgress(stream)
    progress(step(2))
    progress(step(3))
    progress(Event("note", {"text": "hello"}))
    assert stream.getvalue().count("\n") == 1
    assert "[##########..........]" in stream.getvalue()
    assert stream.getvalue().endswith("\r\x1b[Khello\n")
    progress.close()
    assert stream.getvalue().endswith("hello\n"), "nothing is drawn, nothing is to be ended"
    progress(step(4))
    progress.close()
    assert stream.getvalue().endswith("left\n")


def test_quiet_leaves_only_warnings_and_verbose_keeps_every_line() -> None:
    quiet, verbose = io.StringIO(), Terminal()
    for event in (step(), Event("note", {"text": "n"}), Event("warning", {"text": "w"})):
        TerminalProgress(quiet, quiet=True)(event)
        TerminalProgress(verbose, verbose=True)(event)
    assert quiet.getvalue() == "warning: w\n"
    assert len(verbose.getvalue().splitlines()) == 3


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.44, "0.4 s"), (59.4, "59 s"), (60, "1 min 00 s"), (3599.6, "1 h 00 min"), (7620, "2 h 07 min")],
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text
