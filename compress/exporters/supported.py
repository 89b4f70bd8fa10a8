"""What ONNX export refuses before it begins; all of it can be read off a model without weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

from compress.errors import ExportError
from compress.modeling.experts import Experts, is_experts
from compress.modeling.loading import kind_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TRANSFORMERS = "Run it with transformers (a quantized one after `import compress`)"
LANGUAGE_PART = "the language part alone: it takes token ids, no images or sounds"


def require_exportable(model: PreTrainedModel) -> None:
    """Raise `ExportError` for a model that has no ONNX form here: of two texts, of sounds, of fused experts, or one
    that writes text about images without reading any. `model` may be on the meta device, and packed."""
    name, kind = type(model).__name__, kind_of(model)
    remedy = f"{TRANSFORMERS}; ONNX export takes decoders, encoders and image models."
    if kind == "speech":
        raise ExportError(f"{name} is a speech model, which ONNX export does not take.", remedy=remedy)
    if model.config.is_encoder_decoder:
        raise ExportError(f"{name} is an encoder-decoder, which ONNX export does not take.", remedy=remedy)
    if kind == "image" and model.can_generate():
        raise ExportError(
            f"{name} writes text about images, which ONNX export does not take.",
            remedy=remedy,
        )
    for where, module in model.named_modules():
        if isinstance(module, Experts) or is_experts(module):
            raise ExportError(
                f"{name} is a mixture of experts ('{where}' is a {type(module).__name__}), and choosing among stacked "
                "experts has no ONNX form here.",
                remedy=f"{TRANSFORMERS}; or export a model without experts.",
            )


def part_of(model: PreTrainedModel) -> str | None:
    """What of `model` an export holds, where that is not all of it."""
    towers = kind_of(model) == "causal" and model.config.get_text_config() is not model.config
    return LANGUAGE_PART if towers else None
