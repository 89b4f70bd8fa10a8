"""`compress eval` with quantized activations, keys and values: what it hands on, and what it refuses."""

from __future__ import annotations

import json
from typing import Any

import pytest
from click.testing import CliRunner, Result

from compress.cli.main import main
from compress.reporting.evaluate import evaluate

WORDS = ["student", "--data", "text:text.txt", "--context", "32", "--limit", "640", "--reference", "teacher"]

pytestmark = pytest.mark.usefixtures("inside")


def call(*words: str) -> Result:
    return CliRunner().invoke(main, ["eval", *WORDS, *words])


def test_options_are_those_of_the_verb() -> None:
    same: dict[str, Any] = {"data": "text:text.txt", "context": 32, "limit": 640, "reference": "teacher"}
    asked: dict[str, dict[str, Any]] = {
        "": {},
        "--activations 4": {"activations": 4},
        "--kv 3": {"kv": 3},
        "--activations 8 --kv 2 --kv-group 4 --plain-keys": {
            "activations": 8, "kv": 2, "kv_group": 4, "mix_keys": False,
        },
    }  # fmt: skip
    for words, options in asked.items():
        figures = json.loads(call(*words.split(), "--json").stdout)
        assert figures == evaluate("student", **same, **options)
        assert figures.items() >= options.items()
    assert "activations" in call("--activations", "4").stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--activations 16", "--activations is 16. Allowed: less than or equal to 8."),
        ("--kv 1", "--kv is 1. Allowed: greater than or equal to 2."),
        ("--kv-group 8", "--kv-group is 8. Allowed: a group of keys and values that have their bits"),
        ("--kv 4 --kv-group 0", "--kv-group is 0."),
    ],
)
def test_refused(words: str, message: str) -> None:
    result = call(*words.split())
    assert result.exit_code == 2
    assert message in result.stderr
