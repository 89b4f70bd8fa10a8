"""Modules that hold packed weights.

A `PackedLinear` stands where an `nn.Linear` stood (or a `Conv1D`, which is one with its weight transposed) and computes
the same map with the decoded weight, y = x W^T + b; a `PackedConvolution` stands for a convolution, whose matrix is
[out, in x kernel], and `PackedExperts` for a module of stacked experts. The state of each is what is stored: the
payload, one flat `int8` tensor called `weight` like the original one, and the bias; of experts one payload a row,
called like the stacked parameter. (Embeddings and heads are in `compress.quantization.embedding`.)

Where the codec has a product with packed weights, it is prepared at its first use and kept, outside the state: memory
stays some times that of the payload. Else the weight itself is decoded at its first use and kept: that costs as much as
many products, and a model that is run at all needs it again.

A mixed matrix holds W' = Qo^T W Qi. Its product with packed weights is y = Qo (W' (Qi^T x)) + b: activations are mixed
before it and after it. A weight that is decoded and kept is kept in the original basis, where nothing needs mixing.

Activations that are quantized (`compress.quantization.dynamic`) are so in the basis in which they are multiplied: what
an engine would round is Qi^T x. While `roundings` has an entry the product is that of W' and the rounded Qi^T x, and
where the codec has none, W' is decoded and kept.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from compress.codecs.base import CodecSpec, Product, QuantizedMatrix
from compress.codecs.registry import codec_of
from compress.modeling.experts import Experts, Projection, is_experts, projections, without
from compress.modeling.structure import Convolution, MatrixView, module_matrix
from compress.quantization.compiled import packed_linear, spec_text
from compress.transforms.signs import Signs

Ties = dict[str, dict[str, str]]
"""Entries of `_tied_weights_keys` by the part of a transformers model that had them."""


class _Remembering(nn.Module):
    """Keeps what was made of payloads, until they move or change."""

    def _forget(self) -> None:
        raise NotImplementedError

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self._forget()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def _load_from_state_dict(self, *args: object, **kwargs: object) -> None:
        self._forget()
        super()._load_from_state_dict(*args, **kwargs)


class PackedMatrix(_Remembering):
    """A matrix W [out, in] decoded from its payload, and a bias.

    `weight` is the payload (int8, one dimension, `bits / 8` long), `bias` the original parameter or None. W is decoded
    in float32 and then cast to the activations' dtype; it receives no gradient, the activations do.

    Given another packed matrix instead of a payload, it shares that one's and has no `weight`. `ties` is what the model
    said of such modules before.
    """

    weight: Tensor
    bias: nn.Parameter | None

    def __init__(self, spec: CodecSpec, shape: tuple[int, int], payload: Tensor | PackedMatrix) -> None:
        super().__init__()
        self.spec, self._shape = spec, shape
        # in a tuple, so that it is no child
        self._holder: tuple[PackedMatrix, ...] = ()
        if isinstance(payload, PackedMatrix):
            self._holder = (payload,)
        else:
            self.register_buffer("weight", payload)
        self.register_parameter("bias", None)
        self.ties: Ties = {}
        self._signs: Signs | None = None
        self._decoded: Tensor | None = None

    def __setattr__(self, name: str, value: Any) -> None:
        # transformers ties weights by assigning the one to the other; here they are tied already
        if name == "weight" and self._holder and value is self.payload:
            return
        super().__setattr__(name, value)

    @property
    def holder(self) -> PackedMatrix:
        """The module whose payload this one has, mostly itself."""
        return self._holder[0] if self._holder else self

    @property
    def payload(self) -> Tensor:
        """int8 [bits / 8]."""
        return self.holder.weight

    def quantized(self) -> QuantizedMatrix:
        """The matrix as codes, for exporters. Raises `ArtifactError` when the payload has the wrong length."""
        return QuantizedMatrix.from_payload(self.spec, self._shape, self.payload)

    def signs(self) -> Signs:
        """Of the sides that are mixed, read from the payload."""
        if self._signs is None:
            self._signs = self.quantized().signs
        return self._signs

    def decoded(self, dtype: torch.dtype) -> Tensor:
        """W [out, in] in the original basis in `dtype`, on the payload's device."""
        if self._holder:
            return self.holder.decoded(dtype)
        if self._decoded is None or self._decoded.dtype != dtype:
            with torch.inference_mode(False), torch.no_grad():
                self._decoded = self.quantized().dequantize().to(dtype)
        return self._decoded

    def to_module(self, dtype: torch.dtype) -> nn.Module:
        """The ordinary module that this one stands for, with the decoded weight."""
        raise NotImplementedError

    def _unpacked(self, module: nn.Module, weight: Tensor, dtype: torch.dtype) -> nn.Module:
        module.register_parameter("weight", nn.Parameter(weight.to(dtype)))
        if self.bias is not None:
            module.register_parameter("bias", nn.Parameter(self.bias.detach().to(dtype)))
        return module

    def _forget(self) -> None:
        self._signs = self._decoded = None


class PackedLinear(PackedMatrix):
    """y = x W^T + b with W [out, in] decoded from its payload.

    `roundings` are applied, one after the other, to the mixed rows [R, in] that W' is multiplied with; empty unless
    activations are quantized. `transposed`: it stands for a `Conv1D`.
    """

    def __init__(
        self,
        spec: CodecSpec,
        out_features: int,
        in_features: int,
        payload: Tensor | PackedMatrix,
        transposed: bool = False,
    ) -> None:
        super().__init__(spec, (out_features, in_features), payload)
        self.out_features, self.in_features, self.transposed = out_features, in_features, transposed
        self._spec_text = spec_text(spec)
        self._product: Product | None = None
        self._decoded_plain: Tensor | None = None
        self.roundings: tuple[Callable[[Tensor], Tensor], ...] = ()

    @classmethod
    def from_matrix(cls, linear: nn.Module, matrix: QuantizedMatrix) -> Self:
        """In place of the `nn.Linear` or `Conv1D`, with the weight `matrix`, on the same device."""
        return cls.like(linear, matrix.spec, matrix.payload())

    @classmethod
    def empty_like(cls, linear: nn.Module, spec: CodecSpec) -> Self:
        """In place of the `nn.Linear` or `Conv1D`, with a payload of the right length that is still to be filled."""
        return cls.like(linear, spec, _empty(spec, _shape_of(linear)))

    @classmethod
    def like(cls, linear: nn.Module, spec: CodecSpec, payload: Tensor | PackedMatrix) -> Self:
        """In place of the `nn.Linear` or `Conv1D`, with this payload, or that of another module."""
        if isinstance(payload, Tensor):
            payload = payload.to(linear.get_parameter("weight").device)
        module = cls(spec, *_shape_of(linear), payload, isinstance(linear, Conv1D))
        module.bias = linear.bias  # type: ignore[assignment]
        return module

    def product(self) -> Product | None:
        """x [R, in] -> x W^T in the mixed basis; None where the weight should be decoded and kept (`Codec.prepare`)."""
        if self._product is None and self._decoded is None and self._decoded_plain is None:
            self._product = codec_of(self.spec).prepare(self.quantized().plain)
        return self._product

    def decoded_plain(self, dtype: torch.dtype) -> Tensor:
        """W' [out, in], the weight in the mixed basis, in `dtype`, on the payload's device."""
        if self.spec.mixing == "none":
            return self.decoded(dtype)
        if self._decoded_plain is None or self._decoded_plain.dtype != dtype:
            with torch.inference_mode(False), torch.no_grad():
                self._decoded_plain = self.quantized().plain.dequantize().to(dtype)
        return self._decoded_plain

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling() and not self.roundings:
            y = packed_linear(x, self.payload, self._spec_text, self.out_features)
            return y if self.bias is None else y + self.bias
        multiply = self.product()
        if multiply is None and not self.roundings:
            return functional.linear(x, self.decoded(x.dtype), self.bias)
        rows = self.signs().mix_inputs(x.reshape(-1, self.in_features))
        for rounding in self.roundings:
            rows = rounding(rows)
        y = functional.linear(rows, self.decoded_plain(x.dtype)) if multiply is None else multiply(rows)
        y = self.signs().unmix_outputs(y).view(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias

    def to_module(self, dtype: torch.dtype) -> nn.Module:
        """An ordinary `nn.Linear` with the decoded weight, or the `Conv1D`."""
        weight = self.quantized().dequantize()
        if self.transposed:
            return self._unpacked(Conv1D(self.out_features, self.in_features), weight.T.contiguous(), dtype)
        linear = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        return self._unpacked(linear, weight, dtype)

    def extra_repr(self) -> str:
        mixing = "" if self.spec.mixing == "none" else f", mixing={self.spec.mixing}"
        return f"{self.in_features}, {self.out_features}, codec={self.spec.codec}, width={self.spec.width}{mixing}"

    def _forget(self) -> None:
        super()._forget()
        self._product = self._decoded_plain = None


class PackedConvolution(PackedMatrix):
    """A convolution of 1, 2 or 3 dimensions whose weight [out, in, *kernel] is the matrix [out, in x kernel]."""

    def __init__(self, convolution: Convolution, spec: CodecSpec, payload: Tensor) -> None:
        super().__init__(spec, _shape_of(convolution), payload.to(convolution.weight.device))
        self.bias = convolution.bias  # type: ignore[assignment]
        self.in_channels, self.out_channels = convolution.in_channels, convolution.out_channels
        self.kernel_size, self.stride = convolution.kernel_size, convolution.stride
        self.padding, self.dilation = convolution.padding, convolution.dilation
        # in a tuple, so that it is no child: it knows how to pad; its weight has no memory
        self._convolution: tuple[Any] = (without(convolution, "weight"),)

    def forward(self, x: Tensor) -> Tensor:
        return self.convolve(x, self.decoded(x.dtype))

    def convolve(self, x: Tensor, weight: Tensor) -> Tensor:
        """The convolution of `x` with the matrix `weight` [out, in x kernel]."""
        kernel = weight.view(self.out_channels, self.in_channels, *self.kernel_size)
        y: Tensor = self._convolution[0]._conv_forward(x, kernel, self.bias)
        return y

    def to_module(self, dtype: torch.dtype) -> nn.Module:
        """An ordinary convolution with the decoded weight."""
        weight = self.quantized().dequantize().view(self.out_channels, self.in_channels, *self.kernel_size)
        return self._unpacked(copy.deepcopy(self._convolution[0]), weight, dtype)

    def extra_repr(self) -> str:
        sizes = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"
        return f"{sizes}, codec={self.spec.codec}, width={self.spec.width}"


class PackedExperts(_Remembering, Experts):
    """Stacked experts of which each matrix is a row of a payload int8 [E, bits / 8], called like the parameter."""

    def __init__(self, fused: nn.Module, where: str, payloads: Mapping[str, tuple[CodecSpec, Tensor]]) -> None:
        super().__init__(fused, where)
        self.specs = {}
        for projection in (self.up, self.down):
            self.specs[projection.name], payload = payloads[projection.name]
            self.register_buffer(projection.name, payload.to(fused.get_parameter(projection.name).device))
        self._fused = (without(fused, self.up.name, self.down.name),)
        self._packed: dict[tuple[str, int], PackedLinear] = {}

    @classmethod
    def empty_like(cls, fused: nn.Module, where: str, specs: Mapping[str, CodecSpec]) -> Self:
        """In place of `fused`, with payloads that are still to be filled."""
        empty = {each.name: _empty(specs[each.name], each.shape) for each in projections(fused, where)}
        experts = projections(fused, where)[0].experts
        return cls(fused, where, {name: (specs[name], one.new_empty(experts, len(one))) for name, one in empty.items()})

    @classmethod
    def from_matrices(cls, fused: nn.Module, where: str, matrices: Mapping[str, Sequence[QuantizedMatrix]]) -> Self:
        """In place of `fused`, with the matrices of all experts by the names of the stacked parameters."""
        rows = {name: torch.stack([one.payload() for one in stack]) for name, stack in matrices.items()}
        return cls(fused, where, {name: (matrices[name][0].spec, payload) for name, payload in rows.items()})

    def expert(self, projection: Projection, index: int) -> Callable[[Tensor], Tensor]:
        key = (projection.name, index)
        if key not in self._packed:
            payload = self.get_buffer(projection.name)[index]
            self._packed[key] = PackedLinear(self.specs[projection.name], *projection.shape, payload)
        return self._packed[key]

    def quantized(self, projection: Projection, index: int) -> QuantizedMatrix:
        """One matrix as codes."""
        payload = self.get_buffer(projection.name)[index]
        return QuantizedMatrix.from_payload(self.specs[projection.name], projection.shape, payload)

    def to_module(self, dtype: torch.dtype) -> nn.Module:
        """The module of stacked experts with the decoded weights."""
        fused = copy.deepcopy(self._fused[0])
        for name, parameter in self.named_parameters(recurse=False):
            fused.register_parameter(name, parameter)
        for name, child in self.named_children():
            fused.add_module(name, child)
        for projection in (self.up, self.down):
            stack = torch.stack(
                [self.quantized(projection, index).dequantize().to(dtype) for index in range(projection.experts)]
            )
            weight = stack.transpose(1, 2).contiguous() if projection.transposed else stack
            fused.register_parameter(projection.name, nn.Parameter(weight))
        return fused

    def extra_repr(self) -> str:
        each = (f"{one.name}={one.experts} x {one.shape}, {self.specs[one.name].codec}" for one in (self.up, self.down))
        return ", ".join(each)

    def _forget(self) -> None:
        self._packed = {}


Packed = PackedMatrix | PackedExperts


def packed_modules(model: nn.Module) -> dict[str, Packed]:
    """The packed modules of a model, by full name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Packed)}


def packed_linears(model: nn.Module) -> dict[str, PackedLinear]:
    """Those that stand for linear layers."""
    return {name: module for name, module in packed_modules(model).items() if isinstance(module, PackedLinear)}


def prepare_packed(model: nn.Module, specs: Mapping[str, CodecSpec]) -> None:
    """Replace, in place, the linear maps that `specs` lists by packed ones whose payload is still to be loaded. Keys
    are those of `MatrixView.place`. Raises `TypeError` for one that is no linear map."""
    experts: dict[str, dict[str, CodecSpec]] = {}
    for place, spec in specs.items():
        parent, _, last = place.rpartition(".")
        if is_experts(model.get_submodule(parent)):
            experts.setdefault(parent, {})[last] = spec
            continue
        module = model.get_submodule(place)
        if isinstance(module, Convolution):
            model.set_submodule(place, PackedConvolution(module, spec, _empty(spec, _shape_of(module))))
        elif isinstance(module, nn.Linear | Conv1D):
            model.set_submodule(place, PackedLinear.empty_like(module, spec))
        else:
            raise TypeError(f"'{place}' is a {type(module).__name__}, not a linear map")
    for name, both in experts.items():
        model.set_submodule(name, PackedExperts.empty_like(model.get_submodule(name), name, both))


def pack(model: nn.Module, rounded: Sequence[tuple[MatrixView, QuantizedMatrix]]) -> None:
    """Replace, in place, the linear maps of `rounded`, whole modules of experts, by packed ones."""
    stacks: dict[str, dict[str, list[QuantizedMatrix]]] = {}
    for view, matrix in sorted(rounded, key=lambda pair: pair[0].index or 0):
        if view.index is not None:
            stacks.setdefault(view.module, {}).setdefault(view.parameter.rpartition(".")[2], []).append(matrix)
            continue
        module = model.get_submodule(view.module)
        packed: nn.Module
        if isinstance(module, Convolution):
            packed = PackedConvolution(module, matrix.spec, matrix.payload())
        else:
            packed = PackedLinear.from_matrix(module, matrix)
        model.set_submodule(view.module, packed)
    for name, both in stacks.items():
        model.set_submodule(name, PackedExperts.from_matrices(model.get_submodule(name), name, both))


def unpack(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Replace, in place, every packed module by an ordinary one in `dtype`; the inverse of quantization but for the
    rounding. What shared a payload shares a weight. Returns the model."""
    packed = packed_modules(model)
    names = {module: name for name, module in packed.items()}
    shared = {name: names[module.holder] for name, module in packed.items() if isinstance(module, PackedMatrix)}
    for name, module in packed.items():
        model.set_submodule(name, module.to_module(dtype))
    for name, holder in shared.items():
        if name != holder:
            model.get_submodule(name).register_parameter("weight", model.get_submodule(holder).get_parameter("weight"))
    ties = [module.ties for module in packed.values() if isinstance(module, PackedMatrix) and module.ties]
    for prefix, declared in (entry for each in ties for entry in each.items()):
        part = model.get_submodule(prefix)
        assert isinstance(part, PreTrainedModel)
        part._tied_weights_keys = {**(part._tied_weights_keys or {}), **declared}  # type: ignore[dict-item]
    if ties and isinstance(model, PreTrainedModel):
        model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)
    return model


def _shape_of(module: nn.Module) -> tuple[int, int]:
    rows, columns = module_matrix(module).shape
    return rows, columns


def _empty(spec: CodecSpec, shape: tuple[int, int]) -> Tensor:
    return torch.empty(codec_of(spec).bits(spec, shape) // 8, dtype=torch.int8)
