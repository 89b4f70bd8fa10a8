"""The header of a safetensors file, checked before it is believed.

Every rule here answers a file that would otherwise crash a reader, or make it read what it should not: a header longer
than the file, ranges that overlap, leave holes, run backwards or past the end, a shape whose product is not the range,
a name that is there twice. No memory is asked for by a number from the file before it was compared with the file.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from compress.errors import CompressError, quoted
from compress.modeling.layout import DTYPES, count
from compress.plain_json import parse_json

MAX_HEADER_BYTES = 2**21
"""A header may be longer only where it is less than a sixteenth of its file. As Python's objects JSON takes up to 25
times its own length: so much memory is at most 50 MB, or else less than twice the file. Checkpoints have some 120 bytes
of header for a tensor of megabytes."""
MAX_HEADER_PART = 16
MAX_DIMENSIONS = 64
LARGEST = 2**63 - 1
"""No extent, and no number of bytes, is above what torch can count."""


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
        if size < 8 or length > size - 8:
            raise _broken(path, f"it has {size} bytes, too few for its header", error)
        if length > max(MAX_HEADER_BYTES, size // MAX_HEADER_PART):
            raise _broken(path, f"its header takes {length} of its {size} bytes", error)
        text = file.read(length)
    try:
        table = parse_json(text)
    except ValueError as cause:
        raise _broken(path, f"its header is not JSON ({cause})", error) from cause
    if not isinstance(table, dict):
        raise _broken(path, "its header is not a table", error)
    _check_metadata(path, table.pop("__metadata__", {}), error)
    begin = 8 + length
    infos = {name: _tensor_info(path, name, row, begin, error) for name, row in table.items()}
    _check_ranges(path, infos, begin, size, error)
    return infos


def _check_metadata(path: Path, metadata: object, error: type[CompressError]) -> None:
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _broken(path, "its __metadata__ is no table of texts", error)


def _tensor_info(path: Path, name: str, row: object, begin: int, error: type[CompressError]) -> TensorInfo:
    match row:
        case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [int(first), int(last)], **rest} if not rest:
            pass
        case _:
            raise _broken(path, f"the entry of tensor {quoted(name)} is not dtype, shape and data_offsets", error)
    if dtype not in DTYPES:
        raise error(
            f"Tensor {quoted(name)} in '{path}' has dtype {quoted(dtype)}, which is not supported.",
            remedy=f"Save the model with one of {', '.join(DTYPES)}.",
        )
    itemsize = DTYPES[dtype].itemsize
    if not _is_shape(shape, itemsize):
        raise _broken(path, f"tensor {quoted(name)} has shape {quoted(shape)}", error)
    nbytes = count(shape) * itemsize
    if isinstance(first, bool) or isinstance(last, bool) or not 0 <= first <= last or last - first != nbytes:
        raise _broken(path, f"tensor {quoted(name)} of {nbytes} bytes has the range {first}..{last}", error)
    return TensorInfo(tuple(shape), dtype, path.name, nbytes, begin + first)


def _is_shape(shape: list[object], itemsize: int) -> bool:
    """Whether these are extents that a tensor can have: torch multiplies also those of an empty one."""
    if len(shape) > MAX_DIMENSIONS:
        return False
    product = itemsize
    for extent in shape:
        if type(extent) is not int or not 0 <= extent <= LARGEST:
            return False
        product *= max(extent, 1)
    return product <= LARGEST


def _check_ranges(path: Path, infos: dict[str, TensorInfo], begin: int, size: int, error: type[CompressError]) -> None:
    position = begin
    for name, info in sorted(infos.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if info.offset + info.nbytes > size:
            raise _broken(path, f"tensor {quoted(name)} ends at byte {info.offset + info.nbytes} of {size}", error)
        if info.offset < position:
            raise _broken(path, f"tensor {quoted(name)} overlaps the one before it", error)
        if info.offset > position:
            raise _broken(path, f"there is a hole before tensor {quoted(name)}", error)
        position = info.offset + info.nbytes
    if position != size:
        raise _broken(path, f"its tensors end at byte {position} of {size}", error)


def _broken(path: Path, what: str, error: type[CompressError]) -> CompressError:
    return error(f"'{path}' is damaged: {what}.", remedy="Copy or download the file again.")
