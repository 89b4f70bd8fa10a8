"""How many digits of a divergence between close models does float32 keep: here, in torch, in TRL?

    python benchmarks/divergence_accuracy.py [--rows 64] [--classes 40000] [--json]

The student's logits are the teacher's plus noise; the noise sets the divergence. The truth is the definition, written
out in float64 on the same float32 logits. Of each way to compute it: the largest relative error of the rows, and how
many rows come out negative. TRL's columns are its chunked kernel (`trl.kernels`), given logits through one-hot hidden
states, and `generalized_jsd_loss` of its GKD trainer. The last columns are processor time per logit and thread, value
and gradient, on one thread: here, and with torch's own operations.
"""

from __future__ import annotations

import argparse
import json
import math
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

from compress.losses import KL, Alpha, JensenShannon, ReverseKL
from compress.losses.divergence import Divergence

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # that it is experimental
    from trl.experimental.gkd.gkd_trainer import GKDTrainer

Values = Callable[[Tensor, Tensor], Tensor]


def close_pair(rows: int, classes: int, distance: float) -> tuple[Tensor, Tensor]:
    """Logits of a student and a teacher [rows, classes]; KL is about distance^2 / 2."""
    generator = torch.Generator().manual_seed(0)
    teacher = 3 * torch.randn(rows, classes, generator=generator)
    return teacher + distance * torch.randn(rows, classes, generator=generator), teacher


def log_pair(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    return F.log_softmax(teacher, -1), F.log_softmax(student, -1)


def kl(student: Tensor, teacher: Tensor) -> Tensor:
    log_p, log_q = log_pair(student, teacher)
    return F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)


def reverse_kl(student: Tensor, teacher: Tensor) -> Tensor:
    return kl(teacher, student)


def jensen_shannon(student: Tensor, teacher: Tensor) -> Tensor:
    log_p, log_q = log_pair(student, teacher)
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)
    return 0.5 * (log_p.exp() * (log_p - log_m) + log_q.exp() * (log_q - log_m)).sum(-1)


def alpha(student: Tensor, teacher: Tensor) -> Tensor:
    log_p, log_q = log_pair(student, teacher)
    return 4 * (1 - (0.5 * (log_p + log_q)).exp().sum(-1))


def trl_kernel(beta: float) -> Values:
    def values(student: Tensor, teacher: Tensor) -> Tensor:
        hidden = torch.eye(len(student))
        value, _ = ChunkedDivergenceFunction.apply(
            hidden, student.T.contiguous(), None, hidden, teacher.T.contiguous(), None, beta
        )
        return value

    return values


def trl_dense(beta: float) -> Values:
    def values(student: Tensor, teacher: Tensor) -> Tensor:
        rows = zip(student, teacher, strict=True)
        return torch.stack([GKDTrainer.generalized_jsd_loss(s[None, None], t[None, None], beta=beta) for s, t in rows])

    return values


DIVERGENCES: dict[str, tuple[Divergence, Values, float | None]] = {
    "kl": (KL(reduction="none"), kl, 0.0),
    "reverse_kl": (ReverseKL(reduction="none"), reverse_kl, 1.0),
    "jensen_shannon": (JensenShannon(reduction="none"), jensen_shannon, 0.5),
    "alpha=0.5": (Alpha(reduction="none"), alpha, None),
}
"""The loss, its definition (`F.kl_div` where that has it), and TRL's beta."""


def errors(values: Tensor, truth: Tensor) -> tuple[float, int]:
    """The largest relative error of the rows, and how many are negative."""
    return ((values.double() - truth) / truth).abs().max().item(), int((values < 0).sum())


def accuracy(name: str, distance: float, rows: int, classes: int) -> dict[str, Any]:
    ours, definition, beta = DIVERGENCES[name]
    student, teacher = close_pair(rows, classes, distance)
    truth = definition(student.double(), teacher.double())
    ways = {"here": ours, "torch": definition}
    if beta is not None:
        ways |= {"trl_kernel": trl_kernel(beta), "trl_gkd": trl_dense(beta)}
    found = {way: errors(values(student, teacher), truth) for way, values in ways.items()}
    return {"divergence": name, "value": truth.mean().item(), "errors": found}


def nanoseconds(step: Callable[[], object], logits: int) -> float:
    """The least processor time of a step, per logit."""
    times = []
    for _ in range(20):
        start = time.thread_time()
        step()
        times.append(time.thread_time() - start)
    return min(times) / logits * 1e9


def speed(name: str, rows: int, classes: int) -> dict[str, Any]:
    """Value and gradient of a batch: here, and by torch's operations and autograd."""
    ours, definition, _ = DIVERGENCES[name]
    student, teacher = close_pair(rows, classes, 0.5)
    student.requires_grad_()
    here = nanoseconds(lambda: torch.autograd.grad(ours(student, teacher).sum(), student), student.numel())
    plain = nanoseconds(lambda: torch.autograd.grad(definition(student, teacher).sum(), student), student.numel())
    return {"divergence": name, "rows": rows, "classes": classes, "here": here, "torch": plain}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--classes", type=int, default=40_000)
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    args = parser.parse_args()
    torch.set_num_threads(1)
    for name in DIVERGENCES:
        if not args.json:
            print(f"\n{name}: {'value':>10}  largest relative error (negative rows)")
        for distance in (0.3, 0.03, 0.003, 0.0003):
            row = accuracy(name, distance, args.rows, args.classes)
            if args.json:
                print(json.dumps(row))
                continue
            cells = [f"{way} {error:.1e} ({negative})" for way, (error, negative) in row["errors"].items()]
            print(f"{row['value']:>{len(name) + 12}.1e}  {'   '.join(cells)}")
    for shape in ((512, 4096), (16, 128_256)):
        for name in DIVERGENCES:
            row = speed(name, *shape)
            if args.json:
                print(json.dumps(row))
            else:
                ratio = row["torch"] / row["here"]
                print(f"{name} {shape}: here {row['here']:.1f}, torch {row['torch']:.1f} ns a logit; ratio {ratio:.2f}")


if __name__ == "__main__":
    main()
