"""The page on data: its Python runs, and it has every kind of source."""

from __future__ import annotations

import re
from pathlib import Path

from compress.data.sources import IMAGES, KINDS, SCHEMES

PAGE = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")


def test_python_of_the_page() -> None:
    (block,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    exec(block, {})


def test_every_kind_of_source_is_listed_and_on_the_page() -> None:
    for scheme in (*SCHEMES, IMAGES):
        assert f"| `{scheme}:" in PAGE
        assert any(kind.startswith(f"{scheme}:") for kind in KINDS)
