"""docs/bad_input.md, made of the rows and of what each of them really gets.

python -m pytest tests/bad_input --write-page
"""

from __future__ import annotations

from pathlib import Path

from tests.bad_input.row import PYTHON, Outcome, Row

PAGE = Path(__file__).parents[2] / "docs" / "bad_input.md"
HEAD = """# Bad input: what it gets

Every row is a test (`tests/bad_input`): something good is broken, a command or a Python expression meets it, and gets
one message, with what is wrong, where, and what to do. There is no traceback, no half result, and the input stays as
it is; memory and time are bounded by the kernel while the row runs. This page is made by those tests. `broken` is the
folder that was broken, `q` the result that does not appear. The exit code is 1 where the work failed, 2 where the
request itself was wrong.

What is *not* an error: a link in a model folder is followed, since the hub's cache consists of links. What it leads to
is checked like a file that lies there.

**Checksums.** An artifact has the size and sha256 of each of its files in `compress.json`. `compress inspect` compares
all of them. Whatever loads a model here by its name (`eval`, `export`, `distill`, `compress.evaluate`) compares those
of the weights: a payload with one wrong bit is read like any other, and its numbers would be wrong silently. That costs
a second for some gigabytes, little beside what is then done with them. `from_pretrained` of transformers compares none,
and refuses what is no payload by its length, its type or its scales.

**Memory.** A header of safetensors is at most 2 MiB, or a sixteenth of its file; sizes in it are compared with the file
before anything is allocated by them. So opening and reading an artifact takes at most twice its bytes, and some
megabytes for the modules of the model. `make fuzz` looks for input that breaks this, or any of the rules here.
"""


def text_of(rows: list[tuple[Row, Outcome]]) -> str:
    """The page: a table for each group of rows."""
    lines, group = [HEAD], ""
    for row, outcome in rows:
        title, _, name = row.name.rpartition(": ")
        if title != group or not lines[1:]:
            group = title
            lines.append(f"\n## {TITLES[title]}\n\n| broken | what meets it | code | message |\n|---|---|---|---|")
        meets = f"`{row.does.removeprefix(PYTHON)}`" if row.does.startswith(PYTHON) else f"`compress {row.does}`"
        code = "" if outcome.code is None else outcome.code
        lines.append(f"| {name} | {_cell(meets)} | {code} | {_cell(_message(outcome))} |")
    return "\n".join(lines) + "\n"


TITLES = {
    "": "Folders, weights and indexes of models",
    "config": "config.json",
    "already quantized": "Models that are quantized already",
    "weights": "Weights and tokenizers",
    "artifact": "Artifacts of compress",
    "recipe": "Recipes",
    "data": "Data",
    "words": "Words of a command",
    "place": "Places of results",
}


def _message(outcome: Outcome) -> str:
    text = outcome.stderr.strip().removeprefix("error: ")
    return text.rpartition("Error: ")[2] if text.startswith("Usage: ") else text


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")
