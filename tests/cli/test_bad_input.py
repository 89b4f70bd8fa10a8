"""Bad input to real commands, and a full disk: exit code, one message on stderr that says what to do, no half result.

The table of bad input is in `tests/bad_input`, whose rows run in the tests' process. A few run here as commands of
their own, because warnings and log lines of libraries reach only the stderr of a real process.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from compress.cli.main import main

DISTILL = (
    "distill --student {student} --teacher {teacher} --data {data} --loss {loss} --context 32 --batch-size 2 --steps 2 "
    "--out q"
)


def call(words: str) -> Result:
    return CliRunner().invoke(main, words.split())


def distill(student: str = "student", teacher: str = "teacher", data: str = "text:text.txt", loss: str = "kl") -> str:
    return DISTILL.format(student=student, teacher=teacher, data=data, loss=loss)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def assert_one_message(stderr: str, *parts: str) -> None:
    """One message: `error: ...`, or click's usage with `Error: ...`, which holds `parts`, and nothing beside it."""
    assert stderr.count("error: ") + stderr.count("Error: ") == 1, stderr
    assert "Traceback" not in stderr
    assert "Warning" not in stderr
    assert stderr.startswith(("error: ", "Usage: ")), stderr
    for part in parts:
        assert part in stderr


def assert_nothing_made(folder: Path, before: set[str], *, work: bool = False) -> None:
    """No result and no hidden part of one; a work folder, which the same command takes up, only where work began."""
    made = names(folder) - before
    assert made <= ({"q.work"} if work else set()), made


def with_nan(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][3, 5] = torch.nan
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def in_shards(folder: Path) -> None:
    """The same weights in several files, the second of them cut short."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="20KB")
    second = sorted(folder.glob("model-*.safetensors"))[1]
    second.write_bytes(second.read_bytes()[:-100])


DAMAGES = {"nan": with_nan, "shards": in_shards}


@pytest.fixture(scope="module")
def strange(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders and files that a user might name by mistake."""
    folder = tmp_path_factory.mktemp("strange")
    for name, damage in DAMAGES.items():
        shutil.copytree(models / "student", folder / name)
        damage(folder / name)
    (folder / "wrong.yaml").write_text("model: student\nout: q\nquantise: {bits: 3}\n")
    return folder


@pytest.fixture(autouse=True)
def here(inside: Path, strange: Path) -> Path:
    for path in strange.iterdir():
        (inside / path.name).symlink_to(path)
    return inside


ASKED = {
    "no such model": ("quantize ./nowhere --bits 3 --out q", 1, ["no folder './nowhere'", "Check the path"]),
    "wrong YAML": ("run wrong.yaml", 2, ["wrong.yaml:3: unknown key 'quantise'. Did you mean 'quantize'?"]),
    "bits 0.5": ("quantize student --bits 0.5 --out q", 2, ["bits a weight", "Name a rate between"]),
    "truncated shard": ("quantize shards --bits 3 --out q", 1, ["model-00002-of", "damaged", "Copy or download"]),
    "NaN weights": ("quantize nan --bits 3 --out q", 1, ["model.layers.0.mlp.up_proj.weight", "NaN", "earlier one"]),
    "NaN weights of the student": (distill(student="nan"), 1, ["of the student 'nan'", "NaN", "earlier one"]),
}


@pytest.mark.parametrize("case", ASKED)
def test_a_real_command_says_one_thing(here: Path, case: str) -> None:
    words, code, parts = ASKED[case]
    before = names(here)
    command = [sys.executable, "-m", "compress.cli.main", *words.split()]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    assert done.returncode == code, done.stderr
    assert done.stdout == ""
    assert_one_message(done.stderr, *parts)
    assert_nothing_made(here, before, work="NaN" in case)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """A function that gives a file system of so many kilobytes, or changes its size."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = False

    def size(kilobytes: int) -> Path:
        nonlocal mounted
        options = f"size={kilobytes}k" + (",remount" if mounted else "")
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", folder], capture_output=True, text=True)
        if done.returncode != 0:
            pytest.skip(f"cannot mount a small file system here: {done.stderr.strip()}")
        mounted = True
        return folder

    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("needs the right to mount a small file system")
    yield size
    if mounted:
        subprocess.run(["umount", folder], check=True)


@pytest.mark.parametrize(
    ("words", "kilobytes"),
    [("quantize teacher --bits 3", kilobytes) for kilobytes in (4, 8, 24, 100)]
    + [
        (distill(student="teacher").removesuffix(" --out q") + " --save-every 1", kilobytes)
        for kilobytes in (4, 100, 1000)
    ],
)
def test_a_full_disk(here: Path, small_disk: Callable[[int], Path], words: str, kilobytes: int) -> None:
    """It fills while the work folder is begun, in the middle of the work, and while the result is written."""
    disk = small_disk(kilobytes)
    words = f"{words} --out {disk / 'q'} --quiet"
    result = call(words)
    assert result.exit_code == 1, result.output
    assert_one_message(result.stderr, "no space left", "Free some space and run the same command again")
    assert names(disk) == {"q.work"}
    small_disk(16_000)
    again = call(words)
    assert (again.exit_code, again.stderr) == (0, "")
    assert names(disk) == {"q", "q.work"}
    assert json.loads((disk / "q.work" / "report.json").read_text())["stages"] == [words.split()[0]]
