"""Bad input: exit code 1 or 2, one message on stderr that says what to do, and no half result.

Most cases run in this process, where an exception that nobody turned into a message shows as one. Those of the first
table run as real commands too, because warnings and log lines of libraries reach only the stderr of a real process.
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
from transformers import AutoModelForCausalLM, AutoTokenizer

from compress.cli.main import main
from tests.families import bert, save
from tests.tiny_models import write_llama

DISTILL = (
    "distill --student {student} --teacher {teacher} --data {data} --loss {loss} --context 32 --batch-size 2 --steps 2 "
    "--out q"
)

CALIBRATED = "quantize student --bits 3 --data text:text.txt --rows 4 --context 32 --out q"


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


def truncated(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


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


def as_pickle(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def without(pattern: str) -> Callable[[Path], None]:
    def remove(folder: Path) -> None:
        for path in folder.glob(pattern):
            path.unlink()

    return remove


DAMAGES = {
    "truncated": truncated,
    "nan": with_nan,
    "shards": in_shards,
    "pickle": as_pickle,
    "empty": lambda folder: (folder / "model.safetensors").write_bytes(b""),
    "no_weights": without("*.safetensors"),
    "no_config": without("config.json"),
    "no_tokenizer": without("tokenizer*"),
}


@pytest.fixture(scope="module")
def strange(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders and files that a user might name by mistake."""
    folder = tmp_path_factory.mktemp("strange")
    for name, damage in DAMAGES.items():
        shutil.copytree(models / "student", folder / name)
        damage(folder / name)
    text = models / "text.txt"
    AutoTokenizer.from_pretrained(models / "student").save_pretrained(folder / "encoder")
    save(bert(vocab_size=300), folder / "encoder")
    narrow = AutoModelForCausalLM.from_pretrained(write_llama(folder / "narrow", text))
    narrow.resize_token_embeddings(290, mean_resizing=False)
    narrow.save_pretrained(folder / "narrow")
    quantized = CliRunner().invoke(
        main, ["quantize", str(models / "student"), "--bits", "3", "--out", str(folder / "quantized"), "--quiet"]
    )
    assert quantized.exit_code == 0, quantized.stderr
    for name, payload in {
        "empty.txt": b"",
        "short.txt": b"def return",
        "latin.txt": "é".encode("latin-1"),
        "rows.json": b'[{"body": "x"}]',
        "rows.csv": b"title,body\nx,y\n",
        "wrong.yaml": b"model: student\nout: q\nquantise: {bits: 3}\n",
        "inner.yaml": b"model: student\nout: q\nquantize:\n  bits: 3\n  codek: pyramid\n",
        "type.yaml": b"model: student\nout: q\nquantize:\n  bits: three\n",
        "open.yaml": b"model: student\nout: [q\nquantize: {bits: 3}\n",
        "twice.yaml": b"model: student\nmodel: teacher\n",
        "idle.yaml": b"model: student\nout: q\n",
    }.items():
        (folder / name).write_bytes(payload)
    (folder / "taken").mkdir()
    (folder / "taken" / "thesis.tex").write_text("years of work")
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


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        # models
        ("quantize builtin:nobody --bits 3 --out q", 1, "There are:"),
        ("quantize text.txt --bits 3 --out q", 1, "is a file"),
        ("quantize truncated --bits 3 --out q", 1, "'truncated/model.safetensors' is damaged"),
        ("quantize empty --bits 3 --out q", 1, "'empty/model.safetensors' is damaged"),
        ("quantize pickle --bits 3 --out q", 1, "writes safetensors"),
        ("quantize no_weights --bits 3 --out q", 1, "holds neither"),
        ("quantize no_config --bits 3 --out q", 1, "no config.json"),
        ("quantize quantized --bits 3 --out q", 1, "already quantized"),
        (distill(student="quantized"), 1, "already quantized"),
        (distill(student="encoder"), 1, "not a causal language model"),
        (distill(teacher="encoder"), 1, "not a causal language model"),
        (distill(student="narrow"), 1, "290 outputs"),
        (distill(teacher="truncated"), 1, "'truncated/model.safetensors' is damaged"),
        (distill(student="no_tokenizer"), 1, "save_pretrained"),
        ("inspect student", 1, "compress quantize"),
        ("inspect nowhere", 1, "nowhere"),
        ("eval nan --data text:text.txt --context 32", 1, "nan"),
        # data
        (distill(data="text:no.txt"), 1, "no file 'no.txt'"),
        (distill(data="text:empty.txt"), 1, "holds no text"),
        (distill(data="text:short.txt"), 1, "fewer than one window of 32"),
        (distill(data="text:latin.txt"), 1, "UTF-8"),
        (distill(data="text.txt"), 1, "text:FILE"),
        (distill(data="json:rows.json#text"), 1, "it has: body"),
        (distill(data="csv:rows.csv#text"), 1, "title, body"),
        ("eval student --data nothing", 1, "nothing"),
        # methods and numbers
        ("quantize student --bits 99 --out q", 2, "quantize.bits"),
        ("quantize student --bits nan --out q", 2, "quantize.bits"),
        ("quantize student --bits three --out q", 2, "three"),
        ("quantize student --out q", 2, "--bits"),
        ("quantize student --bits 3 --codec pyramide --out q", 2, "Did you mean 'pyramid'?"),
        ("quantize student --bits 3 --codec pyramid:size=16 --out q", 2, "size"),
        ("quantize student --bits 3 --codec pyramid: --out q", 2, "NAME:key=value"),
        (CALIBRATED + " --rounding gptq", 2, "no rounding 'gptq'"),
        (CALIBRATED + " --rounding ldlq:swep=2", 2, "Did you mean 'sweeps'?"),
        (CALIBRATED + " --rounding ldlq:damping=-1", 2, "Damping is 0 or more"),
        (CALIBRATED + " --rounding nearest", 2, "nearest uses no data"),
        (CALIBRATED + " --memory much", 2, "500MB"),
        (CALIBRATED + " --transform fourier", 2, "hadamard"),
        (CALIBRATED + " --rows 0", 2, "rows"),
        ("quantize student --bits 3 --rounding ldlq --out q", 2, "ldlq needs `data`"),
        ("quantize student --bits 3 --data text:no.txt --out q", 1, "no file 'no.txt'"),
        (distill() + " --device gpu", 2, "device 'gpu'"),
        (distill(loss="kll"), 2, "Did you mean 'kl'?"),
        (distill(loss="kl:temp=2"), 2, "temperature"),
        (distill(loss="kl:temperature=hot"), 2, "temperature"),
        (distill() + " --context 65", 2, "--context 64"),
        ("distill --student student --data text:text.txt --loss kl --context 32 --out q", 2, "needs a teacher"),
        ("eval student --data text:text.txt --context 1", 2, "context"),
        # places
        ("quantize student --bits 3 --out text.txt", 2, "text.txt"),
        ("quantize student --bits 3 --out taken", 2, "Name another --out"),
        ("quantize student --bits 3 --out taken --restart", 2, "'taken' holds something that compress did not write"),
        ("quantize student --bits 3 --out q --work teacher", 1, "no work folder"),
        # recipes and words
        ("run missing.yaml", 2, "missing.yaml"),
        ("plan missing.yaml", 2, "missing.yaml"),
        ("run inner.yaml", 2, "inner.yaml:5: unknown key 'quantize.codek'. Did you mean 'codec'?"),
        ("run type.yaml", 2, "type.yaml:4: 'quantize.bits' is 'three'. Allowed: a valid number."),
        ("run open.yaml", 2, "open.yaml:3: this is no YAML"),
        ("run twice.yaml", 2, "twice.yaml:2: the key 'model' is already given in line 1"),
        ("run idle.yaml", 2, "at least one of distill, transform, quantize, export, evaluate"),
        ("run demo --set quantize.bit=3", 2, "Did you mean 'bits'?"),
        ("list colours", 2, "colours"),
        ("bench q", 2, "bench"),
    ],
)
def test_one_message_that_says_what_to_do(here: Path, words: str, code: int, message: str) -> None:
    before = names(here)
    result = call(words)
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    assert_one_message(result.stderr, message)
    assert_nothing_made(here, before, work="distill" in words)
    assert names(here / "taken") == {"thesis.tex"}


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
