"""Calibrated quantization of a large model on several devices, planned from rates that are measured here.

    python benchmarks/distributed_plan.py [--processes 8] [--rows 128] [--context 2048]

Measured on one thread of this CPU: float32 products, the float64 Cholesky factor, and what the codec adds per weight.
Computed from them, with the shapes of Llama-3-70B: work per block, and with it hours, memory, disk and traffic for the
number of processes. For the codec's share of the work the formula is checked on a matrix that was not used to fit it.
The columns for a GPU are no measurement: they divide the same work by the rates on the command line.

Work for a matrix [o, n] and T tokens, in multiplications and additions:

    passes 2 o n T for each of the streams;  moments n^2 T for H, 2 n^2 T for C;  Cholesky n^3 / 3 in float64;
    targets W C and C H^-1 4 o n^2;  rounding o n^2 in the first pass, 4 o n^2 in each of two sweeps;
    the three errors of the report 6 o n^2;  and o n weights that are coded three times.

Passes, moments, targets, rounding and coding are shared by the processes; the factor, each makes for itself.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from compress.codecs import codec
from compress.hardware import cpu_name
from compress.quantization.hessian import factorize
from compress.quantization.ldlq import Order, round_matrix

HIDDEN, FFN, KEYS, BLOCKS, VOCABULARY = 8192, 28672, 1024, 80, 128256
GROUPS = ((HIDDEN, HIDDEN + 2 * KEYS), (HIDDEN, HIDDEN), (HIDDEN, 2 * FFN), (FFN, HIDDEN))
"""n and the rows of all matrices that share an input: query, key and value; output; gate and up; down."""
MATRICES = (3, 1, 2, 1)
"""Of each group."""
STREAMS, SWEEPS, DIM = 2, 2, 8
GPU_FLOPS, GPU_DOUBLE, GPU_CODES, GPU_STEP = 25e12, 30e12, 2e9, 2e-3


@dataclass(frozen=True)
class Rates:
    """Operations a second in float32 and float64, weights coded a second, and the seconds in which a device is told to
    round `DIM` columns of a piece, however few rows it has."""

    single: float
    double: float
    codes: float
    step: float = 0.0


def seconds(work: Callable[[], object], repeats: int = 3) -> float:
    """The least of several times of the processor, of which other programs take no part."""
    taken = []
    for _ in range(repeats):
        started = time.process_time()
        work()
        taken.append(time.process_time() - started)
    return min(taken)


def rounding_flops(rows: int, n: int) -> float:
    return rows * n * n * (1 + 4 * SWEEPS)


def round_seconds(rows: int, n: int) -> float:
    """Of `round_matrix` for a random matrix [rows, n] and Hessian."""
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, n, generator=draw)
    x = torch.randn(2 * n, n, generator=draw)
    factor = factorize((x.T @ x).double(), 0.01, "random")
    method = codec("half_pyramid")
    spec = method.spec(26)

    def work() -> None:
        rounding = method.rounding((rows, n), spec, weight.device)
        order = Order.of(torch.ones(n), rounding.dim, rounding.scope, False)
        round_matrix(weight, factor, order, rounding, sweeps=SWEEPS)

    return seconds(work, 2)


def measured() -> Rates:
    x = torch.randn(1024, 1024)
    single = 2 * 1024**3 / seconds(lambda: x @ x, 5)
    positive = (x @ x.T).double() + 1024 * torch.eye(1024, dtype=torch.float64)
    double = 1024**3 / 3 / seconds(lambda: torch.linalg.cholesky(positive), 5)
    rows, n = 128, 512
    coding = round_seconds(rows, n) - rounding_flops(rows, n) / single
    return Rates(single, double, 3 * rows * n / coding)


def planned(rates: Rates, processes: int, tokens: int) -> dict[str, float]:
    """Hours by part of the work."""
    hours = dict.fromkeys(("passes", "moments", "factors", "targets and errors", "rounding", "column by column"), 0.0)
    for (n, rows), matrices in zip(GROUPS, MATRICES, strict=True):
        weights = rows * n
        hours["column by column"] += matrices * n / DIM * (1 + SWEEPS) * rates.step
        hours["passes"] += STREAMS * 2 * weights * tokens / rates.single / processes
        hours["moments"] += 3 * n * n * tokens / rates.single / processes
        hours["factors"] += n**3 / 3 / rates.double
        hours["targets and errors"] += 10 * weights * n / rates.single / processes
        hours["rounding"] += (rounding_flops(rows, n) / rates.single + 3 * weights / rates.codes) / processes
    return {name: BLOCKS * value / 3600 for name, value in hours.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=8)
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--bits", type=float, default=3.25)
    parser.add_argument("--gpu-flops", type=float, default=GPU_FLOPS, help="float32, sustained; assumed")
    parser.add_argument("--gpu-double", type=float, default=GPU_DOUBLE, help="float64, sustained; assumed")
    parser.add_argument("--gpu-codes", type=float, default=GPU_CODES, help="weights coded a second; assumed")
    parser.add_argument("--gpu-step", type=float, default=GPU_STEP, help="seconds for a step of columns; assumed")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    tokens, processes = asked.rows * asked.context, asked.processes
    rates = measured()
    rows, n = 64, 1024
    expected = rounding_flops(rows, n) / rates.single + 3 * rows * n / rates.codes
    print("measured on one thread of", cpu_name())
    print(f"  float32 {rates.single / 1e9:.1f} Gflop/s, float64 Cholesky {rates.double / 1e9:.1f} Gflop/s,")
    print(f"  coding {rates.codes / 1e6:.2f} Mweights/s; check: [{rows}, {n}] takes {round_seconds(rows, n):.3f} s, ")
    print(f"  by the formula {expected:.3f} s")
    gpu = Rates(asked.gpu_flops, asked.gpu_double, asked.gpu_codes, asked.gpu_step)
    columns = {
        "CPU, 1": planned(rates, 1, tokens),
        f"CPU, {processes}": planned(rates, processes, tokens),
        f"GPU, {processes}": planned(gpu, processes, tokens),
    }
    print(f"hours for {BLOCKS} blocks, {tokens} tokens (CPU: extrapolated by the formulas; GPU: from assumed rates)")
    for name in next(iter(columns.values())):
        print(f"  {name:20}", *(f"{label} {hours[name]:10.2f}" for label, hours in columns.items()))
    print(f"  {'sum':20}", *(f"{label} {sum(hours.values()):10.2f}" for label, hours in columns.items()))
    weights = sum(n * rows for n, rows in GROUPS)
    tables, square = 2 * VOCABULARY * HIDDEN, 8 * FFN * FFN
    hidden = 2 * STREAMS * 4 * tokens * HIDDEN
    print("bytes, computed")
    print(
        f"  of a process: two blocks in float32 {8 * weights / 1e9:.1f} GB, H and C in float64 {2 * square / 1e9:.1f},"
    )
    print(f"    while they are summed up {3 * square / 1e9:.1f} more,")
    print(f"    hidden states of its rows {hidden / processes / 1e9:.1f}")
    print(f"  on disk: original {2 * (BLOCKS * weights + tables) / 1e9:.0f} GB, result ", end="")
    packed = BLOCKS * weights * asked.bits / 8
    print(f"{(packed + 2 * tables) / 1e9:.0f}, work folder {(packed + hidden) / 1e9:.0f}")
    moved = sum(1.5 * 8 * n * n for n, _ in GROUPS) * BLOCKS
    print(f"  sent by a process: {moved * (16 / processes + 1) / 1e12:.1f} TB of moments")


if __name__ == "__main__":
    main()
