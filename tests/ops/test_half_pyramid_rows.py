"""Packed half-integer pyramids by the compiled library: against the reference and float64, for every instruction set.

Rests are drawn as Python's integers over the whole codebook, so that ranks of 128 bits are met as well.
"""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch
from torch import Tensor

from compress.errors import CodecError, CompressError
from compress.ops.bits import pack_bits
from compress.ops.half_pyramid import prepared, reference
from compress.ops.half_pyramid.library import (
    Activations,
    Processor,
    half_pyramid_linear,
    half_pyramid_prepare,
    half_pyramid_prepared_linear,
)
from compress.ops.half_pyramid.native import HalfPyramidLibrary
from compress.ops.half_pyramid.shape import HalfShape, composition_counts, plane_widths, uniform_levels
from compress.ops.native import INSTRUCTIONS, find_library

TRAINED = (10, 28, 43, 58, 72, 85, 97, 109, 120)
STEEP = tuple(range(2, 2 + 3 * 25, 3))
STEEPEST = tuple(range(2, 2 + 3 * 32, 3))


def gains(count: int) -> tuple[float, ...]:
    return tuple(0.011 * 1.17**j for j in range(count))


SHAPES = {
    "8, 3.25 bits": (HalfShape(8, 10, TRAINED, gains(6), 5), 26),
    "8, 2 bits": (HalfShape(8, 3, uniform_levels(3), gains(2)), 16),
    "8, one code": (HalfShape(8, 0, (3,), (1.0,)), 8),
    "8, a coset alone": (HalfShape(8, 0, (3,), (1.0,), 2), 9),
    "8, 4 bits, coset": (HalfShape(8, 19, uniform_levels(15), gains(12), 1), 32),
    "8, no table": (HalfShape(8, 30, uniform_levels(15), gains(20), 1), 40),
    "8, many gains": (HalfShape(8, 4, uniform_levels(4), gains(37)), 8 + 15),
    "16, 3.25 bits": (HalfShape(16, 22, uniform_levels(15), gains(7)), 52),
    "16, coset": (HalfShape(16, 20, uniform_levels(15), gains(7), 1), 53),
    "16, all bits": (HalfShape(16, 120, uniform_levels(15), gains(30)), 80),
    "32, coset": (HalfShape(32, 44, uniform_levels(15), gains(5), 1), 106),
    "32, above 120 bits": (HalfShape(32, 200, uniform_levels(15), gains(5)), 160),
    "8, 17 levels": (HalfShape(8, 40, uniform_levels(16), gains(5)), 36),
    "8, 25 levels, coset": (HalfShape(8, 43, STEEP, gains(6), 1), 39),
    "8, 32 levels": (HalfShape(8, 48, STEEPEST, gains(9), 1), 40),
    "16, 25 levels, coset": (HalfShape(16, 75, STEEP, gains(5), 1), 75),
    "16, 32 levels": (HalfShape(16, 92, uniform_levels(31), gains(5)), 80),
    "16, nearly full": (HalfShape(16, 490, uniform_levels(31), gains(5)), 37),
    "32, 25 levels, coset": (HalfShape(32, 150, STEEP, gains(5), 1), 151),
    "32, 32 levels": (HalfShape(32, 185, STEEPEST, gains(5), 1), 160),
}


@pytest.fixture(scope="module")
def library() -> HalfPyramidLibrary:
    path = find_library()
    if path is None:
        pytest.skip("the native library is not built")
    return HalfPyramidLibrary(path)


@pytest.fixture(params=INSTRUCTIONS)
def instructions(request: pytest.FixtureRequest, library: HalfPyramidLibrary) -> str:
    name: str = request.param
    if name not in library.instructions:
        pytest.skip(f"no {name} here")
    return name


every_shape = pytest.mark.parametrize("name", SHAPES)


def planes_of(rests: list[int], shape: HalfShape, width: int) -> list[Tensor]:
    """Random signs, and the planes of the rests."""
    generator = torch.Generator().manual_seed(len(rests))
    planes = [torch.randint(0, 256, (len(rests) * shape.dim // 8,), dtype=torch.uint8, generator=generator)]
    place = 0
    for bits in plane_widths(width - shape.dim):
        parts = [rest >> place & (1 << bits) - 1 for rest in rests]
        signed = [part - (1 << 64) if part >> 63 else part for part in parts]
        planes.append(pack_bits(torch.tensor(signed, dtype=torch.int64), bits))
        place += bits
    return planes


def random_rests(groups: int, shape: HalfShape) -> list[int]:
    chance = random.Random(groups)
    return ([0, shape.codes - 1] + [chance.randrange(shape.codes) for _ in range(groups)])[:groups]


def matrix(name: str, rows: int, columns: int) -> tuple[list[Tensor], Tensor, HalfShape, int]:
    """Planes and row scales."""
    shape, width = SHAPES[name]
    groups = rows * -(-columns // shape.dim)
    scales = 0.5 + torch.rand(rows, generator=torch.Generator().manual_seed(rows))
    return planes_of(random_rests(groups, shape), shape, width), scales, shape, width


def decoded(planes: list[Tensor], scales: Tensor, columns: int, shape: HalfShape, width: int) -> Tensor:
    return reference.decode(planes, scales, columns, shape, width, torch.float32)


def misplaced(plane: Tensor) -> Tensor:
    """The same bytes, at an odd address."""
    return torch.cat((plane.new_zeros(1), plane))[1:]


@every_shape
@pytest.mark.parametrize("groups", [0, 1, 7, 301])
def test_pack_and_unpack(library: HalfPyramidLibrary, name: str, groups: int) -> None:
    shape, width = SHAPES[name]
    rests = random_rests(groups, shape)
    planes = planes_of(rests, shape, width)
    values, gain = library.unpack([misplaced(plane) for plane in planes], groups, shape, width)
    want_values, want_gain = reference.unpack(planes, groups, shape, width)
    assert torch.equal(values, want_values) and torch.equal(gain, want_gain)
    coset = torch.tensor([rest & 1 if shape.coset else 0 for rest in rests], dtype=torch.int64)
    packed = library.pack(values, gain, coset, shape, width)
    assert all(torch.equal(got, want) for got, want in zip(packed, planes, strict=True))


@every_shape
def test_uneven_halves(library: HalfPyramidLibrary, name: str) -> None:
    """Every sum of the left half as often as any other: of random rests nearly all have two halves alike."""
    shape, width = SHAPES[name]
    half, groups, chance = shape.dim // 2, 200, random.Random(1)
    counts = composition_counts(half, shape.pulses, shape.limit)[half]
    possible = [k for k in range(shape.pulses + 1) if counts[k] and counts[shape.pulses - k]]
    left = np.array([chance.choice(possible) for _ in range(groups)])
    m = []
    for sums in (left, shape.pulses - left):
        ranks = np.array([chance.randrange(counts[k]) for k in sums], dtype=object)
        m.append(reference.unrank_compositions(ranks, sums, half, shape.limit))
    signs = torch.randint(0, 2, (groups, shape.dim), generator=torch.Generator().manual_seed(1)) * 2 - 1
    values = (signs * torch.tensor(shape.levels)[torch.from_numpy(np.concatenate(m, 1))] + shape.shift).to(torch.int8)
    gain, coset = torch.arange(groups) % len(shape.gains), torch.zeros(groups, dtype=torch.int64)
    packed = library.pack(values, gain, coset, shape, width)
    wanted = reference.pack(values, gain, coset, shape, width)
    assert all(torch.equal(mine, true) for mine, true in zip(packed, wanted, strict=True))
    found_values, found_gain = library.unpack(packed, groups, shape, width)
    assert torch.equal(found_values, values) and torch.equal(found_gain, gain)


@pytest.mark.parametrize("bits", range(12, 33))
def test_every_width(library: HalfPyramidLibrary, instructions: str, bits: int) -> None:
    shape, width = HalfShape(8, 4, uniform_levels(4), gains(6), 1), 8 + bits
    rests = random_rests(5 * 13, shape)
    planes, scales = planes_of(rests, shape, width), torch.ones(5)
    want = decoded(planes, scales, 8 * 13, shape, width)
    assert torch.equal(library.decode(planes, scales, 8 * 13, shape, width, instructions=instructions), want)


@every_shape
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (3, 172), (0, 40), (5, 512), (2, 4096 + 8), (1, 0)])
def test_decode(library: HalfPyramidLibrary, instructions: str, name: str, rows: int, columns: int) -> None:
    planes, scales, shape, width = matrix(name, rows, columns)
    want = decoded(planes, scales, columns, shape, width)
    planes = [misplaced(plane) for plane in planes]
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        got = library.decode(planes, scales, columns, shape, width, dtype, instructions=instructions)
        assert torch.equal(got, want.to(dtype))


def rounded(x: Tensor) -> Tensor:
    """Rows as step * integer, in float64."""
    step = x.abs().amax(1, keepdim=True) / 127
    return torch.round(x / torch.where(step > 0, step, 1)).double() * step


@every_shape
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (3, 172), (0, 40), (5, 512), (2, 4096 + 8), (1, 0)])
def test_prepare(library: HalfPyramidLibrary, instructions: str, name: str, rows: int, columns: int) -> None:
    """Byte for byte those of the definition, which decode to the payload's weight."""
    planes, scales, shape, width = matrix(name, rows, columns)
    want = prepared.prepare(planes, rows, columns, shape, width)
    weight = decoded(planes, scales, columns, shape, width)
    assert torch.equal(prepared.decode(want, scales, columns, shape), weight)
    planes = [misplaced(plane) for plane in planes]
    assert torch.equal(library.prepare(planes, rows, columns, shape, width, instructions=instructions), want)


@every_shape
@pytest.mark.parametrize("activations", ["float", "int8"])
@pytest.mark.parametrize(("rows", "columns"), [(7, 172), (2, 4096 + 8)])
def test_prepared_linear(
    library: HalfPyramidLibrary, instructions: str, name: str, activations: str, rows: int, columns: int
) -> None:
    """To 1e-5 of |x| |w|, also where an output cancels."""
    planes, scales, shape, width = matrix(name, rows, columns)
    weight = decoded(planes, scales, columns, shape, width).double()
    made = misplaced(library.prepare(planes, rows, columns, shape, width).flatten()).view(rows, -1)
    for batch in (1, 2, 3, 5, 8, 11):
        x = torch.randn(batch, columns, generator=torch.Generator().manual_seed(batch))
        x[-1] *= 1e-20
        used = rounded(x) if activations == "int8" else x.double()
        y = library.prepared_linear(x, made, scales, shape, activations, instructions=instructions)
        scale = used.norm(dim=1, keepdim=True) * weight.norm(dim=1)
        assert ((y - used @ weight.T).abs() <= 1e-5 * scale).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("activations", ["float", "int8"])
def test_linear_of_narrow_types(library: HalfPyramidLibrary, dtype: torch.dtype, activations: str) -> None:
    planes, scales, shape, width = matrix("8, 3.25 bits", 6, 256)
    x = torch.randn(2, 256).to(dtype)
    y = library.linear(x, planes, scales, shape, width, activations)
    made = library.prepare(planes, 6, 256, shape, width)
    assert y.dtype == dtype
    assert torch.equal(y, library.prepared_linear(x.float(), made, scales, shape, activations).to(dtype))


def test_linear_of_nothing_and_of_no_numbers(library: HalfPyramidLibrary, instructions: str) -> None:
    planes, scales, shape, width = matrix("8, 3.25 bits", 6, 172)
    made = library.prepare(planes, 6, 172, shape, width)
    for activations in ("float", "int8"):
        x = torch.zeros(3, 172)
        x[1, 5], x[2, 5] = math.nan, math.inf
        y = library.prepared_linear(x, made, scales, shape, activations, instructions=instructions)
        assert not y[0].any() and y[1].isnan().all() and not y[2].isfinite().any()
        none = library.prepared_linear(x[:0], made, scales, shape, activations, instructions=instructions)
        assert none.shape == (0, 6)


@pytest.mark.parametrize("activations", ["float", "int8"])
def test_operations_on_prepared_rows(activations: Activations) -> None:
    """As torch sees them: with fake kernels that agree, on meta tensors, and like the product that prepares itself."""
    planes, scales, shape, width = matrix("16, coset", 5, 172)
    numbers = (shape.dim, shape.pulses, list(shape.levels), list(shape.gains), shape.shift)
    x = torch.randn(3, 172)
    made = half_pyramid_prepare(planes, 5, 172, shape, width)
    calls = torch.ops.compress
    torch.library.opcheck(calls.half_pyramid_prepare.default, (planes, 5, 172, *numbers, width))
    torch.library.opcheck(calls.half_pyramid_prepared_linear.default, (x, made, scales, *numbers, activations))
    meta = half_pyramid_prepare([plane.to("meta") for plane in planes], 5, 172, shape, width)
    assert meta.shape == made.shape and meta.dtype == made.dtype
    y = half_pyramid_prepared_linear(x, made, scales, shape, activations)
    assert torch.equal(y, half_pyramid_linear(x, planes, scales, shape, width, activations))
    want = Processor().prepared_linear(x, made, scales, shape, activations)
    torch.testing.assert_close(y, want, rtol=1e-5, atol=1e-5)
    with pytest.raises(CodecError, match="damaged"):
        half_pyramid_prepare([planes[0][1:], *planes[1:]], 5, 172, shape, width)
    with pytest.raises(CodecError, match="-1 x 172"):
        half_pyramid_prepare(planes, -1, 172, shape, width)
    with pytest.raises(CodecError, match="Prepared rows are"):
        half_pyramid_prepared_linear(x, made[:, 1:], scales, shape, activations)


@pytest.mark.parametrize("name", ["8, 3.25 bits", "16, coset", "32, coset"])
def test_threads_change_nothing(library: HalfPyramidLibrary, name: str) -> None:
    planes, scales, shape, width = matrix(name, 9, 172)
    x = torch.randn(3, 172)
    threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            values, gain = library.unpack(planes, 9 * -(-172 // shape.dim), shape, width)
            weight = library.decode(planes, scales, 172, shape, width)
            products = [library.linear(x, planes, scales, shape, width, kind) for kind in ("float", "int8")]
            made = library.prepare(planes, 9, 172, shape, width)
            found.append([values, gain, weight, made, *products])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))


@pytest.mark.parametrize(
    "name", [name for name, (shape, width) in SHAPES.items() if shape.codes < 1 << width - shape.dim]
)
def test_a_rest_outside_its_codebook(library: HalfPyramidLibrary, instructions: str, name: str) -> None:
    """Refused; the largest number that the planes can hold included."""
    shape, width = SHAPES[name]
    columns, scales = 3 * shape.dim, torch.ones(2)
    good = random_rests(6, shape)
    for rest in (shape.codes, (1 << width - shape.dim) - 1):
        planes = planes_of([*good[:4], rest, good[5]], shape, width)
        with pytest.raises(CodecError, match="outside its codebook"):
            library.unpack(planes, 6, shape, width)
        with pytest.raises(CodecError, match="outside its codebook"):
            library.decode(planes, scales, columns, shape, width, instructions=instructions)
        with pytest.raises(CodecError, match="outside its codebook"):
            library.prepare(planes, 2, columns, shape, width, instructions=instructions)
        with pytest.raises(CodecError, match="outside its codebook"):
            prepared.prepare(planes, 2, columns, shape, width)


@every_shape
def test_damaged_rows(library: HalfPyramidLibrary, instructions: str, name: str) -> None:
    """Any bytes are multiplied: what they mean does not matter, but nothing else is read."""
    shape, _ = SHAPES[name]
    for byte in (255, 127, 90):
        made = torch.full((3, prepared.row_bytes(shape, 300)), byte, dtype=torch.uint8)
        for activations in ("float", "int8"):
            x = torch.randn(2, 300)
            assert library.prepared_linear(x, made, torch.ones(3), shape, activations, instructions=instructions).shape


def test_refusals(library: HalfPyramidLibrary) -> None:
    planes, scales, shape, width = matrix("8, 3.25 bits", 4, 64)
    x, made = torch.randn(1, 64), library.prepare(planes, 4, 64, shape, width)
    with pytest.raises(CodecError, match="3 planes"):
        library.decode(planes[:2], scales, 64, shape, width)
    for place in range(3):
        short = [plane[:-1] if i == place else plane for i, plane in enumerate(planes)]
        with pytest.raises(CodecError, match="damaged"):
            library.decode(short, scales, 64, shape, width)
        with pytest.raises(CodecError, match="damaged"):
            library.prepare(short, 4, 64, shape, width)
        with pytest.raises(CodecError, match="damaged"):
            library.unpack(short, 32, shape, width)
    with pytest.raises(CodecError, match="17 bits"):
        library.unpack(planes, 32, shape, 17)
    with pytest.raises(CodecError, match="Row scales"):
        library.decode(planes, scales.double(), 64, shape, width)
    with pytest.raises(CodecError, match="float64"):
        library.prepared_linear(x.double(), made, scales, shape)
    with pytest.raises(CodecError, match="int4"):
        library.prepared_linear(x, made, scales, shape, "int4")
    with pytest.raises(CompressError, match="avx10"):
        library.prepared_linear(x, made, scales, shape, instructions="avx10")
    for wrong in (made[:, 1:], made[1:], made.to(torch.int8), made.flatten()):
        with pytest.raises(CodecError, match="Prepared rows are"):
            library.prepared_linear(x, wrong, scales, shape)
    with pytest.raises(CodecError, match="Prepared rows are"):
        library.prepared_linear(torch.randn(1, 257), made, scales, shape)
    with pytest.raises(CodecError, match="-1 x 64"):
        library.prepare(planes, -1, 64, shape, width)
    with pytest.raises(CodecError, match="129 gains"):
        library.prepare(planes[:2], 0, 64, HalfShape(8, 0, (3,), gains(129)), 16)


def test_values_that_are_no_group(library: HalfPyramidLibrary) -> None:
    shape, width = SHAPES["8, 3.25 bits"]
    values, gain = library.unpack(planes_of([1, 2], shape, width), 2, shape, width)
    coset, second = torch.tensor([1, 0]), torch.tensor([0, 1])
    heavier = values.clone()
    heavier[1, :] = TRAINED[1] + shape.shift
    for bad in (
        (values + second.unsqueeze(1).to(torch.int8), gain, coset),
        (heavier, gain, coset),
        (values, gain + 6 * second, coset),
        (values, gain - 6 * second, coset),
        (values, gain, coset + 2 * second),
    ):
        with pytest.raises(CodecError, match="none of 8 coordinates"):
            library.pack(*bad, shape, width)
    with pytest.raises(CodecError, match="groups of 8"):
        library.pack(values, gain[:1], coset, shape, width)
