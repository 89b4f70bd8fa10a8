"""Where each tensor goes in safetensors files: known before a byte is written.

A safetensors file is `u64 header length | JSON header | data`. The header names each tensor's dtype, shape and byte
range, so a file can be written front to back, or in any order, once names, dtypes and shapes are known. `plan_shards`
decides that; the writer and the size prediction both read its result, hence the predicted size is the file's size.

Order inside a shard: larger elements first, then by name, which keeps every tensor aligned to its element (readers
map the file into memory and refuse a float that starts at an odd byte). The header is padded with spaces to 8 bytes.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "I64": torch.int64,
    "U64": torch.uint64,
    "C64": torch.complex64,
    "F32": torch.float32,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I16": torch.int16,
    "U16": torch.uint16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
DTYPE_NAMES: Mapping[torch.dtype, str] = {dtype: name for name, dtype in DTYPES.items()}

# what transformers writes; its loader asks for it
METADATA = {"format": "pt"}


@dataclass(frozen=True)
class Entry:
    """A tensor to be stored: name, dtype as safetensors spells it, shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return count(self.shape) * DTYPES[self.dtype].itemsize


@dataclass(frozen=True)
class Shard:
    """One file: its name, its header (length field included) and where in the file each tensor begins."""

    filename: str
    header: bytes
    entries: tuple[Entry, ...]
    offsets: Mapping[str, int]
    nbytes: int


def count(shape: Iterable[int]) -> int:
    """Number of elements of a tensor of `shape`; 1 for a scalar."""
    product = 1
    for extent in shape:
        product *= extent
    return product


def entry_of(name: str, tensor: torch.Tensor) -> Entry:
    return Entry(name, DTYPE_NAMES[tensor.dtype], tuple(tensor.shape))


def plan_shards(entries: Iterable[Entry], max_shard_bytes: int, stem: str = "model") -> list[Shard]:
    """Cut `entries`, in the order given, into shards of at most `max_shard_bytes` of tensor data.

    A tensor larger than that has a shard of its own. One shard is `<stem>.safetensors`, N of them
    `<stem>-00001-of-0000N.safetensors`.
    """
    cuts: list[list[Entry]] = [[]]
    size = 0
    for entry in entries:
        if cuts[-1] and size + entry.nbytes > max_shard_bytes:
            cuts.append([])
            size = 0
        cuts[-1].append(entry)
        size += entry.nbytes
    if len(cuts) == 1:
        return [_shard(f"{stem}.safetensors", cuts[0])]
    total = len(cuts)
    return [_shard(f"{stem}-{i:05d}-of-{total:05d}.safetensors", cut) for i, cut in enumerate(cuts, 1)]


def _shard(filename: str, entries: list[Entry]) -> Shard:
    ordered = sorted(entries, key=lambda entry: (-DTYPES[entry.dtype].itemsize, entry.name))
    table: dict[str, object] = {"__metadata__": METADATA}
    begins: dict[str, int] = {}
    position = 0
    for entry in ordered:
        end = position + entry.nbytes
        table[entry.name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": [position, end]}
        begins[entry.name] = position
        position = end
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    offsets = {name: len(header) + begin for name, begin in begins.items()}
    return Shard(filename, header, tuple(ordered), offsets, len(header) + position)
