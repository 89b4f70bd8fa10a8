"""The basis that a model is brought into: a change for each place where one can be folded.

`Basis` holds what stands at each site; where it has nothing, nothing changes. `hadamard_basis` mixes everything that
can be rotated, with signs from a seed; `compress.transforms.learned` makes a basis of tensors that were learned.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from compress.modeling.scalings import Scalings
from compress.modeling.sites import Sites
from compress.transforms.changes import Changes, Mixing, Scaling
from compress.transforms.signs import random_signs


@dataclass(frozen=True)
class Basis:
    """What is put in the places of `sites` and `scalings`.

    residual: a change of the stream, orthogonal, of one head. values: of the values, by the value projection, one head
    for each head of keys and values. norms: of what a norm puts out, by the norm, after the change of the stream.
    gates: of what the up projection puts out, by it. queries: of the keys, which queries undo, by the key projection;
    one head, which all share, where keys are normalised.
    """

    sites: Sites = field(default_factory=Sites)
    scalings: Scalings = field(default_factory=Scalings)
    residual: Changes = ()
    values: Mapping[str, Changes] = field(default_factory=dict)
    norms: Mapping[str, Scaling] = field(default_factory=dict)
    gates: Mapping[str, Scaling] = field(default_factory=dict)
    queries: Mapping[str, Scaling] = field(default_factory=dict)


def hadamard_basis(sites: Sites, seed: int) -> Basis:
    """Mixings of the residual stream and of the values, with signs from `seed`; no scalings."""
    residual: Changes = ()
    if sites.residual is not None:
        residual = (Mixing(random_signs(sites.residual.width, seed, "residual").unsqueeze(0)),)
    values: dict[str, Changes] = {}
    for site in sites.values:
        signs = random_signs(site.kv_heads * site.head_dim, seed, f"{site.value}.heads")
        values[site.value] = (Mixing(signs.view(site.kv_heads, site.head_dim)),)
    return Basis(sites, residual=residual, values=values)
