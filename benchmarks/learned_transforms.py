"""What learning a transform is worth: KL(original || quantized) behind none, a fixed one and a learned one.

    python benchmarks/learned_transforms.py [--parts w4a4kv4,...] [--models outliers,...] [--data DIR] [--steps 100]
        [--seeds 1] [--rows 128] [--windows 128] [--context 256] [--peers CSV] [--out CSV]

Parts, each a table; every ratio is to the first line of its block, and `deviations` is the mean difference over windows
in its own standard errors (below -2: nearer to the original than the first line):

- `w4a4kv4`: integer weights of 4 bits with a scale to an output channel, rounded with calibration; activations token by
  token and keys and values head by head in 4 bits, then only activations in 8. Without a transform keys are not mixed
  either. Models: the built-in teacher with eight loud channels (`outliers.py`), the same without, babyllama (--data).
- `weight_only`: those weights, the same with a scale to 64 of them (32 in babyllama), and pyramids at 3 bits.
- `kl_top`: what is minimised while learning, over k and what becomes of the other classes. The k of all classes is the
  whole divergence, whatever the rest.
- `parts`: learning with one ingredient changed.
- `cost`: the seconds of a quantization behind a fixed and behind a learned transform; the difference is learning.

`kl_top`, `parts` use the first of --models (`student`, the built-in one, is small enough for many), and 4 bits for
weights, activations, keys and values. A seed draws the calibration rows, the signs and the order of learning; with
several, divergences are means over them and `kl_seeds` is the standard deviation between them. Rows and windows are
those of `quantize_peers.py`, whose table --peers shows beside `weight_only`: there without pairing, since a table has
no windows, and errors are added in quadrature.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from learned.bench import Bench
from learned.report import beside_peers, header, line, read_peers, write
from learned.trials import OUTLIERS, PARTS, STUDENT, trials
from peers.subjects import MODELS
from transformers.utils import logging

from compress.errors import CompressError


def some_of(known: tuple[str, ...], text: str) -> list[str]:
    """Comma-separated values, each of them one of `known`."""
    chosen = text.split(",")
    if unknown := [name for name in chosen if name not in known]:
        raise argparse.ArgumentTypeError(f"'{unknown[0]}' is not one of {','.join(known)}")
    return chosen


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = (OUTLIERS, *MODELS, STUDENT)
    parser.add_argument("--parts", type=lambda text: some_of(PARTS, text), default=list(PARTS))
    parser.add_argument("--models", type=lambda text: some_of(known, text), help="all for which there are data")
    parser.add_argument("--data", type=Path, metavar="DIR", help="real models and texts, for babyllama")
    parser.add_argument("--steps", type=int, default=100, help="of learning")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--rows", type=int, default=128, help="of calibration")
    parser.add_argument("--windows", type=int, default=128, help="of evaluation")
    parser.add_argument("--context", type=int, default=256, help="tokens of a row and of a window")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--peers", type=Path, metavar="CSV", help="the table of quantize_peers.py")
    parser.add_argument("--out", type=Path, metavar="CSV")
    options = parser.parse_args()
    if options.models is None:
        options.models = [name for name in known if name != STUDENT and (name != "babyllama" or options.data)]
    return options


def main() -> None:
    options = read_options()
    torch.set_num_threads(options.threads)
    logging.disable_progress_bar()
    peers = None if options.peers is None else read_peers(options.peers)
    bench = Bench(options.data, options.rows, options.windows, options.context)
    rows = []
    for part in options.parts:
        print(header(part), flush=True)
        block = None
        for trial in trials(part, options.models, options.steps, bench.classes(options.models[0])):
            if trial.comparison != block:
                print()
            block = trial.comparison
            row = bench.row(trial, range(options.seeds))
            rows.append(row)
            print(line(row), flush=True)
            if options.out is not None:
                write(options.out, rows)
    if peers is not None:
        print("\n".join(beside_peers(rows, peers)) or "No peer on the same rows and windows has as many bits.")


if __name__ == "__main__":
    try:
        main()
    except CompressError as error:
        raise SystemExit(f"error: {error}") from None
