"""`import compress` is light, and registers its method whichever package is imported first."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import compress

ROOT = Path(__file__).parents[2]


def run(script: str) -> str:
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_is_light() -> None:
    heavy = run("import sys, compress; print({'torch', 'transformers', 'numpy', 'pydantic'} & set(sys.modules))")
    assert heavy == "set()"


REGISTERED = "from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING as m; print(m['compress'].__name__)"


@pytest.mark.parametrize(
    "first",
    [
        "import compress; from transformers import AutoModel",
        "from transformers import AutoModel; import compress, importlib; importlib.reload(compress)",
    ],
)
def test_registers_in_either_order(first: str) -> None:
    assert run(f"{first}; {REGISTERED}") == "CompressHfQuantizer"


def test_verbs() -> None:
    assert set(compress.__all__) == {"Recipe", "distill", "evaluate", "export", "load", "quantize", "run", "transform"}
    for name in compress.__all__:
        assert callable(getattr(compress, name))
        assert name in dir(compress)
    with pytest.raises(AttributeError, match="no attribute 'frobnicate'"):
        compress.frobnicate  # noqa: B018
