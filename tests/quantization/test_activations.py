"""Hidden states come back bit by bit, from memory or from a file, and leave nothing behind."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from compress.errors import WorkspaceError
from compress.quantization.activations import Activations

SHAPES = [(3, 5, 4), (1, 2, 4), (2, 7, 4)]
BYTES = 4 * sum(a * b * c for a, b, c in SHAPES)
CPU = torch.device("cpu")


def states() -> list[Tensor]:
    """Among them values that only an exact copy keeps, and one that is not contiguous."""
    draw = torch.Generator().manual_seed(0)
    made = [torch.randn(shape, generator=draw) for shape in SHAPES]
    made[0].view(-1)[:5] = torch.tensor([torch.nan, torch.inf, -0.0, 1e-42, 3.0])
    made[2] = torch.randn(7, 2, 4, generator=draw).transpose(0, 1)
    return made


def written(budget: int, path: Path | None) -> Activations:
    made = Activations(SHAPES, budget, path)
    for tensor in states():
        made.write(tensor)
    made.close()
    return made


def assert_holds(activations: Activations) -> None:
    for index in (2, 0, 1, 0):
        found = activations.read(index, CPU)
        assert found.shape == SHAPES[index] and found.dtype == torch.float32
        assert found.contiguous().numpy().tobytes() == states()[index].contiguous().numpy().tobytes()


@pytest.mark.parametrize("budget", [0, BYTES - 1, BYTES, 10**9])
def test_round_trip_with_a_file(tmp_path: Path, budget: int) -> None:
    path = tmp_path / "states"
    made = written(budget, path)
    assert made.bytes == BYTES == path.stat().st_size
    plain = np.fromfile(path, dtype="<f4")
    expected = np.concatenate([tensor.contiguous().numpy().ravel() for tensor in states()])
    assert plain.tobytes() == expected.tobytes()
    assert_holds(made)
    assert_holds(Activations.reopen(SHAPES, path))


def test_round_trip_in_memory() -> None:
    made = written(0, None)
    assert made.path is None
    assert_holds(made)
    made.discard()


@pytest.mark.parametrize(("budget", "kept"), [(BYTES, True), (BYTES - 1, False)])
def test_what_is_larger_than_the_budget_is_read_from_the_file(tmp_path: Path, budget: int, kept: bool) -> None:
    """A file that is zeroed behind its back changes what is read, unless that is in memory."""
    path = tmp_path / "states"
    made = written(budget, path)
    path.write_bytes(bytes(BYTES))
    assert bool((made.read(1, CPU) == 0).all()) != kept


@pytest.mark.parametrize("change", [-1, -BYTES, 4])
def test_a_file_of_another_size(tmp_path: Path, change: int) -> None:
    path = tmp_path / "states"
    written(0, path)
    path.write_bytes((path.read_bytes() + bytes(4))[: BYTES + change])
    with pytest.raises(WorkspaceError, match=rf"has {BYTES + change} bytes, not {BYTES}") as caught:
        Activations.reopen(SHAPES, path)
    assert "--restart" in caught.value.remedy


def test_a_file_that_is_cut_off_while_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "states"
    written(0, path)
    made = Activations.reopen(SHAPES, path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(WorkspaceError, match="ended too early"):
        made.read(2, CPU)


@pytest.mark.parametrize("budget", [0, BYTES])
def test_discard(tmp_path: Path, budget: int) -> None:
    path = tmp_path / "states"
    made = written(budget, path)
    assert_holds(made)
    made.discard()
    assert not path.exists()
    made.discard()
    with pytest.raises(FileNotFoundError):
        Activations.reopen(SHAPES, path)


def test_wrong_shapes_are_noticed(tmp_path: Path) -> None:
    made = Activations(SHAPES, 0, tmp_path / "states")
    with pytest.raises(AssertionError):
        made.write(torch.zeros(SHAPES[1]))
