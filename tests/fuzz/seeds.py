"""Small good artifacts to mutate: one of every codec, sealed, in one file or several, plain or mixed, of experts and of
convolutions, and a larger one.

They are made by the commands, so that a codec that is new is among them without a change here."""

from __future__ import annotations

import shutil
from pathlib import Path

from click.testing import CliRunner

from compress.cli.main import main
from compress.codecs import codec, codec_names
from tests.architectures import TABLE
from tests.tiny_models import write_llama, write_text

BITS = 3.25
OTHERS = {
    "in shards": "--codec half_pyramid --bits 3 --max-shard-bytes 6000",
    "mixed": "--codec pyramid --bits 3 --transform hadamard",
    "groups": "--codec integer:group=8,symmetric=true --bits 5",
}
KINDS = ("Mixtral", "ResNet", "GPT-2")
"""Architectures whose payloads are stacked, or stand for other shapes than matrices."""


def write_seeds(folder: Path) -> list[Path]:
    """The seeds in `folder`, made there unless they are there."""
    if not (folder / "complete").exists():
        shutil.rmtree(folder, ignore_errors=True)
        (folder / "seeds").mkdir(parents=True)
        text = write_text(folder)
        small = write_llama(folder / "small", text)
        options = {name: _options(name) for name in codec_names()} | OTHERS
        for name, words in options.items():
            _quantize(small, folder / "seeds" / name.replace(" ", "_"), words)
        for title in KINDS:
            model = next(one for one in TABLE if one.title == title).build()
            model.save_pretrained(folder / title)
            _quantize(folder / title, folder / "seeds" / title, "--codec integer:group=8 --bits 5")
        large = write_llama(folder / "large", text, hidden=512, layers=2)
        _quantize(large, folder / "seeds" / "large", _options("half_pyramid"))
        (folder / "complete").touch()
    return sorted(path for path in (folder / "seeds").iterdir() if path.is_dir())


def _options(name: str) -> str:
    method = codec(name)
    several = len(method.widths()) > 1
    return f"--codec {name} --bits {BITS}" if several else f"--codec {name}"


def _quantize(model: Path, out: Path, words: str) -> None:
    done = CliRunner().invoke(main, f"quantize {model} {words} --out {out} --quiet".split())
    assert done.exit_code == 0, done.output
    shutil.rmtree(out.with_name(f"{out.name}.work"))
