"""The pyramid codec: a row scale of 8 bits, and one radix code per group of D weights.

    w[g D + i] ~ c_g y_i,   c_g = fl32(r levels[j]),   code = index(y) L + j   in exactly `width` bits

y is the nearest vector with sum |y_i| = K and |y_i| <= m, found jointly with the gain j (`compress.ops`); r is the
row's scale (`rows.py`), and K, m and the L levels come from a table for each width (`table.py`). The payload, byte by
byte, is described in docs/formats.md. Pyramid vector quantization: Fischer 1986; for language models: van der Ouderaa
et al. 2024 (arXiv 2410.16926). Unlike there, the encoder is exact, the gains are Lloyd-Max levels of the joint encoder
rather than quantiles of the norm, and any number of them shares the code with the shape instead of a power of two.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from compress import ops
from compress.codecs.base import Codec, CodecSpec, FieldLayout, GainRule, QuantizedMatrix, Rounding, exact_containers
from compress.codecs.finite import finite_matrix
from compress.codecs.group_rounding import GroupCodec, GroupRounding
from compress.codecs.pyramid.table import VERSION, Shape, shipped_tables
from compress.codecs.registry import register_codec
from compress.codecs.row_search import Groups, encode_matrix
from compress.codecs.rows import row_scales
from compress.codecs.worthwhile import worthwhile
from compress.errors import ArtifactError, UsageError
from compress.ops.bits import packed_bytes
from compress.ops.span import Pyramid


@dataclass(frozen=True)
class PyramidConfig:
    """dim: weights in a group. max: bound on |y_i|; 7 fits 4-bit containers, 127 bounds nothing."""

    name: ClassVar[str] = "pyramid"
    dim: int = 16
    max: int = 127

    def __post_init__(self) -> None:
        choices = sorted((dim, limit) for version, dim, limit in shipped_tables() if version == VERSION)
        if (self.dim, self.max) not in choices:
            known = ", ".join(f"dim={dim} max={limit}" for dim, limit in choices)
            raise UsageError(
                f"There is no table of gain levels for dim={self.dim} max={self.max}.",
                remedy=f"There are: {known}; benchmarks/train_pyramid_levels.py makes others.",
            )


@register_codec
class PyramidCodec(Codec):
    """See the module's text; the methods are those of `compress.codecs.base.Codec`."""

    rows_apart = 8
    config_type: ClassVar[type[Any]] = PyramidConfig

    def __init__(self, config: PyramidConfig) -> None:
        self.config = config

    @classmethod
    def from_spec(cls, spec: CodecSpec) -> Self:
        shape_of(spec)
        return cls(PyramidConfig(dim=spec.dim, max=int(spec.options["max"])))

    @property
    def dim(self) -> int:
        return self.config.dim

    def widths(self, lowest: float = 0.0, highest: float = float("inf")) -> tuple[int, ...]:
        offered = worthwhile(shipped_tables()[VERSION, self.config.dim, self.config.max])
        return tuple(width for width in offered if lowest <= width / self.config.dim <= highest)

    def spec(self, width: int) -> CodecSpec:
        widths = self.widths()
        if width not in widths:
            raise UsageError(
                f"The pyramid of dim={self.config.dim} max={self.config.max} has no code of {width} bits.",
                remedy=f"Its widths are {widths[0]} to {widths[-1]} bits per {self.config.dim} weights.",
            )
        return CodecSpec("pyramid", width, self.config.dim, {"max": self.config.max, "table": VERSION})

    def layout(self, spec: CodecSpec, shape: tuple[int, int]) -> tuple[FieldLayout, ...]:
        rows, columns = shape
        codes = rows * -(-columns // spec.dim)
        return (
            FieldLayout("scale", torch.float32, (1,)),
            FieldLayout("rows", torch.uint8, (rows,)),
            FieldLayout("codes", torch.uint8, (packed_bytes(codes, spec.width),)),
        )

    def quantize(self, weight: Tensor, spec: CodecSpec) -> QuantizedMatrix:
        weight = finite_matrix(weight)
        codec = _groups((weight.shape[0], weight.shape[1]), spec, weight.device)
        return codec.pack(*encode_matrix(weight, spec.dim, codec.encode))

    def rounding(
        self,
        shape: tuple[int, int],
        spec: CodecSpec,
        device: torch.device,
        gain: GainRule = "projection",
        search: bool = True,
    ) -> Rounding:
        return GroupRounding(shape, _groups(shape, spec, device), gain, search)

    def integers(self, matrix: QuantizedMatrix) -> tuple[Tensor, Tensor]:
        spec, shape = matrix.spec, shape_of(matrix.spec)
        rows, columns = matrix.shape
        groups = -(-columns // spec.dim)
        codes = ops.unpack_bits(matrix.tensors["codes"], spec.width, rows * groups)
        index, gain = split_codes(codes, len(shape.levels))
        y = ops.pyramid_unrank(index, shape.dim, shape.pulses, shape.limit)
        scales = row_scales(matrix.tensors["scale"], matrix.tensors["rows"])
        levels = shape.level_tensor().to(codes.device)
        return y.view(rows, groups * spec.dim), scales.unsqueeze(-1) * levels[gain].view(rows, groups)

    def containers(self, spec: CodecSpec) -> tuple[str, ...]:
        return exact_containers(spec.dim, shape_of(spec).limit)


def _groups(size: tuple[int, int], spec: CodecSpec, device: torch.device) -> GroupCodec:
    shape = shape_of(spec)
    levels = shape.level_tensor().to(device)

    def encode(x: Tensor, scale: Tensor) -> Groups:
        y, gain = ops.pyramid_encode(x, scale, levels, shape.pulses, shape.limit)
        return Groups(y, levels[gain], (gain,))

    def pack(scale: Tensor, rows: Tensor, groups: Groups) -> QuantizedMatrix:
        index = ops.pyramid_rank(groups.values, shape.pulses, shape.limit)
        codes = ops.pack_bits(index * len(shape.levels) + groups.fields[0], spec.width)
        return QuantizedMatrix(spec, size, {"scale": scale, "rows": rows, "codes": codes})

    return GroupCodec(Pyramid(shape.dim, shape.pulses, tuple(range(shape.limit + 1)), 0, levels), encode, pack)


def shape_of(spec: CodecSpec) -> Shape:
    """What `spec` means by its table. Raises `ArtifactError` for a table or width that this version does not have."""
    if spec.codec != PyramidConfig.name or set(spec.options) != {"max", "table"}:
        raise ArtifactError(f"Not the description of a pyramid: {spec.to_dict()}.")
    key = (spec.options["table"], spec.dim, spec.options["max"])
    for known, table in shipped_tables().items():
        if known == key and spec.width in table:
            return table[spec.width]
    raise ArtifactError(
        f"There is no pyramid of {spec.width} bits per {spec.dim} weights, max {key[2]}, in table {key[0]}.",
        remedy="The artifact was written by a newer version of compress, or is damaged.",
    )


def split_codes(codes: Tensor, gains: int) -> tuple[Tensor, Tensor]:
    """Index and gain int64 of codes = index L + gain, int64 [G] read as unsigned 64-bit patterns.

    int64 division is signed, so the pattern is divided by hand in two digits of base 2^32.
    """
    low_half = (1 << 32) - 1
    high, low = (codes >> 32) & low_half, codes & low_half
    low = ((high % gains) << 32) | low
    return ((high // gains) << 32) + low // gains, low % gains
