"""The operations on half-integer pyramids as torch sees them: one schema each, a kernel per backend.

As in `compress.ops.library`: the reference is the default kernel, the compiled library takes over the CPU, the CUDA
kernels the GPU. A shape (`HalfShape`) travels through torch as plain numbers.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Protocol, get_args

import torch
from torch import Tensor

from compress.errors import CodecError
from compress.ops.bits import packed_bytes
from compress.ops.cuda.half_pyramid import CudaKernels
from compress.ops.half_pyramid import prepared, reference
from compress.ops.half_pyramid.native import FLOATS, Activations, HalfPyramidLibrary, plane_bytes
from compress.ops.half_pyramid.shape import HalfShape, plane_widths
from compress.ops.library import LIBRARY_PATH

HAS_CUDA_KERNELS = importlib.util.find_spec("cupy") is not None and torch.cuda.is_available()
SHAPE = "int dim, int pulses, int[] levels, float[] gains, int shift"


class Backend(Protocol):
    """The kernels that a backend provides; arguments are valid when they get there."""

    def encode(self, x: Tensor, scale: Tensor, shape: HalfShape) -> tuple[Tensor, Tensor, Tensor]: ...

    def pack(self, values: Tensor, gain: Tensor, coset: Tensor, shape: HalfShape, width: int) -> list[Tensor]: ...

    def unpack(self, planes: list[Tensor], groups: int, shape: HalfShape, width: int) -> tuple[Tensor, Tensor]: ...

    def decode(
        self, planes: list[Tensor], scales: Tensor, columns: int, shape: HalfShape, width: int, dtype: torch.dtype
    ) -> Tensor: ...

    def linear(
        self, x: Tensor, planes: list[Tensor], scales: Tensor, shape: HalfShape, width: int, activations: str
    ) -> Tensor: ...


class PreparedBackend(Protocol):
    """The kernels of a backend that multiplies with prepared rows."""

    def prepare(self, planes: list[Tensor], rows: int, columns: int, shape: HalfShape, width: int) -> Tensor: ...

    def prepared_linear(
        self, x: Tensor, rows: Tensor, scales: Tensor, shape: HalfShape, activations: str
    ) -> Tensor: ...


def half_pyramid_encode(x: Tensor, scale: Tensor, shape: HalfShape) -> tuple[Tensor, Tensor, Tensor]:
    """Exact joint choice of gain, coset and shape: argmin ||x - scale gain v||^2 for every group.

    x float32 [G, D] finite, scale float32 [G] >= 0. Returns v int8 [G, D], the gain's index int64 [G] and the coset
    int64 [G] (1: the shift is subtracted). A scale of 0 gives the codebook's first group. Raises `CodecError` for other
    shapes or types.
    """
    values, gain, coset = torch.ops.compress.half_pyramid_encode(x, scale, *_numbers(shape))
    return values, gain, coset


def half_pyramid_pack(values: Tensor, gain: Tensor, coset: Tensor, shape: HalfShape, width: int) -> list[Tensor]:
    """The planes of encoded groups: uint8 tensors, signs first. See `compress.ops.half_pyramid.reference`."""
    planes: list[Tensor] = torch.ops.compress.half_pyramid_pack(values, gain, coset, *_numbers(shape), width)
    return planes


def half_pyramid_unpack(planes: list[Tensor], groups: int, shape: HalfShape, width: int) -> tuple[Tensor, Tensor]:
    """v int8 [G, D] and the gain's index int64 [G]. `CodecError` for planes of a wrong size and codes that are none."""
    values, gain = torch.ops.compress.half_pyramid_unpack(planes, groups, *_numbers(shape), width)
    return values, gain


def half_pyramid_decode(
    planes: list[Tensor],
    scales: Tensor,
    columns: int,
    shape: HalfShape,
    width: int,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """W [o, columns] of row scales r float32 [o]: fl32(fl32(r gain) v), then rounded to `dtype`.

    Every row has ceil(columns / D) groups. Errors as in `half_pyramid_unpack`.
    """
    weight: Tensor = torch.ops.compress.half_pyramid_decode(planes, scales, columns, *_numbers(shape), width, dtype)
    return weight


def half_pyramid_linear(
    x: Tensor,
    planes: list[Tensor],
    scales: Tensor,
    shape: HalfShape,
    width: int,
    activations: Activations = "float",
) -> Tensor:
    """y = x W^T [R, o] in x's dtype, for x [R, n] in float32, float16 or bfloat16; W is never decoded.

    A processor prepares its rows for this product alone, which takes as long as many products: `half_pyramid_prepare`
    does it once.

    activations "float": products and sums in float32. "int8": each row of x is first rounded to integers,
    x ~ (max|x| / 127) round(127 x / max|x|), half to even, whose products with v are exact. A row with a NaN or an
    infinity gives NaN. Has no gradient.
    """
    y: Tensor = torch.ops.compress.half_pyramid_linear(x, planes, scales, *_numbers(shape), width, activations)
    return y


def half_pyramid_prepare(planes: list[Tensor], rows: int, columns: int, shape: HalfShape, width: int) -> Tensor:
    """Rows for many products by a processor, uint8 [rows, bytes]: see `compress.ops.half_pyramid.prepared`.

    They take one to two bits a weight more than the planes, which they stand for. Errors as in `half_pyramid_unpack`.
    """
    made: Tensor = torch.ops.compress.half_pyramid_prepare(planes, rows, columns, *_numbers(shape), width)
    return made


def half_pyramid_prepared_linear(
    x: Tensor, rows: Tensor, scales: Tensor, shape: HalfShape, activations: Activations = "float"
) -> Tensor:
    """`half_pyramid_linear` with prepared rows and row scales float32 [o]."""
    y: Tensor = torch.ops.compress.half_pyramid_prepared_linear(x, rows, scales, *_numbers(shape), activations)
    return y


def _numbers(shape: HalfShape) -> tuple[Any, ...]:
    return shape.dim, shape.pulses, shape.levels, shape.gains, shape.shift


@lru_cache(maxsize=1024)
def _shape(dim: int, pulses: int, levels: tuple[int, ...], gains: tuple[float, ...], shift: int) -> HalfShape:
    return HalfShape(dim, pulses, levels, gains, shift)


def _shape_of(dim: int, pulses: int, levels: Sequence[int], gains: Sequence[float], shift: int) -> HalfShape:
    return _shape(dim, pulses, tuple(levels), tuple(gains), shift)


def _check_groups(x: Tensor, scale: Tensor, shape: HalfShape) -> None:
    if x.ndim != 2 or x.shape[1] != shape.dim or scale.shape != x.shape[:1]:
        raise CodecError(
            f"half_pyramid_encode takes x [G, {shape.dim}] and scale [G], not {list(x.shape)} and {list(scale.shape)}."
        )
    if not x.dtype == scale.dtype == torch.float32:
        raise CodecError(f"half_pyramid_encode takes float32, not {x.dtype} and {scale.dtype}.")


def check_planes(planes: list[Tensor], groups: int, shape: HalfShape, width: int) -> None:
    """Raises `CodecError` unless these are the planes of `groups` groups of `width` bits."""
    if shape.codes > 1 << max(0, width - shape.dim):
        raise CodecError(f"{shape.codes} codes do not fit {width} bits with {shape.dim} signs.")
    sizes = plane_bytes(groups, shape, width)
    found = [plane.numel() if plane.dtype == torch.uint8 and plane.ndim == 1 else -1 for plane in planes]
    if found != sizes:
        raise CodecError(
            f"{groups} groups of {width} bits are stored in planes of {sizes} bytes, not {found}.",
            remedy="The codes are damaged or belong to another matrix.",
        )


def _check_rows(planes: list[Tensor], scales: Tensor, columns: int, shape: HalfShape, width: int) -> None:
    if scales.ndim != 1 or scales.dtype != torch.float32:
        raise CodecError(f"Row scales are float32 [o], not {scales.dtype} {list(scales.shape)}.")
    check_planes(planes, scales.numel() * -(-columns // shape.dim), shape, width)


def _check_linear(x: Tensor, activations: str) -> None:
    if x.ndim != 2 or x.dtype not in FLOATS:
        raise CodecError(f"half_pyramid_linear takes x [R, n] of float32, float16 or bfloat16, not {x.dtype}.")
    if activations not in get_args(Activations):
        raise CodecError(f"Activations are float or int8, not '{activations}'.")


def declare() -> None:
    """The schemas, each with its fake kernel."""
    for name, schema, fake in (
        ("encode", f"(Tensor x, Tensor scale, {SHAPE}) -> (Tensor, Tensor, Tensor)", _fake_encode),
        ("pack", f"(Tensor values, Tensor gain, Tensor coset, {SHAPE}, int width) -> Tensor[]", _fake_pack),
        ("unpack", f"(Tensor[] planes, int groups, {SHAPE}, int width) -> (Tensor, Tensor)", _fake_unpack),
        (
            "decode",
            f"(Tensor[] planes, Tensor scales, int columns, {SHAPE}, int width, ScalarType dtype) -> Tensor",
            _fake_decode,
        ),
        (
            "linear",
            f"(Tensor x, Tensor[] planes, Tensor scales, {SHAPE}, int width, str activations) -> Tensor",
            _fake_linear,
        ),
        ("prepare", f"(Tensor[] planes, int rows, int columns, {SHAPE}, int width) -> Tensor", _fake_prepare),
        (
            "prepared_linear",
            f"(Tensor x, Tensor rows, Tensor scales, {SHAPE}, str activations) -> Tensor",
            _fake_prepared_linear,
        ),
    ):
        torch.library.define(f"compress::half_pyramid_{name}", schema)
        torch.library.register_fake(f"compress::half_pyramid_{name}", fake)


def attach(key: str, kernels: Backend) -> None:
    """Registers the kernels of a backend, each behind the checks of its arguments, for the dispatch key `key`."""

    def encode(x: Tensor, scale: Tensor, *numbers: Any) -> tuple[Tensor, Tensor, Tensor]:
        shape = _shape_of(*numbers)
        _check_groups(x, scale, shape)
        return kernels.encode(x, scale, shape)

    def pack(values: Tensor, gain: Tensor, coset: Tensor, *numbers: Any) -> list[Tensor]:
        *rest, width = numbers
        return kernels.pack(values, gain, coset, _shape_of(*rest), width)

    def unpack(planes: list[Tensor], groups: int, *numbers: Any) -> tuple[Tensor, Tensor]:
        *rest, width = numbers
        shape = _shape_of(*rest)
        check_planes(planes, groups, shape, width)
        return kernels.unpack(planes, groups, shape, width)

    def decode(planes: list[Tensor], scales: Tensor, columns: int, *numbers: Any) -> Tensor:
        *rest, width, dtype = numbers
        shape = _shape_of(*rest)
        _check_rows(planes, scales, columns, shape, width)
        return kernels.decode(planes, scales, columns, shape, width, dtype)

    def linear(x: Tensor, planes: list[Tensor], scales: Tensor, *numbers: Any) -> Tensor:
        *rest, width, activations = numbers
        shape = _shape_of(*rest)
        _check_linear(x, activations)
        _check_rows(planes, scales, x.shape[1], shape, width)
        return kernels.linear(x, planes, scales, shape, width, activations)

    for name, kernel in (
        ("encode", encode),
        ("pack", pack),
        ("unpack", unpack),
        ("decode", decode),
        ("linear", linear),
    ):
        torch.library.impl(f"compress::half_pyramid_{name}", key, kernel)


def attach_prepared(key: str, kernels: PreparedBackend) -> None:
    """The same for the two operations on prepared rows, which only a processor has."""

    def prepare(planes: list[Tensor], rows: int, columns: int, *numbers: Any) -> Tensor:
        *rest, width = numbers
        shape = _shape_of(*rest)
        if rows < 0 or columns < 0:
            raise CodecError(f"half_pyramid_prepare takes a matrix, not one of {rows} x {columns}.")
        check_planes(planes, rows * -(-columns // shape.dim), shape, width)
        return kernels.prepare(planes, rows, columns, shape, width)

    def prepared_linear(x: Tensor, rows: Tensor, scales: Tensor, *numbers: Any) -> Tensor:
        *rest, activations = numbers
        return kernels.prepared_linear(x, rows, scales, _shape_of(*rest), activations)

    torch.library.impl("compress::half_pyramid_prepare", key, prepare)
    torch.library.impl("compress::half_pyramid_prepared_linear", key, prepared_linear)


def _fake_encode(x: Tensor, scale: Tensor, *numbers: Any) -> tuple[Tensor, Tensor, Tensor]:
    gain = x.new_empty(x.shape[:1], dtype=torch.int64)
    return x.new_empty(x.shape, dtype=torch.int8), gain, torch.empty_like(gain)


def _fake_pack(values: Tensor, gain: Tensor, coset: Tensor, *numbers: Any) -> list[Tensor]:
    dim, width, groups = numbers[0], numbers[-1], values.shape[0]
    widths = (dim, *plane_widths(width - dim))
    return [values.new_empty(packed_bytes(groups, bits), dtype=torch.uint8) for bits in widths]


def _fake_unpack(planes: list[Tensor], groups: int, *numbers: Any) -> tuple[Tensor, Tensor]:
    first = planes[0]
    return first.new_empty((groups, numbers[0]), dtype=torch.int8), first.new_empty(groups, dtype=torch.int64)


def _fake_decode(planes: list[Tensor], scales: Tensor, columns: int, *numbers: Any) -> Tensor:
    return scales.new_empty((scales.shape[0], columns), dtype=numbers[-1])


def _fake_linear(x: Tensor, planes: list[Tensor], scales: Tensor, *numbers: Any) -> Tensor:
    return x.new_empty((x.shape[0], scales.shape[0]))


def _fake_prepare(planes: list[Tensor], rows: int, columns: int, *numbers: Any) -> Tensor:
    return planes[0].new_empty((rows, prepared.row_bytes(_shape_of(*numbers[:-1]), columns)))


def _fake_prepared_linear(x: Tensor, rows: Tensor, scales: Tensor, *numbers: Any) -> Tensor:
    return x.new_empty((x.shape[0], scales.shape[0]))


class Processor:
    """The kernels for tensors on a device that has none of its own: copied to the CPU and back, which is slow."""

    def encode(self, x: Tensor, scale: Tensor, shape: HalfShape) -> tuple[Tensor, Tensor, Tensor]:
        if x.device.type == "cpu":
            return reference.encode(x, scale, shape)
        values, gain, coset = half_pyramid_encode(x.cpu(), scale.cpu(), shape)
        return values.to(x.device), gain.to(x.device), coset.to(x.device)

    def pack(self, values: Tensor, gain: Tensor, coset: Tensor, shape: HalfShape, width: int) -> list[Tensor]:
        if values.device.type == "cpu":
            return reference.pack(values, gain, coset, shape, width)
        planes = half_pyramid_pack(values.cpu(), gain.cpu(), coset.cpu(), shape, width)
        return [plane.to(values.device) for plane in planes]

    def unpack(self, planes: list[Tensor], groups: int, shape: HalfShape, width: int) -> tuple[Tensor, Tensor]:
        device = planes[0].device
        if device.type == "cpu":
            return reference.unpack(planes, groups, shape, width)
        values, gain = half_pyramid_unpack([plane.cpu() for plane in planes], groups, shape, width)
        return values.to(device), gain.to(device)

    def decode(
        self, planes: list[Tensor], scales: Tensor, columns: int, shape: HalfShape, width: int, dtype: torch.dtype
    ) -> Tensor:
        if scales.device.type == "cpu":
            return reference.decode(planes, scales, columns, shape, width, dtype)
        here = [plane.cpu() for plane in planes]
        return half_pyramid_decode(here, scales.cpu(), columns, shape, width, dtype).to(scales.device)

    def linear(
        self, x: Tensor, planes: list[Tensor], scales: Tensor, shape: HalfShape, width: int, activations: str
    ) -> Tensor:
        if x.device.type == "cpu":
            return reference.linear(x, planes, scales, shape, width, activations)
        weight = self.decode(planes, scales, x.shape[1], shape, width, torch.float32)
        return reference.product(x, weight, activations)

    def prepare(self, planes: list[Tensor], rows: int, columns: int, shape: HalfShape, width: int) -> Tensor:
        device = planes[0].device
        if device.type == "cpu":
            return prepared.prepare(planes, rows, columns, shape, width)
        return half_pyramid_prepare([plane.cpu() for plane in planes], rows, columns, shape, width).to(device)

    def prepared_linear(self, x: Tensor, rows: Tensor, scales: Tensor, shape: HalfShape, activations: str) -> Tensor:
        _check_linear(x, activations)
        prepared.check_prepared(rows, scales, x.shape[1], shape)
        weight = prepared.decode(rows.cpu(), scales.cpu(), x.shape[1], shape)
        return reference.product(x, weight.to(x.device), activations)


def fused_devices() -> frozenset[str]:
    """The types of the devices that multiply with packed half-integer pyramids without decoding them first."""
    return FUSED


declare()
attach("default", Processor())
attach_prepared("default", Processor())
FUSED = frozenset({*(("cpu",) if LIBRARY_PATH is not None else ()), *(("cuda",) if HAS_CUDA_KERNELS else ())})
if HAS_CUDA_KERNELS:
    attach("CUDA", CudaKernels())
if LIBRARY_PATH is not None:
    NATIVE = HalfPyramidLibrary(LIBRARY_PATH)
    attach("cpu", NATIVE)
    attach_prepared("cpu", NATIVE)
