"""Modules that hold packed weights.

A `PackedLinear` stands where an `nn.Linear` stood and computes the same map with the decoded weight,
y = x W^T + b. Its state is what is stored: the payload, one flat `int8` tensor called `weight` like the original one,
and the bias. Where the codec has a product with packed weights, it is prepared at its first use and kept, outside the
state: memory stays some times that of the payload. Else the weight itself is decoded at its first use and kept: that
costs as much as many products, and a model that is run at all needs it again.

A mixed matrix holds W' = Qo^T W Qi. Its product with packed weights is y = Qo (W' (Qi^T x)) + b: activations are mixed
before it and after it. A weight that is decoded and kept is kept in the original basis, where nothing needs mixing.

Activations that are quantized (`compress.quantization.dynamic`) are so in the basis in which they are multiplied: what
an engine would round is Qi^T x. While `roundings` has an entry the product is that of W' and the rounded Qi^T x, and
where the codec has none, W' is decoded and kept.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from compress.codecs.base import CodecSpec, Product, QuantizedMatrix
from compress.codecs.registry import codec_of
from compress.transforms.signs import Signs


class PackedLinear(nn.Module):
    """y = x W^T + b with W [out, in] decoded from its payload.

    `weight` is the payload (int8, one dimension, `bits / 8` long), `bias` the original parameter or None. W is decoded
    in float32 and then cast to the activations' dtype; it receives no gradient, the activations do. `roundings` are
    applied, one after the other, to the mixed rows [R, in] that W' is multiplied with; empty unless activations are
    quantized.
    """

    weight: Tensor
    bias: nn.Parameter | None

    def __init__(self, spec: CodecSpec, out_features: int, in_features: int, payload: Tensor) -> None:
        super().__init__()
        self.spec = spec
        self.out_features, self.in_features = out_features, in_features
        self.register_buffer("weight", payload)
        self.register_parameter("bias", None)
        self._product: Product | None = None
        self._signs: Signs | None = None
        self._decoded: Tensor | None = None
        self._decoded_plain: Tensor | None = None
        self.roundings: tuple[Callable[[Tensor], Tensor], ...] = ()

    @classmethod
    def from_matrix(cls, linear: nn.Linear, matrix: QuantizedMatrix) -> Self:
        """In place of `linear`, with the weight `matrix`, on the same device."""
        payload = matrix.payload().to(linear.weight.device)
        module = cls(matrix.spec, linear.out_features, linear.in_features, payload)
        module.bias = linear.bias
        return module

    @classmethod
    def empty_like(cls, linear: nn.Linear, spec: CodecSpec) -> Self:
        """In place of `linear`, with a payload of the right length that is still to be filled."""
        bits = codec_of(spec).bits(spec, (linear.out_features, linear.in_features))
        payload = torch.empty(bits // 8, dtype=torch.int8, device=linear.weight.device)
        module = cls(spec, linear.out_features, linear.in_features, payload)
        module.bias = linear.bias
        return module

    def quantized(self) -> QuantizedMatrix:
        """The matrix as codes, for exporters. Raises `ArtifactError` when the payload has the wrong length."""
        return QuantizedMatrix.from_payload(self.spec, (self.out_features, self.in_features), self.weight)

    def product(self) -> Product | None:
        """x [R, in] -> x W^T in the mixed basis; None where the weight should be decoded and kept (`Codec.prepare`)."""
        if self._product is None and self._decoded is None and self._decoded_plain is None:
            self._product = codec_of(self.spec).prepare(self.quantized().plain)
        return self._product

    def signs(self) -> Signs:
        """Of the sides that are mixed, read from the payload."""
        if self._signs is None:
            self._signs = self.quantized().signs
        return self._signs

    def decoded(self, dtype: torch.dtype) -> Tensor:
        """W [out, in] in the original basis in `dtype`, on the payload's device."""
        if self._decoded is None or self._decoded.dtype != dtype:
            with torch.inference_mode(False), torch.no_grad():
                self._decoded = self.quantized().dequantize().to(dtype)
        return self._decoded

    def decoded_plain(self, dtype: torch.dtype) -> Tensor:
        """W' [out, in], the weight in the mixed basis, in `dtype`, on the payload's device."""
        if self.spec.mixing == "none":
            return self.decoded(dtype)
        if self._decoded_plain is None or self._decoded_plain.dtype != dtype:
            with torch.inference_mode(False), torch.no_grad():
                self._decoded_plain = self.quantized().plain.dequantize().to(dtype)
        return self._decoded_plain

    def forward(self, x: Tensor) -> Tensor:
        multiply = self.product()
        if multiply is None and not self.roundings:
            return functional.linear(x, self.decoded(x.dtype), self.bias)
        rows = self.signs().mix_inputs(x.reshape(-1, self.in_features))
        for rounding in self.roundings:
            rows = rounding(rows)
        y = functional.linear(rows, self.decoded_plain(x.dtype)) if multiply is None else multiply(rows)
        y = self.signs().unmix_outputs(y).view(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias

    def to_linear(self, dtype: torch.dtype) -> nn.Linear:
        """An ordinary `nn.Linear` with the decoded weight."""
        linear = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        linear.weight = nn.Parameter(self.quantized().dequantize().to(dtype))
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.detach().to(dtype))
        return linear

    def extra_repr(self) -> str:
        mixing = "" if self.spec.mixing == "none" else f", mixing={self.spec.mixing}"
        return f"{self.in_features}, {self.out_features}, codec={self.spec.codec}, width={self.spec.width}{mixing}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self._forget()  # the payload moves; what was read on the old device is void
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def _load_from_state_dict(self, *args: object, **kwargs: object) -> None:
        self._forget()  # the payload changes
        super()._load_from_state_dict(*args, **kwargs)

    def _forget(self) -> None:
        self._product = self._signs = self._decoded = self._decoded_plain = None


def packed_modules(model: nn.Module) -> dict[str, PackedLinear]:
    """The packed modules of a model, by full name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, PackedLinear)}


def prepare_packed(model: nn.Module, specs: Mapping[str, CodecSpec]) -> None:
    """Replace, in place, the named `nn.Linear` modules by packed ones whose payload is still to be loaded."""
    for name, spec in specs.items():
        linear = model.get_submodule(name)
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"'{name}' is a {type(linear).__name__}, not an nn.Linear")
        model.set_submodule(name, PackedLinear.empty_like(linear, spec))


def unpack(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Replace, in place, every packed module by an `nn.Linear` in `dtype`; the inverse of quantization but for the
    rounding. Returns the model."""
    for name, module in packed_modules(model).items():
        model.set_submodule(name, module.to_linear(dtype))
    return model
