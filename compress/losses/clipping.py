"""A window between two quantiles of a distribution, and a network that chooses it.

The classes of the teacher's distribution p are laid on [0, 1] from the least to the most probable one, each as an
interval of length p_k. A window (l, u) of this axis is the region between two quantiles: it leaves out the tail below l
and the top above u. Its soft form is h(x) = sigmoid((x - a) / s) - sigmoid((x - b) / s), and a class is
kept to the degree w_k = mean of h over its interval. The thresholds a, b are solved from l, u (in closed form) such
that the integral of h over [0, 1] is u - l. So the kept mass sum_k w_k p_k is exactly u - l for *every* p and every s,
and a floor on it is a floor on u - l. A mask read off at the middle of each interval would not have this: of two
classes of one half each, the window (0.3, 0.7) holds no middle.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

MARGIN = 1e-3
"""What a learned window leaves out at either end at least, so that its thresholds are finite."""
NARROW = 1e-3
"""An interval below this many widths of the sigmoid is read off at its middle; exact to 1e-7."""
LEADING, RANKS, FAINT = 16, (1, 2, 4, 8, 16, 32, 64), -20.0
"""What the network sees: the leading log-probabilities (not below FAINT), the mass of so many classes, the entropy."""


class ClippingNetwork(nn.Module):
    """From the head of a distribution, log p of its largest classes [n, k] in descending order, to the window (l, u):

        u - l = floor + (1 - 2 MARGIN - floor) sigmoid(a),    l = MARGIN + (1 - 2 MARGIN - (u - l)) sigmoid(b)

    with (a, b) an MLP of one tanh layer over 24 features. It begins with a = 2, b = 0 for every distribution: a window
    that keeps nearly all. The initial parameters come from a generator of their own.
    """

    def __init__(self, hidden: int, mass_floor: float) -> None:
        super().__init__()
        self.mass_floor = mass_floor
        inputs = LEADING + len(RANKS) + 1
        self.inner: nn.Linear = nn.utils.skip_init(nn.Linear, inputs, hidden)
        self.outer: nn.Linear = nn.utils.skip_init(nn.Linear, hidden, 2)
        with torch.no_grad():
            generator = torch.Generator().manual_seed(0)
            self.inner.weight.uniform_(-(inputs**-0.5), inputs**-0.5, generator=generator)
            self.inner.bias.zero_()
            self.outer.weight.zero_()
            self.outer.bias.copy_(torch.tensor([2.0, 0.0]))

    def forward(self, log_head: Tensor, classes: int) -> tuple[Tensor, Tensor]:
        seen = features(log_head, classes).to(self.inner.weight.dtype)
        with torch.autocast(seen.device.type, enabled=False):
            a, b = self.outer(torch.tanh(self.inner(seen))).to(log_head.dtype).unbind(-1)
        widest = 1 - 2 * MARGIN
        width = self.mass_floor + (widest - self.mass_floor) * torch.sigmoid(a)
        lower = MARGIN + (widest - width) * torch.sigmoid(b)
        return lower, lower + width


def features(log_head: Tensor, classes: int) -> Tensor:
    """The 24 features of distributions over so many classes, all of order 1. The entropy takes the tail as uniform."""
    head, size = log_head.exp(), log_head.shape[-1]
    sums = head.cumsum(-1)
    tail = (1 - sums[:, -1:]).clamp(min=0)
    faint = log_head.clamp(min=FAINT)
    leading = nn.functional.pad(faint[:, :LEADING], (0, max(0, LEADING - size)), value=FAINT) / 10
    mass = sums[:, [min(rank, size) - 1 for rank in RANKS]]
    spread = torch.special.entr(tail) + tail * math.log(max(1, classes - size))
    entropy = torch.special.entr(head).sum(-1, keepdim=True) + spread
    return torch.cat([leading, mass, entropy / math.log(max(2, classes))], -1)


def threshold(quantile: Tensor, softness: float) -> Tensor:
    """c such that sigmoid((x - c) / s) has the mean 1 - quantile over [0, 1]; infinite at the quantiles 0 and 1."""
    below = torch.log(-torch.expm1(-quantile / softness))
    above = torch.log(-torch.expm1((quantile - 1) / softness))
    return quantile + softness * (below - above)


def kept_shares(start: Tensor, mass: Tensor, lower: Tensor, upper: Tensor, softness: float) -> Tensor:
    """The mean of the soft window over each interval [start, start + mass], all [n, k]; the bounds [n]."""
    wide = mass > NARROW * softness
    length = torch.where(wide, mass, torch.full_like(mass, softness)) / softness
    share = torch.zeros_like(mass)
    for sign, bound in ((1, lower), (-1, upper)):
        cut = threshold(bound, softness).unsqueeze(-1)
        whole = torch.log1p(torch.sigmoid((start - cut) / softness) * torch.expm1(length)) / length
        middle = torch.sigmoid((start + mass / 2 - cut) / softness)
        share = share + sign * torch.where(wide, whole, middle)
    return share


def octaves(shares: Tensor, rest: Tensor, size: int) -> Tensor:
    """How far the kept classes reach down the ranks: sum_k w_k log(1 + 1/k) / log(1 + V) for the class of rank k, which
    is log(1 + n) / log(1 + V) where the n largest are kept. From the shares of the largest [n, k] and of the rest [n].
    """
    ranks = torch.arange(1, shares.shape[-1] + 1, dtype=shares.dtype, device=shares.device)
    steps = torch.log1p(1 / ranks)
    beyond = math.log1p(size) - math.log1p(shares.shape[-1])
    return ((shares * steps).sum(-1) + rest * beyond) / math.log1p(size)
