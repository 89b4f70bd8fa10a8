"""The same models, the same calibration rows and the same held-out text through this project and its peers.

    python benchmarks/quantize_peers.py [--quick] [--models teacher,babyllama] [--peers gptqmodel,...] [--bits 3,4]
        [--data DIR] [--environments DIR] [--torch-index URL] [--reuse] [--out CSV] [--plot PNG]

Every peer runs on a processor in an environment of its own, made at its first use (--environments; with an index such
as https://download.pytorch.org/whl/cpu they need no CUDA). Each gets the model in float32 and the calibration rows as
token ids, and gives back float32 weights, which are put into the original model; ours is a whole artifact, loaded as a
user would. What is compared is KL(original || quantized) in nats per token on windows of text that calibrated nobody,
with its standard error. All are judged on the same windows, so that pairs are compared window by window:
`ratio_of_ours` is our divergence by theirs, `deviations_of_ours` the mean difference in its own standard errors (below
-2: ours is nearer). "Ours" is the first of --ours. A method that fails is named at the end, and the exit status is
then 1.

Bits are true ones, of all that is stored for the quantized maps: the codes, scales of 16 bits (32 in bitsandbytes),
zero points as wide as the codes where the grid is asymmetric (16 bits in HQQ). Three favours to the peers: scales are
counted with 16 bits where one kept them in float32; codes of 3 bits are counted with 3, though some pack ten of them
into 32 bits; GPTQModel's column indices are not counted. Beside peers at 3 and 4 bits, ours has 3.25 and 4 bits.

`--peers rotations`: llm-compressor's rotations in front of its GPTQ, at 4 bits (`peers/scripts/run_rotations.py`),
also with one scale to an output channel. They change other tensors too, so a whole model comes back. Online rotations
and the untied head cost them no bits here. `--ours` has learned transforms for comparison: ost, integer-ost,
channel-ost; and what these are to be compared with, channel and channel-hadamard.

Defaults of the peers, as written into the column `settings`: GPTQModel and llm-compressor run with their own damping
and column order; the symmetric grid is the default of both and of AutoRound, the asymmetric one mostly the better.
Seconds are those of quantization alone, without loading and saving (`seconds_of_all` has these and the imports);
processor seconds hardly depend on what else the machine does.

--quick: the teacher at 3 bits, 32 windows, without AutoRound, whose 200 iterations a block take most of the time.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from peers.contestants import LEARNED, OURS, PEERS, RATES, Arena, Contestant, ours, theirs
from peers.environments import Environments
from peers.judge import Judge, put
from peers.plot import draw, require_matplotlib
from peers.subjects import MODELS, Subject, calibration, evaluation, subject
from peers.table import Row, figures, header, line, write
from safetensors.torch import load_file
from torch import Tensor
from transformers.utils import logging

from compress.errors import CompressError
from compress.hardware import describe_machine
from compress.modeling.loading import load_model, load_tokenizer

SEED = 0
CACHE = Path(".cache") / "model-compress" / "peers"
QUICK = {
    "models": ["teacher"],
    "bits": [3],
    "windows": 32,
    "ours": ["half_pyramid", "integer"],
    "peers": [name for name in PEERS if name != "autoround"],
}

T = TypeVar("T")


class Tournament:
    """All contestants on one model. `failures` has a line for each that could not run."""

    def __init__(self, chosen: Subject, options: argparse.Namespace) -> None:
        self.chosen, self.options = chosen, options
        self.failures: list[str] = []
        home = options.environments.expanduser().absolute()
        folder = home / "work" / chosen.name
        folder.mkdir(parents=True, exist_ok=True)
        original = load_model(chosen.model)
        original.save_pretrained(folder / "model")
        load_tokenizer(chosen.model).save_pretrained(folder / "model")
        rows = calibration(chosen, options.rows, options.context, SEED)
        np.save(folder / "rows.npy", rows.numpy())
        self.judge = Judge(original, evaluation(chosen, options.windows, options.context))
        self.arena = Arena(
            folder / "model",
            folder / "rows.npy",
            chosen.group,
            options.threads,
            folder,
            Environments(home, options.torch_index),
        )

    def rows(self, bits: int) -> Iterator[Row]:
        """The rows of the table at `bits`, ours first. Raises `CompressError` when none of ours could run."""
        reference: Tensor | None = None
        for who in ours(self.options.ours, bits, self.chosen.group):
            if (judged := self._judged(who)) is not None:
                kl, answer = judged
                reference = kl if reference is None else reference
                yield self._row(who, kl, reference, answer)
        if reference is None:
            raise CompressError("None of --ours could run.", remedy="See the messages above.")
        for who in theirs(self.options.peers, bits, self.options.iterations, self.chosen.group):
            if (judged := self._judged(who)) is not None:
                yield self._row(who, judged[0], reference, judged[1])

    def _judged(self, who: Contestant) -> tuple[Tensor, dict[str, Any]] | None:
        """Divergences [W] and the answer of its script; None for one that could not run."""
        try:
            file, answer = self.arena.run(who, self.options.reuse)
            model = load_model(file) if file.is_dir() else put(load_model(self.chosen.model), load_file(file))
        except CompressError as error:
            self.failures.append(str(error))
            print(error, flush=True)
            return None
        return self.judge.window_kl(model), answer

    def _row(self, who: Contestant, kl: Tensor, reference: Tensor, answer: dict[str, Any]) -> Row:
        return {**self._setting(who), **figures(kl, reference, answer)}

    def _setting(self, who: Contestant) -> Row:
        machine = describe_machine()
        return {
            "model": self.chosen.name,
            "peers_bits": who.bits,
            "method": who.name,
            "group": self.chosen.group if who.group is None else who.group,
            "rows": self.options.rows,
            "windows": self.options.windows,
            "context": self.options.context,
            "seed": SEED,
            "threads": self.options.threads,
            **{name: machine[name] for name in ("cpu", "cores", "torch")},
        }


def some_of(known: Iterable[T], kind: Callable[[str], T]) -> Callable[[str], list[T]]:
    """A reader of comma-separated values, each of them one of `known`; the empty text is none of them."""
    values = list(known)

    def read(text: str) -> list[T]:
        try:
            chosen = [kind(part) for part in text.split(",") if part]
            for each in chosen:
                values.index(each)
        except ValueError:
            raise argparse.ArgumentTypeError(f"'{text}' is not some of {','.join(map(str, values))}") from None
        return chosen

    return read


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="at most ten minutes with environments that exist")
    parser.add_argument("--models", type=some_of(MODELS, str), help="all for which there are data")
    parser.add_argument("--peers", type=some_of(PEERS, str), default=list(PEERS))
    parser.add_argument(
        "--ours", type=some_of(OURS + LEARNED, str), default=list(OURS), help="the first is compared with"
    )
    parser.add_argument("--bits", type=some_of(RATES, int), default=list(RATES), help="of the peers")
    parser.add_argument("--rows", type=int, default=128, help="of calibration")
    parser.add_argument("--context", type=int, default=256, help="tokens of a row and of a window")
    parser.add_argument("--windows", type=int, default=128, help="of evaluation")
    parser.add_argument("--iterations", type=int, default=200, help="of AutoRound, a block")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--data", type=Path, metavar="DIR", help="real models and texts, for babyllama")
    parser.add_argument("--environments", type=Path, metavar="DIR", default=Path.home() / CACHE)
    parser.add_argument("--torch-index", metavar="URL", help="one more package index when an environment is made")
    parser.add_argument("--reuse", action="store_true", help="weights and seconds of earlier, equal runs of the peers")
    parser.add_argument("--out", type=Path, metavar="CSV")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="needs matplotlib")
    options = parser.parse_args()
    if options.quick:
        parser.set_defaults(**QUICK)
        options = parser.parse_args()
    if options.models is None:
        options.models = list(MODELS if options.data is not None else MODELS[:1])
    return options


def main() -> int:
    options = read_options()
    torch.set_num_threads(options.threads)
    logging.disable_progress_bar()
    if options.plot is not None:
        require_matplotlib()
    rows: list[Row] = []
    failures: list[str] = []
    for name in options.models:
        tournament = Tournament(subject(name, options.data), options)
        for bits in options.bits:
            print(header(f"{name}, peers at {bits} bits in groups of {tournament.chosen.group}"), flush=True)
            for row in tournament.rows(bits):
                print(line(row), flush=True)
                rows.append(row)
                if options.out is not None:
                    write(options.out, rows)
        failures += tournament.failures
    if options.plot is not None:
        draw(rows, options.plot)
    for failure in failures:
        print(f"failed: {failure}")
    return 1 if failures else 0


if __name__ == "__main__":
    try:
        status = main()
    except CompressError as error:
        raise SystemExit(f"error: {error}") from None
    raise SystemExit(status)
