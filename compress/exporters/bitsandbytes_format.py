"""How a matrix lies in a checkpoint of bitsandbytes, and what config.json says of it.

The tensors of a module X, as `Linear4bit` and `Linear8bitLt` save them (bitsandbytes 0.43 and later, all to the same
effect), with `<type>` nf4 or fp4:

    X.weight                                uint8 [ceil(o n / 2), 1], two codes to a byte, the first in the upper half
    X.weight.absmax                         float32 [blocks]; nested: uint8
    X.weight.quant_map                      float32 [16], the table
    X.weight.nested_absmax, nested_quant_map  float32 [ceil(blocks / 256)], [256]; only nested
    X.weight.quant_state.bitsandbytes__<type>  uint8, JSON: type, block, dtype and shape; nested: offset, block, dtype

    X.weight   int8 [o, n]        X.SCB   float32 [o]        X.weight_format   uint8 [], 0: row after row

All of it is in the payload of the codecs `nf4`, `fp4` and `int8`, and nothing is rounded.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from compress.codecs.base import CodecSpec, QuantizedMatrix
from compress.codecs.normal_float import Int8Config
from compress.codecs.normal_float.config import BITSANDBYTES
from compress.codecs.normal_float.scales import NESTED_BLOCK
from compress.codecs.normal_float.tables import table
from compress.codecs.registry import codec_of
from compress.errors import ExportError

OUTLIERS = 6.0
"""Activations from this magnitude on are kept out of LLM.int8's 8 bits: its paper's choice, transformers' default."""


def tensors_of(matrix: QuantizedMatrix, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of a matrix by what follows the module's name and a dot. `dtype` is that of its activations."""
    parts = matrix.tensors
    if matrix.spec.codec == Int8Config.name:
        return {"weight": parts["codes"], "SCB": parts["absmax"], "weight_format": torch.tensor(0, dtype=torch.uint8)}
    name = matrix.spec.codec
    state: dict[str, Any] = {
        "quant_type": name,
        "blocksize": matrix.spec.options["block"],
        "dtype": dtype_name(dtype),
        "shape": list(matrix.shape),
    }
    tensors = {
        "weight": parts["codes"].view(-1, 1),
        "weight.absmax": parts["absmax"],
        "weight.quant_map": table(name).values,
    }
    if matrix.spec.options["double"]:
        tensors["weight.nested_absmax"] = parts["nested_absmax"]
        tensors["weight.nested_quant_map"] = table("dynamic").values
        state["nested_blocksize"] = NESTED_BLOCK
        state["nested_dtype"] = "float32"
        state["nested_offset"] = float(parts["nested_offset"])
    encoded = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    return {**tensors, f"weight.quant_state.{BITSANDBYTES}__{name}": encoded}


def common_spec(specs: Mapping[str, CodecSpec]) -> CodecSpec:
    """The spec that all modules have. Raises `ExportError` where there is none, or bitsandbytes has no form for it."""
    for name, spec in specs.items():
        if BITSANDBYTES not in codec_of(spec).containers(spec) or spec.mixing != "none":
            mixed = "" if spec.mixing == "none" else ", mixed at run time"
            raise ExportError(
                f"'{name}' is quantized with {spec.codec}{mixed}, which bitsandbytes cannot hold.",
                remedy="Quantize with --codec nf4, fp4 or int8 and without a transform.",
            )
    different = {spec: name for name, spec in reversed(list(specs.items()))}
    if len(different) != 1:
        found = " and ".join(f"'{name}' ({spec.codec} {dict(spec.options)})" for spec, name in different.items())
        raise ExportError(
            f"bitsandbytes holds models of one form; this has {found or 'no quantized matrix'}.",
            remedy="Quantize all matrices with one of --codec nf4, fp4 or int8.",
        )
    return next(iter(different))


def quantization_config(spec: CodecSpec, dtype: torch.dtype, skipped: Iterable[str]) -> dict[str, Any]:
    """The `quantization_config` of config.json, the fields of transformers' `BitsAndBytesConfig`. `skipped` are the
    linear maps that are stored as they are."""
    eight = spec.codec == Int8Config.name
    fields: dict[str, Any] = {
        "quant_method": BITSANDBYTES,
        "load_in_8bit": eight,
        "load_in_4bit": not eight,
        "llm_int8_threshold": OUTLIERS,
        "llm_int8_skip_modules": list(skipped),
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
    }
    if not eight:
        fields["bnb_4bit_quant_type"] = spec.codec
        fields["bnb_4bit_use_double_quant"] = spec.options["double"]
        fields["bnb_4bit_compute_dtype"] = dtype_name(dtype)
        fields["bnb_4bit_quant_storage"] = "uint8"
    return fields


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
