"""Half-integer pyramids by the compiled library: packing, decoding, and products with packed weights.

The contracts are those of `compress.ops.half_pyramid.reference`. Shapes and lengths are checked here, before a pointer
is taken; a rest that the shape does not have is an error. Nothing that planes or prepared rows hold can make the
library read elsewhere.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor

from compress.errors import CodecError, CompressError
from compress.ops.bits import packed_bytes
from compress.ops.half_pyramid.prepared import MOST_GAINS, check_prepared, chunk_count, row_bytes
from compress.ops.half_pyramid.shape import MOST_EVEN_LEVELS, HalfShape, plane_widths
from compress.ops.half_pyramid.tables import LARGEST_WORD, half_tables
from compress.ops.native import INSTRUCTIONS, INT, INT64, POINTER, NativeLibrary

SIGNATURES: dict[str, list[type]] = {
    "compress_half_pack": [POINTER, POINTER, POINTER, POINTER, POINTER, INT64, INT],
    "compress_half_unpack": [POINTER, POINTER, INT64, POINTER, POINTER, INT],
    "compress_half_decode": [POINTER, POINTER, POINTER, INT64, INT64, INT64, POINTER, INT, INT],
    "compress_half_prepare": [POINTER, POINTER, INT64, INT64, POINTER, INT, INT],
    "compress_half_prepared_linear": [
        *(POINTER, POINTER, INT64, POINTER, INT64, INT64, POINTER, INT64, INT, POINTER, INT, INT)
    ],
}

Activations = Literal["float", "int8"]
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
CHUNK_ELEMENTS = 2**20
"""Weights that are decoded to float32 at once on their way to a narrower type."""
WIDEST_REST = 4
"""Bits of a rest for each weight: 8, 16 and 32 weights fill one word of 32, 64 and 128 bits."""


class HalfCode(ctypes.Structure):
    """`HalfCode` of cuda/half_pyramid_rows.h."""

    _fields_ = (
        *((name, POINTER) for name in ("words", "quads", "quad_starts", "octets", "gains", "levels")),
        *((name, ctypes.c_uint64) for name in ("last_low", "last_high")),
        *((name, ctypes.c_int32) for name in ("dim", "pulses", "limit", "stride", "gain_count", "shift", "bits")),
    )


class PreparedCode(ctypes.Structure):
    """`PreparedCode` of cuda/half_prepared.h."""

    _fields_ = (
        *((name, POINTER) for name in ("gains", "levels")),
        *((name, ctypes.c_int32) for name in ("limit", "gain_count", "shift")),
    )


@dataclass(frozen=True)
class PreparedShape:
    """A shape for the library, with the tensors that its pointers point to."""

    code: HalfCode
    kept: tuple[Tensor, ...]


@lru_cache(maxsize=64)
def prepare_shape(shape: HalfShape, width: int) -> PreparedShape:
    """Raises `CodecError` for a codebook that does not fit `width` bits, or a rest above 4 bits a weight."""
    bits = width - shape.dim
    if not 0 <= bits <= WIDEST_REST * shape.dim or shape.codes > 1 << bits:
        raise CodecError(f"A codebook of {shape.codes} for {shape.dim} weights in a code of {width} bits.")
    tables = half_tables(shape)
    gains = torch.tensor(shape.gains, dtype=torch.float32)
    levels = torch.zeros(MOST_EVEN_LEVELS, dtype=torch.uint8)
    levels[: len(shape.levels)] = torch.tensor(shape.levels)
    kept = (tables.words, tables.quads, tables.quad_starts, tables.octets, gains, levels)
    last = shape.codes - 1
    numbers = (last & LARGEST_WORD, last >> 64, shape.dim, shape.pulses, shape.limit, tables.stride)
    pointers = [tensor.data_ptr() if tensor.numel() else None for tensor in kept]
    return PreparedShape(HalfCode(*pointers, *numbers, len(shape.gains), shape.shift, bits), kept)


class HalfPyramidLibrary:
    """The kernels of one loaded library. Work is spread over `torch.get_num_threads()` threads."""

    def __init__(self, path: Path) -> None:
        self.library = NativeLibrary(path)
        self.instructions = self.library.instructions
        library = ctypes.CDLL(str(path))
        self.functions = {name: library[name] for name in SIGNATURES}
        for name, function in self.functions.items():
            function.argtypes, function.restype = SIGNATURES[name], INT64

    def _call(self, name: str, prepared: PreparedShape, planes: list[Tensor], *arguments: Tensor | int) -> int:
        pointers = (POINTER * len(planes))(*(plane.data_ptr() for plane in planes))
        values = [value.data_ptr() if isinstance(value, Tensor) else value for value in arguments]
        return int(self.functions[name](ctypes.byref(prepared.code), pointers, *values, torch.get_num_threads()))

    def _level(self, instructions: str | None) -> int:
        chosen = instructions or self.instructions[-1]
        if chosen not in self.instructions:
            raise CompressError(f"No loops for '{chosen}' here.", remedy=f"Use one of {', '.join(self.instructions)}.")
        return INSTRUCTIONS.index(chosen)

    def encode(self, x: Tensor, scale: Tensor, shape: HalfShape) -> tuple[Tensor, Tensor, Tensor]:
        gains = torch.tensor(shape.gains, dtype=torch.float32)
        return self.library.encode(x, scale, gains, shape.levels, shape.shift, shape.pulses)

    def pack(self, values: Tensor, gain: Tensor, coset: Tensor, shape: HalfShape, width: int) -> list[Tensor]:
        """See `half_pyramid_pack` of the reference."""
        groups = values.shape[0]
        if values.shape != (groups, shape.dim) or gain.shape != (groups,) or coset.shape != (groups,):
            sizes = f"{list(values.shape)}, {list(gain.shape)} and {list(coset.shape)}"
            raise CodecError(f"Values, gains and cosets of groups of {shape.dim} are {sizes}.")
        values, gain, coset = (
            tensor.to(dtype).contiguous()
            for tensor, dtype in ((values, torch.int8), (gain, torch.int64), (coset, torch.int64))
        )
        prepared = prepare_shape(shape, width)
        planes = [torch.zeros(size, dtype=torch.uint8) for size in plane_bytes(groups, shape, width)]
        if self._call("compress_half_pack", prepared, planes, values, gain, coset, groups):
            raise CodecError(f"A group to pack is none of {shape.dim} coordinates and {shape.pulses} pulses.")
        return planes

    def unpack(self, planes: list[Tensor], groups: int, shape: HalfShape, width: int) -> tuple[Tensor, Tensor]:
        """See `half_pyramid_unpack` of the reference."""
        prepared = prepare_shape(shape, width)
        planes = check_planes(planes, groups, shape, width)
        values = torch.empty((groups, shape.dim), dtype=torch.int8)
        gain = torch.empty(groups, dtype=torch.int64)
        if self._call("compress_half_unpack", prepared, planes, groups, values, gain):
            raise outside(shape)
        return values, gain

    def decode(
        self,
        planes: list[Tensor],
        row_scales: Tensor,
        columns: int,
        shape: HalfShape,
        width: int,
        dtype: torch.dtype = torch.float32,
        *,
        instructions: str | None = None,
    ) -> Tensor:
        """W [o, columns] = fl32(fl32(row scale * gain) * v), rounded to `dtype`."""
        prepared, level = prepare_shape(shape, width), self._level(instructions)
        planes, row_scales = check_matrix(planes, row_scales, columns, shape, width)
        check_type("decoded weights", dtype)
        rows = row_scales.shape[0]
        out = torch.empty((rows, columns), dtype=dtype)
        step = max(1, rows if dtype == torch.float32 else CHUNK_ELEMENTS // max(columns, 1))
        for first in range(0, rows, step):
            part = out[first : first + step]
            decoded = part if dtype == torch.float32 else torch.empty(part.shape, dtype=torch.float32)
            place = (row_scales, first, part.shape[0], columns)
            if self._call("compress_half_decode", prepared, planes, *place, decoded, level):
                raise outside(shape)
            if decoded is not part:
                part.copy_(decoded)
        return out

    def linear(
        self, x: Tensor, planes: list[Tensor], row_scales: Tensor, shape: HalfShape, width: int, activations: str
    ) -> Tensor:
        """One product: rows are prepared for it alone. See `prepared_linear`."""
        prepared = self.prepare(planes, row_scales.shape[0], x.shape[1], shape, width)
        return self.prepared_linear(x, prepared, row_scales, shape, activations)

    def prepare(
        self,
        planes: list[Tensor],
        rows: int,
        columns: int,
        shape: HalfShape,
        width: int,
        *,
        instructions: str | None = None,
    ) -> Tensor:
        """See `compress.ops.half_pyramid.prepared.prepare`."""
        code, level = prepare_shape(shape, width), self._level(instructions)
        if rows < 0 or columns < 0:
            raise CodecError(f"A matrix of {rows} x {columns}.")
        planes = check_planes(planes, rows * -(-columns // shape.dim), shape, width)
        prepared = torch.empty((rows, row_bytes(shape, columns)), dtype=torch.uint8)
        if prepared.numel() and self._call("compress_half_prepare", code, planes, rows, columns, prepared, level):
            raise outside(shape)
        return prepared

    def prepared_linear(
        self,
        x: Tensor,
        prepared: Tensor,
        row_scales: Tensor,
        shape: HalfShape,
        activations: str = "float",
        *,
        instructions: str | None = None,
    ) -> Tensor:
        """x W^T [R, o] of x [R, n], summed in float32.

        With `activations` "int8" each row of x is rounded to step * integer, step = max |x| / 127, half to even, and
        the integers of a group are multiplied exactly. A row with a NaN or an infinity then gives NaN.
        """
        level = self._level(instructions)
        if x.ndim != 2 or x.device.type != "cpu":
            raise CodecError(f"linear takes x [R, n] on the CPU, not {list(x.shape)} on {x.device}.")
        check_type("activations", x.dtype)
        if activations not in get_args(Activations):
            raise CodecError(
                f"Activations as '{activations}'.", remedy=f"Use one of {', '.join(get_args(Activations))}."
            )
        rows, (count, columns) = row_scales.numel(), x.shape
        check_prepared(prepared, row_scales, columns, shape)
        if columns == 0 or count == 0:
            return x.new_zeros((count, rows))
        y = torch.empty((count, rows), dtype=torch.float32)
        code, _ = prepared_code(shape)
        tensors = (prepared.contiguous(), row_scales.contiguous(), x.to(torch.float32).contiguous())
        first, scales, inputs = (tensor.data_ptr() for tensor in tensors)
        refused = self.functions["compress_half_prepared_linear"](
            ctypes.byref(code),
            *(first, chunk_count(columns), scales, rows, columns, inputs, count),
            *(int(activations == "int8"), y.data_ptr(), level, torch.get_num_threads()),
        )
        if refused:
            raise CompressError("Not enough memory for eight rows of activations.")
        return y.to(x.dtype)


@lru_cache(maxsize=64)
def prepared_code(shape: HalfShape) -> tuple[PreparedCode, tuple[Tensor, Tensor]]:
    """With the tensors that its pointers point to: as long as an index of prepared rows can be large."""
    gains, levels = torch.zeros(MOST_GAINS), torch.zeros(MOST_EVEN_LEVELS, dtype=torch.uint8)
    gains[: len(shape.gains)] = torch.tensor(shape.gains)
    levels[: len(shape.levels)] = torch.tensor(shape.levels)
    code = PreparedCode(gains.data_ptr(), levels.data_ptr(), shape.limit, len(shape.gains), shape.shift)
    return code, (gains, levels)


def plane_bytes(groups: int, shape: HalfShape, width: int) -> list[int]:
    """The lengths of signs and planes."""
    return [groups * shape.dim // 8, *(packed_bytes(groups, bits) for bits in plane_widths(width - shape.dim))]


def check_planes(planes: list[Tensor], groups: int, shape: HalfShape, width: int) -> list[Tensor]:
    """The planes, dense. Raises `CodecError` where one is missing, too short, or no uint8 on the CPU."""
    needed = plane_bytes(groups, shape, width)
    if groups < 0 or len(planes) != len(needed):
        raise CodecError(f"A code of {width} bits for {shape.dim} weights has {len(needed)} planes, not {len(planes)}.")
    for plane, size in zip(planes, needed, strict=True):
        if plane.dtype != torch.uint8 or plane.device.type != "cpu" or plane.ndim != 1:
            raise CodecError(f"A plane is {plane.dtype} {list(plane.shape)} on {plane.device}, not bytes on the CPU.")
        if plane.numel() < size:
            raise CodecError(
                f"A plane of {groups} groups has {plane.numel()} bytes, not {size}.", remedy="The codes are damaged."
            )
    return [plane.contiguous() for plane in planes]


def check_matrix(
    planes: list[Tensor], row_scales: Tensor, columns: int, shape: HalfShape, width: int
) -> tuple[list[Tensor], Tensor]:
    if row_scales.ndim != 1 or row_scales.dtype != torch.float32 or row_scales.device.type != "cpu" or columns < 0:
        sizes = f"{row_scales.dtype} {list(row_scales.shape)} on {row_scales.device} for {columns} columns"
        raise CodecError(f"Row scales are float32 [o] on the CPU, not {sizes}.")
    groups = row_scales.shape[0] * -(-columns // shape.dim)
    return check_planes(planes, groups, shape, width), row_scales.contiguous()


def check_type(name: str, dtype: torch.dtype) -> None:
    if dtype not in FLOATS:
        raise CodecError(f"{name} of {dtype}.", remedy=f"Use one of {', '.join(str(each) for each in FLOATS)}.")


def outside(shape: HalfShape) -> CodecError:
    return CodecError(f"A code lies outside its codebook of {shape.codes}.", remedy="The codes are damaged.")
