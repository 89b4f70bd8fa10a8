"""The verb `evaluate`: a model as it is, or as it would be with quantized activations and keys and values."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from compress.errors import UsageError
from compress.evaluation.evaluate import evaluate as measure
from compress.quantization.dynamic import Dynamic, dynamic_quantization

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from compress.data.pixels import ImageProcessor


def evaluate(
    model: str | PreTrainedModel,
    *,
    data: str | list[str],
    reference: str | PreTrainedModel | None = None,
    activations: int | None = None,
    kv: int | None = None,
    kv_group: int | None = None,
    mix_keys: bool = True,
    context: int = 256,
    limit: int | None = None,
    device: str = "cpu",
    tokenizer: PreTrainedTokenizerBase | None = None,
    image_processor: ImageProcessor | None = None,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Measure `model` on `data`: perplexity and bits per byte for a model that predicts tokens (and its KL divergence
    from `reference`), the embeddings' cosine with `reference` for an encoder, accuracy and divergence for an image
    classifier. The files of `compress/evaluation` define each figure. A model named by a string is loaded in float32,
    one given as an object runs as it is. The tokenizer, or the image processor, is that of the model, or of the
    reference when the model is an object. `limit` is in tokens, or in images.

    `activations` and `kv` are bits, 2 to 8: the model, never the reference, runs with the inputs of its matrices, and
    with its keys and values, rounded to so many (`quantization/dynamic.py`). `kv_group` channels of a head share a
    scale; None is the whole head. Without `mix_keys` keys are rounded as they are. The figures say what was quantized.

    Raises `UsageError` for a device that is not there, when an encoder comes without a reference, and for keys and
    values that cannot be quantized; `ModelError` when two vocabularies differ, `DataError` for data that does not fill
    one window, `NumericsError` for a loss of NaN.
    """
    how = Dynamic.of_bits(activations, kv, kv_group, mix_keys)
    if how.figures() and model is reference and not isinstance(model, str):
        raise UsageError("A model is its own reference, which is not quantized.", remedy="Pass a copy as reference.")
    figures = measure(
        model,
        data=data,
        reference=reference,
        context=context,
        limit=limit,
        device=device,
        tokenizer=tokenizer,
        image_processor=image_processor,
        trust_remote_code=trust_remote_code,
        running=partial(dynamic_quantization, how=how),
    )
    return {**figures, **how.figures()}
