"""The product with a packed weight as one operation: y = x W^T in a graph of `torch.compile` or `torch.export`.

Decoding depends on the bytes of the payload, and runs in a compiled library: neither can be traced. So a graph holds
`compress::packed_linear(x, payload, spec, out_features)` instead, which says all that is needed to decode and keeps
nothing of the process that traced it. What the product prepares at its first use is kept with the payload, as long as
that tensor lives and is not written to.

Its gradient is that of the activations, dx = dy W with W decoded; packed weights have none.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.weak import WeakTensorKeyDictionary

from compress.codecs.base import CodecSpec, Product, QuantizedMatrix
from compress.codecs.registry import codec_of
from compress.transforms.signs import Signs


@dataclass(frozen=True)
class _Prepared:
    """What a product with one payload needs. `version` counts the writes to the payload before it was made."""

    version: int
    product: Product | None
    signs: Signs
    weight: Tensor | None

    @property
    def dtype(self) -> torch.dtype | None:
        """Of the activations that it takes; None for all."""
        return None if self.weight is None else self.weight.dtype

    def multiply(self, x: Tensor, out_features: int) -> Tensor:
        if self.product is None:
            assert self.weight is not None
            return functional.linear(x, self.weight)
        rows = self.signs.mix_inputs(x.reshape(-1, x.shape[-1]))
        return self.signs.unmix_outputs(self.product(rows)).reshape(*x.shape[:-1], out_features)


_PREPARED: Final = WeakTensorKeyDictionary()
"""`_Prepared` by payload: a memory of what can be made again, without influence on any result."""
_TABLES: Final = WeakTensorKeyDictionary()
"""Likewise the matrix, checked, that rows are taken from, with the count of writes."""


def spec_text(spec: CodecSpec) -> str:
    """`spec` as an argument of the operation, to be made before anything is traced."""
    return json.dumps(spec.to_dict(), sort_keys=True)


def packed_linear(x: Tensor, payload: Tensor, spec: str, out_features: int) -> Tensor:
    """x [..., in] -> x W^T [..., out] in x's dtype, with W [out, in] in `payload` (int8, flat); `spec` by `spec_text`.

    Raises `ArtifactError` when the payload has the wrong length.
    """
    y: Tensor = torch.ops.compress.packed_linear(x, payload, spec, out_features)
    return y


def packed_rows(rows: Tensor, payload: Tensor, spec: str, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """rows int64 [...] -> those rows of W [V, d] in `payload`, [..., d] in `dtype`; `spec` by `spec_text`.

    Raises `ArtifactError` when the payload has the wrong length, `IndexError` or `RuntimeError` for a row that is not
    there.
    """
    found: Tensor = torch.ops.compress.packed_rows(rows, payload, spec, *shape, dtype)
    return found


def _matrix(payload: Tensor, spec: str, out_features: int, in_features: int) -> QuantizedMatrix:
    # an alias, so that what is kept with a payload does not keep the payload
    return QuantizedMatrix.from_payload(
        CodecSpec.from_dict(json.loads(spec)), (out_features, in_features), payload.detach()
    )


def _linear(x: Tensor, payload: Tensor, spec: str, out_features: int) -> Tensor:
    version = 0 if payload.is_inference() else payload._version
    prepared = _PREPARED.get(payload)
    if prepared is None or prepared.version != version or prepared.dtype not in (None, x.dtype):
        matrix = _matrix(payload, spec, out_features, x.shape[-1])
        product = codec_of(matrix.spec).prepare(matrix.plain)
        weight = matrix.dequantize(x.dtype) if product is None else None
        prepared = _PREPARED[payload] = _Prepared(version, product, matrix.signs, weight)
    return prepared.multiply(x, out_features)


def _gradient(dy: Tensor, payload: Tensor, spec: str, in_features: int) -> Tensor:
    return dy @ _matrix(payload, spec, dy.shape[-1], in_features).dequantize(dy.dtype)


def _rows(rows: Tensor, payload: Tensor, spec: str, height: int, width: int, dtype: torch.dtype) -> Tensor:
    version = 0 if payload.is_inference() else payload._version
    table = _TABLES.get(payload)
    if table is None or table[0] != version:
        table = _TABLES[payload] = (version, _matrix(payload, spec, height, width))
    return codec_of(table[1].spec).rows(table[1], rows.flatten(), dtype).view(*rows.shape, width)


def _rows_shape(rows: Tensor, payload: Tensor, spec: str, height: int, width: int, dtype: torch.dtype) -> Tensor:
    return rows.new_empty((*rows.shape, width), dtype=dtype)


def _shape(x: Tensor, payload: Tensor, spec: str, width: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], width)


def _setup(ctx: Any, inputs: tuple[Tensor, Tensor, str, int], output: Tensor) -> None:
    x, payload, ctx.spec, _ = inputs
    ctx.in_features = x.shape[-1]
    ctx.save_for_backward(payload)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None, None]:
    (payload,) = ctx.saved_tensors
    return torch.ops.compress.packed_linear_gradient(dy, payload, ctx.spec, ctx.in_features), None, None, None


for _name, _kernel in (("packed_linear", _linear), ("packed_linear_gradient", _gradient)):
    torch.library.define(f"compress::{_name}", "(Tensor x, Tensor payload, str spec, int width) -> Tensor")
    torch.library.register_fake(f"compress::{_name}", _shape)
    torch.library.impl(f"compress::{_name}", "default", _kernel)
torch.library.register_autograd("compress::packed_linear", _backward, setup_context=_setup)

torch.library.define(
    "compress::packed_rows",
    "(Tensor rows, Tensor payload, str spec, int height, int width, ScalarType dtype) -> Tensor",
)
torch.library.register_fake("compress::packed_rows", _rows_shape)
torch.library.impl("compress::packed_rows", "default", _rows)
