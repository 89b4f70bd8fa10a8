"""Time of a divergence's value and gradient, per logit: compiled loops, torch's operations, autograd.

    python benchmarks/divergence_rows.py [--threads 1 2] [--repeats 20] [--json]

`native` is `compress.ops.divergence_rows`, with every instruction set of this processor. `torch` is the same formula by
torch's operations, which is what runs where there is no compiled library. `autograd` is the definition as it is often
written: `log_softmax` of both, `F.kl_div` (or sums), and a backward pass. Of each the least of the repeats, which take
turns: processor time of all threads in nanoseconds per logit, and in brackets the wall time. Threads that spin while
they wait count in the first; GOMP_SPINCOUNT=0 stops them.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from compress.losses import KL, JensenShannon, ReverseKL, ReverseSkewKL, SkewKL, SymmetricKL, TotalVariation
from compress.losses.divergence import Distributions, Divergence
from compress.ops.native import NativeLibrary, find_library

Definition = Callable[[Tensor, Tensor], Tensor]


def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    return F.kl_div(log_q, log_p, log_target=True, reduction="sum")


def mixture(w: float, log_p: Tensor, log_q: Tensor) -> Tensor:
    return torch.logaddexp(log_p + math.log(w), log_q + math.log1p(-w))


def jensen_shannon(log_p: Tensor, log_q: Tensor) -> Tensor:
    log_m = mixture(0.5, log_p, log_q)
    return 0.5 * (kl(log_p, log_m) + kl(log_q, log_m))


KINDS: dict[str, tuple[tuple[float, ...], Divergence, Definition]] = {
    "kl": ((), KL(), kl),
    "reverse_kl": ((), ReverseKL(), lambda log_p, log_q: kl(log_q, log_p)),
    "symmetric_kl": ((0.5,), SymmetricKL(), lambda log_p, log_q: 0.5 * (kl(log_p, log_q) + kl(log_q, log_p))),
    "skew_kl": ((0.1,), SkewKL(0.1), lambda log_p, log_q: kl(log_p, mixture(0.1, log_p, log_q))),
    "reverse_skew_kl": ((0.1,), ReverseSkewKL(0.1), lambda log_p, log_q: kl(log_q, mixture(0.1, log_q, log_p))),
    "jensen_shannon": ((0.5,), JensenShannon(), jensen_shannon),
    "total_variation": ((), TotalVariation(), lambda log_p, log_q: 0.5 * (log_p.exp() - log_q.exp()).abs().sum()),
}
"""Options, the loss, and the definition of a batch's sum."""


def by_autograd(definition: Definition, student: Tensor, teacher: Tensor) -> None:
    student = student.detach().requires_grad_()
    definition(F.log_softmax(teacher, -1), F.log_softmax(student, -1)).backward()


def ways(library: NativeLibrary, kind: str, student: Tensor, teacher: Tensor) -> dict[str, Callable[[], object]]:
    options, loss, definition = KINDS[kind]
    gradient = torch.empty_like(student)

    def native(instructions: str) -> Callable[[], object]:
        return lambda: library.divergence_rows(
            student, teacher, kind, options, gradient=gradient, instructions=instructions
        )

    return {
        **{f"native {name}": native(name) for name in library.instructions},
        "torch": lambda: loss.of_distributions(Distributions.of(student, teacher)),
        "autograd": lambda: by_autograd(definition, student, teacher),
    }


def least_seconds(steps: dict[str, Callable[[], object]], repeats: int) -> dict[str, tuple[float, float]]:
    """Processor time and wall time."""
    times = dict.fromkeys(steps, (math.inf, math.inf))
    for _ in range(repeats):
        for name, step in steps.items():
            started, started_wall = time.process_time(), time.perf_counter()
            step()
            spent = time.process_time() - started, time.perf_counter() - started_wall
            times[name] = min(times[name][0], spent[0]), min(times[name][1], spent[1])
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    args = parser.parse_args()
    path = find_library()
    if path is None:
        raise SystemExit("The compiled library is missing.")
    library = NativeLibrary(path)
    for shape in ((64, 4096), (8, 128_256)):
        generator = torch.Generator().manual_seed(0)
        teacher = 3 * torch.randn(shape, generator=generator)
        student = teacher + torch.randn(shape, generator=generator)
        for threads in args.threads:
            torch.set_num_threads(threads)
            for kind in args.kinds:
                seconds = least_seconds(ways(library, kind, student, teacher), args.repeats)
                figures = {name: [each / student.numel() * 1e9 for each in both] for name, both in seconds.items()}
                if args.json:
                    print(json.dumps({"kind": kind, "shape": shape, "threads": threads, "nanoseconds": figures}))
                    continue
                cells = "  ".join(f"{name} {cpu:.2f} ({wall:.2f})" for name, (cpu, wall) in figures.items())
                ratio = figures["torch"][0] / figures[f"native {library.instructions[-1]}"][0]
                print(f"{kind} {list(shape)} {threads} threads: {cells}  torch / native {ratio:.1f}", flush=True)


if __name__ == "__main__":
    main()
