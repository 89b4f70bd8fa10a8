"""The operations on half-integer pyramids on a GPU; contracts as in `compress.ops.half_pyramid.library`.

Products of up to 8 rows read the packed weights and nothing else. Rows of 16-bit activations go to tensor cores, where
gain times v is rounded to float16 and sums are float32; int8 activations are multiplied exactly. More rows are served
eight at a time up to 16, and above that by a tiled product that decodes weights on the fly. float32 activations take
blocks of rows of W decoded in float32: exact, and meant for comparison rather than speed. Packing and unpacking happen
once in a model's life, and on the CPU; so does the decoding of shapes with more than 16 levels (above 4.5 bits).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from compress.ops.cuda.compile import Argument, CupyLauncher, Kernel, Launcher, Macros
from compress.ops.cuda.hadamard import TYPES
from compress.ops.cuda.tables import DeviceTables, Layout, device_tables, layout_of
from compress.ops.half_pyramid.reference import product
from compress.ops.half_pyramid.shape import MOST_LEVELS, HalfShape, plane_widths
from compress.ops.search import first_group, level_sums

MOST_PLANES = 8
FUSED_ROWS = 8
"""Rows of x that one launch of a fused product takes."""
LARGEST_FUSED = 16
UNIT = 64
"""Weights that a thread reads at once."""
WARP = 32
CHUNK_WEIGHTS = 2**25
STATIC_SHARED = 9 * 1024
"""More than any kernel's own shared memory."""
GEMM_BUFFERS = 4 * 128 * 72 * 2


class CudaKernels:
    """The kernels by a launcher; CuPy's unless another one is given."""

    def __init__(self, launcher: Launcher | None = None) -> None:
        self.launcher: Launcher = launcher or CupyLauncher()

    def encode(self, x: Tensor, scale: Tensor, shape: HalfShape) -> tuple[Tensor, Tensor, Tensor]:
        groups, dim = x.shape
        values = torch.empty((groups, dim), dtype=torch.int8, device=x.device)
        gain = torch.empty(groups, dtype=torch.int64, device=x.device)
        coset = torch.empty_like(gain)
        if groups == 0:
            return values, gain, coset
        search = _Search(shape)
        first = torch.tensor(first_group(dim, shape.levels, shape.shift, shape.pulses), dtype=torch.int8)
        macros = (
            ("HALF_DIM", dim),
            ("HALF_PULSES", shape.pulses),
            ("HALF_LIMIT", shape.limit),
            ("HALF_GAINS", len(shape.gains)),
            ("HALF_SHIFT", shape.shift),
            ("HALF_UNIFORM", int(search.uniform)),
        )
        self.launcher.launch(
            Kernel("half_encode.cu", "half_encode", macros, exact=True),
            x.device,
            -(-groups // 128),
            128,
            0,
            (
                x.contiguous(),
                scale.contiguous(),
                search.tables.to(x.device),
                first.to(x.device),
                *map(np.float32, search.numbers),
                np.int64(groups),
                values,
                gain,
                coset,
            ),
        )
        return values, gain, coset

    def pack(self, values: Tensor, gain: Tensor, coset: Tensor, shape: HalfShape, width: int) -> list[Tensor]:
        numbers = (shape.dim, shape.pulses, shape.levels, shape.gains, shape.shift, width)
        planes = torch.ops.compress.half_pyramid_pack(values.cpu(), gain.cpu(), coset.cpu(), *numbers)
        return [plane.to(values.device) for plane in planes]

    def unpack(self, planes: list[Tensor], groups: int, shape: HalfShape, width: int) -> tuple[Tensor, Tensor]:
        numbers = (shape.dim, shape.pulses, shape.levels, shape.gains, shape.shift, width)
        values, gain = torch.ops.compress.half_pyramid_unpack([plane.cpu() for plane in planes], groups, *numbers)
        return values.to(planes[0].device), gain.to(planes[0].device)

    def decode(
        self, planes: list[Tensor], scales: Tensor, columns: int, shape: HalfShape, width: int, dtype: torch.dtype
    ) -> Tensor:
        if shape.limit >= MOST_LEVELS:
            return _decoded_on_the_cpu(planes, scales, columns, shape, width, dtype)
        packed = _Packed(planes, scales, columns, shape, width, self.launcher)
        weight = torch.empty((packed.rows, columns), dtype=dtype, device=scales.device)
        if weight.numel():
            self._decode(packed, 0, packed.rows, weight)
        return weight

    def linear(
        self, x: Tensor, planes: list[Tensor], scales: Tensor, shape: HalfShape, width: int, activations: str
    ) -> Tensor:
        if shape.limit >= MOST_LEVELS:
            weight = _decoded_on_the_cpu(planes, scales, x.shape[1], shape, width, torch.float32)
            return product(x, weight, activations)
        packed = _Packed(planes, scales, x.shape[1], shape, width, self.launcher)
        if x.numel() == 0 or packed.rows == 0:
            return x.new_zeros((x.shape[0], packed.rows))
        x = x.contiguous()
        if activations == "int8":
            return torch.cat([self._fused_int8(packed, part) for part in x.split(FUSED_ROWS)])
        if x.dtype == torch.float32:
            return _where_finite(x, self._float32(packed, x))
        if x.shape[0] <= LARGEST_FUSED:
            return torch.cat([self._fused(packed, part) for part in x.split(FUSED_ROWS)])
        return _where_finite(x, self._tiled(packed, x))

    def _decode(self, packed: _Packed, first: int, rows: int, out: Tensor) -> None:
        """Rows first ... of W to `out`; `first` is a multiple of 8."""
        layout = packed.layout(STATIC_SHARED)
        groups = rows * packed.groups
        launch = _Launch(
            "half_decode",
            packed.planes_from(first),
            packed.tables(layout).gains,
            (
                packed.scales[first : first + rows],
                out,
                np.int64(groups),
                np.int32(packed.groups),
                np.int32(packed.columns),
            ),
            grid=min(-(-groups // 512), 2 * packed.limits.processors),
            block=512,
        )
        self._launch(packed, layout, out.dtype, launch)

    def _fused(self, packed: _Packed, x: Tensor) -> Tensor:
        count, columns = x.shape
        spans = -(-columns // (4 * UNIT))
        inputs = torch.empty((spans, 8, count, 4, 8), dtype=torch.float16, device=x.device)
        layout, share = packed.layout_with(2 * inputs.numel())
        tables = packed.tables(layout)
        steps = self._inputs("half_inputs", x, spans * 32, inputs, tables.unit)
        y = torch.empty((count, packed.rows), dtype=x.dtype, device=x.device)
        launch = _Launch(
            "half_gemv",
            packed.planes,
            tables.pairs,
            (packed.scales, inputs, steps, y, *_integers(packed.rows, packed.groups, spans, count)),
            grid=min(-(-packed.rows // 16), packed.limits.processors),
            block=512,
            shared_bytes=2 * inputs.numel() * share,
            macros=(("HALF_SHARE_INPUTS", int(share)),),
        )
        self._launch(packed, layout, x.dtype, launch)
        return y

    def _fused_int8(self, packed: _Packed, x: Tensor) -> Tensor:
        count, columns = x.shape
        tiles = -(-columns // (WARP * UNIT))
        inputs = torch.empty((count, tiles, 4, WARP, 16), dtype=torch.int8, device=x.device)
        layout, share = packed.layout_with(inputs.numel())
        steps = self._inputs("half_inputs_int8", x, tiles * WARP * 8, inputs, 1.0)
        y = torch.empty((count, packed.rows), dtype=x.dtype, device=x.device)
        warps = 32 if count <= 2 else 16
        parts = warps_of_row(packed.rows, tiles, warps, packed.limits.processors)
        launch = _Launch(
            "half_gemv_int8",
            packed.planes,
            packed.tables(layout).gains,
            (packed.scales, inputs, steps, y, *_integers(packed.rows, packed.groups, tiles, parts)),
            grid=min(-(-packed.rows * parts // warps), packed.limits.processors),
            block=warps * WARP,
            shared_bytes=inputs.numel() * share,
            macros=(("HALF_ROWS", count), ("HALF_SHARE_INPUTS", int(share))),
        )
        self._launch(packed, layout, x.dtype, launch)
        return y

    def _tiled(self, packed: _Packed, x: Tensor) -> Tensor:
        x = torch.nn.functional.pad(x, (0, -x.shape[1] % 8))
        x = x if x.data_ptr() % 16 == 0 else x.clone()
        count = x.shape[0]
        layout = packed.layout(GEMM_BUFFERS)
        tables = packed.tables(layout)
        y = torch.empty((count, packed.rows), dtype=x.dtype, device=x.device)
        sizes = _integers(packed.rows, packed.groups, count, x.shape[1] // 8)
        launch = _Launch(
            "half_gemm",
            packed.planes,
            tables.unit_gains,
            (packed.scales, x, y, *sizes, np.float32(tables.unit)),
            grid=min(-(-packed.rows // 128) * -(-count // 128), packed.limits.processors),
            block=256,
            shared_bytes=GEMM_BUFFERS,
        )
        self._launch(packed, layout, x.dtype, launch)
        return y

    def _float32(self, packed: _Packed, x: Tensor) -> Tensor:
        step = max(8, CHUNK_WEIGHTS // packed.columns // 8 * 8)
        parts = []
        for first in range(0, packed.rows, step):
            rows = min(step, packed.rows - first)
            weight = torch.empty((rows, packed.columns), dtype=torch.float32, device=x.device)
            self._decode(packed, first, rows, weight)
            parts.append(x @ weight.T)
        return torch.cat(parts, 1)

    def _inputs(self, name: str, x: Tensor, octets: int, out: Tensor, factor: float) -> Tensor:
        steps = torch.empty(x.shape[0], dtype=torch.float32, device=x.device)
        macros = (("HALF_TYPE", TYPES[x.dtype]),)
        arguments = (x, np.int32(x.shape[1]), np.int32(octets), out, steps, np.float32(factor))
        self.launcher.launch(Kernel("half_inputs.cu", name, macros), x.device, x.shape[0], 256, 0, arguments)
        return steps

    def _launch(self, packed: _Packed, layout: Layout, dtype: torch.dtype, launch: _Launch) -> None:
        tables = packed.tables(layout)
        planes = [*launch.planes, *[launch.planes[0]] * (MOST_PLANES - len(launch.planes))]
        source = (*planes, tables.octets, tables.words, tables.quads, tables.starts, tables.lookups, launch.gains)
        kernel = Kernel(f"{launch.name}.cu", launch.name, (*layout.macros, ("HALF_TYPE", TYPES[dtype]), *launch.macros))
        shared_bytes = layout.shared_bytes + launch.shared_bytes
        arguments = (*source, *launch.arguments)
        self.launcher.launch(kernel, packed.scales.device, launch.grid, launch.block, shared_bytes, arguments)


@dataclass(frozen=True)
class _Launch:
    """A kernel that reads packed weights: its arguments behind the tables, its size, its shared memory beside them."""

    name: str
    planes: Sequence[Tensor]
    gains: Tensor
    arguments: Sequence[Argument]
    grid: int
    block: int
    shared_bytes: int = 0
    macros: Macros = ()


def _integers(*values: int) -> tuple[np.int32, ...]:
    return tuple(np.int32(value) for value in values)


class _Packed:
    """A packed matrix on a device, aligned as the kernels want it."""

    def __init__(
        self, planes: list[Tensor], scales: Tensor, columns: int, shape: HalfShape, width: int, launcher: Launcher
    ) -> None:
        self.planes = [_aligned(plane) for plane in planes]
        self.scales, self.columns, self.shape, self.width = scales.contiguous(), columns, shape, width
        self.rows, self.groups = scales.numel(), -(-columns // shape.dim)
        self.limits = launcher.limits(scales.device)

    def layout(self, other_bytes: int) -> Layout:
        """Beside `other_bytes` of shared memory."""
        whole = self.shape.dim == 8 and self.groups % 8 == 0
        return layout_of(self.shape, self.width, whole, self.limits.shared_bytes - other_bytes)

    def layout_with(self, input_bytes: int) -> tuple[Layout, bool]:
        """The best layout, and whether inputs of so many bytes fit shared memory beside its tables."""
        layout = self.layout(STATIC_SHARED)
        return layout, layout.shared_bytes + input_bytes + STATIC_SHARED <= self.limits.shared_bytes

    def tables(self, layout: Layout) -> DeviceTables:
        return device_tables(self.shape, self.width, layout.direct, self.scales.device)

    def planes_from(self, first: int) -> list[Tensor]:
        """The planes of some rows; `first` is a multiple of 8, so that their bits begin with a byte."""
        if first == 0:
            return self.planes
        widths = (self.shape.dim, *plane_widths(self.width - self.shape.dim))
        starts = [first * self.groups * bits // 8 for bits in widths]
        return [_aligned(plane[start:]) for plane, start in zip(self.planes, starts, strict=True)]


def _aligned(plane: Tensor) -> Tensor:
    plane = plane.contiguous()
    return plane if plane.data_ptr() % 16 == 0 else plane.clone()


def _where_finite(x: Tensor, y: Tensor) -> Tensor:
    return y.masked_fill_(~x.isfinite().all(1, keepdim=True), math.nan)


def warps_of_row(rows: int, tiles: int, warps: int, processors: int) -> int:
    """How many warps share a row: 1, 2, 4, ... at most one a tile, such that the busiest warp has the fewest tiles."""

    def tiles_of_busiest(parts: int) -> int:
        return -(-rows * parts // (warps * processors)) * -(-tiles // parts)

    choices = [parts for k in range(warps.bit_length()) if (parts := 1 << k) <= min(tiles, warps)]
    return min(choices, key=tiles_of_busiest)


def _decoded_on_the_cpu(
    planes: list[Tensor], scales: Tensor, columns: int, shape: HalfShape, width: int, dtype: torch.dtype
) -> Tensor:
    """W of a shape with more levels than the kernels look up."""
    numbers = (columns, shape.dim, shape.pulses, shape.levels, shape.gains, shape.shift, width, dtype)
    weight: Tensor = torch.ops.compress.half_pyramid_decode([one.cpu() for one in planes], scales.cpu(), *numbers)
    return weight.to(scales.device)


class _Search:
    """The tables of the encoder (cuda/encode.cuh) as one float32 tensor, and its scalars."""

    def __init__(self, shape: HalfShape) -> None:
        gains = np.array(shape.gains, dtype=np.float32)
        levels = np.array(shape.levels, dtype=np.float32)
        table = np.zeros((3, 16), dtype=np.float32)
        if levels.size <= MOST_LEVELS:  # more have equal steps, and no table
            table[0, : levels.size] = levels
            table[1, : levels.size - 1] = 2 * np.diff(levels)
            table[2, : levels.size - 1] = np.diff(levels * levels)
        self.tables = torch.from_numpy(np.concatenate([gains, np.float32(1) / gains, table.ravel()]))
        anchor = min(4, shape.limit)
        pitch = (levels[anchor] - levels[0]) / np.float32(anchor) if anchor else np.float32(1)
        least, most = level_sums(shape.dim, shape.levels, shape.pulses)
        self.numbers = (np.float32(1) / pitch, levels[0] / pitch, least, most, pitch, levels[0])
        self.uniform = len(set(np.diff(levels).tolist())) < 2
