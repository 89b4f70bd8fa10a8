"""The header of a safetensors file, checked before it is believed.

Every rule here answers a file that would otherwise crash a reader, or make it read what it should not: a header longer
than the file, ranges that overlap, leave holes, run backwards or past the end, a shape whose product is not the range.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from compress.errors import CompressError
from compress.modeling.layout import DTYPES, count

# the limit of the reference implementation
MAX_HEADER_BYTES = 100_000_000


@dataclass(frozen=True)
class TensorInfo:
    """A stored tensor: shape, dtype (`F32`, `BF16`, ...), its shard's file name, its bytes and where they begin."""

    shape: tuple[int, ...]
    dtype: str
    shard: str
    nbytes: int
    offset: int


def read_header(path: Path, error: type[CompressError]) -> dict[str, TensorInfo]:
    """The tensors of the file at `path`. Raises `error`, naming path and tensor, for any header that breaks a rule."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(MAX_HEADER_BYTES, size - 8):
            raise _broken(path, f"it has {size} bytes, too few for its header", error)
        text = file.read(length)
    try:
        table = json.loads(text)
    except (ValueError, RecursionError) as cause:
        raise _broken(path, "its header is not JSON", error) from cause
    if not isinstance(table, dict):
        raise _broken(path, "its header is not a table", error)
    table.pop("__metadata__", None)
    begin = 8 + length
    infos = {name: _tensor_info(path, name, row, begin, error) for name, row in table.items()}
    _check_ranges(path, infos, begin, size, error)
    return infos


def _tensor_info(path: Path, name: str, row: object, begin: int, error: type[CompressError]) -> TensorInfo:
    match row:
        case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [int(first), int(last)]}:
            pass
        case _:
            raise _broken(path, f"the entry of tensor '{name}' is not dtype, shape and data_offsets", error)
    if dtype not in DTYPES:
        raise error(
            f"Tensor '{name}' in '{path}' has dtype {dtype}, which is not supported.",
            remedy=f"Save the model with one of {', '.join(DTYPES)}.",
        )
    if not all(isinstance(extent, int) and extent >= 0 for extent in shape):
        raise _broken(path, f"tensor '{name}' has shape {shape}", error)
    nbytes = count(shape) * DTYPES[dtype].itemsize
    if not 0 <= first <= last or last - first != nbytes:
        raise _broken(path, f"tensor '{name}' of {nbytes} bytes has the range {first}..{last}", error)
    return TensorInfo(tuple(shape), dtype, path.name, nbytes, begin + first)


def _check_ranges(path: Path, infos: dict[str, TensorInfo], begin: int, size: int, error: type[CompressError]) -> None:
    position = begin
    for name, info in sorted(infos.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if info.offset + info.nbytes > size:
            raise _broken(path, f"tensor '{name}' ends at byte {info.offset + info.nbytes} of {size}", error)
        if info.offset < position:
            raise _broken(path, f"tensor '{name}' overlaps the one before it", error)
        if info.offset > position:
            raise _broken(path, f"there is a hole before tensor '{name}'", error)
        position = info.offset + info.nbytes
    if position != size:
        raise _broken(path, f"its tensors end at byte {position} of {size}", error)


def _broken(path: Path, what: str, error: type[CompressError]) -> CompressError:
    return error(f"'{path}' is damaged: {what}.", remedy="Copy or download the file again.")
