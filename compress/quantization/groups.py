"""Rounding the matrices that share an input, given its moments.

    moments -> order of columns, factor -> of each piece of rows: its target, its codes -> matrices, reports

Order and factor are the same on all processes; the pieces (`compress.quantization.pieces`) are dealt out to them, and
the codes of each reach all.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from compress.codecs.base import Codec, CodecSpec, GainRule, QuantizedMatrix
from compress.codecs.rows import row_rms
from compress.distributed import World
from compress.errors import NumericsError
from compress.modeling.structure import MatrixView
from compress.quantization.hessian import Factor, Moments, factorize, output_energy
from compress.quantization.ldlq import Blocks, Order, blocks_of, round_matrix
from compress.quantization.matrix import MatrixReport, quantize_matrix, sqnr
from compress.quantization.options import Ldlq
from compress.quantization.pieces import PIECES, dealt, row_pieces, share_payloads, stacked_rows
from compress.transforms.matrices import mix_moment, mix_weight
from compress.transforms.signs import Signs

Rounded = tuple[MatrixView, QuantizedMatrix, MatrixReport]


@dataclass(frozen=True)
class Scheme:
    """How the matrices of a model are rounded: the codec, each matrix's spec, as it is stored, and signs by its name,
    the options."""

    codec: Codec
    specs: Mapping[str, CodecSpec]
    signs: Mapping[str, Signs]
    options: Ldlq


@dataclass
class _Piece:
    """Some rows of the matrix `view`: W, and what is to be rounded, float32 [r, n], columns in order."""

    view: MatrixView
    rows: slice
    weight: Tensor
    target: Tensor


@dataclass(frozen=True)
class _Prepared:
    """What the pieces of a group have in common; `diagonal` float64 [n] is that of H before damping."""

    factor: Factor
    order: Order
    diagonal: Tensor
    blocks: tuple[Blocks, Blocks | None]


def round_group(
    views: Sequence[MatrixView],
    original_of: Callable[[MatrixView], Tensor],
    moments: Moments | None,
    scheme: Scheme,
    world: World,
) -> list[Rounded]:
    """Round matrices that share an input with the given `moments`, which are used up; None: with no moments at all.
    Raises `NumericsError` as the options say."""
    if moments is None:
        return _fall_back(views, original_of, scheme, "never called")
    facts = {"tokens": moments.tokens, "dead_channels": moments.dead, "broken_channels": moments.broken}
    signs = scheme.signs[views[0].name].input
    if signs is not None:
        mix_moment(moments.hessian, signs)
        if moments.shift is not None:
            mix_moment(moments.shift, signs)
    probe = scheme.codec.rounding(views[0].shape, scheme.specs[views[0].name].plain, moments.hessian.device)
    order = Order.of(moments.hessian.diagonal(), probe.dim, probe.scope, scheme.options.order)
    diagonal = moments.hessian.diagonal()[order.columns].clone()
    jobs = [(view, rows) for view in views for rows in _pieces(view, scheme, world, diagonal.device)]
    owners = dealt([rows.stop - rows.start for _, rows in jobs], world.size)
    mine = [index for index, owner in enumerate(owners) if owner == world.rank]
    pieces = _own_pieces({index: jobs[index] for index in mine}, original_of, moments.shift, order, scheme)
    moments.shift = None
    hessian = moments.hessian[order.columns.unsqueeze(1), order.columns]
    moments.release()
    try:
        factor = factorize(hessian, scheme.options.damping, views[0].name)
    except NumericsError:
        if scheme.options.fallback == "error":
            raise
        return _fall_back(views, original_of, scheme, "indefinite Hessian")
    del hessian
    prepared = _Prepared(factor, order, diagonal, blocks_of(factor, order, scheme.options.sweeps))
    return _round_pieces(views, jobs, owners, pieces, prepared, facts, scheme, world)


def _pieces(view: MatrixView, scheme: Scheme, world: World, device: torch.device) -> list[slice]:
    """On the CPU the same ones for any number of processes; a GPU, which is slow at small pieces, gets one of each
    matrix. Scales that are fitted to all rows hold a matrix together."""
    if scheme.options.refit:
        return [slice(0, view.shape[0])]
    return row_pieces(view.shape[0], scheme.codec, PIECES if device.type == "cpu" else world.size)


def _own_pieces(
    jobs: Mapping[int, tuple[MatrixView, slice]],
    original_of: Callable[[MatrixView], Tensor],
    shift: Tensor | None,
    order: Order,
    scheme: Scheme,
) -> dict[int, _Piece]:
    """The pieces of this process, with W C as their target for now, or W where there is no C."""
    columns, narrow = order.columns, None if shift is None else shift.to(torch.float32)
    pieces: dict[int, _Piece] = {}
    name, weight = "", torch.empty(0)
    for index, (view, rows) in jobs.items():
        if view.name != name:
            name, weight = view.name, mix_weight(original_of(view), scheme.signs[view.name], torch.float32)
        part = weight[rows].clone()
        ordered = part[:, columns]
        pieces[index] = _Piece(view, rows, ordered, ordered if narrow is None else (part @ narrow)[:, columns])
    return pieces


def _round_pieces(
    views: Sequence[MatrixView],
    jobs: Sequence[tuple[MatrixView, slice]],
    owners: Sequence[int],
    pieces: Mapping[int, _Piece],
    prepared: _Prepared,
    facts: Mapping[str, float],
    scheme: Scheme,
    world: World,
) -> list[Rounded]:
    """Round this process's `pieces` of the `jobs`, and put the matrices together from those of all."""
    peaks = _peaks(jobs, world.together(lambda: _aimed(pieces, prepared, scheme)), world)
    trials = world.together(
        lambda: {index: _trials(piece, peaks[piece.view.name], prepared, scheme) for index, piece in pieces.items()}
    )
    told = world.gather({index: [trial.figures for trial in found] for index, found in trials.items()})
    figures = {int(index): found for each in told for index, found in each.items()}
    of_view = {view.name: [index for index, (other, _) in enumerate(jobs) if other is view] for view in views}
    chosen: dict[str, int] = {}
    for name, places in of_view.items():
        losses = [sum(figures[index][rule][0] for index in places) for rule in range(len(_rules(scheme)))]
        chosen[name] = losses.index(min(losses))
    own = {index: found[chosen[pieces[index].view.name]].matrix for index, found in trials.items()}
    parts = _shared(jobs, owners, own, scheme, world, prepared.factor.lower.device)
    damping = prepared.factor.damping / float(prepared.diagonal.mean() or 1.0)
    rounded: list[Rounded] = []
    for view in views:
        places = of_view[view.name]
        _, lost, energy = (
            sum(column) for column in zip(*(figures[at][chosen[view.name]] for at in places), strict=True)
        )
        error = lost / energy if energy > 0 else 0.0
        matrix = stacked_rows([parts[at] for at in places]).mixed(scheme.signs[view.name])
        report = MatrixReport(
            view.name,
            view.shape,
            matrix.spec.codec,
            matrix.bits_per_weight,
            error,
            sqnr(error),
            "calibrated",
            {**facts, "damping": damping},
        )
        rounded.append((view, matrix, report))
    return rounded


def _aimed(pieces: Mapping[int, _Piece], prepared: _Prepared, scheme: Scheme) -> dict[int, float]:
    """Turn W C into the targets W + a W C H^-1; the largest RMS of a row of each."""
    strength, order = scheme.options.asymmetric, prepared.order
    for piece in pieces.values():
        if piece.target is not piece.weight:
            solved = torch.cholesky_solve(piece.target.T, prepared.factor.lower).T
            piece.target = piece.weight + strength * solved
    return {index: float(row_rms(piece.target[:, order.places]).max()) for index, piece in pieces.items()}


def _peaks(jobs: Sequence[tuple[MatrixView, slice]], own: Mapping[int, float], world: World) -> dict[str, float]:
    """The largest RMS of a row of each matrix."""
    peaks: dict[str, float] = {}
    for each in world.gather(own):
        for index, peak in each.items():
            name = jobs[int(index)][0].name
            peaks[name] = max(peak, peaks.get(name, 0.0))
    return peaks


@dataclass(frozen=True)
class _Trial:
    """A piece with codes by one rule for gains. `figures`: its loss in the outputs, to choose a rule by, its error in
    them, and their energy."""

    matrix: QuantizedMatrix
    figures: tuple[float, float, float]


def _rules(scheme: Scheme) -> tuple[GainRule, ...]:
    gain = scheme.options.gain
    return ("projection", "norm") if gain == "best" else (gain,)


def _trials(piece: _Piece, peak: float, prepared: _Prepared, scheme: Scheme) -> list[_Trial]:
    options, order, rules = scheme.options, prepared.order, _rules(scheme)
    factor, diagonal = prepared.factor, prepared.diagonal
    spec, shape = scheme.specs[piece.view.name].plain, (len(piece.weight), piece.weight.shape[1])
    energy = output_energy(piece.weight, factor, diagonal)
    found = []
    for rule in rules:
        rounding = scheme.codec.rounding(shape, spec, piece.weight.device, gain=rule, search=options.search)
        rounding.peak = peak
        round_matrix(
            piece.target, factor, order, rounding, sweeps=options.sweeps, refit=options.refit, blocks=prepared.blocks
        )
        value = rounding.decoded()[:, order.columns]
        loss = output_energy(piece.target - value, factor, diagonal) if len(rules) > 1 else 0.0
        error = output_energy(piece.weight - value, factor, diagonal)
        found.append(_Trial(rounding.finish(), (loss, error, energy)))
    return found


def _shared(
    jobs: Sequence[tuple[MatrixView, slice]],
    owners: Sequence[int],
    own: Mapping[int, QuantizedMatrix],
    scheme: Scheme,
    world: World,
    device: torch.device,
) -> dict[int, QuantizedMatrix]:
    """Every piece, from who rounded it."""
    kinds = [(scheme.specs[view.name].plain, (rows.stop - rows.start, view.shape[1])) for view, rows in jobs]
    return share_payloads(kinds, owners, own, world, device)


def _fall_back(
    views: Sequence[MatrixView], original_of: Callable[[MatrixView], Tensor], scheme: Scheme, why: str
) -> list[Rounded]:
    """Rounding to the nearest where calibration says nothing, if the options allow it."""
    if scheme.options.fallback == "error":
        raise NumericsError(
            f"'{views[0].name}' cannot be calibrated: {why}.",
            remedy="Give other data, or allow rounding to the nearest with --rounding ldlq:fallback=nearest.",
        )
    rounded: list[Rounded] = []
    for view in views:
        signs, spec = scheme.signs[view.name], scheme.specs[view.name]
        matrix, report = quantize_matrix(view.name, original_of(view), scheme.codec, spec, signs)
        rounded.append((view, matrix, dataclasses.replace(report, status=f"nearest ({why})")))
    return rounded
