"""Where a table is kept while it is measured, and after: in memory, or in a work folder of its own.

The folder is like any work folder: it belongs to the arguments that decide the table (the model's files, codec,
transform, data, seed), and not to the rate, so that one table serves every rate.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from compress.distributed import world
from compress.errors import WorkspaceError
from compress.modeling.io import read_tensors
from compress.modeling.writer import write_tensors
from compress.storage import disk_errors
from compress.workspace import Workspace

TABLE = "table"


class Store(Protocol):
    """The payloads and the record of each block that was measured; the table; facts of searches and runs by name."""

    def has(self, index: int) -> bool: ...

    def put(self, index: int, payloads: Mapping[str, Tensor], record: Mapping[str, Any]) -> None: ...

    def record(self, index: int) -> Mapping[str, Any]: ...

    def payloads(self, index: int) -> Mapping[str, Tensor]: ...

    def fact(self, name: str) -> dict[str, Any] | None: ...

    def put_fact(self, name: str, fact: Mapping[str, Any]) -> None: ...


class StoreInMemory:
    """For a model in memory: gone when the widths are chosen."""

    def __init__(self) -> None:
        self._blocks: dict[int, tuple[Mapping[str, Tensor], Mapping[str, Any]]] = {}
        self._facts: dict[str, dict[str, Any]] = {}

    def has(self, index: int) -> bool:
        return index in self._blocks

    def put(self, index: int, payloads: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
        self._blocks[index] = payloads, record

    def record(self, index: int) -> Mapping[str, Any]:
        return self._blocks[index][1]

    def payloads(self, index: int) -> Mapping[str, Tensor]:
        return self._blocks[index][0]

    def fact(self, name: str) -> dict[str, Any] | None:
        return self._facts.get(name)

    def put_fact(self, name: str, fact: Mapping[str, Any]) -> None:
        self._facts[name] = dict(fact)


class StoreInFolder:
    """In the units of `workspace`; the payloads of one block stay in memory, those that were asked for last."""

    def __init__(self, workspace: Workspace) -> None:
        self._workspace = workspace
        self._records: dict[int, Mapping[str, Any]] = {}
        self._last: tuple[int, Mapping[str, Tensor]] = (-1, {})

    def has(self, index: int) -> bool:
        if index not in self._records:
            record = self._workspace.done(f"block/{index:05d}")
            if record is not None:
                self._records[index] = record
        return index in self._records

    def put(self, index: int, payloads: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
        path = self._path(index)
        with disk_errors(path):
            world().on_first(lambda: write_tensors(path, payloads))
        self._workspace.commit(f"block/{index:05d}", [path], record)
        self._records[index] = record

    def record(self, index: int) -> Mapping[str, Any]:
        return self._records[index]

    def payloads(self, index: int) -> Mapping[str, Tensor]:
        if self._last[0] != index:
            self._last = index, read_tensors(self._path(index), WorkspaceError)
        return self._last[1]

    def fact(self, name: str) -> dict[str, Any] | None:
        return self._workspace.done(name)

    def put_fact(self, name: str, fact: Mapping[str, Any]) -> None:
        self._workspace.commit(name, [], fact)

    def _path(self, index: int) -> Path:
        return self._workspace.path("blocks", f"{index:05d}.safetensors")
