"""Opening an ONNX file in ONNX Runtime, without its silent fallback.

ONNX Runtime that cannot start the execution provider it was asked for (a CUDA library is missing, say) logs a line and
computes on the CPU. Here that is an error: the session's own list of providers is read back.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

from compress.errors import DependencyError, ExportError, UsageError

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

CPU = "CPUExecutionProvider"
ERRORS_ONLY = 3
"""Severity from which ONNX Runtime writes to stderr; its warnings are about optimisations, not about results."""


def require_packages(*packages: str) -> None:
    """Raise `DependencyError` for the first of the optional `packages` that is not installed."""
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise DependencyError(package, "onnx")


def open_session(path: Path, provider: str = CPU, threads: int | None = None) -> InferenceSession:
    """A session on the model file `path` that really runs on `provider`, with `threads` threads (None: as many as
    there are cores).

    Raises `DependencyError` without ONNX Runtime, `UsageError` for a provider that this build or machine does not
    have, `ExportError` for a file that ONNX Runtime does not take.
    """
    require_packages("onnxruntime")
    import onnxruntime
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    available = onnxruntime.get_available_providers()
    if provider not in available:
        raise UsageError(f"This ONNX Runtime has no {provider}.", remedy=f"It was built with: {', '.join(available)}.")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = ERRORS_ONLY
    options.intra_op_num_threads = threads or 0
    providers = [provider] if provider == CPU else [provider, CPU]
    refusals = (state.Fail, state.InvalidGraph, state.InvalidProtobuf, state.InvalidArgument, state.NoSuchFile)
    try:
        session = onnxruntime.InferenceSession(path, options, providers=providers)
    except (*refusals, state.NotImplemented, state.RuntimeException) as error:
        raise ExportError(
            f"ONNX Runtime {onnxruntime.__version__} does not take '{path}': {error}",
            remedy="Check that the file is complete and that ONNX Runtime is 1.23 or newer.",
        ) from error
    if session.get_providers()[0] != provider:
        raise UsageError(
            f"ONNX Runtime could not start {provider} and would compute on {session.get_providers()[0]}.",
            remedy=f"Install what {provider} needs, or ask for {CPU}.",
        )
    return session
