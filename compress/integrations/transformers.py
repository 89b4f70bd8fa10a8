"""Makes `from_pretrained` read the native artifacts. Imported by `compress.hook`, never by hand.

transformers builds the model on the meta device; before weights are loaded, the quantizer puts a `PackedLinear` with an
empty payload where the configuration says so, and the payloads are then loaded like any other tensor. Only hooks are
used that are the same in transformers 5.17 and in later versions: no conversion of tensors takes place.

This module is imported while transformers itself is (`compress.hook`), before there is a `PreTrainedModel`: what needs
one is imported when a model is loaded.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from compress.errors import UsageError
from compress.formats.config import QUANT_METHOD, QuantizationConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@register_quantization_config(QUANT_METHOD)
class CompressConfig(QuantizationConfigMixin):
    """`quantization_config` as transformers holds it: the fields of config.json, unchanged."""

    def __init__(self, **fields: Any) -> None:
        self.__dict__.update({**fields, "quant_method": QUANT_METHOD})

    def parsed(self) -> QuantizationConfig:
        """The fields, checked. Raises `ArtifactError`."""
        return QuantizationConfig.from_dict(self.__dict__)


@register_quantizer(QUANT_METHOD)
class CompressHfQuantizer(HfQuantizer):
    """Loads packed modules; quantizing while loading is refused (`compress.quantize` does it afterwards)."""

    requires_calibration = True
    quantization_config: CompressConfig

    def __init__(self, quantization_config: CompressConfig, **kwargs: Any) -> None:
        if not kwargs.get("pre_quantized", True):
            raise UsageError(
                "compress does not quantize a model while it is loaded.",
                remedy="Load it without quantization_config, then call compress.quantize(model).",
            )
        super().__init__(quantization_config, **kwargs)

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        from compress.formats.tables import tables_of
        from compress.modeling.structure import matrices
        from compress.quantization.embedding import prepare_tables
        from compress.quantization.modules import prepare_packed

        config = self.quantization_config.parsed()
        places = list(dict.fromkeys(view.place for view in matrices(model, towers=True)))
        tables = tables_of(config, model, declared=True)
        prepare_packed(model, config.by_module(places, model.base_model_prefix))
        prepare_tables(model, tables)

    def _dequantize(self, model: torch.nn.Module, dtype: torch.dtype | str | None = None) -> torch.nn.Module:
        from compress.quantization.modules import unpack

        return unpack(model, _as_dtype(dtype))

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """The state is what is stored, so `save_pretrained` needs no help."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Whether adapters on top can be trained: packed weights receive no gradient, and pass on that of x."""
        return True


def _as_dtype(dtype: torch.dtype | str | None) -> torch.dtype:
    """transformers hands over the config's dtype, which some versions hold as a string."""
    named = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if isinstance(dtype, str):
        return named[dtype.removeprefix("torch.")]
    return torch.float32 if dtype is None else dtype
