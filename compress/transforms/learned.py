"""A basis whose rotations and scalings are tensors that can be learned, and where they start.

    <residual>.rotation    R [1, d, d] of the residual stream
    <value>.rotation       R_h [kv heads, head dim, head dim]
    <norm>.scaling         log s [1, d] of what a norm puts out
    <value>.scaling        log s [kv heads, head dim]
    <up>.scaling           log s [1, intermediate size]
    <key>.scaling          log s [kv heads, head dim / 2], one for each pair of channels; [1, head dim / 2] with norms

A scaling is learned as a logarithm: s stays positive, and a step changes it in proportion.

Rotations start as the mixings of `hadamard_basis`, so that nothing learned is that transform exactly, or behind the
principal axes of the weights ("womi", weight outlier minimisation: Hu et al. 2025, section 3.3): for the residual
stream the eigenvectors of W^T W summed over all matrices that read it, for values those of the columns of the output
projection, each times the mixing. Scalings start at 1.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Literal

import torch
from torch import Tensor

from compress.modeling.scalings import QuerySite, Scalings
from compress.modeling.sites import Residual, Sites, ValueSite
from compress.transforms.basis import Basis, hadamard_basis
from compress.transforms.changes import Change, Changes, Rotation, Scaling, apply
from compress.transforms.fold import Read

Start = Literal["hadamard", "womi"]
Part = Literal["residual", "values", "norms", "value_scales", "gates", "queries"]
PARTS: tuple[Part, ...] = ("residual", "values", "norms", "value_scales", "gates", "queries")
RESIDUAL = "residual.rotation"


def learned_shapes(sites: Sites, scalings: Scalings, parts: Collection[Part] = PARTS) -> dict[str, tuple[int, ...]]:
    """The shapes of the tensors of a basis, those of `parts` alone."""
    shapes: dict[str, tuple[int, ...]] = {}
    residual = sites.residual
    if residual is not None and "residual" in parts:
        shapes[RESIDUAL] = (1, residual.width, residual.width)
    if residual is not None and "norms" in parts:
        shapes |= {f"{norm}.scaling": (1, residual.width) for norm in inner_norms(residual)}
    for site in sites.values:
        if "values" in parts:
            shapes[f"{site.value}.rotation"] = (site.kv_heads, site.head_dim, site.head_dim)
        if "value_scales" in parts:
            shapes[f"{site.value}.scaling"] = (site.kv_heads, site.head_dim)
    if "gates" in parts:
        shapes |= {f"{gate.up}.scaling": (1, gate.width) for gate in scalings.gates}
    if "queries" in parts:
        shapes |= {f"{query.key}.scaling": (query.groups, query.head_dim // 2) for query in scalings.queries}
    return shapes


def starting_tensors(
    sites: Sites, scalings: Scalings, read: Read, start: Start, seed: int, parts: Collection[Part] = PARTS
) -> dict[str, Tensor]:
    """The tensors of a basis at its start, float32, those of `parts` alone. `read` gives an original parameter."""
    mixed = hadamard_basis(sites, seed)
    shapes = learned_shapes(sites, scalings, parts)
    tensors = {name: torch.zeros(shape) for name, shape in shapes.items() if not is_rotation(name)}
    womi = start == "womi"
    if sites.residual is not None and RESIDUAL in shapes:
        axes = _residual_axes(sites.residual, read) if womi else None
        tensors[RESIDUAL] = _start(mixed.residual, axes, shapes[RESIDUAL])
    for site in sites.values:
        name = f"{site.value}.rotation"
        if name in shapes:
            axes = _value_axes(site, read) if womi else None
            tensors[name] = _start(mixed.values[site.value], axes, shapes[name])
    return tensors


def is_rotation(name: str) -> bool:
    """Whether a tensor of a learned basis is orthogonal, rather than logarithms of factors."""
    return name.endswith(".rotation")


def learned_basis(sites: Sites, scalings: Scalings, tensors: Mapping[str, Tensor], seed: int) -> Basis:
    """The basis of `tensors`, as functions of them that autograd can follow. What they have no rotation for is mixed
    with `seed`, as in `hadamard_basis`."""
    mixed = hadamard_basis(sites, seed)
    residual: Changes = (Rotation(tensors[RESIDUAL]),) if RESIDUAL in tensors else mixed.residual
    norms = inner_norms(sites.residual) if sites.residual is not None else ()
    return Basis(
        sites,
        scalings,
        residual=residual,
        values={site.value: tuple(_of_values(site, mixed.values[site.value], tensors)) for site in sites.values},
        norms=_scalings(norms, tensors),
        gates=_scalings([gate.up for gate in scalings.gates], tensors),
        queries={site.key: _of_queries(site, tensors) for site in scalings.queries if f"{site.key}.scaling" in tensors},
    )


def inner_norms(residual: Residual) -> list[str]:
    """The norms in the blocks, in their order; not the one before the head, which stays in full precision."""
    last = residual.readers[residual.head]
    return [norm for norm in dict.fromkeys(residual.readers.values()) if norm != last]


def _scalings(names: Collection[str], tensors: Mapping[str, Tensor]) -> dict[str, Scaling]:
    return {name: Scaling(tensors[f"{name}.scaling"]) for name in names if f"{name}.scaling" in tensors}


def _of_values(site: ValueSite, mixed: Changes, tensors: Mapping[str, Tensor]) -> Iterator[Change]:
    rotation = f"{site.value}.rotation"
    yield from (Rotation(tensors[rotation]),) if rotation in tensors else mixed
    yield from _scalings([site.value], tensors).values()


def _of_queries(site: QuerySite, tensors: Mapping[str, Tensor]) -> Scaling:
    return Scaling(site.spread(tensors[f"{site.key}.scaling"]))


def _start(mixing: Changes, axes: Tensor | None, shape: tuple[int, ...]) -> Tensor:
    """Float32 [heads, width, width]: the mixing as matrices, behind the principal `axes` where there are some."""
    heads, width, _ = shape
    eye = torch.eye(width, dtype=torch.float64).expand(heads, width, width) if axes is None else axes
    rows = eye.transpose(0, 1).reshape(width, heads * width)
    return apply(mixing, rows).view(width, heads, width).transpose(0, 1).contiguous().float()


def _residual_axes(residual: Residual, read: Read) -> Tensor:
    """Eigenvectors [1, d, d] of the second moments of all rows that read the stream in the blocks, gains included."""
    total = torch.zeros(residual.width, residual.width, dtype=torch.float64)
    for name, norm in residual.readers.items():
        if name != residual.head:
            rows = read(f"{name}.weight").detach().double() * (
                read(f"{norm}.weight").detach().double() + residual.offset
            )
            total += rows.t() @ rows
    return torch.linalg.eigh(total).eigenvectors.unsqueeze(0)


def _value_axes(site: ValueSite, read: Read) -> Tensor:
    """Eigenvectors [kv heads, head dim, head dim] of the second moments of the columns of the output projection."""
    weight = read(f"{site.output}.weight").detach().double()
    columns = weight.view(weight.shape[0], site.kv_heads, -1, site.head_dim).permute(1, 0, 2, 3)
    columns = columns.reshape(site.kv_heads, -1, site.head_dim)
    return torch.linalg.eigh(columns.mT @ columns).eigenvectors
