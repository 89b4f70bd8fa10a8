"""Several processes of one run, as a launcher starts them: of a line of Python, or of the `compress` command."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]


def environment(rank: int, size: int, port: int) -> dict[str, str]:
    """What `torchrun` tells a process, and one thread for each."""
    told = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return {
        **os.environ,
        **{name: str(value) for name, value in told.items()},
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
    }


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def run_processes(
    arguments: Sequence[str], size: int = 2, timeout: float = 120
) -> list[subprocess.CompletedProcess[str]]:
    """Run `python *arguments` as `size` processes of one run; what became of each, by rank. None is killed when another
    fails, as a launcher would: all are expected to end by themselves."""
    port = free_port()
    started = [
        subprocess.Popen(
            [sys.executable, *arguments],
            env=environment(rank, size, port),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]
    try:
        found = [process.communicate(timeout=timeout) for process in started]
    finally:
        for process in started:
            process.kill()
    return [
        subprocess.CompletedProcess(process.args, process.returncode, *texts)
        for process, texts in zip(started, found, strict=True)
    ]
