"""Train the built-in models again: run their recipes and put the results, with cards, where the package finds them.

    python models/build.py [teacher] [student]

Each recipe (`recipes/models/NAME.yaml`) trains from random weights and measures on the validation split; its work
folder is `built/NAME.work`, so a killed build goes on where it was. On two CPU cores the teacher takes hours.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path
from typing import Any

import compress
from compress.events import Events, TerminalProgress
from compress.storage import publish, seal, stage_beside

HERE = Path(__file__).parent
FIGURES = ("parameters", "bytes", "nll", "bits_per_byte", "perplexity", "tokens", "context")


def card(trained: str, figures: dict[str, Any]) -> str:
    """The card that the training wrote, with the validation figures and the samples."""
    rows = "\n".join(
        f"| {name} | {figures[name]:,.4f} |" if isinstance(figures[name], float) else f"| {name} | {figures[name]:,} |"
        for name in FIGURES
    )
    data = figures["data"]
    samples = "\n".join(
        f"\n{number}. prompt\n\n```text\n{sample['prompt']}\n```\n\ncontinued\n\n```text\n{sample['text']}\n```"
        for number, sample in enumerate(figures["samples"], 1)
    )
    return f"""{trained.rstrip()}

## Validation

On {data["spec"]} ({data["origin"]}, sha256 {data["sha256"][:16]}); windows of {figures["context"]} tokens, float32.

| | |
|---|---|
{rows}

## Samples

Drawn at temperature 0.7 after the first 16 tokens of windows of the validation text.
{samples}
"""


def install(name: str, trained: Path, figures: dict[str, Any]) -> Path:
    """Put the model in `trained`, with its card, into `models/NAME`."""
    final = HERE / name
    staged = stage_beside(final)
    shutil.copytree(trained, staged)
    (staged / "README.md").write_text(
        card((trained / "README.md").read_text(encoding="utf-8"), figures), encoding="utf-8"
    )
    seal(staged)
    publish(staged, final, overwrite=True)
    return final


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=["teacher", "student"])
    for name in parser.parse_args().names:
        report = compress.run(f"recipes/models/{name}.yaml", events=Events([TerminalProgress(sys.stderr)]))
        figures = report["evaluate"]["models"]["distilled"]
        print(install(name, Path("built", name, "distilled"), figures))


if __name__ == "__main__":
    main()
