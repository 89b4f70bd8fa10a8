"""Measuring a model: on text or images, and optionally against the model that it should equal.

Each kind of model has its measure (`MEASURES`), and each measure its file, which defines the figures.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from compress.data import ImageSource, TextSource, fingerprint, image_source, require_kind, text_source, tokenize
from compress.data.pixels import ImageProcessor
from compress.errors import ModelError, UsageError
from compress.evaluation.causal import evaluate_causal
from compress.evaluation.encoder import evaluate_encoder
from compress.evaluation.images import evaluate_images
from compress.evaluation.readers import check_readers, load_reader
from compress.evaluation.seq2seq import evaluate_seq2seq
from compress.hardware import require_device
from compress.modeling.loading import (
    Kind,
    check_vocabularies,
    kind_of,
    load_config,
    load_model,
    positions_of,
    skeleton,
)
from compress.modeling.resolve import resolve_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

KINDS: Mapping[Kind, str] = {
    "causal": "a decoder",
    "seq2seq": "an encoder with a decoder",
    "encoder": "an encoder",
    "image": "an image model",
    "speech": "a speech model",
}


def evaluate(
    model: str | PreTrainedModel,
    *,
    data: str | list[str],
    reference: str | PreTrainedModel | None = None,
    context: int = 256,
    limit: int | None = None,
    device: str = "cpu",
    tokenizer: PreTrainedTokenizerBase | None = None,
    image_processor: ImageProcessor | None = None,
    trust_remote_code: bool = False,
    running: Callable[[PreTrainedModel], AbstractContextManager[object]] = nullcontext,
) -> dict[str, Any]:
    """Measure `model` on `data`: perplexity and bits per byte for a model that predicts tokens (and its KL divergence
    from `reference`), the embeddings' cosine with `reference` for an encoder, accuracy and divergence for an image
    classifier. The files of this package define each figure. A model named by a string is loaded in float32, one given
    as an object runs as it is. The tokenizer, or the image processor, is that of the model, or of the reference when
    the model is an object. `limit` is in tokens, or in images. The model is measured within the context
    `running(model)`, which may change how it computes.

    Raises `UsageError` for a device that is not there, when a model without figures of its own comes without a
    reference, and for a kind of model that cannot be measured; `ModelError` for a reference of another kind or
    vocabulary, `DataError` for text where images are needed or the other way round, and for data that do not fill one
    window, `NumericsError` for a loss of NaN.
    """
    if context < 2:
        raise UsageError(f"A context of {context} tokens scores none.", remedy="Give --context of at least 2.")
    if limit is not None and limit < 1:
        raise UsageError(f"A limit of {limit} measures nothing.", remedy="Give --limit of at least 1.")
    require_device(device)
    kind = _kind(model, trust_remote_code)
    if kind not in MEASURES:
        raise UsageError(
            f"'{_name(model)}' reads sounds, and there is no figure for that.",
            remedy="Measured are models of text and of images.",
        )
    specs = [data] if isinstance(data, str) else data
    if not (isinstance(specs, list) and all(isinstance(spec, str) for spec in specs)):
        raise UsageError(
            f"Data to be measured on are named, and these are a {type(data).__name__}.",
            remedy="Give a source such as 'text:FILE', or a list of them.",
        )
    require_kind(kind, specs, _name(model))
    if reference is not None and (other := _kind(reference, trust_remote_code)) != kind:
        raise ModelError(
            f"'{_name(model)}' is {KINDS[kind]}, and the reference '{_name(reference)}' is {KINDS[other]}.",
            remedy="Name a reference of the same kind.",
        )
    source: TextSource | ImageSource
    reader = _reader(kind, image_processor if kind == "image" else tokenizer, model, reference, trust_remote_code)
    source = image_source(specs) if kind == "image" else text_source(specs)
    request = Request(
        _model(model, device, trust_remote_code),
        None if reference is None else _model(reference, device, trust_remote_code),
        source, reader, context, limit,
    )  # fmt: skip
    with running(request.model):
        figures = MEASURES[kind](request)
    return {**figures, "data": fingerprint(source).to_dict()}


@dataclass(frozen=True)
class Request:
    """What is measured on what. `reader` makes a model's inputs of the source: a tokenizer or an image processor."""

    model: PreTrainedModel
    reference: PreTrainedModel | None
    source: Any
    reader: Any
    context: int
    limit: int | None


def _reader(
    kind: Kind,
    given: Any,
    model: str | PreTrainedModel,
    reference: str | PreTrainedModel | None,
    trust_remote_code: bool,
) -> Any:
    """The reader that is given, or that of the first model named; that of a reference that is named must be like it."""
    found = given
    if found is None:
        named = next((one for one in (model, reference) if isinstance(one, str)), None) or _folder_of(model)
        if not named:
            what = ("image processor", "image_processor") if kind == "image" else ("tokenizer", "tokenizer")
            raise UsageError(f"A model given as an object needs its {what[0]}.", remedy=f"Pass {what[1]}=...")
        found = load_reader(kind, named, trust_remote_code)
    if isinstance(reference, str):
        check_readers(kind, _name(model), found, reference, load_reader(kind, reference, trust_remote_code))
    return found


def _folder_of(model: str | PreTrainedModel) -> str:
    """Where a model was loaded from; empty for one that was made in memory."""
    return model if isinstance(model, str) else str(model.config.name_or_path)


def _predictions(request: Request, measure: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    if request.reference is not None:
        check_vocabularies("model", request.model, "reference", request.reference)
    _check_context(request)
    ids, sizes = tokenize(request.source, request.reader, request.limit).rows(request.context, request.limit)
    return {**measure(request.model, ids, sizes, request.reference), "context": request.context}


def _embeddings(request: Request) -> dict[str, Any]:
    if request.reference is None:
        raise UsageError("An encoder is measured against another.", remedy="Name one with --reference.")
    _check_context(request)
    figures = evaluate_encoder(
        request.model, request.reference, request.reader, request.source, context=request.context, limit=request.limit
    )
    return {**figures, "context": request.context}


def _images(request: Request) -> dict[str, Any]:
    return evaluate_images(request.model, request.reference, request.reader, request.source, limit=request.limit)


MEASURES: Mapping[Kind, Callable[[Request], dict[str, Any]]] = {
    "causal": partial(_predictions, measure=evaluate_causal),
    "seq2seq": partial(_predictions, measure=evaluate_seq2seq),
    "encoder": _embeddings,
    "image": _images,
}


def _check_context(request: Request) -> None:
    longest = positions_of(request.model.config)
    if longest is not None and request.context > longest:
        raise UsageError(
            f"The model takes {longest} tokens, not {request.context}.", remedy=f"Use --context {longest}."
        )


def _name(model: str | PreTrainedModel) -> str:
    return model if isinstance(model, str) else type(model).__name__


def _kind(model: str | PreTrainedModel, trust_remote_code: bool) -> Kind:
    """The kind of a model; of one that is named, from its config alone."""
    if isinstance(model, str):
        return kind_of(skeleton(load_config(resolve_model(model), trust_remote_code), trust_remote_code))
    return kind_of(model)


def _model(model: str | PreTrainedModel, device: str, trust_remote_code: bool) -> PreTrainedModel:
    if isinstance(model, str):
        return load_model(model, device=device, trust_remote_code=trust_remote_code)
    return model.eval()
