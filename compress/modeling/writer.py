"""Writing safetensors shards as `layout` planned them, one tensor in memory at a time, in any order."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from io import BufferedRandom
from pathlib import Path
from types import TracebackType

import torch

from compress.modeling.folders import INDEX
from compress.modeling.layout import Entry, Shard, entry_of, plan_shards

MAX_SHARD_BYTES = 5_000_000_000


class ShardWriter:
    """Writes planned `entries` as shards of at most `max_shard_bytes`, plus an index when there are several.

    `add` takes the tensors in any order; each goes straight to its place in its file. `close` checks that all are
    there, syncs the files and writes the index. Used as a context manager, an exception leaves unfinished files behind
    for the caller, who owns the folder, to remove.
    """

    def __init__(self, folder: Path, entries: Iterable[Entry], max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
        self.folder = folder
        self.shards = plan_shards(entries, max_shard_bytes)
        self._place = {entry.name: (shard, entry) for shard in self.shards for entry in shard.entries}
        self._missing = set(self._place)
        self._files: dict[str, BufferedRandom] = {}

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Write one planned tensor. Its dtype and shape must be those of the plan."""
        shard, planned = self._place[name]
        if entry_of(name, tensor) != planned:
            raise ValueError(f"'{name}' was planned as {planned} and is {entry_of(name, tensor)}")
        if name not in self._missing:
            raise ValueError(f"'{name}' was added before")
        file = self._file(shard)
        file.seek(shard.offsets[name])
        file.write(tensor_bytes(tensor))
        self._missing.remove(name)

    def close(self) -> list[Path]:
        """Sync all files and return their paths, the index last when there is one."""
        if self._missing:
            raise ValueError(f"planned and never added: {sorted(self._missing)[:5]}")
        paths = []
        for shard in self.shards:
            file = self._file(shard)
            file.flush()
            os.fsync(file.fileno())
            file.close()
            paths.append(self.folder / shard.filename)
        if len(self.shards) > 1:
            paths.append(self._write_index())
        return paths

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if error is None:
            self.close()
            return
        for file in self._files.values():
            file.close()

    def _file(self, shard: Shard) -> BufferedRandom:
        if shard.filename not in self._files:
            file = (self.folder / shard.filename).open("w+b")
            file.write(shard.header)
            file.truncate(shard.nbytes)
            self._files[shard.filename] = file
        return self._files[shard.filename]

    def _write_index(self) -> Path:
        weight_map = {entry.name: shard.filename for shard in self.shards for entry in shard.entries}
        total = sum(entry.nbytes for shard in self.shards for entry in shard.entries)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        path = self.folder / INDEX
        with path.open("w", encoding="utf-8") as file:
            file.write(json.dumps(index, indent=2) + "\n")
            file.flush()
            os.fsync(file.fileno())
        return path


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The little-endian bytes of `tensor` in row-major order."""
    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """One safetensors file with `tensors`, written and synced. The caller makes it atomic."""
    entries = [entry_of(name, tensor) for name, tensor in tensors.items()]
    (shard,) = plan_shards(entries, max_shard_bytes=sum(entry.nbytes for entry in entries), stem=path.stem)
    with path.open("wb") as file:
        file.write(shard.header)
        for entry in shard.entries:
            file.write(tensor_bytes(tensors[entry.name]))
        file.flush()
        os.fsync(file.fileno())
