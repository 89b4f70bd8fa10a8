"""kill -9 in the middle of the work: the same command goes on, and ends with the bytes of a run that nothing broke.

Real processes through the real command line, killed by `benchmarks/crash.py`, which does the same to the built-in
models and as often as one likes. Two kills of each command here: most of the time goes into importing torch.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.crash import Command, calibrated_command, distill_command, measure, quantize_command
from tests.tiny_models import write_llama, write_text


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Command]:
    """Commands on tiny models, large enough to work for about a second after their imports."""
    folder = tmp_path_factory.mktemp("models")
    text = write_text(folder)
    teacher = write_llama(folder / "teacher", text, hidden=64, layers=12, seed=1)
    student = write_llama(folder / "student", text, seed=2)
    return {
        "distill": distill_command(str(teacher), str(student), f"text:{text}", steps=24, context=32),
        "quantize": quantize_command(str(teacher)),
        "calibrated": calibrated_command(str(teacher), f"text:{text}", rows=8, context=32),
    }


@pytest.mark.parametrize("name", ["distill", "quantize", "calibrated"])
def test_killed_twice_and_taken_up_again(commands: dict[str, Command], name: str, tmp_path: Path) -> None:
    result = measure(name, commands[name], kills=2, seed=1, folder=tmp_path)
    assert result.kills == len(result.moments) == 2
    assert result.same_bytes, result
    assert result.same_losses, result
