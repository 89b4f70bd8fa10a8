"""A virtual environment for each peer, so that none meets another's versions: made once, with exact versions, and kept.

A base environment holds what all need. Each of the others is a thin one whose `.pth` file lets it see the base, and
holds only what its peer adds or wants in another version. The requirements that an environment was made for are written
into it last: one that carries other requirements, or none because its making was interrupted, is made anew.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import venv
from dataclasses import dataclass
from pathlib import Path

from compress.errors import CompressError

BASE = "base"
DONE = "requirements.txt"
REQUIREMENTS = {
    BASE: (
        "torch==2.13.0",
        "transformers==5.17.0",
        "accelerate==1.15.0",
        "datasets==5.2.0",
        "safetensors==0.8.0",
        "numpy==2.4.6",
        "bitsandbytes==0.50.2",
    ),
    "gptqmodel": ("GPTQModel==7.6.0",),
    "llmcompressor": ("llmcompressor==0.14.0.1",),
    "autoround": ("auto-round==0.16.1",),
    "hqq": ("hqq==0.2.8.post1",),
}
TORCH = REQUIREMENTS[BASE][0]


@dataclass(frozen=True)
class Environments:
    """`folder`: where they are kept. `index`: one more package index, such as PyTorch's own for processors."""

    folder: Path
    index: str | None = None

    def python(self, name: str) -> Path:
        """The interpreter of environment `name`, made now unless it is there. Raises `CompressError` when pip fails."""
        if name != BASE:
            self.python(BASE)
        home, wanted = self.folder / name, "\n".join(REQUIREMENTS[name]) + "\n"
        python = home / ("Scripts" if sys.platform == "win32" else "bin") / "python"
        done = home / DONE
        if not (done.is_file() and done.read_text(encoding="utf-8") == wanted):
            print(f"making the environment '{name}' in {home}", flush=True)
            self._make(home, python, base=name == BASE)
            self._install(name, python)
            done.write_text(wanted, encoding="utf-8")
        return python

    def _make(self, home: Path, python: Path, base: bool) -> None:
        if home.exists():
            shutil.rmtree(home)
        venv.create(home, with_pip=base, symlinks=os.name != "nt")
        if not base:
            packages = _site_packages(python)
            (packages / "base.pth").write_text(f"{_site_packages(self.python(BASE))}\n", encoding="utf-8")

    def _install(self, name: str, python: Path) -> None:
        """With the base's torch for all, lest a peer should bring one built for another device."""
        constraint = self.folder / "constraints.txt"
        constraint.write_text(f"{TORCH}\n", encoding="utf-8")
        command = [str(python), "-m", "pip", "install", "-q", "-c", str(constraint), *REQUIREMENTS[name]]
        if self.index is not None:
            command += ["--extra-index-url", self.index]
        if subprocess.run(command).returncode != 0:
            raise CompressError(
                f"pip could not install {' '.join(REQUIREMENTS[name])}.",
                remedy="Look at its messages above, or leave this peer out with --peers.",
            )


def _site_packages(python: Path) -> Path:
    """Where the interpreter of an environment has its packages."""
    command = [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    return Path(subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip())
