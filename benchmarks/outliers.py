"""Outliers that change nothing: the same function with a few loud channels, as large language models have them.

    python benchmarks/outliers.py builtin:teacher OUT [--channels 8] [--factor 30] [--seed 0]

A pre-norm block computes W (g * x / |x|) with the gain g of a norm and the matrices W that read it. For C channels j of
the residual stream, the same in every block,

    g_j' = f g_j,    W'_ij = W_ij / f    (W of query, key, value; gate, up),

so that W' g' = W g: in exact arithmetic no output changes, yet the activations that these matrices read have C channels
f times as loud. What quantizes those activations with one scale to a token then spends it on C channels. Small models
have no such outliers by themselves; those of large ones sit in few residual channels across all blocks. The last norm
keeps its gain.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import PreTrainedModel

from compress.errors import ModelError
from compress.modeling.loading import load_model, load_tokenizer
from compress.modeling.sites import find_sites


def outlier_channels(width: int, channels: int, seed: int) -> torch.Tensor:
    """Which of `width` channels are loud: int64 [channels], drawn without repetition."""
    return torch.randperm(width, generator=torch.Generator().manual_seed(seed))[:channels]


@torch.no_grad()
def with_outliers(model: PreTrainedModel, channels: int = 8, factor: float = 30.0, seed: int = 0) -> PreTrainedModel:
    """`model`, changed in place, with `channels` loud channels in front of attention and MLP.

    Computed in the model's dtype. Raises `ModelError` for a model without a residual stream that pre-norms read.
    """
    sites = find_sites(model)
    if sites.residual is None:
        raise ModelError("The model has no norms for outliers: " + " ".join(sites.reasons), remedy="Take a Llama.")
    loud = outlier_channels(sites.residual.width, channels, seed)
    readers = {name: norm for name, norm in sites.residual.readers.items() if name != sites.residual.head}
    for norm in set(readers.values()):
        gain = model.get_submodule(norm).get_parameter("weight")
        gain[loud] = (gain[loud] + sites.residual.offset) * factor - sites.residual.offset
    for reader in readers:
        model.get_submodule(reader).get_parameter("weight")[:, loud] /= factor
    return model


def write_outliers(source: str, out: Path, channels: int = 8, factor: float = 30.0, seed: int = 0) -> Path:
    """The model `source` with outliers as a checkpoint folder `out`, float32, with its tokenizer; returns `out`."""
    with_outliers(load_model(source), channels, factor, seed).save_pretrained(out)
    load_tokenizer(source).save_pretrained(out)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source")
    parser.add_argument("out", type=Path)
    parser.add_argument("--channels", type=int, default=8)
    parser.add_argument("--factor", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    print(write_outliers(given.source, given.out, given.channels, given.factor, given.seed))


if __name__ == "__main__":
    main()
