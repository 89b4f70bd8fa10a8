"""Several processes tell each other numbers, facts and errors; sums do not depend on how many they are."""

from __future__ import annotations

import json

import pytest
import torch

from compress.distributed import World, joined, world
from compress.errors import DataError
from tests.processes import run_processes

PROGRAM = """
import json
import sys
import torch
from compress.distributed import joined
from compress.errors import DataError, DependencyError

def parts(world, number):
    for index in world.mine(number):
        draw = torch.Generator().manual_seed(index)
        yield None if index % 3 == 1 else torch.randn(7, generator=draw, dtype=torch.float64) * 10 ** (3 * index)

def fails(kind, ranks):
    def work():
        if world.rank in ranks:
            raise kind
        return world.rank
    try:
        return world.together(work)
    except Exception as error:
        return [type(error).__name__, str(error), getattr(error, "agreed", None), getattr(error, "exit_code", None)]

found = {}
with joined() as world:
    tensors = {
        "bool": torch.arange(5) % 2 == world.rank,
        "bfloat16": torch.full((2, 3), 1.5 + world.rank, dtype=torch.bfloat16),
        "other shapes": torch.arange(world.rank * 2),
        "a number": torch.tensor(world.rank + 0.1, dtype=torch.float64),
    }
    found["tensors"] = {
        name: [[str(one.dtype), list(one.shape), one.tolist()] for one in world.gather_tensors(tensor)]
        for name, tensor in tensors.items()
    }
    sent = [torch.full((3,), float(world.rank)), torch.full((2, 2), world.rank).t()]
    world.broadcast(sent, 1)
    found["broadcast"] = [one.tolist() for one in sent]
    found["gather"] = world.gather({"rank": world.rank, "text": "\\u00e9" * world.rank, "inf": float("inf")})
    found["first"] = world.on_first(lambda: {"rank": world.rank, "pi": 3.141592653589793, "tuple": (1, 2)})
    found["alone"] = fails(DataError("No rows.", remedy="Give more."), [1])
    found["both"] = fails(DataError(f"At {world.rank}."), [0, 1])
    found["package"] = fails(DependencyError("onnx", "onnx"), [1])
    found["foreign"] = fails(ValueError("odd"), [1])
    found["disk"] = fails(OSError(5, "Input/output error", "/a"), [1])
    found["none"] = fails(ValueError("odd"), [])
    sums = {number: world.summed(parts(world, number), number, torch.device("cpu")) for number in (1, 2, 5, 8)}
    found["sums"] = {number: None if one is None else [x.hex() for x in one.tolist()] for number, one in sums.items()}
print(json.dumps(found))
"""


def reference(number: int) -> list[str] | None:
    """The sum of the parts of PROGRAM, one after the other."""
    total = None
    for index in range(number):
        draw = torch.Generator().manual_seed(index)
        if index % 3 != 1:
            part = torch.randn(7, generator=draw, dtype=torch.float64) * 10 ** (3 * index)
            total = part if total is None else total + part
    return None if total is None else [x.hex() for x in total.tolist()]


def test_processes_tell_each_other_everything() -> None:
    size = 3
    done = run_processes(["-c", PROGRAM], size)
    assert [each.returncode for each in done] == [0] * size, done[0].stderr + done[1].stderr
    found = [json.loads(each.stdout) for each in done]
    for rank, one in enumerate(found):
        assert one["broadcast"] == [[1.0, 1.0, 1.0], [[1, 1], [1, 1]]]
        assert [each["text"] for each in one["gather"]] == ["é" * each for each in range(size)]
        assert one["gather"][rank]["inf"] == float("inf")
        assert one["first"] == {"rank": 0, "pi": 3.141592653589793, "tuple": [1, 2]}
        for each, tensors in one["tensors"].items():
            assert tensors == found[0]["tensors"][each]
        assert [each[2] for each in one["tensors"]["bfloat16"]] == [[[1.5 + r] * 3] * 2 for r in range(size)]
        assert [each[1] for each in one["tensors"]["other shapes"]] == [[2 * r] for r in range(size)]
        assert [each[2] for each in one["tensors"]["a number"]] == [r + 0.1 for r in range(size)]
        assert one["alone"] == ["DataError", "No rows. Give more.", True, 1]
        assert one["both"] == ["DataError", "At 0.", True, 1]
        assert one["package"][0] == "DependencyError"
        assert one["disk"][:2] == [
            "WorkspaceError",
            "'/a': Input/output error. Check the path, your rights and the free space.",
        ]
        assert one["none"] == rank
        if rank == 1:
            assert one["foreign"][:2] == ["ValueError", "odd"], "whose traceback is the one that helps"
        else:
            assert one["foreign"][0] == "OtherProcessError"
            assert f"Process 1 of {size}" in one["foreign"][1]
            assert "odd" in one["foreign"][1]
        for number in (1, 2, 5, 8):
            assert one["sums"][str(number)] == reference(number)


def test_one_process_alone_has_no_process_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "init_process_group", None)
    with joined() as alone:
        assert alone == World(0, 1) == world()
        assert alone.gather(1) == [1]
        assert alone.on_first(lambda: (1, 2)) == (1, 2)
        ones = [torch.ones(2, dtype=torch.float64), None, torch.ones(2, dtype=torch.float64)]
        total = alone.summed(iter(ones), 3, torch.device("cpu"))
        assert total is not None
        assert total.tolist() == [2, 2]
        with pytest.raises(DataError):
            alone.together(lambda: (_ for _ in ()).throw(DataError("no")))


def test_what_happens_to_a_later_process_alone_says_where() -> None:
    """Not agreed: the first process cannot know, and this one must say it."""
    code = """
from compress.distributed import joined
from compress.errors import CompressError, DataError
try:
    with joined() as world:
        if world.rank == 1:
            raise DataError("No rows.", remedy="Give more.")
        world.gather(1)
except CompressError as error:
    print(type(error).__name__, error)
"""
    first, second = run_processes(["-c", code])
    assert second.stdout == "OtherProcessError Process 1 of 2 (counted from 0): No rows. Give more.\n"
    assert "OtherProcessError Another process of this run has ended" in first.stdout
    assert "takes the run up again" in first.stdout
