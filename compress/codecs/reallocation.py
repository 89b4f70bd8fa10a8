"""Codes that are near in another metric than the one an encoder knows.

An encoder finds the code v of least ||t - v||^2. Calibrated rounding asks for the least (t - v) M (t - v)^T, M positive
definite: moving a pulse from one weight of a group to another may cost more squares and less output. With 1
the largest eigenvalue of M, a step of gradient descent and the encoder take turns,

    v <- encode(v + omega (t - v) M),

and a row takes the new code where it is better in M. For omega <= 1 the step minimizes a bound of the objective that
touches it at v, so it cannot rise; omega = 2 sees further over the gaps between codes and finds better ones (measured
on layers of a language model: 1.1 % less of the objective with groups of 8, 1.7 % with 16; with omega = 1 0.2 %).
Every move of pulses, sign, gain and coset is open to it, as all are to the encoder.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from compress.codecs.row_search import Groups

OVERSTEP = 2.0
STEPS = 3

GroupEncoder = Callable[[Tensor], Groups]
"""Targets float32 [o, D] to `Groups` of [o]."""
GroupDecoder = Callable[[Groups], Tensor]
"""Groups of [o] to what they decode to, float32 [o, D]."""


def reallocate(found: Groups, target: Tensor, metric: Tensor, encode: GroupEncoder, decode: GroupDecoder) -> Tensor:
    """Improve `found`, in place, towards `target` float32 [o, D] in `metric` float32 [D, D]; returns what it decodes
    to, float32 [o, D]."""
    value = decode(found)
    left = (target - value) @ metric
    cost = (left * (target - value)).sum(1)
    for _ in range(STEPS):
        trial = encode(value + OVERSTEP * left)
        other = decode(trial)
        gradient = (target - other) @ metric
        price = (gradient * (target - other)).sum(1)
        rows = (price < cost).nonzero().squeeze(-1)
        if not rows.numel():
            break
        found.put(rows, trial, rows)
        value[rows], left[rows], cost[rows] = other[rows], gradient[rows], price[rows]
    return value
