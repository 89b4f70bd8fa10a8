"""The three tables of bitsandbytes: what a 4-bit code stands for, and what an 8-bit code of a scale stands for.

NF4 (Dettmers et al. 2023, "QLoRA", arXiv 2305.14314, section 3). With the quantile function Q of the normal
distribution and d = 0.9677083, halfway between 1 - 1/32 and 1 - 1/30,

    v = { -Q(d + (1/2 - d) i / 7) : i = 0 .. 6 }  with  0  and  { Q(d + (1/2 - d) i / 8) : i = 0 .. 7 },  over Q(d):

seven negative values, zero, eight positive ones, the ends at -1 and 1. They are spelled out here because they are a
format: the published numbers went through float32 on their way and lie up to 1.2e-7 from the equation.

FP4, a sign, two bits of exponent and one of mantissa, in an order of its own and over 12: the magnitudes of the codes
0 to 7 are 0, 1/16, 8, 12, 4, 6, 2, 3; 8 more gives the negative ones, -0 included, which decodes to 0. (The smallest
is 1/16 and not 1: bitsandbytes gives its subnormal an exponent further down.)

The dynamic map of the scales' scales (Dettmers 2015, arXiv 1511.04561): in each of seven decades down from 1 the
midpoints of 2^e equal parts of [0.1, 1], e = 6 for the first and 0 for the last, with both signs; 0 and 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Final

import torch
from torch import Tensor

NF4: Final = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
FP4_MAGNITUDES: Final = (0.0, 1 / 16, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)
DECADES: Final = 7


@dataclass(frozen=True)
class Table:
    """`values` float32 [k] by code. `order` int64 [k]: the codes by ascending value, 0 before -0; `bounds` float32
    [k - 1]: what lies between them."""

    values: Tensor
    order: Tensor
    bounds: Tensor

    @classmethod
    def of(cls, values: Tensor) -> Table:
        order = torch.argsort(values, stable=True)
        ascending = values[order]
        return cls(values, order, (ascending[:-1] + ascending[1:]) / 2)

    def to(self, device: torch.device) -> Table:
        return Table(self.values.to(device), self.order.to(device), self.bounds.to(device))

    def nearest(self, units: Tensor) -> Tensor:
        """uint8 codes, in the shape of `units` float32, of the nearest values; the lesser one of two as near."""
        return self.order[torch.bucketize(units, self.bounds)].to(torch.uint8)

    def decode(self, codes: Tensor) -> Tensor:
        """float32 values of uint8 codes, in their shape."""
        return self.values[codes.to(torch.int64)]


@cache
def table(name: str) -> Table:
    """`nf4`, `fp4`, or `dynamic`, on the CPU."""
    if name == "nf4":
        return Table.of(torch.tensor(NF4, dtype=torch.float32))
    if name == "fp4":
        magnitudes = torch.tensor(FP4_MAGNITUDES, dtype=torch.float32) / max(FP4_MAGNITUDES)
        return Table.of(torch.cat([magnitudes, 0 - magnitudes]))
    return Table.of(_dynamic())


def _dynamic() -> Tensor:
    """float32 [256], ascending. With b = fl32(1/10), P = 2^e parts, h = fl32(1 - b) / P, and every step rounded to
    float32, the ends of the parts are b + i h below the middle and 1 - (P - i) h from there on; a value is
    10^(e - 6) (left + right) / 2."""
    least = torch.tensor(0.1).double()
    positive = []
    for exponent in range(DECADES):
        parts = 2**exponent
        index = torch.arange(parts + 1, dtype=torch.float64)
        step = (1 - least).float().double() / parts
        ends = torch.where(2 * index < parts + 1, least + index * step, 1 - (parts - index) * step).float()
        positive.append((ends[:-1] + ends[1:]) / 2 * 10.0 ** (exponent - DECADES + 1))
    values = torch.cat(positive)
    return torch.cat([-values.flip(0), torch.zeros(1), values, torch.ones(1)])
