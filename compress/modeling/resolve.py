"""From what a user writes to a folder on disk: `builtin:teacher`, a local folder, or a hub id.

The built-in models are package data, `compress/models/<name>`, in an installed wheel; in a checkout (also when it is
installed in editable mode) they are the top-level folder `models/`, which lies beside the package.
"""

from __future__ import annotations

import re
from pathlib import Path

import compress
from compress.errors import ModelError

BUILTIN = "builtin:"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
# what a checkpoint needs; pickles are left out, they would only be refused; code is not run unless it is trusted
HUB_FILES = ["*.safetensors", "*.json", "*.model", "*.spm", "*.tiktoken", "*.txt", "*.jinja", "*.py", "LICENSE*"]


def builtin_root() -> Path:
    """The folder of the built-in models. Raises `ModelError` when this installation has none."""
    package = Path(compress.__file__).parent
    for candidate in (package / "models", package.parent / "models"):
        if any(candidate.glob("*/config.json")):
            return candidate
    raise ModelError(
        f"This installation has no built-in models (looked in {package / 'models'} and {package.parent / 'models'}).",
        remedy="Install the wheel, or name a local folder or a hub id.",
    )


def builtin_names() -> list[str]:
    """Names of the built-in models, sorted."""
    return sorted(path.parent.name for path in builtin_root().glob("*/config.json"))


def resolve_model(ref: str) -> Path:
    """The folder of model `ref`; downloads a hub id. Raises `ModelError` that says what was looked for and where."""
    if ref.startswith(BUILTIN):
        return _builtin(ref.removeprefix(BUILTIN))
    path = Path(ref).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise ModelError(f"'{ref}' is a file, not a model folder.", remedy="Name the folder that holds config.json.")
    if not HUB_ID.fullmatch(ref):
        raise ModelError(f"There is no folder '{ref}'.", remedy="Check the path, or use a hub id such as org/name.")
    return _download(ref)


def model_name(folder: Path) -> str:
    """What to call the model in `folder`: its hub id if it is a snapshot in the cache, else the folder's name."""
    *_, repository, kind, name = ("", "", *folder.resolve().parts)
    if kind == "snapshots" and repository.startswith("models--"):
        return repository.removeprefix("models--").replace("--", "/")
    return name


def _builtin(name: str) -> Path:
    names = builtin_names()
    if name not in names:
        raise ModelError(f"There is no built-in model '{name}'.", remedy=f"There are: {', '.join(names)}.")
    return builtin_root() / name


def _download(ref: str) -> Path:
    # imported here: a local model needs neither the package's import time nor a network
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        return Path(snapshot_download(ref, allow_patterns=HUB_FILES))
    except GatedRepoError as error:
        raise ModelError(
            f"The hub model '{ref}' asks for access that this account does not have.",
            remedy="Accept its terms on the model's page and log in with `hf auth login`.",
        ) from error
    except RepositoryNotFoundError as error:
        raise ModelError(
            f"There is no folder and no hub model '{ref}'.", remedy="Check the spelling; log in if it is private."
        ) from error
    except (LocalEntryNotFoundError, HfHubHTTPError, ConnectionError) as error:
        raise ModelError(
            f"There is no local folder '{ref}', and the hub could not be reached for a model of that name.",
            remedy="Check the path, or the network connection and try again.",
        ) from error
