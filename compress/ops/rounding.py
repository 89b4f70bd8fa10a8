"""Rounding the columns of a span one block after the other, compiled.

For each block b of D columns, from the last to the first,

    t = base_b + carried_b inverse_b,    v = a code near t in metric_b,    carried += (base_b - v) coupling_b

which is what `compress.codecs.group_rounding` does with one call of the encoder at a time; here rows go through all
blocks by themselves, spread over threads. Sums within a block run in another order than torch's, so that a code may
differ where two are as near as float32 tells.
"""

from __future__ import annotations

from functools import lru_cache

from torch import Tensor

from compress.ops.native import NativeLibrary, find_library
from compress.ops.span import Codes, Pyramid, Span


@lru_cache(maxsize=1)
def _library() -> NativeLibrary | None:
    path = find_library()
    return None if path is None else NativeLibrary(path)


def can_round_spans(tensor: Tensor) -> bool:
    """Whether there are compiled loops for matrices on the device of `tensor`."""
    return tensor.device.type == "cpu" and _library() is not None


def round_span(span: Span, pyramid: Pyramid, codes: Codes, steps: int, overstep: float) -> Tensor:
    """What the codes decode to, float32 [o, s]; `codes` are written. The nearest code of the target is improved in the
    metric by `steps` steps of v <- encode(v + overstep (t - v) M)."""
    library = _library()
    assert library is not None
    return library.round_span(span, pyramid, codes, steps, overstep)
