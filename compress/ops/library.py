"""The operations as torch sees them: one schema each, arguments checked once, a kernel per backend.

Every operation is declared in the namespace `compress` with the torch reference as its default kernel, so it runs on
any device. When the compiled library is there, it takes over the CPU under the same name. Fake kernels give shapes
and types alone, for export and compile. (`torch.library.custom_op` would say the same in fewer lines, but imports the
compiler on its first call: a second that a command-line tool notices.)
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from compress.errors import CodecError
from compress.ops import reference
from compress.ops.native import NativeLibrary, find_library
from compress.ops.tables import index_words
from compress.ops.words import MOST_WORDS, WORD, word_count, words_shape

LARGEST_PULSE = 127
LARGEST_DIM = 128
WIDEST = WORD * MOST_WORDS


class Backend(Protocol):
    """The kernels that a backend provides; arguments are valid when they get there."""

    def pyramid_encode(
        self, x: Tensor, scale: Tensor, levels: Tensor, pulses: int, limit: int
    ) -> tuple[Tensor, Tensor]: ...

    def pyramid_rank(self, y: Tensor, pulses: int, limit: int) -> Tensor: ...

    def pyramid_unrank(self, index: Tensor, dim: int, pulses: int, limit: int) -> Tensor: ...

    def pack_bits(self, values: Tensor, width: int) -> Tensor: ...

    def unpack_bits(self, packed: Tensor, width: int, count: int) -> Tensor: ...


def pyramid_encode(x: Tensor, scale: Tensor, levels: Tensor, pulses: int, limit: int) -> tuple[Tensor, Tensor]:
    """Exact joint choice of gain and shape: argmin over (j, y) of ||x - scale levels_j y||^2.

    x float32 [G, D] finite, scale float32 [G] >= 0, levels float32 [L] > 0 ascending; y in Z^D with sum |y_i| = pulses
    and |y_i| <= limit. Returns y int8 [G, D] and the level's index int64 [G]. A scale of 0 gives the codebook's first
    vector and level 0. Ties, and the arithmetic that makes backends agree: `compress.ops.reference`. Raises
    `CodecError` for shapes or types other than these, and when pulses > D limit.
    """
    y, gain = torch.ops.compress.pyramid_encode(x, scale, levels, pulses, limit)
    return y, gain


def pyramid_rank(y: Tensor, pulses: int, limit: int = -1) -> Tensor:
    """Index in [0, N) of each y int8 [G, D] among the vectors with `pulses` pulses, at most `limit` each.

    int64 [G], read as unsigned patterns, or with W = ceil(log2 N / 64) > 1 words [G, W], the least significant first.
    Vectors are in lexicographic order, the values of one coordinate in the order 0, +1, -1, +2, -2, ... (Fischer 1986).
    limit -1: no bound but 127. Raises `CodecError` for a y that is no such vector and when N > 2^1024.
    """
    index: Tensor = torch.ops.compress.pyramid_rank(y, pulses, limit)
    return index


def pyramid_unrank(index: Tensor, dim: int, pulses: int, limit: int = -1) -> Tensor:
    """The vector y int8 [G, dim] of each index [G] or [G, W]; inverse of `pyramid_rank`, same order, same errors."""
    y: Tensor = torch.ops.compress.pyramid_unrank(index, dim, pulses, limit)
    return y


def pack_bits(values: Tensor, width: int) -> Tensor:
    """Numbers of `width` bits to a little-endian bit stream uint8 [ceil(G width / 8)], zero padded.

    values: int64 [G], read as unsigned patterns; for a width above 64 words [G, ceil(width / 64)]. Bit b of number g is
    bit g width + b of the stream, which is bit n % 8 of byte n // 8. Bits above `width` are dropped. width is 1 to
    1024, `CodecError` otherwise.
    """
    packed: Tensor = torch.ops.compress.pack_bits(values, width)
    return packed


def unpack_bits(packed: Tensor, width: int, count: int) -> Tensor:
    """The first `count` numbers of a stream of `pack_bits`: [count] or [count, W]. `CodecError` for a short stream."""
    values: Tensor = torch.ops.compress.unpack_bits(packed, width, count)
    return values


def _check_pyramid(dim: int, pulses: int, limit: int) -> int:
    """The bound that holds: -1 stands for none. Raises `CodecError` for a pyramid that int8 vectors cannot hold."""
    bound = min(max(pulses, 1), LARGEST_PULSE) if limit == -1 else limit
    if not 1 <= dim <= LARGEST_DIM:
        raise CodecError(f"A group of {dim} coordinates; 1 to {LARGEST_DIM} are possible.")
    if not 1 <= bound <= LARGEST_PULSE:
        raise CodecError(f"A largest magnitude of {bound}; 1 to {LARGEST_PULSE} fit the int8 result.")
    if not 0 <= pulses <= dim * bound:
        raise CodecError(f"{dim} coordinates of at most {bound} cannot hold {pulses} pulses.")
    return bound


def _check_encode(x: Tensor, scale: Tensor, levels: Tensor, pulses: int, limit: int) -> None:
    if x.ndim != 2 or scale.shape != x.shape[:1] or levels.ndim != 1 or levels.numel() == 0:
        raise CodecError(
            f"pyramid_encode takes x [G, D], scale [G] and levels [L], "
            f"not {list(x.shape)}, {list(scale.shape)}, {list(levels.shape)}."
        )
    if not x.dtype == scale.dtype == levels.dtype == torch.float32:
        raise CodecError(f"pyramid_encode takes float32, not {x.dtype}, {scale.dtype}, {levels.dtype}.")
    if not bool((levels >= torch.finfo(torch.float32).tiny).all()) or bool((levels.diff() < 0).any()):
        raise CodecError(f"pyramid_encode takes positive, ascending levels, not {levels.tolist()}.")
    _check_pyramid(x.shape[1], pulses, limit)


def _check_tensor(name: str, tensor: Tensor, ndim: int, dtype: torch.dtype) -> None:
    if tensor.ndim != ndim or tensor.dtype != dtype:
        raise CodecError(f"{name} takes {dtype} of {ndim} dimensions, not {tensor.dtype} {list(tensor.shape)}.")


def _check_words(name: str, tensor: Tensor, words: int) -> None:
    """Raises `CodecError` unless `tensor` is int64 [G], or [G, W] for more than one word."""
    _check_tensor(name, tensor, 1 if words == 1 else 2, torch.int64)
    if words > 1 and tensor.shape[1] != words:
        raise CodecError(f"{name} takes numbers of {words} words here, not {list(tensor.shape)}.")


def _check_width(width: int) -> None:
    if not 1 <= width <= WIDEST:
        raise CodecError(f"A width of {width} bits; 1 to {WIDEST} are possible.")


def _declare() -> None:
    """The schemas, each with its fake kernel."""
    encode = "(Tensor x, Tensor scale, Tensor levels, int pulses, int limit) -> (Tensor, Tensor)"
    for name, schema, fake in (
        ("pyramid_encode", encode, _fake_encode),
        ("pyramid_rank", "(Tensor y, int pulses, int limit=-1) -> Tensor", _fake_rank),
        ("pyramid_unrank", "(Tensor index, int dim, int pulses, int limit=-1) -> Tensor", _fake_unrank),
        ("pack_bits", "(Tensor values, int width) -> Tensor", _fake_pack),
        ("unpack_bits", "(Tensor packed, int width, int count) -> Tensor", _fake_unpack),
    ):
        torch.library.define(f"compress::{name}", schema)
        torch.library.register_fake(f"compress::{name}", fake)


def _attach(key: str, kernels: Backend) -> None:
    """Registers the kernels of a backend, each behind the checks of its arguments, for the dispatch key `key`."""

    def encode(x: Tensor, scale: Tensor, levels: Tensor, pulses: int, limit: int) -> tuple[Tensor, Tensor]:
        _check_encode(x, scale, levels, pulses, limit)
        return kernels.pyramid_encode(x, scale, levels, pulses, limit)

    def rank(y: Tensor, pulses: int, limit: int = -1) -> Tensor:
        _check_tensor("pyramid_rank", y, 2, torch.int8)
        return kernels.pyramid_rank(y, pulses, _check_pyramid(y.shape[1], pulses, limit))

    def unrank(index: Tensor, dim: int, pulses: int, limit: int = -1) -> Tensor:
        bound = _check_pyramid(dim, pulses, limit)
        _check_words("pyramid_unrank", index, index_words(dim, pulses, bound))
        return kernels.pyramid_unrank(index, dim, pulses, bound)

    def pack(values: Tensor, width: int) -> Tensor:
        _check_width(width)
        _check_words("pack_bits", values, word_count(width))
        return kernels.pack_bits(values, width)

    def unpack(packed: Tensor, width: int, count: int) -> Tensor:
        _check_tensor("unpack_bits", packed, 1, torch.uint8)
        _check_width(width)
        needed = reference.packed_bytes(count, width)
        if packed.numel() < needed:
            raise CodecError(f"{count} codes of {width} bits need {needed} bytes; the stream has {packed.numel()}.")
        return kernels.unpack_bits(packed, width, count)

    for name, kernel in (
        ("pyramid_encode", encode),
        ("pyramid_rank", rank),
        ("pyramid_unrank", unrank),
        ("pack_bits", pack),
        ("unpack_bits", unpack),
    ):
        torch.library.impl(f"compress::{name}", key, kernel)


def _fake_encode(x: Tensor, scale: Tensor, levels: Tensor, pulses: int, limit: int) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=torch.int8), x.new_empty(x.shape[:1], dtype=torch.int64)


def _fake_rank(y: Tensor, pulses: int, limit: int = -1) -> Tensor:
    dim = int(y.shape[1])
    words = index_words(dim, pulses, _check_pyramid(dim, pulses, limit))
    return y.new_empty(words_shape(y.shape[0], words), dtype=torch.int64)


def _fake_unrank(index: Tensor, dim: int, pulses: int, limit: int = -1) -> Tensor:
    return index.new_empty((index.shape[0], dim), dtype=torch.int8)


def _fake_pack(values: Tensor, width: int) -> Tensor:
    return values.new_empty(reference.packed_bytes(values.shape[0], width), dtype=torch.uint8)


def _fake_unpack(packed: Tensor, width: int, count: int) -> Tensor:
    return packed.new_empty(words_shape(count, word_count(width)), dtype=torch.int64)


LIBRARY_PATH = find_library()
_declare()
_attach("default", reference)
if LIBRARY_PATH is not None:
    _attach("cpu", NativeLibrary(LIBRARY_PATH))


def backend() -> str:
    """What computes on the CPU: "native" (the compiled library) or "reference" (plain torch)."""
    return "reference" if LIBRARY_PATH is None else "native"
