"""Throughput of packed half-integer pyramids: matrices of random codes, decoding, and products beside torch's.

Codes are uniformly random, the worst case for the tables that decode them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from statistics import median
from typing import get_args

import torch
from torch import Tensor
from torch.nn.functional import linear

from compress import ops
from compress.ops.half_pyramid.native import Activations
from compress.ops.half_pyramid.shape import HalfShape, plane_widths

Step = Callable[[int], object]
CALLS = 16
"""Products in a row of one contestant: a step of a decoder makes many."""


def random_planes(shape: HalfShape, width: int, weights: int, seed: int) -> list[Tensor]:
    """Of random codes. Of a rest of more than 63 bits only the lower ones are random."""
    generator = torch.Generator().manual_seed(seed)
    planes = [torch.randint(0, 256, (weights // 8,), dtype=torch.uint8, generator=generator)]
    rests = torch.randint(0, min(shape.codes, 2**63 - 1), (weights // shape.dim,), generator=generator)
    for bits in plane_widths(width - shape.dim):
        if bits >= 8:
            planes.append(rests.view(torch.uint8).view(-1, 8)[:, : bits // 8].flatten())
        else:
            parts = (rests & (1 << bits) - 1).view(-1, 8 // bits)
            planes.append((parts << bits * torch.arange(8 // bits)).sum(1).to(torch.uint8))
        rests = rests >> bits if bits < 64 else torch.zeros_like(rests)
    return planes


def contest(
    steps: Mapping[str, tuple[Step, int]], rounds: int, calls: int, clock: Callable[[], float]
) -> list[dict[str, float]]:
    """Seconds of one call of each contestant, for every round. A contestant is a function of the number of a matrix and
    the number of matrices there are; in a round all take their turns of so many calls, each with the next matrix."""
    found = []
    for r in range(rounds):
        seconds = {}
        for name, (step, count) in steps.items():
            start = clock()
            for i in range(r * calls, (r + 1) * calls):
                step(i % count)
            seconds[name] = (clock() - start) / calls
        found.append(seconds)
    return found


def summary(rounds: list[dict[str, float]], baselines: tuple[str, ...] = ()) -> dict[str, dict[str, float]]:
    """Of every contestant the median and the least seconds, and two ratios of a baseline's time to its own: the median
    over the rounds, and that of the least times, which on a busy machine says more."""
    result = {}
    for name in rounds[0]:
        times = [each[name] for each in rounds]
        result[name] = {"median": median(times), "least": min(times)}
        for other in baselines:
            result[name][f"ratio to {other}"] = median(each[other] / each[name] for each in rounds)
            result[name][f"ratio to {other}, least"] = min(each[other] for each in rounds) / min(times)
    return result


def products(
    shape: HalfShape, width: int, size: int, rows: int, megabytes: int, rounds: int, clock: Callable[[], float]
) -> dict[str, dict[str, float]]:
    """y = x W^T for x [rows, size], W [size, size]: seconds in the threads that torch has, and the relative error
    |y - exact|_2 / |exact|_2, where exact is the product with the same W in float64.

    Packed matrices are multiplied in the form that `half_pyramid_prepare` makes once of their planes: `bits` a weight.
    """
    planes = random_planes(shape, width, size * size, 0)
    prepared = ops.half_pyramid_prepare(planes, size, size, shape, width)
    packed = copies([prepared], megabytes)
    dense = {dtype: copies([torch.randn(size, size).to(dtype)], megabytes) for dtype in (torch.bfloat16, torch.float32)}
    scales = 0.5 + torch.rand(size, generator=torch.Generator().manual_seed(1))
    x = torch.randn(rows, size, generator=torch.Generator().manual_seed(rows))
    weight = ops.half_pyramid_decode(planes, scales, size, shape, width).double()
    exact = x.double() @ weight.T

    def product(activations: Activations) -> Callable[[int], Tensor]:
        return lambda i: ops.half_pyramid_prepared_linear(x, packed[i][0], scales, shape, activations)

    def baseline(dtype: torch.dtype) -> Callable[[int], Tensor]:
        own = x.to(dtype)
        return lambda i: linear(own, dense[dtype][i][0])

    ways = {
        "int8": (product("int8"), len(packed)),
        "float": (product("float"), len(packed)),
        "bf16": (baseline(torch.bfloat16), len(dense[torch.bfloat16])),
        "fp32": (baseline(torch.float32), len(dense[torch.float32])),
    }
    report = summary(contest(ways, rounds, CALLS, clock), ("bf16", "fp32"))
    for name in get_args(Activations):
        report[name]["bits"] = prepared.numel() * 8 / size**2
        report[name]["error"] = float((product(name)(0) - exact).norm() / exact.norm())
    for dtype, name in ((torch.bfloat16, "bf16"), (torch.float32, "fp32")):
        report[name]["error"] = float((linear(x.to(dtype), weight.to(dtype)) - exact).norm() / exact.norm())
    return report


def copies(tensors: list[Tensor], megabytes: int) -> list[list[Tensor]]:
    """As many copies as make up so many megabytes."""
    size = sum(tensor.nbytes for tensor in tensors)
    return [[tensor.clone() for tensor in tensors] for _ in range(max(1, -(-megabytes * 10**6 // size)))]
