"""From a model folder to a transformers config, a model without memory (`skeleton`), or a model with its weights.

The class is the one of transformers that `architectures` in config.json names, so a model comes back with its head.
Nothing is filled in silently: a weight that the checkpoint lacks is an error here, where transformers would warn and
use random numbers. Code that comes with a model is never run unless `trust_remote_code` says so.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
import transformers
from accelerate import init_empty_weights
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
    MODEL_MAPPING_NAMES,
)
from transformers.utils import logging

from compress.errors import ModelError, nearest, quoted
from compress.modeling.bounds import check_counts, check_kinds, check_tensors
from compress.modeling.folders import CONFIG, not_a_model
from compress.modeling.io import Checkpoint
from compress.modeling.resolve import resolve_model
from compress.modeling.weights import StoredWeights
from compress.plain_json import parse_json
from compress.storage import verify_weights

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
LIBRARY_ERRORS = (
    ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, OSError, RuntimeError, TypeError,
    ValueError, StrictDataclassError, SafetensorError,
)  # fmt: skip
"""What transformers raises for a config that it cannot read, build or fill: it checks few of the fields."""
ONE_TOKENIZER = "Only models that share a tokenizer can be compared or distilled."
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
        raise not_a_model(folder, CONFIG, ModelError)
    return _json_object(path, remedy="Copy the file again.")


def _json_object(path: Path, remedy: str) -> dict[str, Any]:
    try:
        data = parse_json(path.read_bytes(), numbers=False)
    except ValueError as error:
        raise ModelError(f"'{path}' is not JSON: {error}.", remedy=remedy) from error
    if not isinstance(data, dict):
        raise ModelError(f"'{path}' is not a JSON object.", remedy=remedy)
    check_counts(data, path)
    check_kinds(data, path)
    return data


def load_config(folder: Path, trust_remote_code: bool = False) -> PreTrainedConfig:
    """The transformers config of the model in `folder`. Raises `ModelError` for one that transformers cannot read."""
    fields = read_config(folder)
    model_type = fields.get("model_type")
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except LIBRARY_ERRORS as error:
        if fields.get("auto_map") and not trust_remote_code:
            raise ModelError(
                f"'{folder}' brings code of its own (auto_map in {CONFIG}), which is not run unless you say so.",
                remedy="Read the code; if you trust it, add --trust-remote-code (trust_remote_code=True).",
            ) from error
        known = isinstance(model_type, str) and model_type in CONFIG_MAPPING
        raise ModelError(
            f"transformers cannot read '{folder / CONFIG}' (model_type {quoted(model_type)}): {_first_line(error)}",
            remedy="Correct the field, or copy the file again."
            if known
            else "Supported are models that this version of transformers knows; a newer one may know it.",
        ) from error
    return config


def config_from_file(path: Path) -> PreTrainedConfig:
    """The config of a model that is yet to be made: the JSON file `path` names its `model_type` and its sizes.

    Raises `ModelError` for a file that is missing or no JSON object, a `model_type` that it does not name or that
    transformers does not know, and sizes that cannot be.
    """
    if not path.is_file():
        raise ModelError(f"There is no config '{path}'.", remedy="Check the path.")
    fields = _json_object(path, remedy="Correct the file.")
    model_type = fields.pop("model_type", None)
    if not isinstance(model_type, str):
        raise ModelError(f"The config '{path}' names no model_type.", remedy='Add one, such as "model_type": "llama".')
    if model_type not in CONFIG_MAPPING:
        raise ModelError(
            f"The config '{path}' has model_type {quoted(model_type)}, which transformers does not know.",
            remedy=nearest(model_type, ("llama", "mistral", "qwen2", "qwen3", "bert"), "Known are, among others"),
        )
    try:
        config: PreTrainedConfig = AutoConfig.for_model(model_type, **fields)
    except LIBRARY_ERRORS as error:
        reason = str(error).strip().splitlines()
        raise ModelError(
            f"transformers refuses the config '{path}': {' '.join(line.strip() for line in reason)}",
            remedy="Correct the file.",
        ) from error
    return config


def is_quantized(config: PreTrainedConfig) -> bool:
    """Whether the config says that the weights are stored in a quantized form, ours or another's."""
    return bool(config.to_dict().get("quantization_config"))


def require_unquantized(
    config: PreTrainedConfig, where: str, remedy: str = "Quantize the original model instead."
) -> None:
    """Raise `ModelError`, naming the method, when the model is quantized already."""
    found = config.to_dict().get("quantization_config")
    if found:
        method = found.get("quant_method") if isinstance(found, dict) else found
        raise ModelError(
            f"The model '{where}' is already quantized (quant_method {quoted(method)}).",
            remedy=remedy,
        )


def require_causal(config: PreTrainedConfig, where: str) -> None:
    """Raise `ModelError`, naming the architecture, when the model does not predict the next token."""
    architecture, known = _architecture(config), MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type, ())
    names = (known,) if isinstance(known, str) else known
    if not names or architecture not in (None, *names):
        raise ModelError(
            f"'{where}' is a {architecture or config.model_type}, not a causal language model.",
            remedy="Name a model that predicts the next token, such as builtin:teacher.",
        )


Kind = Literal["causal", "seq2seq", "encoder", "image", "speech"]
"""What a model reads and makes: `causal` predicts the next token of a text (also where images may come along),
`seq2seq` that of a second text, `encoder` reads a whole text, `image` reads pixels, `speech` a spectrum or a wave."""


def kind_of(model: PreTrainedModel) -> Kind:
    """The kind of `model`, which may be on the meta device."""
    if model.main_input_name == "pixel_values":
        return "image"
    if model.main_input_name in ("input_features", "input_values"):
        return "speech"
    if model.config.is_encoder_decoder:
        return "seq2seq"
    return "causal" if model.can_generate() else "encoder"


def skeleton(config: PreTrainedConfig, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model of `config` on the meta device: every module, name and shape, and no memory."""
    with torch.device("meta"):
        return _build(config, trust_remote_code)


def hollow(config: PreTrainedConfig, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model of `config` with its buffers, such as tables of rotations, and parameters on the meta device."""
    with init_empty_weights(include_buffers=False):
        model = _build(config, trust_remote_code)
    return model.eval()


def _build(config: PreTrainedConfig, trust_remote_code: bool) -> PreTrainedModel:
    cls = _model_class(config, trust_remote_code)
    auto = {"trust_remote_code": trust_remote_code}
    try:
        named: PreTrainedModel = (
            cls._from_config(config) if issubclass(cls, PreTrainedModel) else cls.from_config(config, **auto)
        )
    except LIBRARY_ERRORS as error:
        raise ModelError(
            f"transformers cannot build {cls.__name__} as '{config.name_or_path or 'the config'}' asks for it: "
            f"{_first_line(error)}",
            remedy="Correct the sizes in config.json, or copy the file again.",
        ) from error
    return named


def tensor_names(model: torch.nn.Module, prefix: str) -> list[str]:
    """Full names of what the module `prefix` of `model` has in a checkpoint: parameters, a tied one once, and buffers
    that are stored."""
    part = model.get_submodule(prefix)
    buffers = {name for name, _ in part.named_buffers(prefix=prefix)}
    stored = part.state_dict(prefix=f"{prefix}." if prefix else "", keep_vars=True)
    return [*(name for name, _ in part.named_parameters(prefix=prefix)), *(name for name in stored if name in buffers)]


def fill_parameters(model: torch.nn.Module, names: Iterable[str], read: Callable[[str], torch.Tensor]) -> None:
    """Give the parameters and buffers `names` of `model` the values that `read` has for them; they need no gradient
    then."""
    for name in names:
        path, _, last = name.rpartition(".")
        module, value = model.get_submodule(path), read(name)
        is_parameter = last in dict(module.named_parameters(recurse=False))
        setattr(module, last, torch.nn.Parameter(value, requires_grad=False) if is_parameter else value)


def empty_parameters(model: torch.nn.Module, names: Iterable[str]) -> None:
    """Take the values of the parameters `names` away: they are on the meta device then. Buffers stay."""
    parameters = dict(model.named_parameters())
    fill_parameters(
        model,
        [name for name in names if name in parameters],
        lambda name: torch.empty_like(parameters[name], device="meta"),
    )


def positions_of(config: PreTrainedConfig) -> int | None:
    """Tokens that fit into a model's table of positions; None for a model that has no such bound."""
    # a field that some families do not have, under a name that others map to their own
    longest: int | None = getattr(config.get_text_config(), "max_position_embeddings", None)
    return longest


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
    Raises `ModelError` when the checkpoint is damaged or lacks a weight of the model, `ArtifactError` when the weights
    of a folder that this package made have other checksums than it wrote.
    """
    folder = resolve_model(str(ref))
    config = load_config(folder, trust_remote_code)
    if expect == "causal":
        require_causal(config, str(ref))
    loader = _model_class(config, trust_remote_code)
    checkpoint = Checkpoint(folder)
    if not is_quantized(config):
        model = skeleton(config, trust_remote_code)
        check_tensors(model, StoredWeights(checkpoint, model))
    verify_weights(folder)
    try:
        with _no_progress_bar():
            model, info = loader.from_pretrained(
                folder,
                config=config,
                dtype="auto" if dtype is None else dtype,
                trust_remote_code=trust_remote_code,
                use_safetensors=True,
                output_loading_info=True,
            )
    except LIBRARY_ERRORS as error:
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


def load_tokenizer(ref: str | Path, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of model `ref`. Raises `ModelError` when the folder has none."""
    folder = resolve_model(str(ref))
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # the tokenizers library raises nothing narrower
        found = any((folder / name).is_file() for name in TOKENIZERS)
        cause = f"a tokenizer that transformers cannot read: {_first_line(error)}" if found else "no tokenizer."
        raise ModelError(
            f"'{folder}' has {cause}",
            remedy="Save the tokenizer into the model's folder with save_pretrained.",
        ) from error


def check_vocabularies(first_name: str, first: PreTrainedModel, second_name: str, second: PreTrainedModel) -> None:
    """Raise `ModelError` when the logits of two models that are to be compared have different widths."""
    widths = [model.config.get_text_config().vocab_size for model in (first, second)]
    if widths[0] != widths[1]:
        raise ModelError(
            f"The vocabulary of '{first_name}' has {widths[0]} tokens, that of '{second_name}' {widths[1]}.",
            remedy=ONE_TOKENIZER,
        )


def check_room(tokenizer: PreTrainedTokenizerBase, **models: PreTrainedModel) -> None:
    """Raise `ModelError` unless each of the models has an output for every token. More than that is padding."""
    for name, model in models.items():
        width = model.config.get_text_config().vocab_size
        if width < len(tokenizer):
            raise ModelError(
                f"The {name} has {width} outputs, its tokenizer {len(tokenizer)} tokens.",
                remedy="Take the tokenizer that belongs to it, or resize its embeddings (resize_token_embeddings).",
            )


def check_tokenizers(
    first_name: str, first: PreTrainedTokenizerBase, second_name: str, second: PreTrainedTokenizerBase
) -> None:
    """Raise `ModelError` unless two models that are to be compared cut a text into the same token ids.

    Vocabularies of one size can number different tokens, and then column i of one model's logits means another token
    than column i of the other's: any divergence of the two is a number without meaning. Compared are the tokens with
    their ids and, where both tokenizers are of the `tokenizers` library, the algorithm with its merges.
    """
    tokens, others = first.get_vocab(), second.get_vocab()
    if tokens != others:
        word = min(word for word, _ in tokens.items() ^ others.items())
        raise ModelError(
            f"'{first_name}' and '{second_name}' have different tokenizers: token {word!r} is "
            f"{tokens.get(word, 'absent')} in the one and {others.get(word, 'absent')} in the other.",
            remedy=ONE_TOKENIZER,
        )
    if _algorithm(first) != _algorithm(second) and None not in (_algorithm(first), _algorithm(second)):
        raise ModelError(
            f"'{first_name}' and '{second_name}' have the same tokens and form them in different ways.",
            remedy=ONE_TOKENIZER,
        )


def _algorithm(tokenizer: PreTrainedTokenizerBase) -> object:
    """How a tokenizer of the `tokenizers` library cuts words into tokens, as plain data; None for another one."""
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        return None
    return json.loads(tokenizer.backend_tokenizer.to_str())["model"]


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


def _model_class(config: PreTrainedConfig, trust_remote_code: bool) -> Any:
    """What builds and loads the named architecture: its class, or an Auto class where code beside the model has it.
    Without a name it is the most telling Auto class that knows the `model_type`."""
    architecture = _architecture(config)
    if trust_remote_code:
        for auto, _ in HEADS:
            if auto.__name__ in (config.to_dict().get("auto_map") or {}):
                return auto
    if architecture is None:
        for auto, table in HEADS:
            if config.model_type in table:
                return auto
    else:
        found = getattr(transformers, str(architecture), None)
        if (
            isinstance(found, type)
            and issubclass(found, PreTrainedModel)
            and isinstance(config, found.config_class or ())
        ):
            return found
    raise ModelError(
        f"'{config.name_or_path}': the architecture {quoted(architecture)} of model_type {config.model_type!r} is not "
        "supported.",
        remedy="Correct 'architectures' in config.json, or use a version of transformers that has it.",
    )


def _first_line(error: BaseException) -> str:
    """What an error says first; where that only announces a list, with the first of it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    text = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    return text if text.endswith((".", "!", "?")) else f"{text}."
