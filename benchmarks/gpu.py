"""The CUDA kernels on the GPU at hand: are they right, how fast are they, and beside what.

    python benchmarks/gpu.py [--output gpu.json] [--width 26] [--quick]

Every timing cycles through distinct matrices of at least 1 GB in the format that is read, so that none comes from a
cache, and replays a CUDA graph, so that no launch waits for Python: the median of the replays over the number of
matrices. Rates count the payload: packed planes for products, what is read and written for copies and decoding. Beside
them, in the same run: a device copy, torch's bfloat16 `linear`, its 4-bit weight-only product, and NF4 of bitsandbytes
where it is installed. Instructions per weight are counted in the machine code of the loop that reads the planes, where
`cuobjdump` is on PATH. At most eight minutes on an H200.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from compress.codecs.half_pyramid.table import shipped_tables
from compress.ops.cuda.compile import CupyLauncher
from compress.ops.cuda.hadamard import hadamard_rows
from compress.ops.cuda.half_pyramid import CudaKernels
from compress.ops.half_pyramid import reference
from compress.ops.half_pyramid.shape import HalfShape, plane_widths

SIZES = ((4096, 14336), (8192, 28672))
FLOOR = 1 << 30
REPLAYS = 9
Run = Callable[[], None]


def seconds_per_item(runs: list[Run]) -> float:
    """Median over replays of a graph of all runs, divided by their number."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for run in runs[:2]:
            run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for run in runs:
            run()
    graph.replay()
    times = []
    for _ in range(REPLAYS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3 / len(runs))
    return statistics.median(times)


def random_planes(groups: int, shape: HalfShape, width: int) -> list[Tensor]:
    """Planes of codes drawn uniformly, made on the GPU; for rests of at most 62 bits and whole bytes."""
    rest = torch.randint(0, shape.codes, (groups,), device="cuda")
    planes = [torch.randint(0, 256, (groups * shape.dim // 8,), dtype=torch.uint8, device="cuda")]
    place = 0
    for bits in plane_widths(width - shape.dim):
        part = rest >> place & ((1 << bits) - 1)
        if bits >= 8:
            planes.append(part.view(torch.uint8).view(groups, 8)[:, : bits // 8].flatten())
        else:
            shifts = torch.arange(0, 8, bits, device="cuda")
            planes.append((part.view(-1, 8 // bits) << shifts).sum(1).to(torch.uint8))
        place += bits
    return planes


def packed_matrices(rows: int, columns: int, shape: HalfShape, width: int) -> list[tuple[list[Tensor], Tensor]]:
    groups = rows * columns // shape.dim
    count = -(-FLOOR // (groups * width // 8))
    scales = [torch.rand(rows, device="cuda") + 0.5 for _ in range(count)]
    return [(random_planes(groups, shape, width), scale) for scale in scales]


def measure_copy() -> dict[str, float]:
    parts = [torch.empty(FLOOR // 4, dtype=torch.uint8, device="cuda") for _ in range(8)]
    seconds = seconds_per_item([lambda a=a, b=b: b.copy_(a) for a, b in zip(parts[::2], parts[1::2], strict=True)])
    return {"gigabytes_per_second": 2 * (FLOOR // 4) / seconds / 1e9}


def check(kernels: CudaKernels, shape: HalfShape, width: int) -> dict[str, Any]:
    """Against the reference (decode, encode: equal bits) and float64 (products: relative error in norm)."""
    rows, columns = 512, 4096
    groups = rows * columns // shape.dim
    x, scale = torch.randn(groups, shape.dim), torch.rand(groups) + 0.5
    numbers = (shape.dim, shape.pulses, shape.levels, shape.gains, shape.shift)
    codes = torch.ops.compress.half_pyramid_encode(x, scale, *numbers)
    found = kernels.encode(x.cuda(), scale.cuda(), shape)
    planes = torch.ops.compress.half_pyramid_pack(*codes, *numbers, width)
    scales = torch.rand(rows) + 0.5
    weight = reference.decode(planes, scales, columns, shape, width, torch.float32)
    packed = [plane.cuda() for plane in planes]
    arguments = (packed, scales.cuda(), shape, width)
    result: dict[str, Any] = {
        "encode_equal": all(torch.equal(a.cpu(), b) for a, b in zip(found, codes, strict=True)),
        "decode_equal": torch.equal(
            kernels.decode(packed, scales.cuda(), columns, shape, width, torch.float32).cpu(), weight
        ),
    }
    for count in (1, 2, 8, 256):
        inputs = torch.randn(count, columns).bfloat16()
        exact = inputs.double() @ weight.double().T
        for activations in ("float", "int8"):
            if count > 8 and activations == "int8":
                continue
            y = kernels.linear(inputs.cuda(), *arguments, activations).cpu().double()
            result[f"error_{activations}_{count}"] = float((y - exact).norm() / exact.norm())
    return result


def cycle(matrices: list[Any], product: Callable[..., Tensor]) -> float:
    return seconds_per_item([lambda m=m: product(m) for m in matrices])


def measure_products(kernels: CudaKernels, rows: int, columns: int, shape: HalfShape, width: int) -> dict[str, Any]:
    result: dict[str, Any] = {}
    weights = [
        torch.randn(rows, columns, device="cuda", dtype=torch.bfloat16)
        for _ in range(-(-FLOOR // (2 * rows * columns)))
    ]
    inputs = {count: torch.randn(count, columns, device="cuda", dtype=torch.bfloat16) for count in (1, 2, 4, 8, 2048)}
    bf16 = {count: cycle(weights, lambda w, x=x: F.linear(x, w)) for count, x in inputs.items()}
    result["bf16"] = {"seconds": bf16, "gigabytes_per_second": 2e-9 * rows * columns / bf16[1]}
    del weights
    matrices = packed_matrices(rows, columns, shape, width)
    size = rows * columns // shape.dim * width / 8
    for activations in ("float", "int8"):
        for count, x in inputs.items():
            if activations == "int8" and count > 8:
                continue
            seconds = cycle(matrices, lambda m, x=x, a=activations: kernels.linear(x, *m, shape, width, a))
            result[f"{activations}_{count}"] = {
                "microseconds": seconds * 1e6,
                "gigabytes_per_second": size / seconds / 1e9,
                "ratio_to_bf16": bf16[count] / seconds,
            }
    seconds = cycle(matrices, lambda m: kernels.decode(*m, columns, shape, width, torch.bfloat16))
    result["decode"] = {"gigabytes_per_second": (size + 2 * rows * columns) / seconds / 1e9}
    del matrices
    for name, measure in (("int4", measure_int4), ("nf4", measure_nf4)):
        try:
            seconds = measure(rows, columns, inputs[1])
            result[name] = {"microseconds": seconds * 1e6, "ratio_to_bf16": bf16[1] / seconds}
        except (RuntimeError, ImportError, AttributeError) as error:
            result[name] = {"missing": str(error).partition("\n")[0]}
    return result


def measure_int4(rows: int, columns: int, x: Tensor) -> float:
    """torch's 4-bit weight-only product with groups of 128."""
    packed = torch.randint(0, 256, (rows, columns // 2), dtype=torch.uint8, device="cuda")
    scales = torch.rand(columns // 128, rows, 2, device="cuda", dtype=torch.bfloat16)
    count = -(-FLOOR // packed.numel())
    weights = [torch._convert_weight_to_int4pack(packed.roll(k), 8) for k in range(count)]
    return cycle(weights, lambda w: torch._weight_int4pack_mm(x, w, 128, scales))


def measure_nf4(rows: int, columns: int, x: Tensor) -> float:
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ImportError("bitsandbytes is not installed")
    import bitsandbytes.functional as bnb

    weight = torch.randn(rows, columns, device="cuda", dtype=torch.bfloat16)
    count = -(-FLOOR // (rows * columns // 2))
    packed = [bnb.quantize_4bit(weight.roll(k), quant_type="nf4") for k in range(count)]
    return cycle(packed, lambda p: bnb.gemv_4bit(x, p[0].t(), state=p[1]))


def measure_encode(kernels: CudaKernels, shape: HalfShape, weights: int) -> dict[str, float]:
    part = 2**27
    x = torch.randn(part // shape.dim, shape.dim, device="cuda")
    scale = torch.ones(part // shape.dim, device="cuda")
    kernels.encode(x[:1024], scale[:1024], shape)
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(weights // part):
        kernels.encode(x, scale, shape)
    torch.cuda.synchronize()
    return {"weights": weights, "seconds": time.perf_counter() - start}


def measure_hadamard(launcher: CupyLauncher) -> dict[str, float]:
    rates = {}
    for columns in (1024, 4096, 8192, 32768):
        parts = [torch.randn(2**27 // columns, columns, device="cuda", dtype=torch.bfloat16) for _ in range(4)]
        seconds = cycle(parts, lambda x: hadamard_rows(x, launcher))
        rates[str(columns)] = 4 * 2**27 / seconds / 1e9
    return rates


def instructions_per_weight(folder: Path) -> dict[str, float]:
    """Of the newest binaries of the fused products: the loop that holds their streaming loads."""
    if shutil.which("cuobjdump") is None:
        return {}
    counts = {}
    for name, weights in (("half_gemv", 128), ("half_gemv_int8", 64)):
        binaries = sorted(folder.glob(f"{name}-sm_*.cubin"), key=lambda path: path.stat().st_mtime)
        if binaries:
            text = subprocess.run(["cuobjdump", "-sass", str(binaries[-1])], capture_output=True, text=True).stdout
            counts[binaries[-1].name] = loop_length(text) / weights
    return counts


def loop_length(sass: str) -> int:
    """Instructions from the target of the longest backward branch to the end of its unconditional part.

    The part of a loop that sums a finished row over its warps lies behind a branch and is not counted.
    """
    lines = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?);", sass)
    places = [int(place, 16) for place, _ in lines]
    branches = [
        (place, re.search(r"BRA (?:0x|`\(.*\) )?0x([0-9a-f]+)|BRA 0x([0-9a-f]+)", text))
        for place, text in zip(places, (t for _, t in lines), strict=True)
    ]
    jumps = [(place, int(next(g for g in match.groups() if g), 16)) for place, match in branches if match]
    start, end = max(((target, place) for place, target in jumps if target < place), key=lambda jump: jump[1] - jump[0])
    last = [
        place
        for place, text in zip(places, (t for _, t in lines), strict=True)
        if start <= place < end and re.search(r"IDP|HMMA", text)
    ]
    return (max(last) - start) // 16 + 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("gpu.json"))
    parser.add_argument("--width", type=int, default=26, help="bits of a group of 8")
    parser.add_argument(
        "--quick", action="store_true", help="the smaller matrix, and an eighth of the weights to encode"
    )
    options = parser.parse_args()
    shape = shipped_tables()[1, 8, True, "trained"][options.width].shape
    launcher = CupyLauncher()
    kernels = CudaKernels(launcher)
    report: dict[str, Any] = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "width": options.width}

    def add(name: str, measure: Callable[[], Any]) -> None:
        start = time.perf_counter()
        report[name] = measure()
        torch.cuda.empty_cache()
        report[name]["took"] = round(time.perf_counter() - start, 1)
        print(name, json.dumps(report[name]), flush=True)
        options.output.write_text(json.dumps(report, indent=1))

    add("check", lambda: check(kernels, shape, options.width))
    add("copy", measure_copy)
    for rows, columns in SIZES[: 1 if options.quick else None]:
        add(f"{rows}x{columns}", lambda o=rows, n=columns: measure_products(kernels, o, n, shape, options.width))
    add("encode", lambda: measure_encode(kernels, shape, 2**27 if options.quick else 2**30))
    add("hadamard", lambda: measure_hadamard(launcher))
    add("instructions_per_weight", lambda: dict(instructions_per_weight(launcher.folder)))


if __name__ == "__main__":
    main()
