"""CUDA kernels: whole kernels on the processor against the reference, nvcc's report, and a GPU where there is one.

Tolerances of products are relative errors in norm: float32 sums 1e-6; weights rounded to float16 5e-4 and to bfloat16
3e-3 (2^-12 and 2^-9 each, with the rounding of the result).
"""

from __future__ import annotations

import math
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor

from compress.errors import CompressError, DependencyError
from compress.ops.cuda.compile import (
    CupyLauncher,
    Kernel,
    Launcher,
    compile_kernel,
    require_cupy,
    source_folder,
    source_headers,
)
from compress.ops.cuda.hadamard import hadamard_rows
from compress.ops.cuda.half_pyramid import CudaKernels, warps_of_row
from compress.ops.cuda.tables import layout_of
from compress.ops.half_pyramid import reference
from tests.ops.emulated import EmulatedLauncher
from tests.ops.half_cases import SHAPES, Case, make_case

PRODUCTS = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 4e-3}
ARCHITECTURES = (80, 90, 100)


@pytest.fixture(scope="module")
def launcher(tmp_path_factory: pytest.TempPathFactory) -> EmulatedLauncher:
    if shutil.which("g++") is None:
        pytest.skip("g++ is not on PATH")
    return EmulatedLauncher(tmp_path_factory.mktemp("kernels"))


@pytest.fixture(scope="module")
def gpu() -> Launcher:
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    return CupyLauncher()


def relative(found: Tensor, wanted: Tensor) -> float:
    wanted = wanted.double()
    return float((found.double() - wanted).norm() / wanted.norm())


def check_encode(case: Case, kernels: CudaKernels, device: str) -> None:
    found = kernels.encode(case.x.to(device), case.scale.to(device), case.shape)
    for mine, true in zip(found, case.codes, strict=True):
        assert mine.dtype == true.dtype and torch.equal(mine.cpu(), true)


def check_decode(case: Case, kernels: CudaKernels, device: str, dtype: torch.dtype) -> None:
    planes = [plane.to(device) for plane in case.planes]
    found = kernels.decode(planes, case.row_scales.to(device), case.columns, case.shape, case.width, dtype)
    assert torch.equal(found.cpu(), case.weight(dtype))


def check_linear(
    case: Case, kernels: CudaKernels, device: str, rows: int, dtype: torch.dtype, activations: str
) -> None:
    x = torch.randn(rows, case.columns, generator=torch.Generator().manual_seed(rows)).to(dtype)
    planes = [plane.to(device) for plane in case.planes]
    found = kernels.linear(x.to(device), planes, case.row_scales.to(device), case.shape, case.width, activations).cpu()
    assert found.dtype == dtype and found.shape == (rows, case.row_scales.numel())
    number = x.double()
    if activations == "int8":
        step = x.float().abs().amax(1, keepdim=True) / 127
        number = (x.float() / step).round().double() * step.double()
    assert relative(found, number @ case.weight().double().T) < PRODUCTS[dtype]


@pytest.mark.parametrize("name", SHAPES)
def test_encode_and_decode_on_the_processor(launcher: EmulatedLauncher, name: str) -> None:
    kernels = CudaKernels(launcher)
    for rows, columns in ((5, 512), (7, 172)):
        case = make_case(name, rows, columns)
        check_encode(case, kernels, "cpu")
        check_decode(case, kernels, "cpu", torch.float32)


def test_decode_to_16_bits_on_the_processor(launcher: EmulatedLauncher) -> None:
    for columns in (256, 172):
        for dtype in (torch.float16, torch.bfloat16):
            check_decode(make_case("3.25 bits", 5, columns), CudaKernels(launcher), "cpu", dtype)


@pytest.mark.parametrize("name", SHAPES)
def test_products_on_the_processor(launcher: EmulatedLauncher, name: str) -> None:
    kernels = CudaKernels(launcher)
    for rows, columns in ((35, 320), (7, 172)):
        case = make_case(name, rows, columns)
        check_linear(case, kernels, "cpu", 3, torch.float16, "float")
        check_linear(case, kernels, "cpu", 3, torch.float16, "int8")
    check_linear(case, kernels, "cpu", 17, torch.float16, "float")


def test_products_of_other_types_on_the_processor(launcher: EmulatedLauncher) -> None:
    case = make_case("3.25 bits", 140, 512)
    for count, dtype in ((2, torch.float32), (17, torch.bfloat16), (131, torch.bfloat16)):
        check_linear(case, CudaKernels(launcher), "cpu", count, dtype, "float")


@pytest.mark.parametrize("rows", [1, 8, 9])
def test_products_of_any_number_of_rows(launcher: EmulatedLauncher, rows: int) -> None:
    case = make_case("3.25 bits", 70, 2048 + 64)
    for activations in ("float", "int8"):
        check_linear(case, CudaKernels(launcher), "cpu", rows, torch.bfloat16, activations)


def test_little_shared_memory_takes_tables_of_halves(tmp_path: Path, launcher: EmulatedLauncher) -> None:
    """163 KB, an A100's, beside the buffers of the tiled product, and 20 KB for all."""
    case = make_case("3.25 bits", 20, 512)
    for kilobytes in (163, 20):
        little = EmulatedLauncher(tmp_path, shared_bytes=kilobytes * 1024)
        check_linear(case, CudaKernels(little), "cpu", 2, torch.float16, "int8")
        direct = {kernel.name: dict(kernel.macros).get("HALF_DIRECT") for kernel in little.launched}
        assert direct["half_gemv_int8"] == int(kilobytes > 100)


def test_unaligned_planes_and_rows_that_are_not_contiguous(launcher: EmulatedLauncher) -> None:
    case = make_case("3.25 bits", 9, 640)
    planes = [torch.cat([plane.new_zeros(1), plane])[1:] for plane in case.planes]
    x = torch.randn(640, 2).half().T
    kernels = CudaKernels(launcher)
    found = kernels.linear(x, planes, case.row_scales, case.shape, case.width, "float")
    assert relative(found, x.double() @ case.weight().double().T) < PRODUCTS[torch.float16]


def test_rows_that_are_not_finite_give_nan_and_zeros_give_zeros(launcher: EmulatedLauncher) -> None:
    case = make_case("3.25 bits", 9, 512)
    x = torch.randn(4, 512).bfloat16()
    x[0, 5], x[1, 6], x[2] = math.nan, math.inf, 0
    for count, activations in ((4, "float"), (4, "int8"), (20, "float")):
        rows = torch.cat([x, x.new_ones(count - 4, 512)])
        found = CudaKernels(launcher).linear(rows, case.planes, case.row_scales, case.shape, case.width, activations)
        assert found[:2].isnan().all() and (found[2] == 0).all() and found[3:].isfinite().all()


@pytest.mark.parametrize("exponent", [-30, 30])
def test_bfloat16_activations_of_any_unit(launcher: EmulatedLauncher, exponent: int) -> None:
    case = make_case("3.25 bits", 9, 512)
    x = torch.randn(2, 512).bfloat16()
    arguments = (case.planes, case.row_scales, case.shape, case.width, "float")
    kernels = CudaKernels(launcher)
    scaled = kernels.linear(x * 2.0**exponent, *arguments)
    assert torch.equal(kernels.linear(x, *arguments) * 2.0**exponent, scaled)


@pytest.mark.parametrize("name", SHAPES)
def test_damaged_codes_stay_inside_the_tables(launcher: EmulatedLauncher, name: str) -> None:
    """Whatever the bits are, weights are some of the codebook's, or of one with fewer pulses."""
    case = make_case(name, 5, 512)
    planes = [torch.full_like(plane, 255) for plane in case.planes]
    found = CudaKernels(launcher).decode(planes, case.row_scales, 512, case.shape, case.width, torch.float32)
    units = found / (case.row_scales.unsqueeze(1) * torch.tensor(case.shape.gains).reshape(-1, 1, 1))
    largest = case.shape.levels[-1] + case.shape.shift
    assert ((units - units.round()).abs().amax((1, 2)).min() < 1e-3) and (
        units.abs().amax((1, 2)).min() < largest + 0.5
    )


def test_no_rows_and_no_groups(launcher: EmulatedLauncher) -> None:
    case = make_case("3.25 bits", 9, 512)
    kernels = CudaKernels(launcher)
    empty = torch.zeros(0, 512).half()
    found = kernels.linear(empty, case.planes, case.row_scales, case.shape, case.width, "float")
    assert found.shape == (0, 9)
    assert kernels.encode(case.x[:0], case.scale[:0], case.shape)[0].shape == (0, 8)


def test_warps_share_rows_evenly() -> None:
    """4096 rows of 7 tiles need one warp each of 132 x 32; of 5120 rows, warps would do two where 1.2 suffice."""
    assert warps_of_row(4096, 7, 32, 132) == 1
    assert warps_of_row(5120, 8, 32, 132) == 4
    assert warps_of_row(1, 4, 32, 132) == 4


def exact_transform(x: Tensor) -> Tensor:
    """x H / sqrt(n) in float64 by the definition's recursion."""
    n = x.shape[1]
    if n == 1:
        return x.double()
    left, right = exact_transform(x[:, : n // 2]), exact_transform(x[:, n // 2 :])
    return torch.cat([left + right, left - right], 1) / math.sqrt(2)


@pytest.mark.parametrize("columns", [1, 2, 16, 32, 64, 1024, 2048, 32768])
def test_hadamard_on_the_processor(launcher: EmulatedLauncher, columns: int) -> None:
    x = torch.randn(2, columns, generator=torch.Generator().manual_seed(columns))
    assert relative(hadamard_rows(x, launcher), exact_transform(x)) < 3e-7
    assert relative(hadamard_rows(x.bfloat16(), launcher), exact_transform(x.bfloat16())) < 3e-3


def test_hadamard_refuses_other_lengths(launcher: EmulatedLauncher) -> None:
    for x in (torch.zeros(2, 12), torch.zeros(1, 65536), torch.zeros(4, dtype=torch.int64)):
        with pytest.raises(CompressError, match="2\\^k"):
            hadamard_rows(x, launcher)


def test_cupy_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(DependencyError, match="cupy"):
        require_cupy()


def test_sources_include_only_headers_that_nvrtc_is_given() -> None:
    texts = [path.read_text() for path in source_folder().glob("*.cu")] + list(source_headers().values())
    wanted = {name for text in texts for name in re.findall(r'#include [<"](.*?)[>"]', text)}
    assert wanted <= set(source_headers())


REPORT = re.compile(
    r"Compiling entry function '(\w+)' for 'sm_(\d+)'.*?(\d+) bytes spill stores.*?Used (\d+) registers", re.S
)
VARIANTS = {
    "half_decode.cu": (),
    "half_encode.cu": ("-fmad=false",),
    "half_gemm.cu": (),
    "half_gemv.cu": (),
    "half_gemv_int8.cu": ("-DHALF_ROWS=1",),
    "half_inputs.cu": (),
    "hadamard.cu": (),
}
"""The sources and the options they are compiled with."""


def test_nvcc_compiles_every_kernel_without_spills(tmp_path: Path) -> None:
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("nvcc is not on PATH")
    assert {path.name for path in source_folder().glob("*.cu")} == set(VARIANTS)
    targets = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in ARCHITECTURES]
    table: dict[str, dict[int, int]] = {}
    for name, options in VARIANTS.items():
        command = [nvcc, "-std=c++17", *targets, *options, "-Xptxas", "-v", "-fatbin", str(source_folder() / name)]
        done = subprocess.run([*command, "-o", str(tmp_path / "out")], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        for kernel, architecture, spilled, registers in REPORT.findall(done.stderr):
            assert int(spilled) == 0, f"{kernel} spills for sm_{architecture}"
            table.setdefault(kernel, {})[int(architecture)] = int(registers)
    print("\nregisters" + "".join(f"{f'sm_{a}':>8}" for a in ARCHITECTURES))
    for kernel, registers in sorted(table.items()):
        assert set(registers) == set(ARCHITECTURES)
        print(f"{kernel:<17}" + "".join(f"{registers[a]:8}" for a in ARCHITECTURES))
    assert len(table) == len(VARIANTS) + 1


def test_nvrtc_compiles_every_kernel() -> None:
    """As it will where the kernels run; NVRTC compiles without a GPU."""
    pytest.importorskip("cupy_backends")
    for name, (shape, width) in SHAPES.items():
        macros = layout_of(shape, width, True, 200 * 1024).macros
        for kernel in ("half_decode", "half_gemm", "half_gemv", "half_gemv_int8"):
            try:
                binary = compile_kernel(Kernel(f"{kernel}.cu", kernel, (*macros, ("HALF_TYPE", 1))), 90)
            except DependencyError:
                pytest.skip("NVRTC is not installed")
            assert len(binary) > 1000, name


@pytest.mark.gpu
@pytest.mark.parametrize("name", SHAPES)
def test_on_a_gpu(gpu: Launcher, name: str) -> None:
    kernels = CudaKernels(gpu)
    for rows, columns in ((260, 4096), (7, 172), (33, 2112)):
        case = make_case(name, rows, columns)
        check_encode(case, kernels, "cuda")
        for dtype, count in ((torch.float16, 1), (torch.bfloat16, 8), (torch.bfloat16, 200), (torch.float32, 3)):
            check_decode(case, kernels, "cuda", dtype)
            check_linear(case, kernels, "cuda", count, dtype, "float")
            if count < 100:
                check_linear(case, kernels, "cuda", count, dtype, "int8")


@pytest.mark.gpu
@pytest.mark.parametrize("columns", [1, 16, 64, 1024, 4096, 32768])
def test_hadamard_on_a_gpu(gpu: Launcher, columns: int) -> None:
    x = torch.randn(5, columns)
    assert relative(hadamard_rows(x.cuda(), gpu).cpu(), exact_transform(x)) < 3e-7


@pytest.mark.gpu
def test_a_million_groups_encode_as_on_the_cpu(gpu: Launcher) -> None:
    shape, _ = SHAPES["3.25 bits"]
    x, scale = torch.randn(2**20, 8), torch.rand(2**20) + 0.5
    numbers = (shape.dim, shape.pulses, shape.levels, shape.gains, shape.shift)
    true = torch.ops.compress.half_pyramid_encode(x, scale, *numbers)
    found = CudaKernels(gpu).encode(x.cuda(), scale.cuda(), shape)
    assert all(torch.equal(mine.cpu(), other) for mine, other in zip(found, true, strict=True))


def test_kernels_are_values() -> None:
    """Launchers keep compiled kernels by them."""
    assert Kernel("a.cu", "a", (("N", 1),)) == Kernel("a.cu", "a", (("N", 1),))
    assert len({Kernel("a.cu", "a"), Kernel("a.cu", "a", exact=True)}) == 2


def test_reference_is_the_same_contract() -> None:
    for name in ("encode", "pack", "unpack", "decode", "linear"):
        assert callable(getattr(reference, name)) and callable(getattr(CudaKernels, name))
