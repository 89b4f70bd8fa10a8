"""Decoding and preparing of packed half-integer pyramids, and products with prepared ones beside torch's dense ones.

Every timing goes through distinct matrices, more than caches hold: `--matrices` times 4096 x 4096 weights. Codes are
uniformly random, which is the worst case for a table of them. The relative output error of a product is that of
|y - x W^T|_2 against float64, so that of "int8" is mostly the rounding of the activations.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import linear

from compress.ops.half_pyramid.native import HalfPyramidLibrary
from compress.ops.half_pyramid.shape import HalfShape, plane_widths, uniform_levels
from compress.ops.native import find_library

SIZE = 4096
GAINS = tuple(0.01 * 1.17**j for j in range(12))
SHAPES = {
    "8 x 3.25": (HalfShape(8, 10, (10, 28, 43, 58, 72, 85, 97, 109, 120), GAINS[:6], 5), 26),
    "8 x 4": (HalfShape(8, 19, uniform_levels(15), GAINS, 1), 32),
    "16 x 3.25": (HalfShape(16, 22, uniform_levels(15), GAINS[:7]), 52),
    "32 x 3.25": (HalfShape(32, 43, uniform_levels(15), GAINS[:6], 1), 106),
}


def random_planes(shape: HalfShape, width: int, seed: int) -> list[Tensor]:
    """Of a matrix of random codes; a rest of more than 63 bits has its lower bits drawn alone."""
    generator = torch.Generator().manual_seed(seed)
    groups = SIZE * SIZE // shape.dim
    planes = [torch.randint(0, 256, (SIZE * SIZE // 8,), dtype=torch.uint8, generator=generator)]
    rests = torch.randint(0, min(shape.codes, 2**63 - 1), (groups,), generator=generator)
    for bits in plane_widths(width - shape.dim):
        if bits >= 8:
            planes.append(rests.view(torch.uint8).view(groups, 8)[:, : bits // 8].flatten())
        else:
            parts = (rests & (1 << bits) - 1).view(-1, 8 // bits)
            planes.append((parts << bits * torch.arange(8 // bits)).sum(1).to(torch.uint8))
        rests = rests >> bits if bits < 64 else torch.zeros_like(rests)
    return planes


def milliseconds(step: Callable[[int], object], count: int, repeats: int) -> float:
    """The least mean time of step(0), ... step(count - 1)."""
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        for i in range(count):
            step(i)
        best = min(best, (time.perf_counter() - start) / count * 1e3)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2, help="of products; decoding and preparing take one")
    parser.add_argument("--matrices", type=int, default=80)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rows", type=int, nargs="+", default=[1], help="rows of activations")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    args = parser.parse_args()
    path = find_library()
    if path is None:
        raise SystemExit("The compiled library is missing.")
    library = HalfPyramidLibrary(path)
    dense = {
        torch.bfloat16: [torch.randn(SIZE, SIZE).bfloat16() for _ in range(args.matrices // 4)],
        torch.float32: [torch.randn(SIZE, SIZE) for _ in range(args.matrices // 8)],
    }
    scales = 0.5 + torch.rand(SIZE)
    for name in args.shapes:
        shape, width = SHAPES[name]
        first = random_planes(shape, width, 0)
        planes = [[plane.clone() for plane in first] for _ in range(8)]
        prepared = [library.prepare(first, SIZE, SIZE, shape, width) for _ in range(args.matrices)]
        torch.set_num_threads(1)
        report: dict[str, object] = {"shape": name}
        for step, work in (
            ("decoded", lambda i: library.decode(planes[i], scales, SIZE, shape, width)),  # noqa: B023
            ("prepared", lambda i: library.prepare(planes[i], SIZE, SIZE, shape, width)),  # noqa: B023
        ):
            report[f"{step} M weights/s"] = round(SIZE * SIZE / milliseconds(work, 8, args.repeats) / 1e3)
        report["prepared bits a weight"] = round(8 * prepared[0].numel() / SIZE**2, 2)
        torch.set_num_threads(args.threads)
        weight = library.decode(first, scales, SIZE, shape, width).double()
        for rows in args.rows:
            x = torch.randn(rows, SIZE, generator=torch.Generator().manual_seed(rows))
            exact = x.double() @ weight.T
            baselines = {
                dtype: milliseconds(lambda i: linear(x.to(dtype), each[i]), len(each), args.repeats)  # noqa: B023
                for dtype, each in dense.items()
            }
            for activations in ("int8", "float"):

                def product(i: int) -> Tensor:
                    return library.prepared_linear(x, prepared[i], scales, shape, activations)  # noqa: B023

                took = milliseconds(product, args.matrices, args.repeats)
                report[f"{activations}, {rows} rows"] = {
                    "ms": round(took, 3),
                    **{f"x {dtype}": round(other / took, 2) for dtype, other in baselines.items()},
                    "error": float(f"{float((product(0) - exact).norm() / exact.norm()):.1e}"),
                }
        print(json.dumps(report) if args.json else "  ".join(f"{key}: {value}" for key, value in report.items()))


if __name__ == "__main__":
    main()
