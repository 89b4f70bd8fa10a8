"""Every kernel test runs on the torch reference and on what the dispatcher chooses (native, when it is built)."""

from __future__ import annotations

from types import ModuleType

import pytest

from compress import ops


@pytest.fixture(params=["reference", "dispatched"])
def kernels(request: pytest.FixtureRequest) -> ModuleType:
    """The five operations, as functions of a module."""
    if request.param == "dispatched" and ops.backend() == "reference":
        pytest.skip("the native library is not built; the dispatcher chooses the reference")
    return ops.reference if request.param == "reference" else ops


@pytest.fixture
def native() -> None:
    """Skips where the native library is not built."""
    if ops.backend() != "native":
        pytest.skip("the native library is not built")
