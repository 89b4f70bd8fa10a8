"""From a model folder to a transformers config, a model without memory (`skeleton`), or a model with its weights.

The class is the one that `architectures` in config.json names, so a masked language model comes back with its head.
Nothing is filled in silently: a weight that the checkpoint lacks is an error here, where transformers would warn and
use random numbers. Code that comes with a model is never run unless `trust_remote_code` says so.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
    MODEL_MAPPING_NAMES,
)
from transformers.utils import logging

from compress.errors import ModelError
from compress.modeling.io import Checkpoint
from compress.modeling.resolve import resolve_model

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

CONFIG = "config.json"
HEADS = (
    (AutoModelForCausalLM, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
    (AutoModelForMaskedLM, MODEL_FOR_MASKED_LM_MAPPING_NAMES),
    (AutoModelForSequenceClassification, MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES),
    (AutoModelForTokenClassification, MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES),
    (AutoModel, MODEL_MAPPING_NAMES),
)


def read_config(folder: Path) -> dict[str, Any]:
    """`config.json` as plain data. Raises `ModelError` when it is missing or no JSON object."""
    path = folder / CONFIG
    if not path.is_file():
        raise ModelError(f"'{folder}' has no {CONFIG}.", remedy="Name the folder of a transformers model.")
    try:
        data = json.loads(path.read_bytes())
    except ValueError as error:
        raise ModelError(f"'{path}' is not JSON: {error}.", remedy="Copy the file again.") from error
    if not isinstance(data, dict):
        raise ModelError(f"'{path}' is not a JSON object.", remedy="Copy the file again.")
    return data


def load_config(folder: Path, trust_remote_code: bool = False) -> PreTrainedConfig:
    """The transformers config of the model in `folder`. Raises `ModelError` for one that transformers cannot read."""
    model_type = read_config(folder).get("model_type")
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (ValueError, OSError, KeyError, TypeError) as error:
        raise ModelError(
            f"transformers cannot read '{folder / CONFIG}' (model_type {model_type!r}): {_first_line(error)}",
            remedy="Supported are models that this version of transformers knows; a newer one may know it.",
        ) from error
    return config


def require_unquantized(config: PreTrainedConfig, where: str) -> None:
    """Raise `ModelError`, naming the method, when the model is quantized already."""
    found = config.to_dict().get("quantization_config")
    if found:
        raise ModelError(
            f"The model '{where}' is already quantized (quant_method {found.get('quant_method')!r}).",
            remedy="Quantize the original model instead.",
        )


def skeleton(config: PreTrainedConfig, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model of `config` on the meta device: every module, name and shape, and no memory."""
    with torch.device("meta"):
        model: PreTrainedModel = _auto_class(config).from_config(config, trust_remote_code=trust_remote_code)
    return model


def parameter_count(model: torch.nn.Module) -> int:
    """Parameters of a model, tied ones counted once."""
    return sum(parameter.numel() for parameter in model.parameters())


def load_model(
    ref: str | Path,
    dtype: torch.dtype | None = torch.float32,
    device: str | torch.device = "cpu",
    expect: Literal["causal"] | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """The model `ref` (see `resolve_model`) with its weights, in eval mode.

    `dtype` None keeps the stored one. With `expect="causal"` a model that does not predict the next token is refused.
    Raises `ModelError` when the checkpoint is damaged or lacks a weight of the model.
    """
    folder = resolve_model(str(ref))
    config = load_config(folder, trust_remote_code)
    auto = _auto_class(config)
    if expect == "causal" and auto is not AutoModelForCausalLM:
        raise ModelError(
            f"'{ref}' is a {_architecture(config) or config.model_type}, not a causal language model.",
            remedy="Name a model that predicts the next token, such as builtin:teacher.",
        )
    Checkpoint(folder)
    try:
        with _no_progress_bar():
            model, info = auto.from_pretrained(
                folder,
                config=config,
                dtype="auto" if dtype is None else dtype,
                trust_remote_code=trust_remote_code,
                use_safetensors=True,
                output_loading_info=True,
            )
    except (RuntimeError, ValueError, OSError) as error:
        raise ModelError(
            f"transformers cannot load '{folder}': {_first_line(error)}", remedy="Check that config and weights match."
        ) from error
    missing = sorted(info["missing_keys"])
    if missing:
        raise ModelError(
            f"The checkpoint in '{folder}' lacks {len(missing)} weights of {type(model).__name__}, such as "
            f"{missing[0]!r}.",
            remedy="Correct 'architectures' in config.json, or copy the missing shards.",
        )
    loaded: PreTrainedModel = model.to(device).eval()
    return loaded


def load_tokenizer(ref: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of model `ref`. Raises `ModelError` when the folder has none."""
    folder = resolve_model(str(ref))
    try:
        return AutoTokenizer.from_pretrained(folder)
    except (ValueError, OSError, KeyError, TypeError) as error:
        raise ModelError(
            f"'{folder}' has no tokenizer that transformers can read: {_first_line(error)}",
            remedy="Save the tokenizer into the model's folder with save_pretrained.",
        ) from error


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    """Within the block transformers draws none: progress is what events tell, and stderr may be no terminal."""
    enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        if enabled:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]


def _architecture(config: PreTrainedConfig) -> str | None:
    return config.architectures[0] if config.architectures else None


def _auto_class(config: PreTrainedConfig) -> Any:
    """The Auto class that builds the named architecture. Without a name, the causal one where there is one."""
    architecture = _architecture(config)
    for auto, table in HEADS:
        known = table.get(config.model_type, ())
        names = (known,) if isinstance(known, str) else known
        if names and (architecture is None or architecture in names):
            return auto
    raise ModelError(
        f"The architecture {architecture!r} of model_type {config.model_type!r} is not supported.",
        remedy="Supported are decoders with a language head, encoders, and classifiers on top of them.",
    )


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
