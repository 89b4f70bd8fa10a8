"""Time and memory of a distillation loss from hidden states, forward and backward: dense, ours, TRL's, Liger's.

    python benchmarks/fused_losses.py [--quick] [--repeats 3] [--device cuda] [--csv FILE]

Student and teacher have hidden states [rows, width] and a head [classes, width]; what is measured is the loss, averaged
over the rows, and its gradients for the student's states and head. Every measurement is a process of its own:

    seconds      wall time of one forward and backward pass, after a small one that starts the threads
    cpu_seconds  of all threads: what is left to compare on a machine that others use as well
    mib          the peak of the memory beyond inputs and returned gradients (CPU: resident; CUDA: allocated)

Each round runs all of them, every other round in reverse; the table gives medians, and ratios to `dense` of the same
round. `products` are the four matrix products and nothing else: no method that keeps to float32 can be faster.
"""

from __future__ import annotations

import argparse
import csv
import importlib.metadata
import importlib.util
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from compress.hardware import describe_machine
from compress.losses import KL, JensenShannon, TokenLoss
from compress.losses.fused import Head, Strategy, linear_loss

METHODS = ("products", "dense", "gradient", "tiles", "checkpoint", "trl", "liger")
LOSSES = ("kl", "jsd")
MEMORY_ASKED, TIME_ASKED = 1 / 8, 1.15


@dataclass(frozen=True)
class Case:
    loss: str
    rows: int
    classes: int
    width: int
    device: str
    dtype: str
    threads: int


@dataclass(frozen=True)
class Inputs:
    hidden: Tensor
    weight: Tensor
    teacher_hidden: Tensor
    teacher_weight: Tensor

    @classmethod
    def of(cls, case: Case, rows: int, classes: int) -> Inputs:
        torch.manual_seed(0)

        def normal(*shape: int, scale: float = 1.0) -> Tensor:
            dtype = getattr(torch, case.dtype)
            return torch.empty(shape, device=case.device, dtype=dtype).normal_(std=scale)

        size = 3 / math.sqrt(case.width)  # logits of a trained model's spread
        hidden, teacher_hidden = normal(rows, case.width), normal(rows, case.width)
        weight, teacher_weight = (normal(classes, case.width, scale=size) for _ in range(2))
        return cls(hidden.requires_grad_(), weight.requires_grad_(), teacher_hidden, teacher_weight)


def products(x: Inputs, loss: str) -> Tensor:
    with torch.no_grad():
        gradient = x.hidden @ x.weight.t()
        logits = x.teacher_hidden @ x.teacher_weight.t()
        x.hidden.grad, x.weight.grad = gradient @ x.weight, gradient.t() @ x.hidden
    return logits[0, 0].detach().requires_grad_()


def dense(x: Inputs, loss: str) -> Tensor:
    q = F.log_softmax(x.hidden @ x.weight.t(), -1, dtype=torch.float32)
    with torch.no_grad():
        p = F.log_softmax(x.teacher_hidden @ x.teacher_weight.t(), -1, dtype=torch.float32)
    if loss == "kl":
        return F.kl_div(q, p, reduction="batchmean", log_target=True)
    m = torch.logaddexp(q, p) - math.log(2)
    return (
        F.kl_div(m, p, reduction="batchmean", log_target=True) + F.kl_div(m, q, reduction="batchmean", log_target=True)
    ) / 2


def ours(x: Inputs, loss: str, strategy: Strategy) -> Tensor:
    made: TokenLoss = KL() if loss == "kl" else JensenShannon()
    heads = Head(x.weight), Head(x.teacher_weight)
    return linear_loss(made, x.hidden, heads[0], x.teacher_hidden, heads[1], strategy=strategy)


def trl(x: Inputs, loss: str) -> Tensor:
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    beta = 0.0 if loss == "kl" else 0.5
    values, _ = ChunkedDivergenceFunction.apply(
        x.hidden, x.weight, None, x.teacher_hidden, x.teacher_weight, None, beta
    )
    return values.mean()


def liger(x: Inputs, loss: str) -> Tensor:
    from liger_kernel.chunked_loss.jsd_loss import LigerFusedLinearJSDLoss

    made = LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.0 if loss == "kl" else 0.5, compiled=x.hidden.is_cuda
    )
    labels = torch.zeros(len(x.hidden), dtype=torch.int64, device=x.hidden.device)
    return made(x.hidden, x.weight, x.teacher_hidden, x.teacher_weight, labels)


def method(name: str) -> Callable[[Inputs, str], Tensor]:
    if name in ("gradient", "tiles", "checkpoint"):
        return lambda x, loss: ours(x, loss, name)
    return {"products": products, "dense": dense, "trl": trl, "liger": liger}[name]


class Memory:
    """The peak since it was made, beyond what was there then."""

    def __init__(self, device: str) -> None:
        self.cuda = device == "cuda"
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self.start = torch.cuda.memory_allocated()
        else:
            Path("/proc/self/clear_refs").write_text("5")  # sets the peak back to what is resident now
            self.start = _status("VmRSS")

    def peak(self) -> int:
        return (torch.cuda.max_memory_allocated() if self.cuda else _status("VmHWM")) - self.start


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {key}")


def measure(name: str, case: Case) -> dict[str, float]:
    """One forward and backward pass in this process."""
    torch.set_num_threads(case.threads)
    run = method(name)
    run(Inputs.of(case, rows=min(case.rows, 64), classes=min(case.classes, 2048)), case.loss).backward()
    x = Inputs.of(case, case.rows, case.classes)
    memory = Memory(case.device)
    started, cpu_started = time.perf_counter(), time.process_time()
    loss = run(x, case.loss)
    loss.backward()
    if case.device == "cuda":
        torch.cuda.synchronize()
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu_started
    assert x.hidden.grad is not None and x.weight.grad is not None
    returned = x.hidden.grad.nbytes + x.weight.grad.nbytes
    return {
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "mib": (memory.peak() - returned) / 2**20,
        "loss": loss.item(),
        "gradient_norm": x.weight.grad.float().norm().item(),
    }


def measure_apart(name: str, case: Case) -> dict[str, float]:
    """`measure` in a fresh process."""
    request = json.dumps({"name": name, "case": asdict(case)})
    done = subprocess.run([sys.executable, __file__, "--measure", request], capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{name} failed:\n{done.stderr}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def available(names: tuple[str, ...]) -> list[str]:
    packages = {"trl": "trl", "liger": "liger_kernel"}
    missing = [name for name in names if name in packages and importlib.util.find_spec(packages[name]) is None]
    for name in missing:
        print(f"{name}: not installed, left out")
    return [name for name in names if name not in missing]


def versions() -> dict[str, str | int]:
    found = describe_machine()
    for package in ("trl", "liger_kernel"):
        if importlib.util.find_spec(package):
            found[package] = importlib.metadata.version(package)
    return found


def compare(case: Case, names: list[str], repeats: int) -> list[dict[str, object]]:
    """Medians over the rounds, with ratios to dense."""
    rounds: list[dict[str, dict[str, float]]] = []
    for index in range(repeats):
        order = names if index % 2 == 0 else names[::-1]
        rounds.append({name: measure_apart(name, case) for name in order})
    rows = []
    for name in names:
        mine = [each[name] for each in rounds]
        row: dict[str, object] = asdict(case) | {"method": name, "repeats": repeats}
        row |= {key: statistics.median(each[key] for each in mine) for key in mine[0]}
        for key in ("seconds", "cpu_seconds", "mib"):
            row[f"{key}_to_dense"] = statistics.median(each[name][key] / each["dense"][key] for each in rounds)
        rows.append(row)
        print(
            f"{case.loss:4s} {name:10s} {row['seconds']:8.2f} s  x{row['seconds_to_dense']:.2f}   "
            f"cpu {row['cpu_seconds']:8.2f} s  x{row['cpu_seconds_to_dense']:.2f}   "
            f"{row['mib']:8.0f} MiB  x{row['mib_to_dense']:.3f}   loss {row['loss']:.6f}",
            flush=True,
        )
    return rows


def write_csv(path: Path, rows: list[dict[str, object]]) -> None:
    machine = versions()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*rows[0], *machine], lineterminator="\n")
        writer.writeheader()
        for row in rows:
            short = {key: f"{value:.5g}" if isinstance(value, float) else value for key, value in row.items()}
            writer.writerow(short | machine)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="512 rows of 16,384 classes and width 256, one round")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--rows", type=int, help="2048; on CUDA 8192")
    parser.add_argument("--classes", type=int, default=128_256)
    parser.add_argument("--width", type=int, help="1024; on CUDA 4096")
    parser.add_argument("--dtype", help="float32; on CUDA bfloat16")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--losses", nargs="+", choices=LOSSES, default=list(LOSSES))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--csv", type=Path, help="write the table, with hardware and versions, to this file")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        request = json.loads(options.measure)
        print(json.dumps(measure(request["name"], Case(**request["case"]))))
        return
    cuda = options.device == "cuda"
    rows, width = options.rows or (8192 if cuda else 2048), options.width or (4096 if cuda else 1024)
    classes, repeats = options.classes, options.repeats
    if options.quick:
        rows, classes, width, repeats = 512, 16_384, 256, 1
    dtype = options.dtype or ("bfloat16" if cuda else "float32")
    table = []
    for loss in options.losses:
        case = Case(loss, rows, classes, width, options.device, dtype, options.threads)
        table += compare(case, available(tuple(dict.fromkeys(["dense", *options.methods]))), repeats)
    if options.csv:
        write_csv(options.csv, table)
    missed = [row for row in table if row["method"] == "gradient" and not _as_asked(row, options.quick)]
    if missed:
        raise SystemExit("'gradient' needs more than an eighth of dense's memory, or 1.15 times its time")


def _as_asked(row: dict[str, object], quick: bool) -> bool:
    memory, seconds = row["mib_to_dense"], row["cpu_seconds_to_dense"]
    assert isinstance(memory, float) and isinstance(seconds, float)
    return memory <= MEMORY_ASKED and (quick or seconds <= TIME_ASKED)


if __name__ == "__main__":
    main()
