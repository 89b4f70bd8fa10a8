"""Every loss through the whole way: `compress distill` on the built-in pair, before and after.

    python benchmarks/losses_end_to_end.py [--steps 200] [--only kl sinkhorn] [--csv FILE]

Each row is one training of `builtin:student` against `builtin:teacher` on the same rows in the same order. The figures:
the first and the last logged training loss (means over ten steps), and on the same validation text the KL divergence
from the teacher in both directions and the loss on labels, beside those of the student that every run starts from. A
loss that says nothing about which sample is which, or that is meant as an addition, runs beside the anchor that its
page recommends.
"""

from __future__ import annotations

import argparse
import csv
import json
import tempfile
import time
from pathlib import Path

import torch

import compress
from compress.data import text_source, tokenize
from compress.losses import KL, CrossEntropy, ReverseKL, loss_names
from compress.modeling.loading import load_model, load_tokenizer

CONTEXT = 128
FIGURES = {"kl": KL(reduction="sum"), "reverse": ReverseKL(reduction="sum"), "nll": CrossEntropy(reduction="sum")}
ANCHORED = {
    "cmi": ["cross_entropy", "cmi:weight=0.1"],
    "nd": ["kl", "nd:weight=0.1"],
    "sinkhorn": ["kl", "sinkhorn:balance=0.1"],
    "span": ["kl", "span:balance=0.1"],
    "uld": ["kl", "uld:balance=0.1"],
    "uskd": ["cross_entropy", "uskd:weight=0.1"],
}
FIELDS = ("loss", "first", "last", *(f"{name}_{when}" for name in FIGURES for when in ("before", "after")), "seconds")


@torch.inference_mode()
def measure(model: str, limit: int) -> dict[str, float]:
    """KL(teacher || student), KL(student || teacher) and the loss on labels, nats per token."""
    student, teacher = load_model(model), load_model("builtin:teacher")
    source = text_source("builtin:python/val")
    rows, _ = tokenize(source, load_tokenizer("builtin:teacher"), limit).rows(CONTEXT, limit)
    sums = dict.fromkeys(FIGURES, 0.0)
    for batch in rows.split(16):
        logits, target = (each(input_ids=batch).logits[:, :-1] for each in (student, teacher))
        for name, loss in FIGURES.items():
            sums[name] += float(loss(logits, target, batch[:, 1:]))
    return {name: total / rows[:, 1:].numel() for name, total in sums.items()}


def train(losses: list[str], out: Path, steps: int) -> list[tuple[int, float]]:
    compress.distill(
        "builtin:student",
        teacher="builtin:teacher",
        data="builtin:python/train",
        losses=losses,
        out=out,
        steps=steps,
        batch_size=4,
        context=CONTEXT,
        learning_rate=5e-5,
        warmup_steps=steps // 20,
        log_every=10,
        save_every=steps,
    )
    log = (out.with_name(f"{out.name}.work") / "log.jsonl").read_text(encoding="utf-8").splitlines()
    events = [json.loads(line) for line in log]
    return [(event["index"], event["loss"]) for event in events if event["kind"] == "step" and "loss" in event]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--limit", type=int, default=8192, help="validation tokens")
    parser.add_argument("--only", nargs="+", default=loss_names(), metavar="LOSS")
    parser.add_argument("--csv", type=Path, default=None)
    options = parser.parse_args()
    before = measure("builtin:student", options.limit)
    rows = []
    print("  ".join(FIELDS), flush=True)
    for name in options.only:
        losses = ANCHORED.get(name, [name])
        with tempfile.TemporaryDirectory() as folder:
            started = time.perf_counter()
            course = train(losses, Path(folder) / "out", options.steps)
            seconds = time.perf_counter() - started
            after = measure(str(Path(folder) / "out"), options.limit)
        first, last = (next(loss for step, loss in part if step > 1) for part in (course, course[::-1]))
        figures = [each[name] for name in FIGURES for each in (before, after)]
        values = (" + ".join(losses), first, last, *figures, seconds)
        rows.append(dict(zip(FIELDS, values, strict=True)))
        print("  ".join(f"{value:.4f}" if isinstance(value, float) else value for value in values), flush=True)
    if options.csv is not None:
        with options.csv.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, FIELDS)
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
