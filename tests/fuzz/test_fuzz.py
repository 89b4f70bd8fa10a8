"""A few seconds of fuzzing in this process; and what the fuzzer must do: repeat, find, and keep what it found."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from tests.fuzz import execute as execution
from tests.fuzz.campaign import Campaign, quiet
from tests.fuzz.execute import execute, prepare
from tests.fuzz.reader import read
from tests.fuzz.seeds import write_seeds

SECONDS = 5


@pytest.fixture(scope="module")
def seeds(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    quiet()
    return write_seeds(tmp_path_factory.mktemp("fuzz") / "good")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file() and not path.is_symlink()}


def test_seeds_are_read(seeds: list[Path]) -> None:
    for seed in seeds:
        reading = read(seed)
        assert reading.refused is None, seed.name
        assert reading.loaded, seed.name


def test_a_few_seconds(seeds: list[Path], tmp_path: Path) -> None:
    until, number, refused = time.monotonic() + SECONDS, 0, 0
    while time.monotonic() < until:
        result = execute(number, seeds, tmp_path / "input")
        assert not result.is_finding, f"{result.seed}, {result.mutations}: {result.outcome}"
        refused += result.outcome == "refused"
        number += 1
    assert refused > 0


def test_the_same_number_does_the_same(seeds: list[Path], tmp_path: Path) -> None:
    for number in range(20):
        first = prepare(number, seeds, tmp_path / "first"), contents(tmp_path / "first")
        assert (prepare(number, seeds, tmp_path / "second"), contents(tmp_path / "second")) == first


@pytest.mark.parametrize("fault", ["crash", "memory"])
def test_a_fault_is_found(seeds: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    def faulty(folder: Path, measure: bool = False, transformers: bool = True) -> None:
        if fault == "memory":
            bytearray(2**30)
        raise KeyError("a fault")

    monkeypatch.setattr(execution, "read", faulty)
    result = execute(3, seeds, tmp_path / "input")
    assert result.is_finding
    assert ("MemoryError" if fault == "memory" else "KeyError: 'a fault'") in result.outcome


def test_findings_are_kept(seeds: list[Path], tmp_path: Path) -> None:
    """Also what a child that died, or hung, was doing."""
    campaign = Campaign(seeds[0].parents[2], tmp_path / "findings")
    assert campaign._lost(7, "the process ended with -11") == 8
    kept = json.loads((tmp_path / "findings" / "7" / "finding.json").read_text())
    assert (kept["number"], kept["outcome"]) == (7, "the process ended with -11")
    prepare(7, seeds, tmp_path / "again")
    assert contents(tmp_path / "findings" / "7" / "input") == contents(tmp_path / "again")
