"""The compiled CPU backend: a plain C library called through ctypes.

A C interface rather than a Python extension: one build serves every Python version, needs no Python headers, and
compiles in seconds. Its source is `cuda/*.cpp`. Without the library everything
works, slower, on the torch reference; a library of another version is an error rather than a silent fallback.
"""

from __future__ import annotations

import ctypes
import importlib.util
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from compress.errors import CodecError, CompressError
from compress.ops.bits import packed_bytes
from compress.ops.fischer import outside
from compress.ops.search import level_sums
from compress.ops.span import Codes, Pyramid, Span
from compress.ops.tables import codebook_size, index_words, word_table
from compress.ops.words import word_count, words_shape

INTERFACE = 6
"""Version of the C interface; `compress_interface()` of the library must return it."""

POINTER, INT64, INT, DOUBLE = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_double
SIGNATURES: dict[str, list[type]] = {
    "compress_encode": [
        *(POINTER, POINTER, POINTER, POINTER, INT64, *(INT for _ in range(7)), POINTER, POINTER, POINTER, INT, INT)
    ],
    "compress_round_span": [
        *(*(POINTER for _ in range(7)), INT64, INT64, INT64, POINTER, POINTER, *(INT for _ in range(7)), DOUBLE),
        *(INT, INT, *(POINTER for _ in range(5)), INT, INT),
    ],
    "compress_pyramid_rank": [POINTER, POINTER, INT, INT64, INT, INT, INT, POINTER, INT],
    "compress_pyramid_unrank": [POINTER, POINTER, INT, INT64, INT, INT, INT, POINTER, INT],
    "compress_pack_bits": [POINTER, INT64, INT, POINTER, INT],
    "compress_unpack_bits": [POINTER, INT64, INT, POINTER, INT],
    "compress_divergence_rows": [
        *(POINTER, POINTER, INT64, INT64, INT, DOUBLE, DOUBLE, DOUBLE, POINTER, POINTER, INT, INT)
    ],
}

DIVERGENCES = {
    "kl": 0,
    "reverse_kl": 0,
    "symmetric_kl": 1,
    "skew_kl": 1,
    "reverse_skew_kl": 1,
    "jensen_shannon": 1,
    "total_variation": 0,
}
"""The divergences of `divergence_rows` and how many options each takes; in the order of cuda/divergence_rows.h."""

INSTRUCTIONS = ("base", "avx2", "avx512")
"""The instruction sets that a library can hold loops for; base is what every processor of the platform has."""


def find_library() -> Path | None:
    """Where the compiled library lies, or None: the import system knows for checkouts and all kinds of installation."""
    spec = importlib.util.find_spec("compress._native")
    return Path(spec.origin) if spec is not None and spec.origin else None


class NativeLibrary:
    """The kernels of one loaded library, as functions of tensors with the contracts of `compress.ops.reference`.

    Tensors are on the CPU. Work is spread over `torch.get_num_threads()` threads.
    """

    def __init__(self, path: Path) -> None:
        library = ctypes.CDLL(str(path))
        version = int(library.compress_interface())
        if version != INTERFACE:
            raise CompressError(
                f"{path} has interface {version}, this version of compress needs {INTERFACE}.",
                remedy="Install compress again, or delete the file to run without it.",
            )
        self.functions = {name: library[name] for name in SIGNATURES}
        for name, function in self.functions.items():
            function.argtypes, function.restype = SIGNATURES[name], INT64
        best = library.compress_instructions
        best.restype = INT
        self.instructions = INSTRUCTIONS[: best() + 1]
        """The instruction sets that can be used here, the last of them unless another one is asked for."""

    def _call(self, name: str, *arguments: Tensor | float | None) -> int:
        values = [value.data_ptr() if isinstance(value, Tensor) else value for value in arguments]
        return int(self.functions[name](*values, torch.get_num_threads()))

    def _chosen(self, instructions: str | None) -> str:
        """The instruction set to use: the one that is asked for, else the best."""
        chosen = instructions or self.instructions[-1]
        if chosen not in self.instructions:
            raise CompressError(f"No loops for '{chosen}' here.", remedy=f"Use one of {', '.join(self.instructions)}.")
        return chosen

    def encode(
        self,
        x: Tensor,
        scale: Tensor,
        gains: Tensor,
        levels: Sequence[int],
        shift: int,
        pulses: int,
        instructions: str | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `compress.ops.search.encode`. `instructions` asks for a set of `self.instructions`."""
        x, scale, gains = x.contiguous(), scale.contiguous(), gains.contiguous()
        groups, dim = x.shape
        table = torch.tensor(levels, dtype=torch.int8)
        values = torch.empty((groups, dim), dtype=torch.int8)
        gain, coset = torch.empty(groups, dtype=torch.int64), torch.empty(groups, dtype=torch.int64)
        sizes = (groups, dim, gains.numel(), table.numel(), shift, pulses, *level_sums(dim, levels, pulses))
        level = INSTRUCTIONS.index(self._chosen(instructions))
        self._call("compress_encode", x, scale, gains, table, *sizes, values, gain, coset, level)
        return values, gain, coset

    def round_span(
        self, span: Span, pyramid: Pyramid, codes: Codes, steps: int, overstep: float, instructions: str | None = None
    ) -> Tensor:
        """See `compress.ops.rounding.round_span`."""
        rows, columns = span.base.shape
        table = torch.tensor(pyramid.levels, dtype=torch.int8)
        gains = pyramid.gains.contiguous()
        bounds = level_sums(pyramid.dim, pyramid.levels, pyramid.pulses)
        numbers = (pyramid.dim, gains.numel(), table.numel(), pyramid.shift, pyramid.pulses, *bounds)
        parts = (span.base, span.carried, span.scale, span.inverses, span.metrics, span.coupling)
        inputs: list[Tensor | float | None] = [part.contiguous() for part in parts]
        decoded = torch.empty((rows, columns), dtype=torch.float32)
        level = INSTRUCTIONS.index(self._chosen(instructions))
        inputs += [span.places, rows, columns, codes.gain.shape[1], gains, table, *numbers, overstep, steps]
        written = (codes.values, codes.gain, codes.coset, codes.gains, decoded)
        self._call("compress_round_span", *inputs, int(span.keep), *written, level)
        return decoded

    def pyramid_encode(
        self, x: Tensor, scale: Tensor, levels: Tensor, pulses: int, limit: int
    ) -> tuple[Tensor, Tensor]:
        y, gain, _ = self.encode(x, scale, levels, range(limit + 1), 0, pulses)
        return y, gain

    def pyramid_rank(self, y: Tensor, pulses: int, limit: int) -> Tensor:
        groups, dim = y.shape
        y = y.contiguous()
        table, words = word_table(dim, pulses, limit), index_words(dim, pulses, limit)
        index = torch.empty(words_shape(groups, words), dtype=torch.int64)
        if self._call("compress_pyramid_rank", y, table, words, groups, dim, pulses, limit, index):
            raise CodecError(f"A vector to rank does not have {pulses} pulses, at most {limit} on one coordinate.")
        return index

    def pyramid_unrank(self, index: Tensor, dim: int, pulses: int, limit: int) -> Tensor:
        index = index.contiguous()
        groups = index.shape[0]
        y = torch.empty((groups, dim), dtype=torch.int8)
        table, words = word_table(dim, pulses, limit), index_words(dim, pulses, limit)
        if self._call("compress_pyramid_unrank", index, table, words, groups, dim, pulses, limit, y):
            raise outside(codebook_size(dim, pulses, limit))
        return y

    def pack_bits(self, values: Tensor, width: int) -> Tensor:
        values = values.contiguous()
        out = torch.empty(packed_bytes(values.shape[0], width), dtype=torch.uint8)
        self._call("compress_pack_bits", values, values.shape[0], width, out)
        return out

    def unpack_bits(self, packed: Tensor, width: int, count: int) -> Tensor:
        packed = packed.contiguous()
        out = torch.empty(words_shape(count, word_count(width)), dtype=torch.int64)
        self._call("compress_unpack_bits", packed, count, width, out)
        return out

    def divergence_rows(
        self,
        student: Tensor,
        teacher: Tensor,
        kind: str,
        options: tuple[float, ...] = (),
        *,
        temperature: float = 1.0,
        scale: float = 1.0,
        gradient: Tensor | None = None,
        instructions: str | None = None,
    ) -> Tensor:
        """See `compress.ops.divergence_rows`. `instructions` asks for a set of `self.instructions`."""
        _check_divergence(kind, options, temperature)
        _check_rows(student, teacher, gradient)
        level = INSTRUCTIONS.index(self._chosen(instructions))
        values = torch.empty(len(student), dtype=torch.float32)
        number, option = list(DIVERGENCES).index(kind), options[0] if options else 0.0
        sizes = student.shape
        if self._call(
            "compress_divergence_rows",
            *(student, teacher, *sizes, number, option, temperature, scale, values, gradient, level),
        ):
            raise CompressError(
                f"Not enough memory for two rows of {sizes[1]} floats a thread.", remedy="Use fewer threads."
            )
        return values


def _check_divergence(kind: str, options: tuple[float, ...], temperature: float) -> None:
    if kind not in DIVERGENCES:
        raise CompressError(f"There are no loops for '{kind}'.", remedy=f"Use one of {', '.join(DIVERGENCES)}.")
    if len(options) != DIVERGENCES[kind] or not all(0 < option < 1 for option in options):
        wanted = "one option between 0 and 1" if DIVERGENCES[kind] else "no options"
        raise CompressError(f"The divergence '{kind}' takes {wanted}, not {options}.")
    if not 0 < temperature < math.inf:
        raise CompressError(f"temperature is {temperature}.", remedy="Give a positive number.")


def _check_rows(student: Tensor, teacher: Tensor, gradient: Tensor | None) -> None:
    for name, tensor in (("student", student), ("teacher", teacher), ("gradient", gradient)):
        if tensor is None:
            continue
        if tensor.ndim != 2 or tensor.shape != student.shape or tensor.shape[1] == 0:
            shapes = f"{name} is {list(tensor.shape)}, student {list(student.shape)}"
            raise CompressError(f"{shapes}; both must be [n, V] with at least one class.")
        if tensor.dtype != torch.float32 or tensor.device.type != "cpu" or not tensor.is_contiguous():
            raise CompressError(
                f"{name} is {tensor.dtype} on {tensor.device} with strides {tensor.stride()}.",
                remedy="Give contiguous float32 tensors on the CPU.",
            )
