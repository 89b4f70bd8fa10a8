"""Many executions, in a child process that this one watches for crashes and hangs."""

from __future__ import annotations

import json
import multiprocessing
import shutil
import time
import warnings
from collections import Counter
from dataclasses import asdict
from multiprocessing.connection import Connection
from pathlib import Path

from transformers.utils import logging

from tests.fuzz.execute import MOST_SECONDS, Result, execute, prepare
from tests.fuzz.seeds import write_seeds

PATIENCE = 3 * MOST_SECONDS
"""Seconds without word from the child after which it hangs; its own alarm comes first where Python still runs."""
MOST_FINDINGS = 25


def work(sender: Connection, seeds: list[Path], folder: Path, first: int) -> None:
    """The child: executions from `first` on; each is announced, then reported."""
    quiet()
    number = first
    while True:
        sender.send(number)
        sender.send(execute(number, seeds, folder))
        number += 1


def quiet() -> None:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.simplefilter("ignore")


class Campaign:
    """Executions until the time is over. `findings` is the folder that they are written to."""

    def __init__(self, scratch: Path, findings: Path) -> None:
        self.seeds = write_seeds(scratch / "good")
        self.input, self.findings = scratch / "input", findings
        self.counts: Counter[str] = Counter()
        self.peaks: dict[str, Result] = {}
        self._context = multiprocessing.get_context("spawn")

    def run(self, seconds: float, first: int) -> None:
        until, number = time.monotonic() + seconds, first
        while time.monotonic() < until and self.counts["findings"] < MOST_FINDINGS:
            number = self._watch(until, number)

    def _watch(self, until: float, first: int) -> int:
        """One child, until the time is over or it ends; the number to go on with."""
        receiver, sender = self._context.Pipe(duplex=False)
        child = self._context.Process(target=work, args=(sender, self.seeds, self.input, first), daemon=True)
        child.start()
        sender.close()
        number = first
        try:
            while time.monotonic() < until and self.counts["findings"] < MOST_FINDINGS:
                if not receiver.poll(PATIENCE):
                    return self._lost(number, f"no end within {PATIENCE} seconds")
                word = receiver.recv()
                if isinstance(word, Result):
                    self._note(word)
                    word = word.number + 1
                number = word
        except EOFError:
            child.join()
            return self._lost(number, f"the process ended with {child.exitcode}")
        finally:
            child.kill()
            child.join()
        return number

    def _lost(self, number: int, why: str) -> int:
        seed, mutations = prepare(number, self.seeds, self.input)
        self._note(Result(number, seed, mutations, why))
        return number + 1

    def _note(self, result: Result) -> None:
        self.counts["executions"] += 1
        self.counts["findings" if result.is_finding else result.outcome] += 1
        self.counts["loaded by transformers"] += result.loaded
        if result.peak is not None and result.peak >= (self.peaks.get(result.seed, result).peak or 0):
            self.peaks[result.seed] = result
        if result.is_finding:
            self._keep(result)

    def _keep(self, result: Result) -> None:
        folder = self.findings / str(result.number)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        shutil.copytree(self.input, folder / "input", symlinks=True)
        (folder / "finding.json").write_text(json.dumps(asdict(result), indent=1))
        last = result.outcome.strip().splitlines()[-1]
        print(f"finding {folder}: {result.seed}, {'; '.join(result.mutations)}: {last}", flush=True)

    def report(self) -> str:
        lines = [f"{name}: {count}" for name, count in self.counts.items()]
        for seed, result in sorted(self.peaks.items()):
            peak = result.peak or 0
            lines.append(f"most memory, {seed}: {peak:,} bytes for {result.size:,}, {peak / result.size:.2f} times")
        return "\n".join(lines)
