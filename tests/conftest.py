"""Options and fixtures that all tests share."""

from __future__ import annotations

from pathlib import Path

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--real-data", type=Path, default=None, help="a folder with real models and texts for the tests")


@pytest.fixture(scope="session")
def real_data(request: pytest.FixtureRequest) -> Path:
    """The folder with real weights and texts; the test is skipped without one."""
    folder: Path | None = request.config.getoption("--real-data")
    if folder is None:
        pytest.skip("needs real models and texts: pytest --real-data DIR")
    return folder
