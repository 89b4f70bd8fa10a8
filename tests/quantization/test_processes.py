"""Two processes quantize to the same bytes as one, take each other's work up, and fail together."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.processes import run_processes
from tests.quantization import in_processes
from tests.quantization.in_processes import CASES, case, models
from tests.tiny_models import write_llama, write_text

Found = list[dict[str, Any]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("processes")
    models(made)
    return made


def made_by(size: int, name: str, folder: Path) -> Found:
    done = run_processes(["-m", in_processes.__name__, str(folder), name], size, timeout=170)
    for each in done:
        assert each.returncode == 0, each.stderr
    return [json.loads(each.stdout.splitlines()[-1]) for each in done]


@pytest.fixture(scope="module")
def one(folder: Path) -> Found:
    return made_by(1, "one", folder)


@pytest.fixture(scope="module")
def two(folder: Path, one: Found) -> Found:
    return made_by(2, "two", folder)


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


@pytest.mark.parametrize("name", CASES)
def test_the_bytes_are_those_of_one_process(name: str, folder: Path, one: Found, two: Found) -> None:
    assert [each[name] for each in two] == [2, 2] and one[0][name] == 1
    first, second = (folder / f"{who}-{name}" for who in ("one", "two"))
    assert weights(first) == weights(second)
    reports = [json.loads((place / "report.json").read_text()) for place in (first, second)]
    assert reports[0]["matrices"] == reports[1]["matrices"]


def test_a_model_in_memory_becomes_the_same_in_every_process(one: Found, two: Found) -> None:
    assert two[0]["memory"] == two[1]["memory"] == one[0]["memory"]


def test_a_run_is_taken_up_by_another_number_of_processes(folder: Path, two: Found) -> None:
    assert weights(folder / "stopped-one-pyramid") == weights(folder / "one-pyramid"), "by two"
    assert two[0]["resumed"] == 2
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        case(folder, "pyramid", "stopped-two")
    finally:
        torch.set_num_threads(threads)
    assert weights(folder / "stopped-two-pyramid") == weights(folder / "one-pyramid"), "by one"


def test_the_error_of_one_is_that_of_all(two: Found) -> None:
    for each in two:
        assert each["known"] == ["NumericsError", "Spoilt. Mend it.", False, ["lock"]]
    assert two[1]["unknown"][:2] == ["ValueError", "odd"]
    assert two[0]["unknown"][0] == "OtherProcessError"
    assert "Process 1 of 2 (counted from 0): ValueError: odd" in two[0]["unknown"][1]


def test_a_warning_of_one_is_heard_once(two: Found) -> None:
    assert two[0]["warnings"] == ["all", "the last"]
    assert two[1]["warnings"] == []


def test_processes_with_different_data_are_refused(two: Found) -> None:
    for each in two:
        assert "different calibration data" in each["other data"]


def test_the_command_says_once_what_is_wrong(tmp_path: Path) -> None:
    text = write_text(tmp_path)
    source = write_llama(tmp_path / "llama", text)
    asked = ["--data", f"text:{text}", "--rows", "100000", "--context", "16", "--out", str(tmp_path / "out")]
    done = run_processes(["-m", "cli.main", "quantize", str(source), "--bits", "3.25", *asked])
    assert [each.returncode for each in done] == [1, 1]
    assert done[0].stderr.count("error:") == 1
    assert "fills" in done[0].stderr
    assert "error" not in done[1].stderr
    assert not (tmp_path / "out").exists()
