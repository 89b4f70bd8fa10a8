"""Operations with more than one backend, declared to torch in the namespace `compress`.

Each is defined in plain torch: the encoder of all pyramids in `search`, integer pyramids in `reference`, half-integer
pyramids in `half_pyramid.reference`, the transform in `hadamard`. `backend()` says what runs on the CPU.
"""

from compress.ops import reference
from compress.ops.divergences import divergence_rows, native_divergences
from compress.ops.hadamard import hadamard
from compress.ops.half_pyramid.library import (
    fused_devices,
    half_pyramid_decode,
    half_pyramid_encode,
    half_pyramid_linear,
    half_pyramid_pack,
    half_pyramid_prepare,
    half_pyramid_prepared_linear,
    half_pyramid_unpack,
)
from compress.ops.library import (
    backend,
    pack_bits,
    pyramid_encode,
    pyramid_rank,
    pyramid_unrank,
    unpack_bits,
)
from compress.ops.tables import codebook_size

__all__ = [
    "backend",
    "codebook_size",
    "divergence_rows",
    "fused_devices",
    "hadamard",
    "half_pyramid_decode",
    "half_pyramid_encode",
    "half_pyramid_linear",
    "half_pyramid_pack",
    "half_pyramid_prepare",
    "half_pyramid_prepared_linear",
    "half_pyramid_unpack",
    "native_divergences",
    "pack_bits",
    "pyramid_encode",
    "pyramid_rank",
    "pyramid_unrank",
    "reference",
    "unpack_bits",
]
