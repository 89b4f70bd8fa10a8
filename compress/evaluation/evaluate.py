"""Measuring a model: on a text, and optionally against the model that it should equal."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from compress.data import fingerprint, text_source, tokenize
from compress.errors import UsageError
from compress.evaluation.causal import evaluate_causal
from compress.evaluation.encoder import evaluate_encoder
from compress.hardware import require_device
from compress.modeling.loading import check_tokenizers, check_vocabularies, load_model, load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def evaluate(
    model: str | PreTrainedModel,
    *,
    data: str | list[str],
    reference: str | PreTrainedModel | None = None,
    context: int = 256,
    limit: int | None = None,
    device: str = "cpu",
    tokenizer: PreTrainedTokenizerBase | None = None,
    trust_remote_code: bool = False,
    running: Callable[[PreTrainedModel], AbstractContextManager[object]] = nullcontext,
) -> dict[str, Any]:
    """Measure `model` on `data`: perplexity and bits per byte for a causal model (and its KL divergence from
    `reference`), the embeddings' cosine with `reference` for an encoder. `evaluation/causal.py` and
    `evaluation/encoder.py` define each figure. A model named by a string is loaded in float32, one given as an object
    runs as it is. The tokenizer is that of the model, or of the reference when the model is an object. `limit` is in
    tokens. The model is measured within the context `running(model)`, which may change how it computes.

    Raises `UsageError` for a device that is not there and when an encoder comes without a reference, `ModelError` when
    two vocabularies differ, `DataError` for data that does not fill one window, `NumericsError` for a loss of NaN.
    """
    if context < 2:
        raise UsageError(f"A context of {context} tokens scores none.", remedy="Give --context of at least 2.")
    require_device(device)
    if tokenizer is None:
        named = model if isinstance(model, str) else reference
        if not isinstance(named, str):
            raise UsageError("A model given as an object needs its tokenizer.", remedy="Pass tokenizer=...")
        tokenizer = load_tokenizer(named, trust_remote_code)
    source = text_source(data)
    subject = _model(model, device, trust_remote_code)
    other = None if reference is None else _model(reference, device, trust_remote_code)
    longest = subject.config.get_text_config().max_position_embeddings
    if context > longest:
        raise UsageError(f"The model takes {longest} tokens, not {context}.", remedy=f"Use --context {longest}.")
    if isinstance(reference, str):
        check_tokenizers("model", tokenizer, reference, load_tokenizer(reference, trust_remote_code))
    figures: dict[str, Any]
    if subject.can_generate():
        if other is not None:
            check_vocabularies("model", subject, "reference", other)
        ids, sizes = tokenize(source, tokenizer, limit).rows(context, limit)
        with running(subject):
            figures = evaluate_causal(subject, ids, sizes, other)
    else:
        if other is None:
            raise UsageError("An encoder is measured against another.", remedy="Name one with --reference.")
        with running(subject):
            figures = evaluate_encoder(subject, other, tokenizer, source, context=context, limit=limit)
    return {**figures, "context": context, "data": fingerprint(source).to_dict()}


def _model(model: str | PreTrainedModel, device: str, trust_remote_code: bool) -> PreTrainedModel:
    if isinstance(model, str):
        return load_model(model, device=device, trust_remote_code=trust_remote_code)
    return model.eval()
