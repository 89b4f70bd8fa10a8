"""Pyramid vector quantization as shape and gain: a norm for each row, a direction and a gain for each group.

    w[g D + i] ~ c y_i,    c = fl32(s / fl32(||y||)),    s = fl32(norm levels[j])

y is an integer vector with sum |y_i| = K (and |y_i| <= 127), stored as its index in `ceil(log2 N)` bits; the gain j has
b bits. This is the scheme of van der Ouderaa et al. 2024 (arXiv 2410.16926) as far as its public descriptions fix it,
with `gain=beta encoder=round gain_bits=4`; by default both halves are replaced by better ones. What is reconstructed,
and the payload, is described in docs/codecs.md.

The gain quantizes the norm of the group for "beta", as published, and for "lloyd" the projection p = <x, y> / ||y||,
which is the best gain of the direction found. A projection is shorter than the norm by the cosine of the angle, which
hardly depends on the length; so the Lloyd-Max levels of the norm are multiplied by c = sum p s / sum s^2 of the matrix.
The levels are stored with it: a reader needs no Beta law.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from compress import ops
from compress.codecs.base import Codec, CodecSpec, FieldLayout, Option, QuantizedMatrix, exact_containers
from compress.codecs.finite import finite_matrix
from compress.codecs.pvq.config import PvqConfig, limit_of, widths_of
from compress.codecs.pvq.direction import best_direction, products, round_and_fix
from compress.codecs.pvq.gains import beta_gains, lloyd_gains
from compress.codecs.pvq.norms import decode_norms, encode_norms
from compress.codecs.registry import register_codec
from compress.codecs.row_search import fill_groups
from compress.codecs.rows import row_rms
from compress.errors import ArtifactError, CodecError, UsageError
from compress.ops.bits import packed_bytes

CHUNK_WEIGHTS = 2**20
"""Weights handled at once, whole rows at a time."""


@register_codec
class PvqCodec(Codec):
    """See the module's text; the methods are those of `compress.codecs.base.Codec`."""

    config_type: ClassVar[type[Any]] = PvqConfig

    def __init__(self, config: PvqConfig) -> None:
        self.config = config

    @classmethod
    def from_spec(cls, spec: CodecSpec) -> Self:
        return cls(config_of(spec))

    @property
    def dim(self) -> int:
        return self.config.dim

    def widths(self, lowest: float = 0.0, highest: float = float("inf")) -> tuple[int, ...]:
        return tuple(width for width in widths_of(self.config) if lowest <= width / self.dim <= highest)

    def spec(self, width: int) -> CodecSpec:
        config, known = self.config, widths_of(self.config)
        if width not in known:
            near = sorted(known, key=lambda other: abs(other - width))[:2]
            raise UsageError(
                f"Pyramids of {config.dim} weights with {config.gain_bits} bits of gain have no code of {width} bits.",
                remedy=f"Near it are {' and '.join(map(str, sorted(near)))}." if near else "They have none at all.",
            )
        options: dict[str, Option] = {
            "pulses": known[width],
            "gain": config.gain,
            "gain_bits": config.gain_bits,
            "encoder": config.encoder,
        }
        return CodecSpec("pvq", width, config.dim, options)

    def layout(self, spec: CodecSpec, shape: tuple[int, int]) -> tuple[FieldLayout, ...]:
        rows, columns = shape
        bits = config_of(spec).gain_bits
        groups = rows * -(-columns // spec.dim)
        return (
            FieldLayout("scale", torch.float32, (1,)),
            FieldLayout("levels", torch.float32, (1 << bits,)),
            FieldLayout("rows", torch.float16, (rows,)),
            FieldLayout("gains", torch.uint8, (packed_bytes(groups, bits),)),
            FieldLayout("index", torch.uint8, (packed_bytes(groups, spec.width - bits),)),
        )

    def quantize(self, weight: Tensor, spec: CodecSpec) -> QuantizedMatrix:
        config, weight = config_of(spec), finite_matrix(weight)
        rows, columns = weight.shape
        filled = -(-columns // spec.dim) * spec.dim
        scale, halves = encode_norms(row_rms(weight) * math.sqrt(filled))
        index, lengths, shrinkage = _directions(weight, decode_norms(scale, halves), config)
        levels, ends = (beta_gains if config.gain == "beta" else lloyd_gains)(spec.dim, filled, config.gain_bits)
        gains = torch.bucketize(lengths, torch.from_numpy(ends * shrinkage).to(lengths), right=True)
        tensors = {
            "scale": scale,
            "levels": torch.from_numpy(levels * shrinkage).to(lengths),
            "rows": halves,
            "gains": _pack(gains, config.gain_bits),
            "index": _pack(index, spec.width - config.gain_bits),
        }
        return QuantizedMatrix(spec, (rows, columns), tensors)

    def integers(self, matrix: QuantizedMatrix) -> tuple[Tensor, Tensor]:
        spec, config = matrix.spec, config_of(matrix.spec)
        rows, columns = matrix.shape
        groups = -(-columns // spec.dim)
        stored = matrix.tensors
        gains = _unpack(stored["gains"], config.gain_bits, rows * groups)
        index = _unpack(stored["index"], spec.width - config.gain_bits, rows * groups)
        y = ops.pyramid_unrank(index, spec.dim, config.pulses, limit_of(config.pulses))
        norms = decode_norms(stored["scale"], stored["rows"]).unsqueeze(-1)
        lengths = norms * stored["levels"][gains].view(rows, groups)
        parts = [_root(products(part.to(torch.float32), part)[1]) for part in y.split(CHUNK_WEIGHTS // spec.dim)]
        return y.view(rows, groups * spec.dim), lengths / torch.cat(parts).view(rows, groups)

    def containers(self, spec: CodecSpec) -> tuple[str, ...]:
        return exact_containers(spec.dim, limit_of(config_of(spec).pulses))


def config_of(spec: CodecSpec) -> PvqConfig:
    """The options that wrote `spec`, with the pulses as a number. Raises `ArtifactError` for a spec that none wrote."""
    try:
        options: dict[str, Any] = dict(spec.options)
        config = PvqConfig(dim=spec.dim, **options)
        right = spec.codec == PvqConfig.name and len(options) == 4 and spec.width in widths_of(config)
    except (TypeError, UsageError, CodecError) as error:
        raise ArtifactError(f"Not the description of a pvq: {spec.to_dict()}. {error}") from error
    if not right or not config.pulses:
        raise ArtifactError(
            f"Not the description of a pvq: {spec.to_dict()}.",
            remedy="The artifact was written by a newer version of compress, or is damaged.",
        )
    return config


def _directions(weight: Tensor, norms: Tensor, config: PvqConfig) -> tuple[Tensor, Tensor, float]:
    """Indices of the directions [G] or [G, W], the lengths to quantize float32 [G] and what shrinks their law."""
    rows, columns = weight.shape
    step = max(1, CHUNK_WEIGHTS // max(columns, 1))
    search = best_direction if config.encoder == "exact" else round_and_fix
    indices, lengths, across, along = [], [], 0.0, 0.0
    for start in range(0, max(rows, 1), step):
        part = norms[start : start + step]
        groups = fill_groups(weight[start : start + step], config.dim)
        x = (groups / torch.where(part > 0, part, torch.inf).view(-1, 1, 1)).reshape(-1, config.dim)
        y = search(x, config.pulses, limit_of(config.pulses))
        indices.append(ops.pyramid_rank(y, config.pulses, limit_of(config.pulses)))
        n, d = products(x, y)
        norm, projection = _root(products(x, x)[1]), n / _root(d)
        across += float((projection.double() * norm).sum())
        along += float(norm.double().square().sum())
        lengths.append(norm if config.gain == "beta" else projection)
    shrinkage = across / along if config.gain == "lloyd" and along > 0 else 1.0
    return torch.cat(indices), torch.cat(lengths), shrinkage


def _root(squares: Tensor) -> Tensor:
    """fl32(sqrt(d)). By way of float64, as torch's float32 root is off by one place now and then on the CPU."""
    return squares.double().sqrt_().to(torch.float32)


def _pack(values: Tensor, width: int) -> Tensor:
    """`pack_bits`, with nothing for a width of 0."""
    return ops.pack_bits(values, width) if width else torch.empty(0, dtype=torch.uint8, device=values.device)


def _unpack(packed: Tensor, width: int, count: int) -> Tensor:
    return (
        ops.unpack_bits(packed, width, count) if width else torch.zeros(count, dtype=torch.int64, device=packed.device)
    )
