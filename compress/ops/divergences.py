"""Divergences of rows of logits by the compiled library: a few nanoseconds a logit, where torch takes dozens of passes.

The definitions are those of `compress.losses.divergence`, which is also what runs where there is no library.
"""

from __future__ import annotations

from functools import cache

from torch import Tensor

from compress.errors import CompressError
from compress.ops.native import DIVERGENCES, NativeLibrary, find_library


@cache
def _library() -> NativeLibrary | None:
    path = find_library()
    return None if path is None else NativeLibrary(path)


def native_divergences() -> frozenset[str]:
    """The kinds that `divergence_rows` knows here; empty without the compiled library."""
    return frozenset() if _library() is None else frozenset(DIVERGENCES)


def divergence_rows(
    student: Tensor,
    teacher: Tensor,
    kind: str,
    options: tuple[float, ...] = (),
    *,
    temperature: float = 1.0,
    scale: float = 1.0,
    gradient: Tensor | None = None,
) -> Tensor:
    """scale D(p, q) of each row, float32 [n], with p = softmax(teacher / T), q = softmax(student / T).

    student, teacher: float32 [n, V], contiguous, on the CPU. `gradient`, a tensor like them, is filled with the
    gradients of the values with respect to the student's logits; it may be `student` itself, which is then overwritten.

        kind                options  D
        kl                           sum p log(p / q)
        reverse_kl                   sum q log(q / p)
        symmetric_kl        w        w KL(p || q) + (1 - w) KL(q || p)
        skew_kl             w        KL(p || w p + (1 - w) q)
        reverse_skew_kl     w        KL(q || w q + (1 - w) p)
        jensen_shannon      w        w KL(p || m) + (1 - w) KL(q || m), m = w p + (1 - w) q
        total_variation              sum |p - q| / 2

    0 < w < 1. Values are right to 1e-6 of themselves, total variation to 1e-7; gradients to 2e-6 of the largest in
    their row. 1 / T is rounded to float32. A logit of -inf leaves a class out. Where the value is infinite, a gradient
    that is so too is given as 0. A row with a logit that is not a number, or is +inf, has the value nan.

    A value does not depend on the number of threads (`torch.get_num_threads()`), nor on the other rows; its last digits
    depend on the processor. Besides the results, a thread needs memory for two rows. Raises `CompressError` for other
    kinds, options, shapes and types, and where there is no compiled library.
    """
    library = _library()
    if library is None:
        raise CompressError("The compiled library is missing.", remedy="Install compress where there is a compiler.")
    return library.divergence_rows(
        student, teacher, kind, options, temperature=temperature, scale=scale, gradient=gradient
    )
