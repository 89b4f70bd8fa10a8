"""Reading and writing shards: the same data through the safetensors library, and files made to mislead a reader."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from compress.errors import ArtifactError, ModelError
from compress.modeling.io import INDEX, WEIGHTS, Checkpoint, read_tensors
from compress.modeling.layout import DTYPES, entry_of, plan_shards
from compress.modeling.writer import ShardWriter, write_tensors


def samples() -> dict[str, torch.Tensor]:
    """Every dtype, odd sizes, a scalar, an empty tensor."""
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"t.{name}": torch.randint(0, 2, (3, 5), generator=generator).to(dtype) for name, dtype in DTYPES.items()
    }
    tensors["odd"] = torch.randint(-128, 128, (7,), generator=generator, dtype=torch.int8)
    tensors["scalar"] = torch.tensor(3.5)
    tensors["empty"] = torch.empty(0, 4)
    return tensors


def equal(left: torch.Tensor, right: torch.Tensor) -> bool:
    return left.dtype == right.dtype and torch.equal(left.view(torch.uint8), right.view(torch.uint8))


def write(folder: Path, tensors: dict[str, torch.Tensor], max_shard_bytes: int) -> list[Path]:
    writer = ShardWriter(folder, [entry_of(name, tensor) for name, tensor in tensors.items()], max_shard_bytes)
    for name in reversed(tensors):  # any order
        writer.add(name, tensors[name])
    return writer.close()


@pytest.mark.parametrize("max_shard_bytes", [10**9, 200, 1], ids=["one", "several", "each"])
def test_written_shards_read_back_by_the_library(tmp_path: Path, max_shard_bytes: int) -> None:
    tensors = samples()
    paths = write(tmp_path, tensors, max_shard_bytes)
    found: dict[str, torch.Tensor] = {}
    for path in paths:
        if path.suffix == ".safetensors":
            found |= safetensors.torch.load_file(path)
    assert found.keys() == tensors.keys()
    assert all(found[name].shape == tensors[name].shape for name in tensors)
    assert all(equal(found[name].reshape(-1), tensors[name].reshape(-1)) for name in tensors if tensors[name].numel())


@pytest.mark.parametrize("max_shard_bytes", [10**9, 200, 1], ids=["one", "several", "each"])
def test_written_shards_read_back_by_us(tmp_path: Path, max_shard_bytes: int) -> None:
    tensors = samples()
    paths = write(tmp_path, tensors, max_shard_bytes)
    checkpoint = Checkpoint(tmp_path)
    assert checkpoint.names() == sorted(tensors)
    for name, tensor in tensors.items():
        assert checkpoint.info(name).shape == tensor.shape
        assert equal(checkpoint.read(name).reshape(-1), tensor.reshape(-1))
    assert checkpoint.total_bytes == sum(path.stat().st_size for path in paths if path.suffix == ".safetensors")
    entries = [entry_of(name, tensor) for name, tensor in tensors.items()]
    assert checkpoint.total_bytes == sum(shard.nbytes for shard in plan_shards(entries, max_shard_bytes))


def test_shard_size_is_kept(tmp_path: Path) -> None:
    tensors = {f"w{i}": torch.zeros(10, dtype=torch.int8) for i in range(10)}
    write(tmp_path, tensors, 35)
    shards = {info.shard for info in map(Checkpoint(tmp_path).info, tensors)}
    assert sorted(shards) == [f"model-{i:05d}-of-00004.safetensors" for i in range(1, 5)]
    assert json.loads((tmp_path / INDEX).read_text())["metadata"]["total_size"] == 100


def test_files_of_the_library_read_by_us(tmp_path: Path) -> None:
    tensors = samples()
    safetensors.torch.save_file(tensors, tmp_path / WEIGHTS, metadata={"format": "pt"})
    checkpoint, whole = Checkpoint(tmp_path), read_tensors(tmp_path / WEIGHTS)
    for name, tensor in tensors.items():
        for found in (checkpoint.read(name), whole[name]):
            assert found.shape == tensor.shape
            assert equal(found.reshape(-1), tensor.reshape(-1))


def test_write_tensors_is_one_readable_file(tmp_path: Path) -> None:
    tensors = samples()
    write_tensors(tmp_path / "unit.safetensors", tensors)
    found = safetensors.torch.load_file(tmp_path / "unit.safetensors")
    assert all(equal(found[name].reshape(-1), tensors[name].reshape(-1)) for name in tensors if tensors[name].numel())


def test_writer_insists_on_its_plan(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, [entry_of("w", torch.zeros(2))])
    with pytest.raises(ValueError, match="planned as"):
        writer.add("w", torch.zeros(3))
    with pytest.raises(ValueError, match="never added"):
        writer.close()
    writer.add("w", torch.ones(2))
    with pytest.raises(ValueError, match="added before"):
        writer.add("w", torch.ones(2))


Row = dict[str, Any]


def row(begin: int, end: int, shape: list[int] | None = None, dtype: str = "F32") -> Row:
    return {"dtype": dtype, "shape": [(end - begin) // 4] if shape is None else shape, "data_offsets": [begin, end]}


def raw_file(path: Path, table: object, data: int, length: int | None = None) -> None:
    text = table if isinstance(table, bytes) else json.dumps(table).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + bytes(data))


BROKEN: dict[str, tuple[Callable[[Path], None], str]] = {
    "empty": (lambda path: path.write_bytes(b"") and None, "too few"),
    "header longer than the file": (lambda path: raw_file(path, {}, 0, length=10**6), "too few"),
    "absurd header length": (lambda path: raw_file(path, {}, 0, length=2**63), "too few"),
    "no JSON": (lambda path: raw_file(path, b"{nonsense", 0), "not JSON"),
    "deep JSON": (lambda path: raw_file(path, b"[" * 200_000, 0), "not JSON"),
    "no table": (lambda path: raw_file(path, [1], 0), "not a table"),
    "no entry": (lambda path: raw_file(path, {"a": 3}, 0), "'a' is not dtype"),
    "truncated": (lambda path: raw_file(path, {"a": row(0, 8)}, 5), "ends at byte"),
    "overlap": (lambda path: raw_file(path, {"a": row(0, 8), "b": row(4, 12)}, 12), "'b' overlaps"),
    "hole": (lambda path: raw_file(path, {"a": row(0, 8), "b": row(12, 16)}, 16), "hole before tensor 'b'"),
    "trailing": (lambda path: raw_file(path, {"a": row(0, 8)}, 12), "tensors end at byte"),
    "past the end": (lambda path: raw_file(path, {"a": row(10**15, 10**15 + 8)}, 8), "ends at byte"),
    "backwards": (lambda path: raw_file(path, {"a": row(8, 0, [2])}, 8), "the range 8..0"),
    "negative": (lambda path: raw_file(path, {"a": row(-8, 0, [2])}, 8), "the range -8..0"),
    "wrong product": (lambda path: raw_file(path, {"a": row(0, 8, [3])}, 8), "of 12 bytes"),
    "overflowing shape": (lambda path: raw_file(path, {"a": row(0, 8, [2**40, 2**40])}, 8), "has shape"),
    "negative extent": (lambda path: raw_file(path, {"a": row(0, 8, [-2, -1])}, 8), "has shape"),
    "unknown dtype": (lambda path: raw_file(path, {"a": row(0, 8, dtype="F4")}, 8), "dtype 'F4'"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_files_are_refused(tmp_path: Path, case: str) -> None:
    make, message = BROKEN[case]
    make(tmp_path / WEIGHTS)
    with pytest.raises(ModelError, match=message) as caught:
        Checkpoint(tmp_path)
    assert str(tmp_path / WEIGHTS) in str(caught.value)
    assert caught.value.remedy
    with pytest.raises(ArtifactError):
        Checkpoint(tmp_path, ArtifactError)


def index(folder: Path, weight_map: object) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"w": "model-00002-of-00002.safetensors"}, "is missing"),
        ({"w": "../model.safetensors"}, "outside the folder"),
        ({"w": "/etc/passwd"}, "outside the folder"),
        ({"w": "..\\model.safetensors"}, "outside the folder"),
        ({"other": "a.safetensors"}, "'other' is in a.safetensors, and it is not there"),
        (["w"], "no table 'weight_map'"),
        ({"w": 3}, "no table 'weight_map'"),
    ],
)
def test_index_that_does_not_fit(tmp_path: Path, weight_map: object, message: str) -> None:
    write_tensors(tmp_path / "a.safetensors", {"w": torch.zeros(2)})
    index(tmp_path, weight_map)
    with pytest.raises(ModelError, match=message) as caught:
        Checkpoint(tmp_path)
    assert str(tmp_path / INDEX) in str(caught.value)


def test_index_that_is_no_json(tmp_path: Path) -> None:
    (tmp_path / INDEX).write_text("{")
    with pytest.raises(ModelError, match="is not JSON"):
        Checkpoint(tmp_path)


def test_tensor_in_two_shards(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_tensors(tmp_path / f"{name}.safetensors", {"w": torch.zeros(2), name: torch.zeros(1)})
    index(tmp_path, {"a": "a.safetensors", "b": "b.safetensors"})
    with pytest.raises(ModelError, match="'w' is in two shards"):
        Checkpoint(tmp_path)


def test_pickles_and_nothing(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"has no model\.safetensors"):
        Checkpoint(tmp_path)
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(ModelError, match=r"pickles \(pytorch_model\.bin\).* save_pretrained, which writes safetensors"):
        Checkpoint(tmp_path)


def test_file_truncated_after_opening(tmp_path: Path) -> None:
    write_tensors(tmp_path / WEIGHTS, {"w": torch.zeros(100)})
    checkpoint = Checkpoint(tmp_path)
    with (tmp_path / WEIGHTS).open("r+b") as file:
        file.truncate(300)
    with pytest.raises(ModelError, match="ended inside tensor 'w'"):
        checkpoint.read("w")
    with pytest.raises(ModelError, match="damaged"):
        Checkpoint(tmp_path)


def test_unknown_tensor(tmp_path: Path) -> None:
    write_tensors(tmp_path / WEIGHTS, {"w": torch.zeros(1)})
    with pytest.raises(ModelError, match="holds no tensor 'v'"):
        Checkpoint(tmp_path).read("v")
