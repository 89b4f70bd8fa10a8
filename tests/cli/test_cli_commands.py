"""The commands on tiny models: what they print, what they write, and how they fail."""

from __future__ import annotations

import errno
import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file

from compress import pipeline
from compress.cli.main import main
from compress.distillation.checkpoints import last_verified
from tests.tiny_models import write_llama, write_text


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    text = write_text(folder)
    write_llama(folder / "teacher", text, hidden=64, layers=2, seed=1)
    write_llama(folder / "student", text, seed=2)
    return folder


@pytest.fixture(autouse=True)
def inside(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("teacher", "student", "text.txt"):
        (tmp_path / name).symlink_to(models / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


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
    assert "kl" in call("list", "losses").stdout
    assert "demo" in json.loads(call("list", "recipes", "--json").stdout)
    assert "text:FILE" in call("list", "data").stdout


def _truncated(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def _with_nan(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][3, 5] = torch.nan
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "message"), [(_truncated, "model.safetensors"), (_with_nan, "model.layers.0.mlp.up_proj")]
)
def test_damaged_weights_end_in_one_message_and_no_artifact(
    inside: Path, damage: Callable[[Path], None], message: str
) -> None:
    shutil.copytree(inside / "student", inside / "damaged")
    damage(inside / "damaged")
    result = call("quantize", "damaged", "--bits", "3", "--out", "q")
    assert result.exit_code == 1
    assert message in result.stderr
    assert "Traceback" not in result.output
    assert not (inside / "q").exists()


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        ("quantize ./nowhere --bits 3 --out q", 1, "nowhere"),
        ("quantize student --bits 0.5 --out q", 2, "bits a weight"),
        ("quantize student --bits 99 --out q", 2, "quantize.bits"),
        ("quantize student --bits three --out q", 2, "three"),
        ("quantize student --out q", 2, "--bits"),
        ("quantize student --bits 3 --codec pyramid:size=16 --out q", 2, "size"),
        ("quantize student --bits 3 --codec pyramid: --out q", 2, "NAME:key=value"),
        ("quantize student --bits 3 --out text.txt", 2, "text.txt"),
        ("quantize student --bits 3 --out q --work teacher", 1, "no work folder"),
        ("distill --student student --teacher teacher --data text:no.txt --loss kl --out q", 1, "no.txt"),
        ("distill --student student --teacher teacher --data text:text.txt --loss kll --out q", 2, "'kl'"),
        ("distill --student student --data text:text.txt --loss kl --out q", 2, "needs a teacher"),
        ("eval student --data text:text.txt --context 1", 2, "context"),
        ("eval student --data nothing", 1, "nothing"),
        ("run missing.yaml", 2, "missing.yaml"),
        ("plan missing.yaml", 2, "missing.yaml"),
        ("run wrong.yaml", 2, "wrong.yaml:3: unknown key 'quantise'. Did you mean 'quantize'?"),
        ("inspect student", 1, "quant_method"),
        ("inspect nowhere", 1, "nowhere"),
        ("list colours", 2, "colours"),
        ("bench q", 2, "bench"),
    ],
)
def test_bad_input_is_one_message_that_says_what_to_do(inside: Path, words: str, code: int, message: str) -> None:
    (inside / "wrong.yaml").write_text("model: student\nout: q\nquantise: {bits: 3}\n")
    before = names(inside)
    result = call(*words.split())
    assert result.exit_code == code, result.output
    assert message in result.stderr
    assert "Traceback" not in result.output
    assert result.stdout == ""
    assert names(inside) == before


def test_a_result_in_the_way_is_named_before_any_work(inside: Path) -> None:
    (inside / "q").mkdir()
    (inside / "q" / "thesis.tex").write_text("years of work")
    for extra in ([], ["--restart"]):
        result = call("quantize", "student", "--bits", "3", "--out", "q", *extra)
        assert result.exit_code == 2
        assert "'q'" in result.stderr
    assert not (inside / "q.work" / "blocks").exists()
    assert names(inside / "q") == {"thesis.tex"}


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
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
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
