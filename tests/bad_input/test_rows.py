"""Every row of the table of bad input gets its one message, leaves nothing half made, and changes no input; and
docs/bad_input.md has the messages that they get."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.bad_input import rows_artifacts, rows_models, rows_requests
from tests.bad_input.page import PAGE, text_of
from tests.bad_input.row import Outcome, Row, check

ROWS = (*rows_models.ROWS, *rows_artifacts.ROWS, *rows_requests.ROWS)


@pytest.fixture(scope="module")
def outcomes() -> dict[str, Outcome]:
    """What came of the rows, by their names."""
    return {}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_row(here: Path, row: Row, outcomes: dict[str, Outcome]) -> None:
    outcomes[row.name] = check(row, here)


def test_names_are_unique() -> None:
    assert len({row.name for row in ROWS}) == len(ROWS)


def test_page_of_the_documentation(outcomes: dict[str, Outcome], request: pytest.FixtureRequest) -> None:
    if missing := [row.name for row in ROWS if row.name not in outcomes]:
        pytest.skip(f"needs all rows; {len(missing)} did not run or failed")
    page = text_of([(row, outcomes[row.name]) for row in ROWS])
    if request.config.getoption("--write-page"):
        PAGE.write_text(page, encoding="utf-8")
    assert PAGE.read_text(encoding="utf-8") == page, "make it anew: python -m pytest tests/bad_input --write-page"
