"""What the script of a contestant is told, and what it answers. Runs in a peer's environment: torch, transformers,
numpy and safetensors are there, this project is not.

    python SCRIPT MODEL ROWS.npy OUT.safetensors --bits B --group G [--symmetric] [--setting NAME=VALUE ...]

MODEL is a folder in float32, ROWS int64 [rows, context]. A peer writes into OUT the dequantized weights, float32
[out, in], of every linear map but the language head, by the name of the module. The last line of stdout is the answer,
a JSON object: version and method, what was set, true bits a weight, and the seconds of quantization alone, once as they
passed and once as this process spent them on processors (loading, saving and imports are in neither).
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

SEED = 0


@dataclass
class Task:
    model: Path
    rows: Tensor
    out: Path
    bits: int
    group: int
    symmetric: bool
    settings: dict[str, str]
    seconds: float = 0.0
    processor_seconds: float = 0.0

    def true_bits(self, scale: float = 16, zero: float | None = None) -> float:
        """b + (s + z) / g bits a weight: a group of g codes of b bits has a scale of s bits and a zero point of z. By
        default z is b, and 0 on a symmetric grid, where nothing needs to be stored."""
        if zero is None:
            zero = 0 if self.symmetric else self.bits
        return self.bits + (scale + zero) / self.group

    @contextmanager
    def timed(self) -> Iterator[None]:
        started, spent = time.perf_counter(), time.process_time()
        yield
        self.seconds += time.perf_counter() - started
        self.processor_seconds += time.process_time() - spent

    def write(self, weights: dict[str, Tensor]) -> None:
        save_file({name: weight.detach().float().contiguous() for name, weight in weights.items()}, self.out)

    def answer(self, package: str, method: str, *, bits_per_weight: float, **used: Any) -> None:
        """Print the answer; `used` are the settings worth knowing, defaults among them."""
        report = {
            "version": f"{package} {version(package)}",
            "method": method,
            "settings": {"symmetric": self.symmetric, **used},
            "bits_per_weight": bits_per_weight,
            "seconds": self.seconds,
            "processor_seconds": self.processor_seconds,
        }
        print("\n" + json.dumps(report), flush=True)


def read_task() -> Task:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("rows", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--bits", type=int, required=True)
    parser.add_argument("--group", type=int, required=True)
    parser.add_argument("--symmetric", action="store_true")
    parser.add_argument("--setting", action="append", default=[], metavar="NAME=VALUE")
    given = parser.parse_args()
    torch.manual_seed(SEED)
    settings = dict(each.split("=", 1) for each in given.setting)
    rows = torch.from_numpy(np.load(given.rows))
    return Task(given.model, rows, given.out, given.bits, given.group, given.symmetric, settings)


def load(folder: Path) -> nn.Module:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.config.use_cache = False
    return model.eval()


def linear_maps(model: nn.Module) -> dict[str, nn.Linear]:
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not name.endswith("lm_head")
    }
