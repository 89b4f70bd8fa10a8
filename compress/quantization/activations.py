"""The hidden states between two blocks, batch by batch: in memory as far as a budget goes, and in a file.

The file is what a run that was killed goes on from, so it is always there when there is a folder for it: float32,
batch after batch, row-major. What is in memory is a copy that saves reading; a file that was just written is mostly in
the system's page cache as well, which gives way when memory is short. Batches are cut into chunks with a file each
(`ChunkedActivations`), so that processes that share the batches can take them up in other numbers than they began.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from io import BufferedReader, BufferedWriter
from pathlib import Path

import torch
from torch import Tensor

from compress.errors import WorkspaceError


class Activations:
    """Hidden states of each batch, float32 of the given shapes. Written once, batch by batch in order, then read.

    `budget`: bytes that may be kept in memory. `path` None: no file, all in memory.
    """

    def __init__(self, shapes: Sequence[tuple[int, ...]], budget: int, path: Path | None = None) -> None:
        self.shapes = [tuple(shape) for shape in shapes]
        sizes = [4 * torch.Size(shape).numel() for shape in self.shapes]
        self._starts = [sum(sizes[:index]) for index in range(len(sizes))]
        self.bytes = sum(sizes)
        self._resident = path is None or self.bytes <= budget
        self._kept: list[Tensor] = []
        self._path = path
        self._writer: BufferedWriter | None = None
        self._reader: BufferedReader | None = None
        self._written = 0

    @property
    def written(self) -> int:
        """Batches that were written so far."""
        return self._written

    @property
    def path(self) -> Path | None:
        return self._path

    def write(self, hidden: Tensor) -> None:
        """Append the next batch."""
        assert tuple(hidden.shape) == self.shapes[self._written]
        if self._resident:
            self._kept.append(hidden)
        if self._path is not None:
            if self._writer is None:
                self._writer = self._path.open("wb")
            self._writer.write(hidden.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
        self._written += 1

    def close(self) -> None:
        """End of writing: the file has all that was written."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    @classmethod
    def reopen(cls, shapes: Sequence[tuple[int, ...]], path: Path) -> Activations:
        """Those that an earlier process wrote to `path`. Raises `WorkspaceError` when the file is of another size."""
        found = cls(shapes, 0, path)
        if path.stat().st_size != found.bytes:
            raise WorkspaceError(f"'{path}' has {path.stat().st_size} bytes, not {found.bytes}.", remedy="--restart")
        found._written = len(found.shapes)
        return found

    def read(self, index: int, device: torch.device) -> Tensor:
        """Batch `index`, on `device`."""
        if self._kept:
            return self._kept[index].to(device)
        assert self._path is not None
        if self._reader is None:
            self._reader = self._path.open("rb")
        buffer = bytearray(4 * torch.Size(self.shapes[index]).numel())
        self._reader.seek(self._starts[index])
        if self._reader.readinto(buffer) != len(buffer):
            raise WorkspaceError(f"'{self._path}' ended too early.", remedy="Begin anew with --restart.")
        return torch.frombuffer(buffer, dtype=torch.float32).view(self.shapes[index]).to(device)

    def discard(self) -> None:
        """Remove the file and let go of the memory."""
        if self._reader is not None:
            self._reader.close()
        self._kept.clear()
        if self._path is not None:
            self._path.unlink(missing_ok=True)


class ChunkedActivations:
    """Hidden states of consecutive chunks of batches, as if they were `Activations` of all of them.

    `budget`: bytes that may be kept in memory, given to the first chunks. `place` names the file of the chunk with a
    number, or None for none.
    """

    def __init__(
        self, chunks: Mapping[int, Sequence[tuple[int, ...]]], budget: int, place: Callable[[int], Path | None]
    ) -> None:
        self._chunks: list[Activations] = []
        for number, shapes in chunks.items():
            made = Activations(shapes, budget, place(number))
            budget = max(0, budget - made.bytes)
            self._chunks.append(made)
        self._index()

    @classmethod
    def reopen(
        cls, chunks: Mapping[int, Sequence[tuple[int, ...]]], place: Callable[[int], Path | None]
    ) -> ChunkedActivations:
        """Those whose chunks earlier processes wrote. Raises `WorkspaceError` like `Activations.reopen`."""
        found = cls({}, 0, place)
        places = {number: place(number) for number in chunks}
        found._chunks = [
            Activations.reopen(chunks[number], path) for number, path in places.items() if path is not None
        ]
        found._index()
        return found

    def _index(self) -> None:
        self._places = [(chunk, index) for chunk in self._chunks for index in range(len(chunk.shapes))]

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """Of all batches."""
        return [shape for chunk in self._chunks for shape in chunk.shapes]

    @property
    def written(self) -> int:
        """Batches that were written so far."""
        return sum(chunk.written for chunk in self._chunks)

    @property
    def paths(self) -> list[Path]:
        """The files that there are."""
        return [chunk.path for chunk in self._chunks if chunk.path is not None]

    def write(self, hidden: Tensor) -> None:
        """Append the next batch."""
        self._places[self.written][0].write(hidden)

    def close(self) -> None:
        """End of writing: the files have all that was written."""
        for chunk in self._chunks:
            chunk.close()

    def read(self, index: int, device: torch.device) -> Tensor:
        """Batch `index`, on `device`."""
        chunk, place = self._places[index]
        return chunk.read(place, device)

    def discard(self) -> None:
        """Remove the files and let go of the memory."""
        for chunk in self._chunks:
            chunk.discard()


States = Activations | ChunkedActivations
