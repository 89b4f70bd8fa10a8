"""What Hadamard incoherence means for a whole model: what is folded, what is mixed at run time, and what that costs.

Every matrix should have both sides mixed, at no more cost than must be:

    residual stream folded   query, key, gate, up: input side.  Value and output projection: both sides.  Down
                             projection: the output side, and at run time the input, which a nonlinearity separates
                             from everything that could take up a rotation.
    not folded               both sides of every matrix at run time, but for what a folded value rotation covers.

The outputs of query, key, gate and up stay as they are in a folded model. Mixing them would cost more than everything
else together, and gain least: the errors of two outputs meet in no term of tr(E H E^T).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from compress.modeling.sites import Sites
from compress.modeling.structure import MatrixView
from compress.transforms.mixing import mixing_cost
from compress.transforms.signs import Signs, matrix_signs, mixed_sides


@dataclass(frozen=True)
class OnlineCost:
    """Multiply-adds for one token: those of the mixings at run time, and those of the matrices of the target set."""

    mixing: int
    matrices: int

    @property
    def relative(self) -> float:
        """What the mixings add to the matrices, as a fraction."""
        return self.mixing / self.matrices if self.matrices else 0.0


def online_mixing(views: Sequence[MatrixView], sites: Sites) -> dict[str, str]:
    """Which sides of each matrix are mixed at run time when everything in `sites` is folded: one of
    `compress.transforms.signs.MIXINGS` by the matrix's name. `Sites()` stands for a model of which nothing is."""
    inputs = {site.output for site in sites.values}
    outputs = {site.value for site in sites.values}
    if sites.residual is not None:
        inputs |= sites.residual.readers.keys()
        outputs |= {view.name for view in views}
    words = {(False, False): "none", (True, False): "input", (False, True): "output", (True, True): "both"}
    return {view.name: words[view.name not in inputs, view.name not in outputs] for view in views}


def online_cost(views: Sequence[MatrixView], mixing: Mapping[str, str]) -> OnlineCost:
    """The cost of `mixing`, by matrix names, as `PackedLinear` pays it: each matrix mixes its own input."""
    sides = 0
    for view in views:
        inputs, outputs = mixed_sides(mixing[view.name])
        sides += mixing_cost(view.shape[1]) * inputs + mixing_cost(view.shape[0]) * outputs
    return OnlineCost(sides, sum(view.weights for view in views))


def view_signs(view: MatrixView, mixing: str, seed: int) -> Signs:
    """The signs of a matrix; matrices of one group, which read the same activations, share those of the input."""
    return matrix_signs(mixing, view.shape, seed, view.name, view.group)
