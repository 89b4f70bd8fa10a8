"""A training divided between two processes is that of one: the same losses, gradients, checkpoints and students."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.distillation.divided import ALL, TWO, distilled, train
from tests.processes import run_processes
from tests.tiny_models import write_llama, write_text

SAVING: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("divided")
    text = write_text(folder)
    write_llama(folder / "teacher", text, hidden=48, seed=1)
    write_llama(folder / "student", text, seed=2)
    return folder


@pytest.fixture(scope="module")
def one(folder: Path) -> dict[str, list[dict[str, float]]]:
    """The trainings of one process."""
    return {
        "all": train(folder / "one", ALL, **SAVING),
        "fused": train(folder / "one_fused", TWO, fused=True),
        "muon": train(folder / "one_muon", TWO, optimizer="muon"),
    }


@pytest.fixture(scope="module")
def two(folder: Path, one: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    """What two processes find."""
    ended = run_processes([str(Path(__file__).with_name("divided.py")), str(folder)], timeout=170)
    assert [process.returncode for process in ended] == [0, 0], ended[0].stderr[-3000:] + ended[1].stderr[-3000:]
    found: dict[str, Any] = json.loads((folder / "found.json").read_text(encoding="utf-8"))
    return found


def assert_same(got: list[dict[str, float]], want: list[dict[str, float]], rel: float = 1e-5) -> None:
    """Losses within `rel`, the norm of gradients within ten times that: some divide by what is nearly zero."""
    assert len(got) == len(want) > 0
    for here, there in zip(got, want, strict=True):
        assert here.keys() == there.keys()
        for name, value in there.items():
            assert here[name] == pytest.approx(value, rel=10 * rel if name == "grad_norm" else rel), name


@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_every_kind_of_loss_has_the_curve_of_one_process(mode: str, one: dict[str, Any], two: dict[str, Any]) -> None:
    assert {f"loss_{name}" for name in ALL} < one["all"][0].keys()
    assert_same(two[mode], one["all"])


@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_fused_losses_too(mode: str, one: dict[str, Any], two: dict[str, Any]) -> None:
    assert_same(two[f"{mode} fused"], one["fused"])


def test_a_student_that_accelerate_shards_too(one: dict[str, Any], two: dict[str, Any]) -> None:
    assert_same(two["accelerate"], one["fused"])


def test_muon_differs_by_its_half_precision(one: dict[str, Any], two: dict[str, Any]) -> None:
    assert_same(two["fsdp muon"], one["muon"], rel=2e-3)


@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_two_processes_take_up_the_checkpoint_of_one(mode: str, one: dict[str, Any], two: dict[str, Any]) -> None:
    assert_same(two[f"{mode} resumed"], one["all"])


@pytest.mark.parametrize("name", ["fsdp", "fsdp_resumed"])
def test_one_process_takes_up_the_checkpoint_of_two(
    name: str, folder: Path, one: dict[str, Any], two: dict[str, Any], tmp_path: Path
) -> None:
    step = {"fsdp": 2, "fsdp_resumed": 4}[name]
    resumed = train(tmp_path, ALL, resume=str(folder / name / f"checkpoint-{step}"))
    assert_same(resumed, one["all"])


@pytest.mark.parametrize("name", ["fsdp_muon", "accelerate"])
def test_the_checkpoint_of_a_sharded_student_is_an_ordinary_one(name: str, folder: Path, two: dict[str, Any]) -> None:
    ours, theirs = folder / "one" / "checkpoint-2", folder / name / "checkpoint-2"
    weights, want = load_file(theirs / "model.safetensors"), load_file(ours / "model.safetensors")
    assert {key: value.shape for key, value in weights.items()} == {key: value.shape for key, value in want.items()}
    assert json.loads((theirs / "config.json").read_text()) == json.loads((ours / "config.json").read_text())
    state = torch.load(theirs / "optimizer.pt", weights_only=True)
    parts = state.values() if name == "fsdp_muon" else [state]
    assert all(type(value) is torch.Tensor for part in parts for e in part["state"].values() for value in e.values())


def test_a_loss_that_is_not_finite_on_one_process_ends_all(two: dict[str, Any]) -> None:
    assert len(two["diverged"]) == 2
    assert all("NumericsError: The loss at step 1 is nan" in text for text in two["diverged"])


def test_what_cannot_be_divided_is_refused(two: dict[str, Any]) -> None:
    assert all("'together' compares positions" in text for text in two["undivided"])
    assert all("4" not in text and "batch of 3 sequences cannot be divided" in text for text in two["uneven"])
    assert all("accelerate shards on accelerators alone" in text for text in two["on a CPU"])


@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_the_stage_publishes_the_student_of_one_process(
    mode: str, folder: Path, two: dict[str, Any], tmp_path: Path
) -> None:
    record = distilled(folder, tmp_path / "out", fused=True)
    for (_, got), (_, want) in zip(two[f"stage {mode}"], record["loss"], strict=True):
        assert got == pytest.approx(want, rel=1e-5)
    made, want_made = (
        load_file(folder / f"stage_{mode}" / "model.safetensors"),
        load_file(tmp_path / "out" / "model.safetensors"),
    )
    assert made.keys() == want_made.keys()
    for name, tensor in want_made.items():
        assert made[name].dtype == tensor.dtype
        assert torch.allclose(made[name].float(), tensor.float(), atol=2e-3), name


def test_a_clock_ends_all_processes_at_the_same_step(two: dict[str, Any]) -> None:
    first, second = two["clock"]
    assert 0 < first == second < 100_000
