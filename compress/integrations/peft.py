"""LoRA on packed weights: y = W x + (alpha / r) B A x, with W packed and A, B trained. Imported by `compress.hook`.

PEFT chooses the class of an adapter by that of the module below it, and asks a `LoraConfig` for classes that it does
not know itself. Such an entry is no field of the config: an adapter that was saved has none when it is loaded. So the
entry is made when an adapter is, in every config, and `get_peft_model`, `PeftModel.from_pretrained` and
`model.add_adapter` need no more than they do on an `nn.Linear`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from peft.tuners.lora.layer import Linear
from peft.tuners.lora.model import LoraModel

from compress.errors import UsageError

if TYPE_CHECKING:
    from peft import LoraConfig
    from torch import nn

    from compress.quantization.modules import PackedLinear


class PackedLora(Linear):  # type: ignore[misc]
    """An adapter beside a `PackedLinear`: plain LoRA, since variants such as DoRA need the weight itself."""

    @property
    def lora_variants(self) -> dict[tuple[str, ...], type | None]:
        return {(): None}

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refused: W + B A has no code of W's few bits."""
        raise UsageError(
            "An adapter cannot be merged into packed weights.",
            remedy="Keep it beside them (save_pretrained of the PEFT model), "
            "or load it on the artifact after dequantize() and merge there.",
        )

    def _get_in_out_features(self, module: PackedLinear) -> tuple[int, int]:
        return module.in_features, module.out_features


_create_new_module = LoraModel._create_new_module


def _create_packed(lora_config: LoraConfig, adapter_name: str, target: nn.Module, **options: Any) -> nn.Module:
    """The adapter of `target`, by a config that knows packed modules."""
    from compress.quantization.modules import PackedLinear  # which this module is too early for

    lora_config._register_custom_module({PackedLinear: PackedLora})
    return _create_new_module(lora_config, adapter_name, target, **options)


LoraModel._create_new_module = staticmethod(_create_packed)
