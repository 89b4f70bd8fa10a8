"""What a codec is, and what it makes of a matrix.

A codec turns a matrix W [o, n] into named integer and float tensors whose bytes, one after the other, are the payload
that an artifact stores. Which bytes those are depends on the codec, its `CodecSpec` and the shape alone: no tensor
carries a header, and the number of bits is known before there are any data.

Rows are cut into groups of `dim` columns (the last one filled up with zeros), and every group gets a code of exactly
`width` bits. Every codec here reconstructs a group as one float32 scale times small integers, which is what stock
containers (ONNX Runtime's MatMulNBits, for one) hold: `integers()` hands out the two factors, `dequantize()` their
product, and the two agree bit for bit.

What the codec rounds may be W in another basis, W' = Qo^T W Qi (`compress.transforms`). The spec's `mixing` then names
the mixed sides, and the signs that say which mixing it was follow the codec's tensors in the payload. Codecs know
nothing of it: they round and decode W', the `plain` matrix, and `QuantizedMatrix` adds the signs and goes back to W.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, Protocol, Self

import torch
from torch import Tensor

from compress.codecs.registry import codec_of
from compress.errors import ArtifactError, CodecError, UsageError, quoted
from compress.transforms.matrices import unmix_weight
from compress.transforms.signs import MIXINGS, Signs, mixed_sides, pack_signs, sign_bytes, unpack_signs

Option = int | float | str | bool

MOST_BITS = 2**20
"""No code is wider, and no group has more columns, than this."""
LARGEST_SCALE = 2.0**103
"""Of all factors of a weight that are stored as floats: it leaves 2^24 for integers, levels and sums of a mixed basis
before float32 overflows."""
RESTORE = "Restore the config.json of the artifact."


@dataclass(frozen=True)
class CodecSpec:
    """All that reading a payload needs besides its shape: the codec's name, its options, width and group size.

    width: bits of one group's code. dim: columns of a group. mixing: which sides of the matrix were mixed before it was
    rounded, one of `MIXINGS`.
    """

    codec: str
    width: int
    dim: int
    options: Mapping[str, Option] = field(default_factory=dict)
    mixing: str = "none"

    def __hash__(self) -> int:
        return hash((self.codec, self.width, self.dim, tuple(sorted(self.options.items())), self.mixing))

    @property
    def plain(self) -> Self:
        """The same of a matrix that is not mixed: what the codec rounds with."""
        return replace(self, mixing="none")

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; `from_dict` takes it back. A matrix that is not mixed has no field `mixing`."""
        data = {"codec": self.codec, "width": self.width, "dim": self.dim, "options": dict(self.options)}
        return data if self.mixing == "none" else {**data, "mixing": self.mixing}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """The spec that `to_dict` wrote. Raises `ArtifactError` when a field is missing, unknown or of a wrong type."""
        data = {"mixing": "none", **data}
        kinds: dict[str, type] = {"codec": str, "width": int, "dim": int, "options": Mapping, "mixing": str}
        for name in data:
            if name not in kinds:
                raise _no_spec(f"an unknown field {quoted(name)}")
        for name, kind in kinds.items():
            if name not in data:
                raise ArtifactError(f"A codec's description lacks the field '{name}'.", remedy=RESTORE)
            if not isinstance(data[name], kind) or isinstance(data[name], bool):
                raise _no_spec(f"{quoted(data[name])} as its '{name}'")
        for name in ("width", "dim"):
            if not 0 < data[name] <= MOST_BITS:
                raise _no_spec(f"{quoted(data[name])} as its '{name}'")
        for option, value in data["options"].items():
            if not isinstance(value, (int, float, str, bool)) or value != value:
                raise _no_spec(f"{quoted(value)} as the option {quoted(option)}")
        if data["mixing"] not in MIXINGS:
            raise _no_spec(f"{quoted(data['mixing'])} as its 'mixing'")
        return cls(**{name: data[name] for name in kinds})


def _no_spec(what: str) -> ArtifactError:
    return ArtifactError(f"A codec's description has {what}.", remedy=RESTORE)


@dataclass(frozen=True)
class FieldLayout:
    """One named tensor of a payload: stored dense, row-major, little-endian."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return self.dtype.itemsize * torch.Size(self.shape).numel()


def sign_layout(spec: CodecSpec, shape: tuple[int, int]) -> tuple[FieldLayout, ...]:
    """The packed signs of the mixed sides, which end a payload."""
    inputs, outputs = mixed_sides(spec.mixing)
    sides = (*((("input_signs", shape[1]),) if inputs else ()), *((("output_signs", shape[0]),) if outputs else ()))
    return tuple(FieldLayout(name, torch.uint8, (sign_bytes(width),)) for name, width in sides)


@dataclass
class QuantizedMatrix:
    """A matrix in the form in which it is stored: its spec, its shape [o, n] and its tensors in payload order."""

    spec: CodecSpec
    shape: tuple[int, int]
    tensors: dict[str, Tensor]

    @property
    def bits(self) -> int:
        """Every stored bit, scales and padding included: eight times the payload's bytes."""
        return 8 * sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def bits_per_weight(self) -> float:
        """`bits` over the weights of the matrix without padding; 0 for a matrix without weights."""
        weights = self.shape[0] * self.shape[1]
        return self.bits / weights if weights else 0.0

    def payload(self) -> Tensor:
        """All tensors as one flat int8 tensor: the bytes of each in the codec's order, without gaps."""
        return torch.cat([tensor.contiguous().flatten().view(torch.int8) for tensor in self.tensors.values()])

    @classmethod
    def from_payload(cls, spec: CodecSpec, shape: tuple[int, int], payload: Tensor) -> Self:
        """The matrix whose `payload()` this is. Raises `ArtifactError` unless type and length are exactly right and
        all scales are finite, not negative, and not so large that a weight might not be finite."""
        layout = (*codec_of(spec).layout(spec, shape), *sign_layout(spec, shape))
        needed = sum(part.nbytes for part in layout)
        if payload.dtype != torch.int8 or payload.ndim != 1 or payload.numel() != needed:
            raise ArtifactError(
                f"A {spec.codec} matrix {shape[0]} x {shape[1]} of {spec.width} bits per {spec.dim} weights is "
                f"{needed} bytes of int8; the payload is {list(payload.shape)} of {payload.dtype}.",
                remedy="The file is damaged or belongs to another model.",
            )
        tensors: dict[str, Tensor] = {}
        start, largest = 0, 1.0
        for part in layout:
            piece = payload[start : start + part.nbytes]
            piece = piece if part.dtype.itemsize == 1 else piece.clone()  # which may lie at an odd place
            tensor = tensors[part.name] = piece.view(part.dtype).view(part.shape)
            if tensor.is_floating_point() and not bool((torch.isfinite(tensor) & (tensor >= 0)).all()):
                raise ArtifactError(
                    f"A {spec.codec} matrix has scales ('{part.name}') that are no finite, positive numbers.",
                    remedy="The file is damaged.",
                )
            if tensor.is_floating_point() and tensor.numel():
                largest *= max(1.0, float(tensor.max()))
            start += part.nbytes
        if largest > LARGEST_SCALE:
            raise ArtifactError(
                f"A {spec.codec} matrix has scales whose product reaches {largest:.0e}: its weights would overflow.",
                remedy="The file is damaged.",
            )
        return cls(spec, shape, tensors)

    @property
    def signs(self) -> Signs:
        """Of the sides that are mixed, on the device of the tensors."""
        packed = {part.name: self.tensors[part.name] for part in sign_layout(self.spec, self.shape)}
        rows, columns = self.shape
        return Signs(
            unpack_signs(packed["input_signs"], columns) if "input_signs" in packed else None,
            unpack_signs(packed["output_signs"], rows) if "output_signs" in packed else None,
        )

    @property
    def plain(self) -> QuantizedMatrix:
        """What the codec rounded: W' as a matrix by itself, in the mixed basis; the same tensors without the signs."""
        if self.spec.mixing == "none":
            return self
        signs = {part.name for part in sign_layout(self.spec, self.shape)}
        tensors = {name: tensor for name, tensor in self.tensors.items() if name not in signs}
        return QuantizedMatrix(self.spec.plain, self.shape, tensors)

    def mixed(self, signs: Signs) -> QuantizedMatrix:
        """The matrix W whose W' = Qo^T W Qi this one is; the inverse of `plain`."""
        packed = {"input_signs": signs.input, "output_signs": signs.output}
        stored = {name: pack_signs(side) for name, side in packed.items() if side is not None}
        return QuantizedMatrix(replace(self.spec, mixing=signs.mixing), self.shape, {**self.tensors, **stored})

    def integers(self) -> tuple[Tensor, Tensor]:
        """int8 [o, n'] and float32 scales [o, n' / g], whose product is W: columns in groups of g share a scale, and n'
        is n rounded up to whole groups. g is `dim`, but for single columns that share one (`integer`).
        Raises `CodecError` for a mixed matrix, which is no such product; its `plain` form is."""
        if self.spec.mixing != "none":
            raise CodecError(
                "A mixed matrix is no product of scales and integers.", remedy="Take those of its plain form."
            )
        return codec_of(self.spec).integers(self)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """W [o, n] in the original basis, rounded to `dtype`.

        W[r, k g + i] = fl32(scales[r, k] integers[r, k g + i]); of a mixed matrix that is W', and W = Qo W' Qi^T.
        """
        if self.spec.mixing == "none":
            return codec_of(self.spec).decode(self, dtype)
        return unmix_weight(self.plain.dequantize(), self.signs, dtype)


ONNX_INT4, ONNX_INT8 = "onnx int4", "onnx int8"
COMPRESSED_TENSORS_INT4, COMPRESSED_TENSORS_INT8 = "compressed-tensors int4", "compressed-tensors int8"


def exact_containers(dim: int, largest: int) -> tuple[str, ...]:
    """The stock containers that hold groups of `dim` integers of magnitude <= `largest`, one float32 scale each, bit
    for bit: ONNX Runtime's MatMulNBits has blocks of 16 and more, vLLM's pack-quantized kernels groups of 32, 64, 128.
    Integers of b bits around a zero point are as large as 2^(b-1) - 1: 4 bits have zero points of their own in both.
    """
    bits = (*((4,) if largest <= 7 else ()), *((8,) if largest <= 127 else ()))
    onnx = {4: ONNX_INT4, 8: ONNX_INT8}
    tensors = {4: COMPRESSED_TENSORS_INT4, 8: COMPRESSED_TENSORS_INT8}
    names = [onnx[number] for number in bits if dim % 16 == 0]
    return (*names, *(tensors[number] for number in bits if dim in (32, 64, 128)))


Product = Callable[[Tensor], Tensor]
"""x [R, n] -> x W^T [R, o] in x's dtype, from the packed weight or one that is decoded for this product alone."""


class CodecConfig(Protocol):
    """The options of a codec: a frozen dataclass with the codec's name on the class."""

    name: ClassVar[str]


GainRule = Literal["projection", "norm"]
"""The gain of a group: that of least error, c = <t, v> / <v, v>, or that which keeps its length, c = ||t|| / ||v||."""


class Rounding(Protocol):
    """A matrix W [o, n] that gets its codes some columns at a time, because what a column should be depends on how
    others were rounded.

    dim: columns that are rounded at once. scope: columns that share scales, a multiple of dim (or n, if that is less).
    Columns begin at multiples of these; the last ones of a matrix may be fewer.
    """

    dim: int
    scope: int
    peak: float = 0.0
    """Set before `scale` where these are some rows of a matrix: the largest RMS of all its rows."""

    def scale(self, start: int, values: Tensor) -> None:
        """Choose the scales of the columns from `start` on that share them, for their `values` float32 [o, <= scope].
        Raises `NumericsError` for values that are not finite."""
        ...

    def round(self, start: int, target: Tensor, metric: Tensor | None = None, keep: bool = False) -> Tensor:
        """Codes of the columns from `start` on: what they decode to, v float32 [o, <= dim], is near `target` t float32
        [o, <= dim]. Near is (t - v) M (t - v)^T with `metric` M float32 [<= dim, <= dim], positive definite, whose
        largest eigenvalue is 1; the square without. With `keep` a row whose present code is as near keeps it. Scales
        are chosen already.
        """
        ...

    def round_span(
        self,
        columns: Sequence[int],
        base: Tensor,
        carried: Tensor,
        inverses: Tensor,
        metrics: Tensor,
        coupling: Tensor,
        keep: bool = False,
    ) -> Tensor:
        """Round blocks of `dim` columns that depend on each other, the last first; `columns` is where each begins.

            t = base_b + carried_b inverse_b,    v = `round`(t, metric_b),    carried += (base_b - v) coupling_b

        base, carried float32 [o, s]; inverses, metrics float32 [b, dim, dim], of a short last block the leading part;
        coupling float32 [s, s]. Returns all v, float32 [o, s].
        """
        carried, decoded = carried.clone(), torch.empty_like(base)
        for block in reversed(range(len(columns))):
            part = slice(block * self.dim, min((block + 1) * self.dim, base.shape[1]))
            width = part.stop - part.start
            target = base[:, part] + carried[:, part] @ inverses[block, :width, :width]
            decoded[:, part] = self.round(columns[block], target, metrics[block, :width, :width], keep)
            carried[:, : part.start].addmm_(base[:, part] - decoded[:, part], coupling[part, : part.start])
        return decoded

    def rescale(self, factors: Tensor) -> None:
        """Multiply the scales by `factors` float32 [o, ceil(n / scope)], as nearly as can be stored; codes stay."""
        ...

    def decoded(self) -> Tensor:
        """What all codes decode to, float32 [o, n]."""
        ...

    def finish(self) -> QuantizedMatrix:
        """The matrix; all columns have their codes."""
        ...


class Codec(Protocol):
    """One way to make bits of a matrix. Codecs derive from it, and have `bits`, `decode` and `prepare` from here unless
    they know better. The matrices they make and read are not mixed. Construct one through `codec(name, **options)` of
    `compress.codecs`."""

    config_type: ClassVar[type[Any]]
    config: Any
    rows_apart: ClassVar[int] = 0
    """Pieces that begin at multiples of so many rows may be rounded by themselves, given `Rounding.peak`; the matrix's
    tensors are theirs, one behind the other. 0: they may not."""

    def __init__(self, config: Any) -> None: ...

    @classmethod
    def from_spec(cls, spec: CodecSpec) -> Self:
        """The codec that wrote `spec`; `ArtifactError` when no options of it could have."""
        ...

    @property
    def dim(self) -> int:
        """Columns that are rounded at once."""
        ...

    def widths(self, lowest: float = 0.0, highest: float = float("inf")) -> tuple[int, ...]:
        """The code widths B with lowest <= B / dim <= highest (bits per weight without scales), ascending."""
        ...

    def spec(self, width: int) -> CodecSpec:
        """The spec of one width; `UsageError` that names the widths there are."""
        ...

    def layout(self, spec: CodecSpec, shape: tuple[int, int]) -> tuple[FieldLayout, ...]:
        """The tensors of a payload but for signs, in their order."""
        ...

    def bits(self, spec: CodecSpec, shape: tuple[int, int]) -> int:
        """`QuantizedMatrix.bits` of a matrix of this shape, exactly and without data."""
        return 8 * sum(part.nbytes for part in (*self.layout(spec, shape), *sign_layout(spec, shape)))

    def quantize(self, weight: Tensor, spec: CodecSpec) -> QuantizedMatrix:
        """A near matrix in the form of `spec`: each group is rounded to the nearest under its scale, which is searched
        for. `NumericsError` for a weight that is not finite."""
        ...

    def rounding(
        self,
        shape: tuple[int, int],
        spec: CodecSpec,
        device: torch.device,
        gain: GainRule = "projection",
        search: bool = True,
    ) -> Rounding:
        """A matrix of this shape on its way to the form of `spec`, for callers that decide column by column. Codecs
        whose groups have a gain choose it by the rule `gain`; those of several columns `search` for the code that is
        near in a metric, or else take the nearest. `UsageError` for a codec that rounds whole matrices alone."""
        raise UsageError(
            f"The codec '{spec.codec}' has no calibrated rounding.",
            remedy="Leave out the data, or take half_pyramid, pyramid or integer.",
        )

    def spread(self, weight: Tensor) -> Tensor:
        """What the errors of rounding W [o, n] are in proportion to, as a function that autograd follows and that
        broadcasts to [o, n]: the root mean square of each row, by which scales are chosen."""
        return torch.linalg.vector_norm(weight, dim=1, keepdim=True) / weight.shape[1] ** 0.5

    def integers(self, matrix: QuantizedMatrix) -> tuple[Tensor, Tensor]:
        """See `QuantizedMatrix.integers`."""
        ...

    def decode(self, matrix: QuantizedMatrix, dtype: torch.dtype) -> Tensor:
        """See `QuantizedMatrix.dequantize`; from the two factors of `integers`, unless a codec has a faster way."""
        integers, scales = matrix.integers()
        rows, groups = scales.shape
        weight = integers.view(rows, groups, matrix.spec.dim).to(torch.float32).mul_(scales.unsqueeze(-1))
        return weight.view(rows, groups * matrix.spec.dim)[:, : matrix.shape[1]].to(dtype).contiguous()

    def rows(self, matrix: QuantizedMatrix, rows: Tensor, dtype: torch.dtype) -> Tensor:
        """The `rows` int64 [N] of `decode`, [N, n] in `dtype`; by decoding all, unless a codec has a faster way. Raises
        `IndexError` or `RuntimeError` for a row that is not there."""
        return self.decode(matrix, dtype).index_select(0, rows)

    def prepare(self, matrix: QuantizedMatrix) -> Product | None:
        """The product with this matrix, for a caller that keeps it and multiplies often; None where decoding takes so
        long, and a product so little less than that, that the caller should decode once and keep the weight."""
        return None

    def containers(self, spec: CodecSpec) -> tuple[str, ...]:
        """Names of the stock containers that carry a matrix of `spec` exactly; see `exact_containers`."""
        ...
