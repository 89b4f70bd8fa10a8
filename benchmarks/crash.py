"""Kill a run with SIGKILL at random moments, take it up again, and compare the result with an unbroken run.

    python benchmarks/crash.py [--kills 10] [--only NAME] [--quick] [--json]

For `distill`, for `quantize` and for `quantize` with calibration data (`calibrated`): one unbroken run, then runs that
are killed and started again with the same command, until the given number of kills is reached and the last run has
ended by itself. "Equal" means the contract's "same bytes": all weight, config and tokenizer files, and report.json
without its times and memory; and, for distill, every logged loss.

The moments are drawn uniformly over the time in which a run works: from when it holds the lock of its work folder (what
comes before is imports and the plan) to when it has written its report (what comes after is the interpreter's end).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

UNSTABLE = {"README.md", "compress.json"}
"""Files that name times of the run (the card, and the checksum list that covers it)."""
UNSTABLE_FIELDS = ("seconds", "peak_rss_bytes")


POLL_SECONDS = 0.002

Command = Callable[[Path], list[str]]
"""A command line for a given `--out`."""


@dataclass
class Result:
    """`moments`: when each kill hit, as parts of the time that the unbroken run worked."""

    command: str
    kills: int
    starts: int
    seconds_worked: float
    moments: list[float] = field(default_factory=list)
    same_bytes: bool = True
    same_losses: bool = True


def quantize_command(model: str = "builtin:teacher", bits: float = 3.25) -> Command:
    words = [sys.executable, "-m", "compress.cli.main", "quantize", model, "--bits", str(bits), "--quiet"]
    return lambda out: [*words, "--out", str(out)]


def calibrated_command(
    model: str = "builtin:student", data: str = "builtin:python/train", rows: int = 16, context: int = 256
) -> Command:
    command = quantize_command(model)
    words = ["--data", data, "--rows", str(rows), "--context", str(context)]
    return lambda out: [*command(out), *words]


def distill_command(
    teacher: str = "builtin:teacher",
    student: str = "builtin:student",
    data: str = "builtin:python/val",
    steps: int = 40,
    context: int = 64,
) -> Command:
    words = [sys.executable, "-m", "compress.cli.main", "distill", "--teacher", teacher, "--student", student]
    words += ["--data", data, "--loss", "kl", "--steps", str(steps), "--save-every", "4", "--log-every", "2"]
    words += ["--batch-size", "4", "--context", str(context), "--quiet"]
    return lambda out: [*words, "--out", str(out)]


COMMANDS = {"distill": distill_command(), "quantize": quantize_command(), "calibrated": calibrated_command()}


def work_folder(out: Path) -> Path:
    return out.with_name(f"{out.name}.work")


def digest(out: Path) -> dict[str, str]:
    """SHA-256 of every file that must be the same in two runs."""
    found = {}
    for path in sorted(path for path in out.rglob("*") if path.is_file() and path.name not in UNSTABLE):
        payload = path.read_bytes()
        if path.name == "report.json":
            report = json.loads(payload)
            payload = json.dumps({k: v for k, v in report.items() if k not in UNSTABLE_FIELDS}, sort_keys=True).encode()
        found[path.relative_to(out).as_posix()] = hashlib.sha256(payload).hexdigest()
    return found


def losses(out: Path) -> dict[int, set[float]]:
    """The losses that a run's log gives for each step: one value, unless a restart logged another."""
    found: dict[int, set[float]] = {}
    for line in (work_folder(out) / "log.jsonl").read_text().splitlines():
        event = json.loads(line)
        if event["kind"] == "step" and "loss" in event:
            found.setdefault(event["index"], set()).add(event["loss"])
    return found


def begin(command: Command, out: Path) -> subprocess.Popen[str]:
    """Start the command, and return when it has locked its work folder, or ended."""
    process = subprocess.Popen(command(out), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    lock = work_folder(out) / "lock"
    while process.poll() is None:
        if lock.exists() and lock.read_text() == f"pid {process.pid}":
            break
        time.sleep(POLL_SECONDS)
    return process


def end(process: subprocess.Popen[str]) -> None:
    """Wait for a run to end by itself. Raises `RuntimeError` with what it said when it failed."""
    _, errors = process.communicate()
    if process.returncode != 0:
        raise RuntimeError(f"{process.args} failed:\n{errors}")


def unbroken_run(command: Command, out: Path) -> float:
    """Run the command; the seconds from its lock to its report."""
    process = begin(command, out)
    started = time.monotonic()
    report = work_folder(out) / "report.json"
    while process.poll() is None and not report.exists():
        time.sleep(POLL_SECONDS)
    seconds = time.monotonic() - started
    end(process)
    return seconds


def killed_runs(command: Command, out: Path, kills: int, seconds: float, draw: random.Random) -> list[float]:
    """Start the command until it ends by itself, killing it at most `kills` times; the moments at which it was hit."""
    hits: list[float] = []
    while len(hits) < kills:
        process = begin(command, out)
        moment = draw.random()
        try:
            process.wait(moment * seconds)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.communicate()
            hits.append(round(moment, 3))
        else:
            end(process)
            return hits
    end(begin(command, out))
    return hits


def measure(name: str, command: Command, kills: int, seed: int, folder: Path) -> Result:
    """Compare runs of the command that were killed `kills` times in all with one that was not."""
    whole = folder / f"{name}-whole"
    seconds = unbroken_run(command, whole)
    wanted, wanted_losses = digest(whole), losses(whole)
    draw = random.Random(seed)
    result = Result(name, 0, 0, round(seconds, 2))
    while result.kills < kills:
        broken = folder / f"{name}-{result.kills}"
        hits = killed_runs(command, broken, kills - result.kills, seconds, draw)
        result.kills, result.starts = result.kills + len(hits), result.starts + len(hits) + 1
        result.moments += hits
        result.same_bytes &= digest(broken) == wanted
        result.same_losses &= losses(broken) == wanted_losses
        if not hits:
            shutil.rmtree(broken)
            shutil.rmtree(work_folder(broken))
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--steps", type=int, default=40, help="of the distillation")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="two kills of each")
    parser.add_argument("--only", choices=COMMANDS)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    kills = 2 if options.quick else options.kills
    commands = {**COMMANDS, "distill": distill_command(steps=options.steps)}
    names = [options.only] if options.only else list(commands)
    with tempfile.TemporaryDirectory() as folder:
        results = [measure(name, commands[name], kills, options.seed, Path(folder)) for name in names]
    for result in results:
        print(json.dumps(asdict(result)) if options.json else result)
    if not all(result.same_bytes and result.same_losses for result in results):
        raise SystemExit("a resumed run differs from an unbroken one")


if __name__ == "__main__":
    main()
