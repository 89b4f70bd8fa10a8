"""Kill a run with SIGKILL at random moments, take it up again, and compare the result with an unbroken run.

    python benchmarks/crash.py [--kills 10] [--quick] [--json]

For `distill` and for `quantize`: one unbroken run, then runs that are killed at a moment drawn uniformly over the time
that the unbroken one took and started again with the same command, until the given number of kills is reached and the
last run has ended by itself. "Equal" means the contract's "same bytes": all weight, config and tokenizer files, and
report.json without its times and memory; and, for distill, every logged loss.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

UNSTABLE = {"README.md", "compress.json"}
"""Files that name times of the run (the card, and the checksum list that covers it)."""
UNSTABLE_FIELDS = ("seconds", "peak_rss_bytes")


@dataclass
class Result:
    command: str
    kills: int
    starts: int
    seconds_unbroken: float
    same_bytes: bool
    same_losses: bool


def command_line(name: str, out: Path, steps: int) -> list[str]:
    base = [sys.executable, "-m", "compress.cli.main", name]
    if name == "quantize":
        return [*base, "builtin:teacher", "--bits", "3.25", "--out", str(out), "--quiet"]
    options = ["--teacher", "builtin:teacher", "--student", "builtin:student", "--data", "builtin:python/val"]
    recipe = ["--loss", "kl", "--steps", str(steps), "--save-every", "4", "--log-every", "2"]
    size = ["--batch-size", "4", "--context", "64"]
    return [*base, *options, *recipe, *size, "--out", str(out), "--quiet"]


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
    for line in (out.with_name(out.name + ".work") / "log.jsonl").read_text().splitlines():
        event = json.loads(line)
        if event["kind"] == "step" and "loss" in event:
            found.setdefault(event["index"], set()).add(event["loss"])
    return found


def killed_runs(command: list[str], kills: int, seconds: float, draw: random.Random) -> tuple[int, int]:
    """Start `command` until it ends by itself, killing it at random moments; returns (kills that hit, starts)."""
    hits = starts = 0
    while True:
        starts += 1
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        try:
            _, errors = process.communicate(timeout=draw.uniform(0, seconds) if hits < kills else None)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.communicate()
            hits += 1
            continue
        if process.returncode != 0:
            raise SystemExit(f"{' '.join(command)} failed:\n{errors.decode()}")
        return hits, starts


def measure(name: str, kills: int, steps: int, seed: int, folder: Path) -> Result:
    whole = folder / f"{name}-whole"
    started = time.monotonic()
    subprocess.run(command_line(name, whole, steps), check=True)
    seconds = time.monotonic() - started
    wanted, wanted_losses = digest(whole), losses(whole)
    draw = random.Random(seed)
    result = Result(name, 0, 0, round(seconds, 1), True, True)
    while result.kills < kills:
        broken = folder / f"{name}-{result.kills}"
        hits, starts = killed_runs(command_line(name, broken, steps), kills - result.kills, seconds, draw)
        result.kills, result.starts = result.kills + hits, result.starts + starts
        result.same_bytes &= digest(broken) == wanted
        result.same_losses &= losses(broken) == wanted_losses
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--steps", type=int, default=40, help="of the distillation")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="two kills of each")
    parser.add_argument("--only", choices=["distill", "quantize"])
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    kills = 2 if options.quick else options.kills
    names = [options.only] if options.only else ["distill", "quantize"]
    with tempfile.TemporaryDirectory() as folder:
        results = [measure(name, kills, options.steps, options.seed, Path(folder)) for name in names]
    for result in results:
        print(json.dumps(asdict(result)) if options.json else result)
    if not all(result.same_bytes and result.same_losses for result in results):
        raise SystemExit("a resumed run differs from an unbroken one")


if __name__ == "__main__":
    main()
