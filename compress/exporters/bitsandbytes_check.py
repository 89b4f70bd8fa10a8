"""An exported folder against its model: loaded by transformers, run by bitsandbytes, compared.

1. transformers must find every tensor it asks for, leave none over, and make exactly the packed modules modules of
   bitsandbytes.
2. Every other tensor is the same, bit for bit. (Buffers that no checkpoint holds are taken from the model: they may
   differ where it was cast after it was loaded.)
3. Each packed module gives the same product with random rows: max |difference| / max |product| <= `TOLERANCE`.
4. So do the logits (or last hidden states) of a model that takes token ids.

All of it in float32, on the CPU. Two habits of bitsandbytes are left out, since they would hide what is compared: on
processors with AVX512-BF16 it repacks 4-bit weights for products with scales in bfloat16, and fails where the rows are
no multiple of 32; and LLM.int8 rounds activations to 8 bits, for which the module's product with float activations, as
in training, is taken here. How far the logits are with activations in 8 bits, the report says as
`activations in int8`.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from compress.errors import ExportError
from compress.exporters.quiet import quiet
from compress.exporters.verification import relative_error
from compress.quantization.modules import PackedLinear, packed_linears

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TOLERANCE = 1e-5
SEED = 0
ROWS = 5
# left padding of each row of a batch of texts
PADDING, LENGTH = (0, 3), 9
WITH_ROUNDED_INPUTS = "activations in int8"


@torch.no_grad()
def check_export(model: PreTrainedModel, folder: Path) -> dict[str, float]:
    """The relative errors of products and outputs by name. Raises `ExportError` for a folder that does not agree."""
    # not the model's own `float`, which refuses a quantized one
    original = model if model.dtype == torch.float32 else nn.Module.float(copy.deepcopy(model))
    loaded, info = _load(model, folder)
    packed = packed_linears(original)
    eight = _exact_products(loaded.eval(), packed, info)
    _same_tensors(original, loaded, packed)
    with quiet():
        errors = {"products": max(_product_error(one, loaded.get_submodule(name)) for name, one in packed.items())}
        inputs = _inputs(original)
        if inputs is not None:
            reference = _output(original, inputs)
            errors["outputs"] = relative_error(_output(loaded, inputs), reference)
    for name, error in errors.items():
        if not error <= TOLERANCE:
            raise _disagrees(f"relative error {error:.2g} of the {name}, allowed is {TOLERANCE:g}")
    if eight and inputs is not None:
        for module in eight:
            module.training = False
        with quiet():
            errors[WITH_ROUNDED_INPUTS] = relative_error(_output(loaded, inputs), reference)
    return errors


def _load(model: PreTrainedModel, folder: Path) -> tuple[PreTrainedModel, dict[str, Any]]:
    """What transformers makes of the folder, in float32, and what it says of names."""
    loader: Any = type(model)
    try:
        with quiet():
            loaded, info = loader.from_pretrained(folder, output_loading_info=True)
    except (RuntimeError, ValueError, OSError) as error:
        reason = str(error).partition("\n")[0]
        raise ExportError(
            f"transformers does not load this {type(model).__name__} with bitsandbytes: {reason}",
            remedy="Of some models it keeps matrices in float32, of T5 its 'wo'. Use the artifact itself, which loads "
            "after `import compress`.",
        ) from error
    return nn.Module.float(loaded), info


def _exact_products(loaded: nn.Module, packed: Mapping[str, PackedLinear], info: Mapping[str, Any]) -> list[nn.Module]:
    """Check 1, and the settings of the module's text; the modules of 8 bits."""
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    strange = sorted({*info["missing_keys"], *info["unexpected_keys"], *map(str, info["mismatched_keys"])})
    if strange:
        raise _disagrees(f"transformers finds no place, or nothing, for {strange[0]!r}")
    found = {name: module for name, module in loaded.named_modules() if isinstance(module, Linear4bit | Linear8bitLt)}
    different = sorted(found.keys() ^ packed.keys())
    if different:
        raise _disagrees(f"'{different[0]}' is quantized in one of them alone")
    eight = [module for module in found.values() if isinstance(module, Linear8bitLt)]
    for module in found.values():
        if isinstance(module, Linear4bit):
            module.compute_dtype, module.compute_type_is_set = torch.float32, True
            module.support_avx512bf16_for_cpu = False
        else:
            module.training = True
    return eight


def _same_tensors(original: nn.Module, loaded: nn.Module, packed: Mapping[str, PackedLinear]) -> None:
    """Check 2."""
    ours, theirs = original.state_dict(), loaded.state_dict()
    for name, tensor in ours.items():
        module, _, part = name.rpartition(".")
        if module in packed and part == "weight":
            continue
        if name not in theirs or not torch.equal(tensor, theirs[name]):
            raise _disagrees(f"'{name}' is another")
    buffers = dict(loaded.named_buffers())
    for name, tensor in original.named_buffers():
        if name not in ours and name in buffers:
            buffers[name].copy_(tensor)


def _product_error(ours: PackedLinear, theirs: nn.Module) -> float:
    """Check 3."""
    generator = torch.Generator().manual_seed(SEED)
    x = torch.randn(ROWS, ours.in_features, generator=generator)
    found, expected = theirs(x), ours(x)
    return 0.0 if torch.equal(found, expected) else relative_error(found, expected)


def _inputs(model: PreTrainedModel) -> dict[str, Tensor] | None:
    """A batch padded on the left; None for a model that takes no token ids."""
    if model.main_input_name != "input_ids":
        return None
    generator = torch.Generator().manual_seed(SEED)
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.randint(vocabulary, (len(PADDING), LENGTH), generator=generator)
    mask = (torch.arange(LENGTH) >= torch.tensor(PADDING)[:, None]).long()
    inputs = {"input_ids": ids, "attention_mask": mask}
    return {**inputs, "decoder_input_ids": ids} if model.config.is_encoder_decoder else inputs


def _output(model: PreTrainedModel, inputs: dict[str, Tensor]) -> Tensor:
    """What `model` computes for the last position, which is no padding."""
    output: Tensor = model(**inputs)[0]
    return output[:, -1]


def _disagrees(what: str) -> ExportError:
    return ExportError(
        f"What bitsandbytes loads is not the model: {what}.",
        remedy="Nothing was written. Please report the model and the versions of torch, transformers and bitsandbytes.",
    )
