"""The work folder keeps its word: after kill -9, a full disk, changed files, other arguments, a second process."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors import SafetensorError

from compress import workspace as workspace_module
from compress.errors import DataError, UsageError, WorkspaceError
from compress.events import Event, Events
from compress.storage import (
    atomic_write,
    check_free,
    discard_replaced,
    disk_errors,
    file_sha256,
    publish,
    reserve,
    seal,
    stage_beside,
    tree_sha256,
    write_json,
)
from compress.workspace import Workspace

ROOT = Path(workspace_module.__file__).parents[1]
ARGUMENTS = {"model": "builtin:teacher", "quantize.bits": 3.25}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def artifact(folder: Path, text: str = "weights") -> Path:
    folder.mkdir(parents=True)
    (folder / "compress.json").write_text("{}")
    (folder / "model.safetensors").write_text(text)
    return folder


def test_units_are_there_after_reopening(tmp_path: Path) -> None:
    with Workspace.open(tmp_path / "w", ARGUMENTS) as work:
        file = work.path("blocks", "0.safetensors")
        file.write_bytes(b"abc")
        assert work.done("block 0") is None
        work.commit("block 0", [file], {"error": 0.5})
    with Workspace.open(tmp_path / "w", ARGUMENTS) as work:
        assert work.done("block 0") == {"error": 0.5}
        assert work.units() == ("block 0",)
        work.drop("block 0")
        assert work.done("block 0") is None
        assert not file.exists()


@pytest.mark.parametrize("damage", [b"", b"abd", b"abcd", None])
def test_a_unit_whose_file_changed_is_not_done(tmp_path: Path, damage: bytes | None) -> None:
    heard: list[Event] = []
    with Workspace.open(tmp_path / "w", {}, events=Events([heard.append])) as work:
        file = work.path("unit.bin")
        file.write_bytes(b"abc")
        work.commit("unit", [file], {})
        file.unlink() if damage is None else file.write_bytes(damage)
        assert work.done("unit") is None
    assert [event.kind for event in heard] == ["warning"]
    assert "unit.bin" in heard[0].data["text"]
    assert "unit.bin" in (tmp_path / "w" / "log.jsonl").read_text()


def test_other_arguments_are_refused_by_name_with_both_values(tmp_path: Path) -> None:
    with Workspace.open(tmp_path / "w", ARGUMENTS) as work:
        work.commit("unit", [], {})
    with (
        pytest.raises(WorkspaceError, match=r"quantize\.bits was 3\.25 and is now 3\.0.*--restart") as caught,
        Workspace.open(tmp_path / "w", {**ARGUMENTS, "quantize.bits": 3.0, "seed": 1}),
    ):
        pass
    assert "seed is 1 and was not given" in str(caught.value)
    assert "model" not in caught.value.message
    with Workspace.open(tmp_path / "w", {"model": "other"}, restart=True) as work:
        assert work.units() == ()
        assert work.overwrite
    with Workspace.open(tmp_path / "w", {"model": "other"}) as work:
        assert work.overwrite, "a run begun with restart and taken up again may still replace results"


def test_a_run_that_fails_before_any_work_binds_nobody(tmp_path: Path) -> None:
    """What it says to do, such as fewer rows, must be possible; and what was done is kept whatever happens after."""
    folder = tmp_path / "w"
    with pytest.raises(DataError), Workspace.open(folder, ARGUMENTS) as work:
        work.commit("begun:quantize", [], {})
        raise DataError("too few rows", remedy="Ask for fewer.")
    other = {**ARGUMENTS, "quantize.rows": 16}
    with pytest.raises(DataError), Workspace.open(folder, other) as work:
        assert work.units() == ()
        file = work.path("blocks", "0")
        file.write_bytes(b"a block")
        work.commit("block 0", [file], {})
        raise DataError("later")
    with pytest.raises(WorkspaceError, match=r"quantize\.rows"), Workspace.open(folder, ARGUMENTS):
        pass
    with Workspace.open(folder, other) as work:
        assert work.done("block 0") == {}


def test_tuples_and_lists_are_the_same_argument(tmp_path: Path) -> None:
    for value in ((1, 2), [1, 2]):
        with Workspace.open(tmp_path / "w", {"losses": value}):
            pass


def test_a_second_process_is_refused_and_a_dead_one_is_not(tmp_path: Path) -> None:
    folder = tmp_path / "w"
    code = f"""
import time
from pathlib import Path
from compress.workspace import Workspace
with Workspace.open(Path({str(folder)!r}), {{}}):
    print("open", flush=True)
    time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "open\n"
        with pytest.raises(WorkspaceError, match=f"pid {holder.pid}"), Workspace.open(folder, {}):
            pass
        holder.kill()
        holder.wait()
    with Workspace.open(folder, {}):
        pass


def test_a_folder_of_somebody_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    for restart in (False, True):
        with pytest.raises(WorkspaceError, match="no work folder"), Workspace.open(tmp_path, {}, restart=restart):
            pass
    assert names(tmp_path) == ["thesis.tex"]


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"format_version": 1}', '{"arguments": {}}', '{"a'])
def test_a_file_of_the_right_name_makes_no_work_folder(tmp_path: Path, content: str) -> None:
    (tmp_path / "fingerprint.json").write_text(content)
    (tmp_path / "prints.npy").write_text("years of work")
    with pytest.raises(WorkspaceError, match="no work folder"), Workspace.open(tmp_path, {}, restart=True):
        pass
    assert names(tmp_path) == ["fingerprint.json", "prints.npy"]


def test_damaged_manifest_is_named(tmp_path: Path) -> None:
    with Workspace.open(tmp_path / "w", {}) as work:
        work.commit("unit", [], {})
    (tmp_path / "w" / "manifest.json").write_text('{"units": {')
    with (
        pytest.raises(WorkspaceError, match=r"manifest\.json' is damaged.*--restart"),
        Workspace.open(tmp_path / "w", {}),
    ):
        pass
    with Workspace.open(tmp_path / "w", {}, restart=True) as work:
        assert work.units() == ()


CHAIN = """
import hashlib, sys
from pathlib import Path
from compress.storage import stage_beside, write_json
from compress.workspace import Workspace
folder, out = Path(sys.argv[1]), Path(sys.argv[2])
with Workspace.open(folder, {"n": 40}) as work:
    value = b"start"
    for number in range(40):
        record = work.done(f"unit {number}")
        file = work.path(f"{number}.bin")
        if record is None:
            value = hashlib.sha256(value).digest() * 500
            file.write_bytes(value)
            work.commit(f"unit {number}", [file], {"number": number})
        value = file.read_bytes()
    if work.published("result", out) is None:
        staged = stage_beside(out)
        staged.mkdir()
        write_json(staged / "compress.json", {})
        for number in range(40):
            (staged / f"{number}.bin").write_bytes(work.path(f"{number}.bin").read_bytes())
        work.publish("result", staged, out, {})
    print("finished")
"""


def test_kill_at_random_moments_leaves_a_folder_that_continues_to_the_same_bytes(tmp_path: Path) -> None:
    def start(name: str) -> subprocess.Popen[bytes]:
        arguments = [sys.executable, "-c", CHAIN, str(tmp_path / name), str(tmp_path / f"{name}-out")]
        return subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.PIPE)

    began = time.monotonic()
    assert start("whole").communicate()[0] == b"finished\n"
    whole = time.monotonic() - began
    chance = random.Random(20240229)
    for _ in range(8):
        process = start("killed")
        time.sleep(whole * chance.uniform(0.3, 1.0))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        out = tmp_path / "killed-out"
        assert not out.exists() or len(list(out.iterdir())) == 41, "half a result"
    assert start("killed").communicate()[0] == b"finished\n"
    assert start("killed").communicate()[0] == b"finished\n", "a finished run is no error"
    assert tree_sha256(tmp_path / "killed-out") == tree_sha256(tmp_path / "whole-out")


TOGETHER = """
import os, signal, sys
from pathlib import Path
from compress.workspace import Workspace
folder, left, sync = Path(sys.argv[1]), int(sys.argv[2]), os.fsync
with Workspace.open(folder, {}) as work:
    files = [work.path("inputs", "0"), work.path("inputs", "1"), work.path("blocks", "0")]
    for file in files:
        file.write_bytes(file.as_posix().encode())
    work.commit("inputs", files[:1], {"before": 0})

    def fsync(descriptor):
        global left
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        sync(descriptor)

    os.fsync = fsync
    work.commit_all({"block 0": (files[2:], {}), "inputs": (files[1:2], {"before": 1})})
"""


def test_units_that_belong_together_are_committed_at_once(tmp_path: Path) -> None:
    """Killed before each of its syncs, `commit_all` has done everything or nothing."""
    states = []
    for left in range(100):
        folder = tmp_path / str(left)
        done = subprocess.run([sys.executable, "-c", TOGETHER, str(folder), str(left)], cwd=ROOT)
        with Workspace.open(folder, {}) as work:
            states.append((work.done("block 0"), work.done("inputs")))
        if done.returncode == 0:
            break
        assert done.returncode == -signal.SIGKILL
    before, after = (None, {"before": 0}), ({}, {"before": 1})
    assert len(states) > 5, "both files, their folders and the manifest are synced"
    assert states == sorted(states, key=lambda state: state == after)
    assert states[0] == before
    assert states[-1] == after
    assert all(state in (before, after) for state in states)


def test_of_units_that_belong_together_none_is_done_when_a_file_is_missing(tmp_path: Path) -> None:
    with Workspace.open(tmp_path / "w", {}) as work:
        work.commit("inputs", [], {"before": 0})
        file = work.path("0.bin")
        file.write_bytes(b"abc")
        with pytest.raises(FileNotFoundError):
            work.commit_all({"block 0": ([file], {}), "inputs": ([work.path("1.bin")], {"before": 1})})
        assert (work.done("block 0"), work.done("inputs")) == (None, {"before": 0})
    with Workspace.open(tmp_path / "w", {}) as work:
        assert work.units() == ("inputs",)


@pytest.mark.parametrize("call", ["fsync", "open"])
def test_full_disk_leaves_the_old_file_and_no_half_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    path = tmp_path / "manifest.json"
    atomic_write(path, b"old")

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full) if call == "fsync" else patch.setattr(Path, "open", full)
        with pytest.raises(WorkspaceError, match=r"no space left on the device.*Free some space"):
            atomic_write(path, b"new and longer")
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["manifest.json"]


def test_full_disk_while_committing_leaves_the_unit_undone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Workspace.open(tmp_path / "w", {}) as work:
        work.commit("one", [], {})
        file = work.path("two.bin")
        file.write_bytes(b"abc")
        with monkeypatch.context() as patch:
            patch.setattr(
                os, "fsync", lambda _: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left on device"))
            )
            with pytest.raises(WorkspaceError):
                work.commit("two", [file], {})
        assert work.done("two") is None
    with Workspace.open(tmp_path / "w", {}) as work:
        assert work.units() == ("one",)


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 85120 vs 85008"),
    ],
)
def test_every_way_to_say_that_the_disk_is_full(tmp_path: Path, error: Exception) -> None:
    with pytest.raises(WorkspaceError, match="no space left on the device"), disk_errors(tmp_path):
        raise error


@pytest.mark.parametrize("error", [OSError(errno.ENOENT, "No such file"), RuntimeError("shapes"), SafetensorError("x")])
def test_other_errors_pass(tmp_path: Path, error: Exception) -> None:
    with pytest.raises(type(error)) as caught, disk_errors(tmp_path):
        raise error
    assert caught.value is error


def test_missing_rights_are_one_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", denied)
    with pytest.raises(WorkspaceError, match="may write to"), Workspace.open(tmp_path / "w", {}):
        pass


def test_publish_moves_the_whole_folder(tmp_path: Path) -> None:
    final = tmp_path / "deep" / "result"
    staged = stage_beside(final)
    artifact(staged)
    publish(staged, final)
    assert names(final) == ["compress.json", "model.safetensors"]
    assert names(final.parent) == ["result"]


def test_publish_replaces_only_an_artifact_of_ours_and_only_when_told(tmp_path: Path) -> None:
    final, staged = artifact(tmp_path / "result", "old"), artifact(tmp_path / "staged", "new")
    with pytest.raises(UsageError, match="not empty"):
        publish(staged, final)
    publish(staged, final, overwrite=True)
    assert (final / "model.safetensors").read_text() == "new"
    assert names(tmp_path) == ["result"]
    (final / "compress.json").unlink()
    with pytest.raises(UsageError, match="did not write"):
        publish(artifact(tmp_path / "staged"), final, overwrite=True)


def test_what_a_kill_between_the_renames_and_the_removal_left_goes_away(tmp_path: Path) -> None:
    final, left = tmp_path / "result", artifact(tmp_path / ".result.compress-old", "old")
    discard_replaced(final)
    assert left.exists(), "the only result there is stays"
    publish(artifact(stage_beside(final), "new"), final)
    assert names(tmp_path) == ["result"]
    artifact(left, "old")
    discard_replaced(final)
    assert names(tmp_path) == ["result"]


def test_a_place_is_reserved_for_one(tmp_path: Path) -> None:
    final = tmp_path / "deep" / "result"
    with (
        reserve(final),
        reserve(tmp_path / "other"),
        pytest.raises(WorkspaceError, match=rf"Another process \(pid {os.getpid()}\) makes '{final}'"),
        reserve(final),
    ):
        pass
    assert names(final.parent) == [], "the lock is gone with its holder"
    (final.parent / ".result.compress-lock").write_text("pid 1")
    with reserve(final):
        pass
    assert names(final.parent) == [], "that of a killed process is no obstacle"


def test_check_free_accepts_nothing_and_an_empty_folder(tmp_path: Path) -> None:
    check_free(tmp_path / "missing")
    check_free(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="no folder"):
        check_free(tmp_path / "file")


def test_published_knows_its_own_result(tmp_path: Path) -> None:
    final = tmp_path / "result"
    with Workspace.open(tmp_path / "w", {}) as work:
        work.publish("quantize", artifact(stage_beside(final)), final, {"bits": 3.25})
        assert work.published("quantize", final) == {"bits": 3.25}
        (final / "model.safetensors").write_text("touched")
        assert work.published("quantize", final) is None


def test_seal_lists_every_file_with_its_hash(tmp_path: Path) -> None:
    (tmp_path / "onnx").mkdir()
    (tmp_path / "onnx" / "model.onnx").write_bytes(b"abc")
    seal(tmp_path)
    seal(tmp_path)
    files = json.loads((tmp_path / "compress.json").read_text())["files"]
    assert files == {
        "onnx/model.onnx": {
            "bytes": 3,
            "sha256": "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad",
        }
    }


def test_hashes_are_those_of_hashlib(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    assert file_sha256(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    before = tree_sha256(tmp_path)
    (tmp_path / "a").rename(tmp_path / "b")
    assert tree_sha256(tmp_path) != before


def test_write_json_refuses_nan_and_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    write_json(path, {"a": 1})
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(path, {"a": float("nan")})
    assert json.loads(path.read_text()) == {"a": 1}
