"""What each part of calibrated rounding is worth: on and off, one at a time, over several draws of calibration rows.

    python benchmarks/rounding_parts.py [--model builtin:teacher] [--data builtin:python/train] [--seeds 3] [--rows 128]
        [--held-out builtin:python/val] [--windows 64] [--bits 3.25] [--codec half_pyramid] [--only NAME ...]
        [--csv FILE]

Each line is the default with one thing changed. Figures are KL(original || quantized) in nats per token on windows of
256 tokens of held-out text, the mean over seeds and its standard error over windows, and against the default: the
ratio of the means, and the paired difference over windows in its own standard errors (above 2: the change does harm,
below -2: it helps). A seed draws the calibration rows and, where matrices are mixed, the signs.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import compress
from compress.data import text_source, tokenize
from compress.data.calibration import calibration_rows
from compress.losses import KL
from compress.modeling.loading import load_model, load_tokenizer
from compress.quantization.options import Ldlq, Nearest

CONTEXT = 256
DEFAULT = Ldlq()
FIELDS = ("part", "change", "kl", "stderr", "ratio", "deviations", "seconds")


def changes() -> dict[str, tuple[str, dict[str, Any]]]:
    """What is changed, by the name of the part: a text, and arguments of `compress.quantize`."""

    def options(**fields: Any) -> dict[str, Any]:
        return {"rounding": dataclasses.replace(DEFAULT, **fields)}

    return {
        "default": (DEFAULT.text, {}),
        "ldlq": ("rounding to the nearest, without data", {"rounding": Nearest(), "data": None}),
        "hadamard": ("transform=hadamard", {"transform": "hadamard"}),
        "order": ("columns as they are", options(order=False)),
        "reallocation": ("search=false", options(search=False)),
        "sweeps 0": ("sweeps=0", options(sweeps=0)),
        "sweeps 1": ("sweeps=1", options(sweeps=1)),
        "sweeps 4": ("sweeps=4", options(sweeps=4)),
        "gain norm": ("gain=norm", options(gain="norm")),
        "gain best": ("gain=best", options(gain="best")),
        "refit": ("refit", options(refit=not DEFAULT.refit)),
        "sequential block": ("sequential=block", options(sequential="block")),
        "sequential nothing": ("sequential=nothing, asymmetric=0", options(sequential="nothing", asymmetric=0.0)),
        "gptaq": ("asymmetric=0", options(asymmetric=0.0)),
        "gptaq half": ("asymmetric=0.5", options(asymmetric=0.5)),
        "damping": ("damping=0.05", options(damping=0.05)),
        "textbook": (
            "sweeps=0, search=false, asymmetric=0, order as it is",
            options(sweeps=0, search=False, asymmetric=0.0, order=False),
        ),
    }


@torch.inference_mode()
def window_kl(model: Any, original: Any, windows: Tensor) -> Tensor:
    """Mean KL(original || model) of each window, float64 [W], in nats per token."""
    divergence = KL(reduction="none")
    parts = []
    for batch in windows.split(8):
        student, teacher = (each(input_ids=batch).logits[:, :-1].float() for each in (model, original))
        parts.append(divergence(student, teacher).double().view(len(batch), -1).mean(1))
    return torch.cat(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="builtin:teacher")
    parser.add_argument("--data", default="builtin:python/train")
    parser.add_argument("--held-out", default="builtin:python/val")
    parser.add_argument("--bits", type=float, default=3.25)
    parser.add_argument("--codec", default="half_pyramid")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--csv", type=Path)
    given = parser.parse_args()
    tokenizer = load_tokenizer(given.model)
    limit = given.windows * CONTEXT
    windows, _ = tokenize(text_source(given.held_out), tokenizer, limit).rows(CONTEXT, limit)
    original = load_model(given.model)
    drawn = [
        calibration_rows(text_source(given.data), tokenizer, rows=given.rows, context=CONTEXT, seed=seed)
        for seed in range(given.seeds)
    ]
    lines: list[dict[str, Any]] = []
    base: Tensor | None = None
    for part, (text, arguments) in changes().items():
        if given.only and part not in ("default", *given.only):
            continue
        started = time.process_time()
        found = []
        for seed, rows in enumerate(drawn):
            model = load_model(given.model)
            options = {"data": rows, "seed": seed, **arguments}
            compress.quantize(model, bits=given.bits, codec=given.codec, **options)
            found.append(window_kl(model, original, windows))
        seconds = (time.process_time() - started) / given.seeds
        mean = torch.stack(found).mean(0)
        base = mean if base is None else base
        difference = mean - base
        spread = float(difference.std()) / len(mean) ** 0.5
        line = {
            "part": part,
            "change": text,
            "kl": round(float(mean.mean()), 5),
            "stderr": round(float(mean.std()) / len(mean) ** 0.5, 5),
            "ratio": round(float(mean.mean() / base.mean()), 3),
            "deviations": round(float(difference.mean()) / spread, 1) if spread else 0.0,
            "seconds": round(seconds, 1),
        }
        lines.append(line)
        print("  ".join(str(line[name]) for name in FIELDS), flush=True)
    if given.csv is not None:
        with given.csv.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, FIELDS)
            writer.writeheader()
            writer.writerows(lines)


if __name__ == "__main__":
    main()
