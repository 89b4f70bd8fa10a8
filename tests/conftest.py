"""Options and fixtures that all tests share."""

from __future__ import annotations

from pathlib import Path

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--write-page", action="store_true", help="make docs/bad_input.md anew")
    parser.addoption("--real-data", type=Path, default=None, help="a folder with real models and texts for the tests")
    parser.addoption(
        "--transformers-overlay",
        type=Path,
        default=None,
        help="a folder with another version of transformers, as `make test-5.17` has it",
    )


@pytest.fixture(scope="session")
def real_data(request: pytest.FixtureRequest) -> Path:
    """The folder with real weights and texts; the test is skipped without one."""
    folder: Path | None = request.config.getoption("--real-data")
    if folder is None:
        pytest.skip("needs real models and texts: pytest --real-data DIR")
    return folder
