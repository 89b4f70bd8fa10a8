"""Rows of matrices as pieces of work that processes share.

Given the factor of its inputs a row is rounded without regard to the others, so a matrix is cut into pieces of rows, by
its shape alone: one process rounds all of them, several a part each, and each piece comes out the same. What a process
made travels as the payload that is stored, so that all have the same matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from compress.codecs.base import Codec, CodecSpec, QuantizedMatrix, sign_layout
from compress.codecs.registry import codec_of
from compress.distributed import World
from compress.modeling.structure import MatrixView
from compress.quantization.matrix import MatrixReport

PIECES = 16
"""Most pieces of a matrix on the CPU."""
LEAST_ROWS = 64
"""Rows of a piece below which products of matrices get slow."""


def row_pieces(rows: int, codec: Codec, most: int = PIECES) -> list[slice]:
    """At `most` so many pieces of a matrix of so many rows: all of it for a codec that does not take rows apart."""
    apart = codec.rows_apart
    if not apart or rows <= LEAST_ROWS:
        return [slice(0, rows)]
    size = -(-max(LEAST_ROWS, -(-rows // most)) // apart) * apart
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]


def dealt(costs: Sequence[int], processes: int) -> list[int]:
    """Which process does each of some works of these costs: the largest first, each to who has least to do."""
    loads = [0] * processes
    owners = [0] * len(costs)
    for work in sorted(range(len(costs)), key=lambda one: -costs[one]):
        owner = min(range(processes), key=lambda rank: loads[rank])
        owners[work] = owner
        loads[owner] += costs[work]
    return owners


def stacked_rows(parts: Sequence[QuantizedMatrix]) -> QuantizedMatrix:
    """The matrix of the pieces `parts`, cut as `Codec.rows_apart` says, in their order. A tensor that does not grow
    with the rows, a scale of the matrix, is that of each piece."""
    spec, columns = parts[0].spec, parts[0].shape[1]
    shape = sum(part.shape[0] for part in parts), columns
    tensors: dict[str, Tensor] = {}
    for field in codec_of(spec).layout(spec, shape):
        pieces = [part.tensors[field.name] for part in parts]
        if len(pieces) > 1 and pieces[0].shape == field.shape:
            assert all(torch.equal(piece, pieces[0]) for piece in pieces)
            pieces = pieces[:1]
        tensors[field.name] = torch.cat(pieces)
    return QuantizedMatrix(spec, shape, tensors)


def share_payloads(
    kinds: Sequence[tuple[CodecSpec, tuple[int, int]]],
    owners: Sequence[int],
    own: Mapping[int, QuantizedMatrix],
    world: World,
    device: torch.device,
) -> dict[int, QuantizedMatrix]:
    """All matrices, of these specs and shapes, by their numbers; `own` are those that this process is the owner of."""
    if world.size == 1:
        return dict(own)
    flat = torch.cat([matrix.payload() for matrix in own.values()] or [torch.empty(0, dtype=torch.int8, device=device)])
    matrices: dict[int, QuantizedMatrix] = {}
    for rank, payloads in enumerate(world.gather_tensors(flat)):
        start = 0
        for number, (spec, shape) in enumerate(kinds):
            if owners[number] == rank:
                layout = (*codec_of(spec).layout(spec, shape), *sign_layout(spec, shape))
                end = start + sum(part.nbytes for part in layout)
                matrices[number] = QuantizedMatrix.from_payload(spec, shape, payloads[start:end])
                start = end
    return matrices


def share_matrices(
    views: Sequence[MatrixView],
    specs: Mapping[str, CodecSpec],
    rounded: Callable[[MatrixView], tuple[QuantizedMatrix, MatrixReport]],
    world: World,
    device: torch.device,
) -> Iterator[tuple[MatrixView, QuantizedMatrix, MatrixReport]]:
    """What `rounded` makes of each of the matrices `views`, on `device`; the processes share them, and all get all."""
    if world.size == 1:
        for view in views:
            yield view, *rounded(view)
        return
    owners = dealt([view.weights for view in views], world.size)
    mine = [number for number, owner in enumerate(owners) if owner == world.rank]
    made = world.together(lambda: {number: rounded(views[number]) for number in mine})
    told = world.gather([[number, report.to_dict()] for number, (_, report) in made.items()])
    reports = {number: MatrixReport.from_dict(row) for each in told for number, row in each}
    kinds = [(specs[view.name], view.shape) for view in views]
    own = {number: matrix for number, (matrix, _) in made.items()}
    matrices = share_payloads(kinds, owners, own, world, device)
    for number, view in enumerate(views):
        yield view, matrices[number], reports[number]
