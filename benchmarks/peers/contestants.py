"""Who takes part, with which settings, and how one is run.

Every contestant is a script with one contract (see `scripts/task.py`), run in an interpreter of its own: a peer in its
environment, this project in the present one.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peers.environments import BASE, Environments

from compress.errors import CompressError

SCRIPTS = Path(__file__).with_name("scripts")
PEERS = ("gptqmodel", "llmcompressor", "autoround", "hqq", "bitsandbytes", "rtn", "rotations")
OURS = ("half_pyramid", "hadamard", "integer", "data-free")
"""What takes part unless somebody chooses."""
LEARNED = ("ost", "integer-ost", "channel", "channel-hadamard", "channel-ost")
"""What takes part when asked for: learned transforms, and weights with one scale to an output channel."""
RATES = {3: 3.25, 4: 4.0}
"""Bits a weight of the default codec beside peers of so many bits, which store some more for scales."""


@dataclass(frozen=True)
class Contestant:
    """`name` is that of the table, `script` of scripts/run_NAME.py, `environment` None for the present interpreter.
    `group`: weights to a scale, -1 for a whole output channel, None for what the others have. `whole`: it leaves a
    folder with a model, not a file of weights."""

    name: str
    script: str
    environment: str | None
    bits: int
    symmetric: bool = False
    settings: Mapping[str, str | int | float] = field(default_factory=dict)
    group: int | None = None
    whole: bool = False

    def path(self) -> Path:
        return SCRIPTS / f"run_{self.script}.py"

    def words(self) -> list[str]:
        words = ["--bits", str(self.bits), *(["--symmetric"] if self.symmetric else [])]
        return words + [word for name, value in self.settings.items() for word in ("--setting", f"{name}={value}")]


def ours(names: Iterable[str], bits: int, group: int) -> Iterator[Contestant]:
    """With calibration the default codec, the same with transforms, and `integer` (GPTQ with this project's rounding);
    and the default codec without data. The first is whom the peers are compared with. `LEARNED` are those of learned
    transforms and, as the peers have them, integers with a symmetric grid to a channel."""
    integer = bits + (16 + bits) / group
    channel: dict[str, str | int | float] = {"width": bits, "codec": "integer:group=0,symmetric=true"}
    settings: dict[str, dict[str, str | int | float]] = {
        "half_pyramid": {"rate": RATES[bits]},
        "hadamard": {"rate": RATES[bits], "transform": "hadamard"},
        "integer": {"rate": integer, "codec": f"integer:group={group}"},
        "data-free": {"rate": RATES[bits], "data": "none"},
        "ost": {"rate": RATES[bits], "transform": "ost"},
        "integer-ost": {"width": bits, "codec": f"integer:group={group}", "transform": "ost"},
        "channel": {**channel, "transform": "none"},
        "channel-hadamard": {**channel, "transform": "hadamard"},
        "channel-ost": {**channel, "transform": "ost"},
    }
    for name in names:
        yield Contestant(f"ours {name}", "compress", None, bits, settings=settings[name], whole=True)


def theirs(names: Iterable[str], bits: int, iterations: int, group: int) -> Iterator[Contestant]:
    """The peers `names`, with the grids that each has: symmetric and asymmetric, or its tables of 4 bits; rotations at
    4 bits, where their papers have them."""
    for name in names:
        if name == "bitsandbytes":
            if bits == 4:
                yield Contestant("bitsandbytes NF4", name, BASE, bits)
                yield Contestant("bitsandbytes NF4 double", name, BASE, bits, settings={"double": 1})
                yield Contestant("bitsandbytes FP4", name, BASE, bits, settings={"table": "fp4"})
        elif name == "hqq":
            yield Contestant("HQQ", name, name, bits)
        elif name == "rotations":
            if bits == 4:
                yield from rotated(bits, group)
        else:
            settings = {"iterations": iterations} if name == "autoround" else {}
            for symmetric in (False, True):
                grid = "symmetric" if symmetric else "asymmetric"
                place = BASE if name == "rtn" else name
                yield Contestant(f"{TITLES[name]} {grid}", name, place, bits, symmetric, settings)


def rotated(bits: int, group: int) -> Iterator[Contestant]:
    """llm-compressor's rotations (see `scripts/run_rotations.py`) in front of its GPTQ, or of rounding to the nearest,
    with a scale to `group` weights and with one to an output channel, both grids; and its GPTQ alone with one to an
    output channel."""
    tried = [("spinquant", "gptq"), ("uncentred", "gptq"), ("quarot", "gptq"), ("quip", "gptq"), ("uncentred", "rtn")]
    for size, place in ((group, f"g{group}"), (-1, "channel")):
        for rotation, rounding in [("none", "gptq"), *tried] if size == -1 else tried:
            for symmetric in (False, True):
                words = ["llm-compressor", *([rotation] if rotation != "none" else []), rounding, place]
                yield Contestant(
                    " ".join([*words, "symmetric" if symmetric else "asymmetric"]),
                    "rotations",
                    "llmcompressor",
                    bits,
                    symmetric,
                    {"rotation": rotation, "rounding": rounding},
                    size,
                    whole=True,
                )


TITLES = {"gptqmodel": "GPTQModel", "llmcompressor": "llm-compressor", "autoround": "AutoRound", "rtn": "RTN"}


@dataclass(frozen=True)
class Arena:
    """What all contestants on one model share: its folder in float32, the file of calibration rows, weights to a scale,
    threads, and a folder for what they leave, logs among it. All paths are absolute."""

    model: Path
    rows: Path
    group: int
    threads: int
    folder: Path
    environments: Environments

    def run(self, who: Contestant, reuse: bool) -> tuple[Path, dict[str, Any]]:
        """The file of dequantized weights, or the folder with a model; and the answer (see `scripts/task.py`), to
        which `seconds_of_all` is added, those of the whole process. With `reuse` a peer's are those of an earlier run
        with the same scripts, arguments, model, rows and threads, if there was one.

        Raises `CompressError` with the end of its messages when the script fails.
        """
        name = f"{who.name} {who.bits}".replace(" ", "-")
        weights = self.folder / (name if who.whole else f"{name}.safetensors")
        answer, log = (self.folder / f"{name}.{suffix}" for suffix in ("json", "log"))
        stamp = self._stamp(who)
        if reuse and who.environment is not None and weights.exists() and answer.is_file():
            report: dict[str, Any] = json.loads(answer.read_text(encoding="utf-8"))
            if report["stamp"] == stamp:
                return weights, report
        answer.unlink(missing_ok=True)
        python = sys.executable if who.environment is None else str(self.environments.python(who.environment))
        command = [python, str(who.path()), str(self.model), str(self.rows), str(weights), "--group", self._group(who)]
        started = time.perf_counter()
        with log.open("w", encoding="utf-8") as stream:
            result = subprocess.run(
                command + who.words(),
                cwd=self.folder,
                stdout=subprocess.PIPE,
                stderr=stream,
                text=True,
                env=self._variables(),
            )
            stream.write(result.stdout)
        seconds = time.perf_counter() - started
        if result.returncode != 0:
            raise CompressError(f"{who.name} failed: {_last_line(log)}", remedy=f"Its messages are in '{log}'.")
        report = {**json.loads(result.stdout.strip().splitlines()[-1]), "seconds_of_all": seconds, "stamp": stamp}
        answer.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        return weights, report

    def _group(self, who: Contestant) -> str:
        return str(self.group if who.group is None else who.group)

    def _stamp(self, who: Contestant) -> str:
        """SHA-256 of all that decides what a contestant gives, but for this project's own code."""
        digest = hashlib.sha256(json.dumps([who.words(), int(self._group(who)), self.threads]).encode())
        for path in (who.path(), SCRIPTS / "task.py", self.rows, *sorted(self.model.glob("*.safetensors"))):
            digest.update(path.read_bytes())
        return digest.hexdigest()

    def _variables(self) -> dict[str, str]:
        """No network, no graphics card, and threads that sleep while they wait, since other work may run beside."""
        chosen = {
            "OMP_NUM_THREADS": str(self.threads),
            "GOMP_SPINCOUNT": "0",
            "CUDA_VISIBLE_DEVICES": "",
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        return {**os.environ, **chosen}


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing")
