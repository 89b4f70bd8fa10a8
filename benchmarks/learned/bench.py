"""Runs a trial: quantizes a model, measures it window by window, and compares it with the first of its comparison."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import torch
from learned.trials import OUTLIERS, STUDENT, Quantization, Trial
from outliers import with_outliers
from peers.judge import Judge, mean_and_error, paired
from peers.scripts.width import rate_of
from peers.subjects import Subject, calibration, evaluation, subject
from torch import Tensor
from transformers import PreTrainedModel

import compress
from compress.codecs import codec
from compress.hardware import describe_machine
from compress.modeling.loading import load_model
from compress.quantization.dynamic import Dynamic, dynamic_quantization
from compress.quantization.modules import packed_modules
from compress.recipe.method import Method

KEPT = 8
"""Quantized models that are kept for trials that only run otherwise."""
Row = dict[str, str | int | float | None]


@dataclass(frozen=True)
class Measured:
    """`kl` [W] nats per token, mean over seeds; `spread`: the standard deviation over seeds of its mean, None for one;
    bits a weight; seconds of a quantization, as they passed and of processors, mean over seeds."""

    kl: Tensor
    spread: float | None
    bits: float
    seconds: float
    processor_seconds: float


class Bench:
    """The models by name, calibration rows and held-out windows: those of `quantize_peers.py`."""

    def __init__(self, data: Path | None, rows: int, windows: int, context: int) -> None:
        self._data, self._rows, self._windows, self._context = data, rows, windows, context
        self._first: dict[tuple[object, ...], Measured] = {}
        self._judge = lru_cache(1)(self._make_judge)
        self._quantized = lru_cache(KEPT)(self._quantize)

    def classes(self, model: str) -> int:
        """Those that its head tells apart."""
        return int(self.model(model).config.vocab_size)

    def model(self, name: str) -> PreTrainedModel:
        """A fresh one, float32."""
        model = load_model(self._subject(name).model)
        return with_outliers(model) if name == OUTLIERS else model

    def measure(self, trial: Trial, seeds: Sequence[int]) -> Measured:
        """The mean over `seeds`, each of which draws calibration rows, signs and the order of learning."""
        found, costs, bits = [], [], 0.0
        for seed in seeds:
            model, bits, *cost = self._quantized(trial.quantization, seed)
            running = Dynamic.of_bits(trial.activations, trial.kv, mix_keys=trial.mix_keys)
            with dynamic_quantization(model, running):
                found.append(self._judge(trial.quantization.model).window_kl(model))
            costs.append(cost)
        means = torch.stack([kl.mean() for kl in found])
        wall, processor = torch.tensor(costs).mean(0).tolist()
        spread = float(means.std()) if len(seeds) > 1 else None
        return Measured(torch.stack(found).mean(0), spread, bits, wall, processor)

    def row(self, trial: Trial, seeds: Sequence[int]) -> Row:
        """The columns of a trial. `ratio`: its divergence by that of the first of its comparison; `deviations`: the
        mean difference over windows in its own standard errors (below -2: nearer to the original)."""
        measured = self.measure(trial, seeds)
        first = self._first.setdefault(trial.comparison, measured)
        mean, error = mean_and_error(measured.kl)
        pair = paired(measured.kl, first.kl)
        asked, machine = trial.quantization, describe_machine()
        return {
            "part": trial.part,
            "model": asked.model,
            "weights": asked.weights.codec,
            "bits_per_weight": measured.bits,
            "activations": trial.activations,
            "kv": trial.kv,
            "label": trial.label,
            "transform": asked.transform,
            "kl": mean,
            "kl_stderr": error,
            "kl_seeds": measured.spread,
            "ratio": pair.ratio,
            "deviations": pair.deviations,
            "seconds": measured.seconds,
            "processor_seconds": measured.processor_seconds,
            "seconds_beyond_first": measured.seconds - first.seconds,
            "rows": self._rows,
            "windows": self._windows,
            "context": self._context,
            "seeds": len(seeds),
            "threads": torch.get_num_threads(),
            **{name: machine[name] for name in ("cpu", "cores", "torch")},
        }

    def _subject(self, name: str) -> Subject:
        if name == STUDENT:
            return replace(subject("teacher", None), name=name, model="builtin:student")
        return subject("teacher" if name == OUTLIERS else name, self._data)

    def _make_judge(self, name: str) -> Judge:
        return Judge(self.model(name), evaluation(self._subject(name), self._windows, self._context))

    def _quantize(self, asked: Quantization, seed: int) -> tuple[PreTrainedModel, float, float, float]:
        """The model, its true bits a weight, seconds and processor seconds."""
        model = self.model(asked.model)
        rows = calibration(self._subject(asked.model), self._rows, self._context, seed)
        method = Method.model_validate(asked.weights.codec)
        rounder = codec(method.name, **method.options)
        bits = asked.weights.bits
        rate = rate_of(model, rounder, round(bits)) if asked.weights.fixed else bits
        started, spent = time.perf_counter(), time.process_time()
        compress.quantize(model, bits=rate, data=rows, codec=rounder, transform=asked.transform, seed=seed)
        seconds, processor_seconds = time.perf_counter() - started, time.process_time() - spent
        packed = packed_modules(model).values()
        stored = sum(8 * module.weight.nbytes for module in packed)
        weights = sum(module.out_features * module.in_features for module in packed)
        return model, stored / weights, seconds, processor_seconds
