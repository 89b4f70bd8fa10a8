"""The commands on tiny models: what they print, what they write, and how they are interrupted."""

from __future__ import annotations

import errno
import json
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from compress import pipeline
from compress.cli.main import main
from compress.distillation.checkpoints import last_verified

pytestmark = pytest.mark.usefixtures("inside")


def call(*words: str) -> Result:
    return CliRunner().invoke(main, list(words))


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_quantize_then_again_then_otherwise_then_anew(inside: Path) -> None:
    first = call("quantize", "student", "--bits", "3.25", "--out", "q", "--json")
    assert first.exit_code == 0, first.stderr
    report = json.loads(first.stdout)
    assert 3.0 < report["bits_per_weight"] <= 3.25
    assert report["bits_target"] == 3.25
    assert json.loads((inside / "q.work" / "report.json").read_text()) == report
    assert json.loads((inside / "q" / "report.json").read_text())["bits_per_weight"] == report["bits_per_weight"]
    assert "quantize 1/1" in first.stderr

    again = call("quantize", "student", "--bits", "3.25", "--out", "q", "--json")
    assert again.exit_code == 0
    assert "already finished" in again.stderr
    assert json.loads(again.stdout) == report

    other = call("quantize", "student", "--bits", "3", "--out", "q")
    assert other.exit_code == 1
    assert "quantize.bits was 3.25 and is now 3.0" in other.stderr
    assert "--restart" in other.stderr

    anew = call("quantize", "student", "--bits", "3", "--out", "q", "--restart", "--quiet")
    assert (anew.exit_code, anew.stdout, anew.stderr) == (0, "", "")
    assert json.loads((inside / "q" / "report.json").read_text())["bits_target"] == 3.0


def test_the_plan_of_a_quantization_is_what_happens(inside: Path) -> None:
    planned = json.loads(call("plan", "quantize", "student", "--bits", "2.5", "--json").stdout)
    assert names(inside) == {"teacher", "student", "text.txt"}, "a plan writes nothing"
    report = json.loads(call("quantize", "student", "--bits", "2.5", "--out", "q", "--json").stdout)
    for name in ("bits_per_weight", "model_bits_per_weight", "model_bytes", "original_bytes", "backend"):
        assert planned[name] == report[name]
    assert planned["model_bytes"] == (inside / "q" / "model.safetensors").stat().st_size
    assert [m["name"] for m in planned["matrices"]] == [m["name"] for m in report["matrices"]]


@pytest.mark.parametrize("transform", ["none", "hadamard"])
def test_the_plan_of_a_calibrated_quantization_is_what_happens(inside: Path, transform: str) -> None:
    words = ["quantize", "student", "--bits", "3.25", "--data", "text:text.txt", "--rows", "4", "--context", "32"]
    words += ["--rounding", "ldlq:sweeps=1", "--transform", transform]
    planned = json.loads(call("plan", *words, "--json").stdout)
    assert names(inside) == {"teacher", "student", "text.txt"}, "a plan writes nothing"
    done = call(*words, "--out", "q", "--json")
    assert done.exit_code == 0, done.stderr
    report = json.loads(done.stdout)
    for name in ("bits_per_weight", "model_bits_per_weight", "model_bytes", "original_bytes", "backend"):
        assert planned[name] == report[name]
    assert planned["model_bytes"] == (inside / "q" / "model.safetensors").stat().st_size
    assert (planned["rounding"], planned["data_free"]) == ("ldlq:sweeps=1", False)
    assert {m["name"] for m in planned["matrices"]} == {m["name"] for m in report["matrices"]}
    assert {m["status"] for m in report["matrices"]} == {"calibrated"}
    assert {m["calibration"]["tokens"] for m in report["matrices"]} == {4 * 32}
    other = call(*words[:-4], "--out", "q")
    assert other.exit_code == 1
    assert "rounding" in other.stderr


def test_three_ways_to_ask_for_a_plan(inside: Path) -> None:
    (inside / "r.yaml").write_text("model: student\nout: result\nquantize: {bits: 3.0}\n")
    words = [
        ["plan", "quantize", "student", "--bits", "3"],
        ["plan", "student", "--bits", "3"],
        ["plan", "r.yaml"],
        ["plan", "r.yaml", "--set", "quantize.bits=3"],
    ]
    texts = {call(*asked).stdout for asked in words}
    assert len(texts) == 1
    text = texts.pop()
    assert "model.layers.0.self_attn.q_proj" in text
    assert "work folder" in text
    distill = ["--teacher", "teacher", "--student", "student", "--data", "text:text.txt", "--loss", "kl"]
    distill += ["--context", "32"]
    assert call("plan", "distill", *distill).stdout == call("plan", *distill).stdout != ""


def test_run_a_recipe_with_changes(inside: Path) -> None:
    (inside / "r.yaml").write_text("model: student\nout: result\nquantize: {bits: 3.0}\n")
    result = call("run", "r.yaml", "--set", "quantize.bits=2.5", "--set", "out=other", "--work", "w: x")
    assert result.exit_code == 0, result.stderr
    assert "bits_per_weight" in result.stdout
    assert (inside / "other" / "model.safetensors").is_file()
    assert (inside / "w: x" / "manifest.json").is_file()


def test_eval_and_inspect_and_list(inside: Path) -> None:
    asked = [
        "eval",
        "student",
        "--reference",
        "teacher",
        "--data",
        "text:text.txt",
        "--context",
        "32",
        "--limit",
        "640",
    ]
    figures = json.loads(call(*asked, "--json").stdout)
    contract = {"perplexity", "nll", "bits_per_byte", "tokens", "kl_divergence", "kl_stderr", "top1_agreement"}
    assert contract | {"reference_perplexity"} <= figures.keys()
    assert "kl_divergence" in call(*asked).stdout

    assert call("quantize", "student", "--bits", "3", "--out", "q").exit_code == 0
    content = json.loads(call("inspect", "q", "--json").stdout)
    assert content["bits_per_weight"] <= 3
    assert content["backend"] in ("native", "reference")
    assert len(content["matrices"]) == 7
    assert "q_proj" in call("inspect", "q").stdout
    weights = inside / "q" / "model.safetensors"
    payload = bytearray(weights.read_bytes())
    payload[-1] ^= 1
    weights.write_bytes(payload)
    damaged = call("inspect", "q")
    assert damaged.exit_code == 1
    assert "model.safetensors" in damaged.stderr

    assert "pyramid" in call("list", "codecs").stdout
    losses = {entry["name"]: entry for entry in json.loads(call("list", "losses", "--json").stdout)}
    assert losses["kl"]["options"] == {"temperature": 1.0, "t2": False}
    assert losses["kl"]["needs"] == ["teacher"]
    assert all(entry["is"].endswith(".") for entry in losses.values())
    assert "\nkl:temperature=1,t2=false\n" in call("list", "losses").stdout
    assert "demo" in json.loads(call("list", "recipes", "--json").stdout)
    assert "text:FILE" in call("list", "data").stdout


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "q.work/log.jsonl"), 1, "'q.work/log.jsonl': No space left"),
        (PermissionError(errno.EACCES, "Permission denied", "q"), 1, "'q': Permission denied"),
        (KeyboardInterrupt(), 130, "The same command takes it up again"),
    ],
)
def test_what_the_system_says_is_a_message(
    monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, message: str
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(pipeline, "run", fail)
    words = ["quantize", "student", "--bits", "3", "--out", "q"]
    result = call(*words)
    assert result.exit_code == code
    assert message in result.stderr
    assert "Traceback" not in result.output


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--context 1", "error: --context is 1. Allowed: greater than or equal to 2."),
        ("--limit 0", "error: --limit is 0. Allowed: greater than or equal to 1."),
        ("--limit 0 --context 1", "--limit is 0"),
    ],
)
def test_eval_names_its_options_not_keys_of_a_recipe(words: str, message: str) -> None:
    result = call("eval", "student", "--data", "text:text.txt", *words.split())
    assert result.exit_code == 2
    assert message in result.stderr
    assert "evaluate." not in result.stderr


def test_a_plan_says_what_memory_it_speaks_of() -> None:
    assert "estimated; the program itself comes on top" in call("plan", "student", "--bits", "3").stdout


def test_verbose_shows_the_traceback(inside: Path) -> None:
    result = call("quantize", "./nowhere", "--bits", "3", "--out", "q", "--verbose")
    assert result.exit_code == 1
    assert "Traceback" in result.stderr


def test_an_unforeseen_error_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(pipeline, "run", fail)
    result = call("quantize", "student", "--bits", "3", "--out", "q")
    assert isinstance(result.exception, ZeroDivisionError)


def test_an_interrupted_training_leaves_a_work_folder_to_go_on_from(inside: Path) -> None:
    words = ["distill", "--student", "student", "--teacher", "teacher", "--data", "text:text.txt", "--loss", "kl",
             "--steps", "1000", "--batch-size", "2", "--context", "32", "--log-every", "1", "--save-every", "2",
             "--out", "d"]  # fmt: skip
    seen = []
    command = [sys.executable, "-m", "compress.cli.main", *words]
    # a job in the background is started with SIGINT ignored, and its children with it
    listen = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=listen) as process:
        assert process.stderr is not None
        for line in process.stderr:
            seen.append(line)
            if line.startswith("distill 4/"):
                process.send_signal(signal.SIGINT)
    assert process.returncode == 130, "".join(seen)
    assert "The same command takes it up again" in seen[-1]
    assert "Traceback" not in "".join(seen)
    assert not (inside / "d").exists()
    assert last_verified(inside / "d.work" / "training") is not None
