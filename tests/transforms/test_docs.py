"""The Python of the page on transforms runs as it stands there."""

from __future__ import annotations

from tests.test_docs import blocks


def test_python_of_the_page() -> None:
    (example,) = blocks("docs/transforms.md")
    exec(example, {})
