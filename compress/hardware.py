"""Which machine and which versions a figure was measured with."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path

from compress.errors import UsageError


def cpu_name() -> str:
    """The processor's name as the system gives it; the architecture where it gives none."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def require_device(device: str) -> None:
    """Raise `UsageError` when torch cannot work on `device` here: an unknown name, or no such hardware."""
    if device == "cpu":
        return
    import torch

    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        cause = str(error).strip().partition("\n")[0].rstrip(".")
        raise UsageError(
            f"The device '{device}' cannot be used here: {cause}.", remedy="Use --device cpu, or name another."
        ) from error


def describe_machine() -> dict[str, str | int]:
    """Processor, cores, graphics card if any, and the versions that matter."""
    import torch

    machine: dict[str, str | int] = {
        "cpu": cpu_name(),
        "cores": os.cpu_count() or 1,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": importlib.metadata.version("transformers"),
    }
    if torch.cuda.is_available():
        machine["gpu"] = torch.cuda.get_device_name()
    return machine
