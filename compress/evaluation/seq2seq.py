"""How well a model of encoder and decoder goes on with a text, and how far it is from another.

Rows of `context` tokens without overlap, as for a causal model. The encoder reads the first half of a row (rounded
down) and the decoder predicts the second, teacher-forced: each token given the first half and all before it in the
second. All tokens of the second half are scored, the first from the start token alone. `predictions.py` defines the
figures; perplexity and bits per byte are those of the second halves.

That is a text continued, not what such a model was fine-tuned for. As a figure of how far two models are apart it needs
no labels, and it reaches every matrix of encoder and decoder.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from compress.data.calibration import decoder_start, halves, shifted
from compress.evaluation.predictions import prediction_figures

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def evaluate_seq2seq(
    model: PreTrainedModel,
    ids: Tensor,
    sizes: Tensor,
    reference: PreTrainedModel | None = None,
    *,
    batch_tokens: int = 2048,
) -> dict[str, float | int | None]:
    """The figures of `model` on rows `ids` [N, context] whose tokens add `sizes` [N, context] bytes; None for one that
    is not defined (the standard error of a single row).

    Raises `NumericsError` when the model's loss is NaN or beyond any perplexity, `ModelError` for a config without a
    start token.
    """
    start, half = decoder_start(model), halves(ids.shape[1])

    def predict(one: nn.Module, rows: Tensor) -> Tensor:
        source, target = rows[:, :half], rows[:, half:]
        logits: Tensor = one(input_ids=source, decoder_input_ids=shifted(target, start), use_cache=False).logits
        return logits

    scored = ids.shape[1] - half
    return prediction_figures(model, ids, sizes, reference, predict=predict, scored=scored, batch_tokens=batch_tokens)
