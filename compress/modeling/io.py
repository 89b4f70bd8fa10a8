"""Reading checkpoints of safetensors shards, one tensor in memory at a time.

`Checkpoint` opens a folder, reads the headers only (a few kilobytes a gigabyte) and checks them against the format's
rules before anything is trusted: sizes against the file, ranges against each other, the index against the shards.
Files are read, not mapped into memory: mapped pages would count as memory used, and a file that is truncated while it
is mapped kills the process instead of raising an error. Writing is in `writer`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from compress.errors import CompressError, ModelError, quoted
from compress.modeling.folders import CONVERT, INDEX, WEIGHTS, not_a_model
from compress.modeling.headers import TensorInfo, read_header
from compress.modeling.layout import DTYPES
from compress.plain_json import parse_json
from compress.storage import is_inside


class Checkpoint:
    """The tensors of a model folder, by name. Opening reads every shard's header and checks it (see `headers`).

    `error` is the class of error raised, `ModelError` for models, `ArtifactError` where the folder is an artifact.
    """

    def __init__(self, folder: Path, error: type[CompressError] = ModelError) -> None:
        self.folder = folder
        self._error = error
        self._infos: dict[str, TensorInfo] = {}
        index = self._index()
        for shard in sorted(set(index.values())) or [WEIGHTS]:
            for name, info in read_header(folder / shard, error).items():
                if name in self._infos:
                    raise error(
                        f"Tensor {quoted(name)} is in two shards of '{folder}', {self._infos[name].shard} and {shard}.",
                        remedy="Save the model again.",
                    )
                self._infos[name] = info
        self._check_index(index)

    def names(self) -> list[str]:
        """Names of all tensors, sorted."""
        return sorted(self._infos)

    def shards(self) -> list[str]:
        """File names of the shards, sorted."""
        return sorted({info.shard for info in self._infos.values()})

    def info(self, name: str) -> TensorInfo:
        """Shape, dtype and place of tensor `name`."""
        if name not in self._infos:
            raise self._error(
                f"'{self.folder}' holds no tensor {quoted(name)}.", remedy="Check that the folder is complete."
            )
        return self._infos[name]

    def read(self, name: str) -> torch.Tensor:
        """Tensor `name`, with its stored dtype, in memory of its own."""
        return _read_tensor(self.folder / self.info(name).shard, name, self.info(name), self._error)

    @property
    def total_bytes(self) -> int:
        """Bytes of the weight files on disk, headers included."""
        return sum((self.folder / shard).stat().st_size for shard in self.shards())

    def _index(self) -> Mapping[str, str]:
        """The shard of each tensor as the index says it; empty where all tensors are in one file."""
        if (self.folder / WEIGHTS).is_file():
            return {}
        path = self.folder / INDEX
        if not path.is_file():
            raise not_a_model(self.folder, f"{WEIGHTS} or {INDEX}", self._error)
        try:
            index = parse_json(path.read_bytes())
        except ValueError as error:
            raise self._error(f"'{path}' is not JSON: {error}.", remedy="Copy the file again.") from error
        table = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(table, dict) or not table or not all(isinstance(shard, str) for shard in table.values()):
            raise self._error(f"'{path}' has no table 'weight_map'.", remedy="Copy the file again.")
        for shard in sorted(set(table.values())):
            self._check_shard(path, shard)
        return table

    def _check_shard(self, index: Path, shard: str) -> None:
        """Raise unless `shard` is the plain name of a safetensors file in the folder. A link there is followed: the
        hub's cache consists of them."""
        if Path(shard).name != shard or not is_inside(shard):
            raise self._error(f"'{index}' names {quoted(shard)}, which is outside the folder.", remedy="Do not use it.")
        if not shard.endswith(".safetensors"):
            raise self._error(
                f"'{index}' names {quoted(shard)}, which is no safetensors file.",
                remedy=CONVERT,
            )
        if not (self.folder / shard).is_file():
            raise self._error(
                f"'{index}' names {quoted(shard)}, which is missing.", remedy="Copy the whole folder again."
            )

    def _check_index(self, index: Mapping[str, str]) -> None:
        for name, shard in index.items():
            if name not in self._infos or self._infos[name].shard != shard:
                raise self._error(
                    f"'{self.folder / INDEX}' says that tensor {quoted(name)} is in {shard}, and it is not there.",
                    remedy="Index and shards are of different versions; copy the whole folder again.",
                )


def stream_tensors(path: Path, error: type[CompressError] = ModelError) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of one safetensors file with their names, one in memory at a time, after the checks of `headers`."""
    for name, info in read_header(path, error).items():
        yield name, _read_tensor(path, name, info, error)


def read_tensors(path: Path, error: type[CompressError] = ModelError) -> dict[str, torch.Tensor]:
    """All tensors of one safetensors file, after the checks of `headers`."""
    return dict(stream_tensors(path, error))


def _read_tensor(path: Path, name: str, info: TensorInfo, error: type[CompressError]) -> torch.Tensor:
    if info.nbytes == 0:
        return torch.empty(info.shape, dtype=DTYPES[info.dtype])
    buffer = bytearray(info.nbytes)
    with path.open("rb") as file:
        file.seek(info.offset)
        if file.readinto(buffer) != info.nbytes:
            raise error(f"'{path}' ended inside tensor {quoted(name)}.", remedy="Copy it again.")
    return torch.frombuffer(buffer, dtype=DTYPES[info.dtype]).reshape(info.shape)
