"""From rows and their scales to codes, with a short search for the scale that serves each row best."""

from __future__ import annotations

import torch
from torch import Tensor

from compress import ops
from compress.codecs.pyramid.rows import TOP, row_scales
from compress.codecs.pyramid.table import Shape


def encode_rows(weight: Tensor, matrix_scale: Tensor, rows: Tensor, shape: Shape) -> tuple[Tensor, Tensor]:
    """Codes of W float32 [o, n]: row codes int64 [o] and group codes int64 [o ceil(n / D)].

    Starts from the row codes `rows` and walks to smaller scales, or else to larger ones, as long as the row's squared
    error falls (one step is 4.4 %). It wins 1 % of the error in Gaussian rows of 1024 and 2 % in rows of 256, and more
    in a row with outliers, whose RMS says little about most of its weights. A row that even its best scale serves
    worse than zeros do becomes zeros.
    """
    search = _Search(weight, matrix_scale, rows, shape)
    search.walk(-1, search.rows > 0)
    search.walk(+1, search.rows == rows)
    search.clear(search.error > search.energy)
    index = ops.pyramid_rank(search.y.view(-1, shape.dim), shape.pulses, shape.limit)
    return search.rows, index * search.levels.numel() + search.gain.flatten()


class _Search:
    """The rows of one chunk, cut into groups, with the best encoding found so far.

    rows int64 [o], y int8 [o, groups, D], gain int64 [o, groups], error float64 [o].
    """

    def __init__(self, weight: Tensor, matrix_scale: Tensor, rows: Tensor, shape: Shape) -> None:
        self.groups = fill_groups(weight, shape.dim)
        self.columns = weight.shape[1]
        self.energy = weight.double().square_().sum(1)
        self.matrix_scale = matrix_scale
        self.shape = shape
        self.levels = shape.level_tensor().to(weight.device)
        self.rows = rows.clone()
        self.y, self.gain, self.error = self._encode(self.groups, rows)

    def walk(self, step: int, chosen: Tensor) -> None:
        """Moves the rows of the mask `chosen` by `step` while that lowers their errors. Rows of code 0 stay."""
        active = (chosen & (self.rows > 0)).nonzero().squeeze(-1)
        while True:
            trial = self.rows[active] + step
            possible = (trial >= 1) & (trial <= TOP)
            active, trial = active[possible], trial[possible]
            if not active.numel():
                return
            y, gain, error = self._encode(self.groups[active], trial)
            better = error < self.error[active]
            active = active[better]
            self.rows[active], self.error[active] = trial[better], error[better]
            self.y[active], self.gain[active] = y[better], gain[better]

    def clear(self, chosen: Tensor) -> None:
        """Makes zeros of the rows of the mask `chosen`."""
        active = chosen.nonzero().squeeze(-1)
        self.rows[active] = 0
        self.y[active], self.gain[active], self.error[active] = self._encode(self.groups[active], self.rows[active])

    def _encode(self, x: Tensor, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """y [a, groups, D], gain [a, groups] and squared error float64 [a] of x [a, groups, D] under row codes [a]."""
        count, groups, dim = x.shape
        scales = row_scales(self.matrix_scale, rows)
        y, gain = ops.pyramid_encode(
            x.reshape(count * groups, dim),
            scales.repeat_interleave(groups),
            self.levels,
            self.shape.pulses,
            self.shape.limit,
        )
        y, gain = y.view(count, groups, dim), gain.view(count, groups)
        container = scales.unsqueeze(-1) * self.levels[gain]
        error = (y * container.unsqueeze(-1)).sub_(x).view(count, groups * dim)[:, : self.columns]
        return y, gain, error.double().square_().sum(1)


def fill_groups(weight: Tensor, dim: int) -> Tensor:
    """W [o, n] as groups [o, ceil(n / dim), dim]. The last group of a row is filled up with its mean magnitude.

    What a reader finds in the filled columns is dropped, so any value would do; zeros would make the pyramid spend
    error on carrying its pulses there.
    """
    rows, columns = weight.shape
    groups = -(-columns // dim)
    missing = groups * dim - columns
    if missing:
        tail = weight[:, columns - (dim - missing) :].abs().mean(1, keepdim=True)
        weight = torch.cat([weight, tail.expand(rows, missing)], 1)
    return weight.reshape(rows, groups, dim)
