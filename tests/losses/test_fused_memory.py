"""The memory of a fused loss, measured from outside: the peak of a process, beyond inputs and returned gradients."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
CODE = """
import json, sys
sys.path.insert(0, sys.argv[1])
from fused_losses import Case, measure
case = Case("kl", rows=3072, classes=8192, width=64, device="cpu", dtype="float32", threads=1)
print(json.dumps({name: measure(name, case)["mib"] for name in ("gradient", "tiles", "checkpoint", "dense")}))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak is read from Linux's /proc")
def test_memory_is_below_an_eighth_of_the_dense_loss() -> None:
    done = subprocess.run(
        [sys.executable, "-c", CODE, str(BENCHMARKS)], capture_output=True, text=True, check=True, cwd=BENCHMARKS.parent
    )
    mib = json.loads(done.stdout)
    assert mib["dense"] > 2 * 3072 * 8192 * 4 / 2**20  # the logits of both, at least: what is measured is real
    for strategy in ("gradient", "tiles", "checkpoint"):
        assert 0 < mib[strategy] < mib["dense"] / 8, mib
