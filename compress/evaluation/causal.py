"""How well a causal language model predicts text, and how far it is from another.

Windows of `context` tokens without overlap; the first token of each window is not scored, every other is, given all
before it in its window. `predictions.py` defines the figures.
"""

from __future__ import annotations

from torch import Tensor, nn

from compress.evaluation.predictions import prediction_figures


def _predict(model: nn.Module, ids: Tensor) -> Tensor:
    logits: Tensor = model(input_ids=ids, use_cache=False).logits
    return logits[:, :-1]


def evaluate_causal(
    model: nn.Module,
    ids: Tensor,
    sizes: Tensor,
    reference: nn.Module | None = None,
    *,
    batch_tokens: int = 2048,
) -> dict[str, float | int | None]:
    """The figures of `model` on windows `ids` [N, context] whose tokens add `sizes` [N, context] bytes; None for one
    that is not defined (the standard error of a single window).

    Raises `NumericsError` when the model's loss is NaN or beyond any perplexity.
    """
    scored = ids.shape[1] - 1
    return prediction_figures(model, ids, sizes, reference, predict=_predict, scored=scored, batch_tokens=batch_tokens)
