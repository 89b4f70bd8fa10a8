"""The half-integer pyramid codec: a row scale of 8 bits, and for each group of D weights its signs and one number.

    w[g D + i] ~ c_g v_i,   c_g = fl32(r gain_j),   v_i = s_i t[m_i] + e d,   sum m_i = K,  0 <= m_i <= M

v, j and e = +-1 are found jointly (`compress.ops.search`), under the row's scale r as it is stored (`rows.py`); K, M,
the levels t, the gains and the shift d come from a table for each width (`table.py`). What a code means is in
`compress.ops.half_pyramid.shape`; the payload, byte by byte, in docs/formats.md.

This pyramid is the project's own. The levels 1, 3, 5, ... are the half-integers m + 1/2 of a pyramid in (Z + 1/2)^D; a
bound on m, which a Gaussian source hardly feels, makes room for more gains; trained levels and a shift of the whole
group towards one of two cosets take off another tenth of the error. All are small integers, so products with integer
activations are exact, and groups of 16 and 32 fit 8-bit containers as they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from compress import ops
from compress.codecs.base import (
    Codec,
    CodecSpec,
    FieldLayout,
    GainRule,
    Option,
    Product,
    QuantizedMatrix,
    Rounding,
    exact_containers,
)
from compress.codecs.finite import finite_matrix
from compress.codecs.group_rounding import GroupCodec, GroupRounding
from compress.codecs.half_pyramid.product import PackedProduct
from compress.codecs.half_pyramid.table import VERSION, Entry, Key, shipped_tables
from compress.codecs.registry import register_codec
from compress.codecs.row_search import Groups, encode_matrix
from compress.codecs.rows import row_scales
from compress.errors import ArtifactError, UsageError
from compress.ops.bits import packed_bytes
from compress.ops.half_pyramid.native import FLOATS
from compress.ops.half_pyramid.shape import MOST_LEVELS, plane_widths
from compress.ops.span import Pyramid


@dataclass(frozen=True)
class HalfPyramidConfig:
    """dim: weights in a group, 8, 16 or 32. coset: whether a bit shifts the group.
    levels: "trained", or "uniform" for the half-integers themselves."""

    name: ClassVar[str] = "half_pyramid"
    dim: int = 8
    coset: bool = True
    levels: str = "trained"

    def __post_init__(self) -> None:
        if self.key not in shipped_tables():
            raise UsageError(
                f"There is no half-integer pyramid of dim={self.dim}, levels={self.levels}.",
                remedy="dim is 8, 16 or 32, levels trained or uniform.",
            )

    @property
    def key(self) -> Key:
        return VERSION, self.dim, self.coset, self.levels


@register_codec
class HalfPyramidCodec(Codec):
    """See the module's text; the methods are those of `compress.codecs.base.Codec`."""

    rows_apart = 8
    config_type: ClassVar[type[Any]] = HalfPyramidConfig

    def __init__(self, config: HalfPyramidConfig) -> None:
        self.config = config

    @classmethod
    def from_spec(cls, spec: CodecSpec) -> Self:
        entry_of(spec)
        options = spec.options
        return cls(HalfPyramidConfig(spec.dim, bool(options["coset"]), str(options["levels"])))

    @property
    def dim(self) -> int:
        return self.config.dim

    def widths(self, lowest: float = 0.0, highest: float = float("inf")) -> tuple[int, ...]:
        known = shipped_tables()[self.config.key]
        return tuple(width for width in known if lowest <= width / self.config.dim <= highest)

    def spec(self, width: int) -> CodecSpec:
        widths = self.widths()
        if width not in widths:
            raise UsageError(
                f"The half-integer pyramid of dim={self.config.dim} has no code of {width} bits.",
                remedy=f"Its widths are {widths[0]} to {widths[-1]} bits per {self.config.dim} weights.",
            )
        options: dict[str, Option] = {"coset": self.config.coset, "levels": self.config.levels, "table": VERSION}
        return CodecSpec("half_pyramid", width, self.config.dim, options)

    def layout(self, spec: CodecSpec, shape: tuple[int, int]) -> tuple[FieldLayout, ...]:
        rows, columns = shape
        groups = rows * -(-columns // spec.dim)
        widths = (spec.dim, *plane_widths(spec.width - spec.dim))
        names = ("signs", *(f"plane_{place}" for place in range(len(widths) - 1)))
        return (
            FieldLayout("scale", torch.float32, (1,)),
            FieldLayout("rows", torch.uint8, (rows,)),
            *(
                FieldLayout(name, torch.uint8, (packed_bytes(groups, bits),))
                for name, bits in zip(names, widths, strict=True)
            ),
        )

    def quantize(self, weight: Tensor, spec: CodecSpec) -> QuantizedMatrix:
        weight = finite_matrix(weight)
        codec = self._groups((weight.shape[0], weight.shape[1]), spec, weight.device)
        return codec.pack(*encode_matrix(weight, spec.dim, codec.encode))

    def rounding(
        self,
        shape: tuple[int, int],
        spec: CodecSpec,
        device: torch.device,
        gain: GainRule = "projection",
        search: bool = True,
    ) -> Rounding:
        return GroupRounding(shape, self._groups(shape, spec, device), gain, search)

    def _groups(self, size: tuple[int, int], spec: CodecSpec, device: torch.device) -> GroupCodec:
        shape = entry_of(spec).shape
        gains = torch.tensor(shape.gains, dtype=torch.float32, device=device)
        names = [part.name for part in self.layout(spec, size)]

        def encode(x: Tensor, scale: Tensor) -> Groups:
            values, gain, coset = ops.half_pyramid_encode(x, scale, shape)
            return Groups(values, gains[gain], (gain, coset))

        def pack(scale: Tensor, rows: Tensor, groups: Groups) -> QuantizedMatrix:
            gain, coset = groups.fields
            planes = ops.half_pyramid_pack(groups.values, gain, coset, shape, spec.width)
            return QuantizedMatrix(spec, size, dict(zip(names, (scale, rows, *planes), strict=True)))

        return GroupCodec(Pyramid(shape.dim, shape.pulses, shape.levels, shape.shift, gains), encode, pack)

    def integers(self, matrix: QuantizedMatrix) -> tuple[Tensor, Tensor]:
        shape, (rows, columns) = entry_of(matrix.spec).shape, matrix.shape
        groups = -(-columns // shape.dim)
        values, gain = ops.half_pyramid_unpack(planes_of(matrix), rows * groups, shape, matrix.spec.width)
        gains = torch.tensor(shape.gains, dtype=torch.float32, device=gain.device)
        scales = row_scales(matrix.tensors["scale"], matrix.tensors["rows"])
        return values.view(rows, groups * shape.dim), scales.unsqueeze(-1) * gains[gain].view(rows, groups)

    def decode(self, matrix: QuantizedMatrix, dtype: torch.dtype) -> Tensor:
        shape = entry_of(matrix.spec).shape
        scales = row_scales(matrix.tensors["scale"], matrix.tensors["rows"])
        known = dtype if dtype in FLOATS else torch.float32
        planes, columns, width = planes_of(matrix), matrix.shape[1], matrix.spec.width
        return ops.half_pyramid_decode(planes, scales, columns, shape, width, known).to(dtype)

    def prepare(self, matrix: QuantizedMatrix) -> Product | None:
        scales = row_scales(matrix.tensors["scale"], matrix.tensors["rows"])
        shape = entry_of(matrix.spec).shape
        if scales.device.type not in ops.fused_devices():
            return None
        if scales.device.type == "cuda" and shape.limit >= MOST_LEVELS:
            return None  # the kernels have no such shapes
        return PackedProduct(matrix, planes_of(matrix), scales, shape)

    def containers(self, spec: CodecSpec) -> tuple[str, ...]:
        shape = entry_of(spec).shape
        return exact_containers(spec.dim, shape.levels[-1] + shape.shift)


def planes_of(matrix: QuantizedMatrix) -> list[Tensor]:
    """The planes of a payload, signs first."""
    return [tensor for name, tensor in matrix.tensors.items() if name not in ("scale", "rows")]


def entry_of(spec: CodecSpec) -> Entry:
    """What `spec` means by its table. Raises `ArtifactError` for a table or width that this version does not have."""
    options = spec.options
    if spec.codec != HalfPyramidConfig.name or set(options) != {"coset", "levels", "table"}:
        raise ArtifactError(f"Not the description of a half-integer pyramid: {spec.to_dict()}.")
    key = (options["table"], spec.dim, options["coset"], options["levels"])
    for known, table in shipped_tables().items():
        if known == key and spec.width in table:
            return table[spec.width]
    raise ArtifactError(
        f"There is no half-integer pyramid of {spec.width} bits per {spec.dim} weights like {dict(options)}.",
        remedy="The artifact was written by a newer version of compress, or is damaged.",
    )
