"""What a folder is that is not the model somebody took it for: an export, a result of several stages, an adapter.

"There is no model.safetensors" is true of all of them and helps with none.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from compress.errors import CompressError

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
MOST_NAMED = 4

CONVERT = "Load the model with transformers and save it with save_pretrained, which writes safetensors."
OTHERS = (
    ("adapter_config.json", "is an adapter (PEFT), not a model", "Merge it into its base model and save that."),
    ("*.gguf", "holds a GGUF file", "Name the original model, in safetensors."),
    ("tf_model*.h5", "holds its weights only for TensorFlow", "Convert them to safetensors."),
    ("flax_model*.msgpack", "holds its weights only for Flax", "Convert them to safetensors."),
    ("fingerprint.json", "is a work folder, not a result", "Name the folder that the run was to make, its --out."),
)


def not_a_model(folder: Path, missing: str, error: type[CompressError]) -> CompressError:
    """The error about `folder`, an existing one without the file that `missing` names: what it is instead."""
    what, remedy = next(explanations(folder), ("", "Name the folder of a transformers model, with config and weights."))
    return error(f"'{folder}' {what or f'has no {missing}'}.", remedy=remedy)


def explanations(folder: Path) -> Iterator[tuple[str, str]]:
    """What the folder without weights of its own may be, the likeliest first: a predicate and what to do."""
    if (folder / "model.onnx").is_file():
        yield (
            "is an ONNX export, which ONNX Runtime runs and nothing here reads",
            "Name the model that it was made from.",
        )
    inner = sorted(path.parent for path in folder.glob(f"*/{CONFIG}") if not path.parent.name.startswith("."))
    if inner and not (folder / CONFIG).is_file():
        named = ", ".join(f"'{path}'" for path in inner[:MOST_NAMED])
        yield (
            f"is no model itself; the models in it are {named}{' and others' if len(inner) > MOST_NAMED else ''}",
            "Name one of them.",
        )
    pickles = sorted({path.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for path in folder.glob(pattern)})
    if pickles:
        named = ", ".join(pickles[:MOST_NAMED])
        yield f"holds its weights only as pickles ({named}), which can run code", CONVERT
    for pattern, what, remedy in OTHERS:
        if any(folder.glob(pattern)):
            yield what, remedy
