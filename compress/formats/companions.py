"""The files of a model folder that belong to the model and are not its weights: what every container needs copied.

They are a list of names, not "whatever lies there": a model folder is often a place of work, with data sets, logs, old
checkpoints and results of this package inside. An artifact that took them along would grow by them, carry what was
never to be shared, and differ from the next one of the same model.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

# as the hub's conventions and the save_pretrained of transformers and sentence-transformers name them
NAMES = (
    # tokenizers: the fast form, vocabularies and merges of every kind, special tokens, templates of chats
    "tokenizer*.json", "vocab*.json", "vocab*.txt", "vocab.bpe", "merges.txt", "bpe.codes", "*.model", "*.spm",
    "*.tiktoken", "special_tokens_map.json", "added_tokens.json", "chat_template*.json", "*.jinja",
    "additional_chat_templates/*.jinja",
    # how the model is used: sampling, and what comes before it
    "generation_config.json", "*preprocessor_config.json", "processor_config.json",
    # sentence-transformers: the pipeline, and its modules after the transformer
    "modules.json", "config_sentence_transformers.json", "sentence_*_config.json", "[0-9]*_*/config.json",
    "[0-9]*_*/model.safetensors",
    # the terms under which all of this may be passed on
    "LICENSE*", "NOTICE*", "USE_POLICY*",
)  # fmt: skip
CODE = "*.py"
# configurations that may send a reader to the code beside them
NAMING_CODE = ("config.json", "tokenizer_config.json", "processor_config.json", "preprocessor_config.json")


def companions(source: Path) -> list[Path]:
    """The companions of the weights in the model folder `source`, sorted. Code is among them where a configuration
    names some (`auto_map`): then every module at the top, as one may import another."""
    patterns = (*NAMES, CODE) if _names_code(source) else NAMES
    found = {path for pattern in patterns for path in source.glob(pattern)}
    return sorted(path for path in found if path.is_file() and not path.name.startswith("."))


def copy_companions(source: Path, folder: Path) -> None:
    """Copy the companions of the model in `source` to the same places in `folder`."""
    for path in companions(source):
        target = folder / path.relative_to(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)


def _names_code(source: Path) -> bool:
    return any(_has_auto_map(source / name) for name in NAMING_CODE)


def _has_auto_map(path: Path) -> bool:
    """Whether the JSON file `path` has a key `auto_map`; a file that cannot be read has none."""
    try:
        return "auto_map" in json.loads(path.read_bytes())
    except (OSError, ValueError, TypeError):
        return False
