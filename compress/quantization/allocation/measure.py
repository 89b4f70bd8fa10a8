"""Measuring a table: every group of matrices rounded alone, at every level, and what the model loses then.

    for each block: moments of its inputs over the calibration rows -> each matrix rounded at each level
                    -> for each group and level: the measured rows through the block with that group rounded,
                       and on through the original blocks -> loss
    then for each level: the measured rows through all blocks with every group at that level

Inputs are the original model's, so one matrix does not depend on how another is rounded, and what a group loses is its
own. A block that is done is kept: a measuring that was stopped goes on behind it. The payloads are kept too: a search
over widths puts models together from them. Matrices are dealt out to the processes to be rounded.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from compress.data.calibration import Batch
from compress.distributed import world
from compress.events import Events, seconds_left
from compress.modeling.structure import MatrixView
from compress.quantization.allocation.course import Course, Rows, Subject
from compress.quantization.allocation.source import Resident
from compress.quantization.allocation.store import Store
from compress.quantization.allocation.table import Table
from compress.quantization.hessian import Factor, Moments, factorize
from compress.quantization.inputs import input_rows, inputs_of, structure_of
from compress.quantization.ldlq import Order, round_matrix
from compress.quantization.matrix import relative_error
from compress.transforms.matrices import mix_moment, mix_weight

STAGE = "measure"
Prepared = tuple[Factor, Order]
Hidden = Mapping[int, Tensor]


def measure(
    blocks: Resident,
    subject: Subject,
    calibration: Sequence[Batch],
    measured: Sequence[Batch],
    store: Store,
    events: Events,
) -> Table:
    """The table of `subject`; blocks that are in the `store` already are not measured again."""
    rows, course = Rows(blocks, dict(enumerate(calibration))), Course(blocks, subject.views, measured)
    hidden: Hidden = rows.start
    before: Hidden = course.rows.start
    total, started, done = blocks.count + 1, time.monotonic(), 0
    with events.stage(STAGE, total):
        for index in range(blocks.count):
            if store.has(index):
                done += 1
            else:
                store.put(index, *_measure_block(index, subject, rows, hidden, course, before))
            block = blocks.block(index)
            hidden, before = rows.run(index, block, hidden), course.rows.run(index, block, before)
            left = seconds_left(started, index + 1 - done, total - done)
            events.emit("step", stage=STAGE, index=index + 1, total=total, name=f"block {index}", seconds_left=left)
        together = tuple(_together(level, subject, course, store) for level in subject.levels)
        events.emit("step", stage=STAGE, index=total, total=total, name="all blocks together", seconds_left=0.0)
    records = [store.record(index) for index in range(blocks.count)]
    return Table(
        course.figure,
        subject.levels,
        {group: tuple(losses) for one in records for group, losses in one["losses"].items()},
        together,
        {name: tuple(errors) for one in records for name, errors in one["errors"].items()},
    )


def payload_name(view: MatrixView, level: int) -> str:
    """Of a matrix at a level, in a store."""
    return f"{view.name}@{level}"


def _measure_block(
    index: int, subject: Subject, rows: Rows, hidden: Hidden, course: Course, before: Hidden
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The payloads of a block, and the record of its losses and errors."""
    payloads = dict(_rounded(index, subject, rows, hidden, course))
    groups: dict[str, list[MatrixView]] = {}
    for view in course.views[index]:
        groups.setdefault(view.group, []).append(view)
    losses: dict[str, list[float]] = {group: [] for group in groups}
    errors: dict[str, list[float]] = {view.name: [] for view in course.views[index]}
    for group, members in groups.items():
        for level in subject.levels:

            def value(index: int, view: MatrixView, original: Tensor, level: int = level) -> Tensor:
                decoded = subject.matrix(view, level, payloads[payload_name(view, level)]).dequantize()
                errors[view.name].append(relative_error(original, decoded))
                return decoded

            losses[group].append(course.loss(index + 1, course.after(index, members, value, before)))
    return payloads, {"losses": losses, "errors": errors}


def _together(level: int, subject: Subject, course: Course, store: Store) -> float:
    """The loss with all groups at `level`."""

    def value(index: int, view: MatrixView, original: Tensor) -> Tensor:
        payload = store.payloads(index)[payload_name(view, level)]
        return subject.matrix(view, level, payload).dequantize()

    return course.loss_of(value)


def _rounded(index: int, subject: Subject, rows: Rows, hidden: Hidden, course: Course) -> Iterator[tuple[str, Tensor]]:
    """The payload of every matrix at every level, by its name in a store."""
    jobs = list(_factors(index, subject, rows, hidden, course))
    size, rank, levels = world().size, world().rank, subject.levels
    for start in range(0, len(jobs), size):
        ours = jobs[start : start + size]

        def made(mine: Sequence[tuple[MatrixView, Prepared | None]] = ours[rank : rank + 1]) -> Tensor:
            found = [
                _round(view, factor, level, subject, course.place(index, view))
                for view, factor in mine
                for level in levels
            ]
            return torch.cat([one.cpu() for one in found]) if found else torch.empty(0, dtype=torch.int8)

        for (view, _), payloads in zip(ours, world().gather_tensors(world().together(made)), strict=False):
            sizes = [subject.codec.bits(subject.codec.spec(level), view.shape) // 8 for level in levels]
            for level, payload in zip(levels, payloads.split(sizes), strict=True):
                yield payload_name(view, level), payload


def _factors(
    index: int, subject: Subject, rows: Rows, hidden: Hidden, course: Course
) -> Iterator[tuple[MatrixView, Prepared | None]]:
    """Every matrix of a block with the factor of its inputs' Hessian; None for one that is rounded to the nearest: an
    expert, whose tokens are few, or a map that no token reaches."""
    views = course.views[index]
    calibrated = [view for view in views if view.index is None and subject.rounding is not None]
    plain = [view for view in views if view not in calibrated]
    block = course.blocks.block(index)
    by_name = {course.inside(index, view): view for view in calibrated}
    first = next(iter(hidden))
    groups = structure_of(block, list(by_name), rows.calls[first][index], hidden[first]).groups if by_name else ()
    moments = _moments(index, [group[0] for group in groups], rows, hidden, course)
    for group in groups:
        moment = moments.pop(group[0], None)
        if moment is None:
            plain += [by_name[name] for name in group]
            continue
        moment.close()
        prepared: dict[str, Prepared] = {}
        for view in (by_name[name] for name in group):
            signs = subject.signs[view.name].input
            key = view.group if signs is not None else ""
            if key not in prepared:
                prepared[key] = _prepare(view, moment.hessian.clone(), signs, subject)
            yield view, prepared[key]
    for view in plain:
        yield view, None


def _moments(index: int, names: Sequence[str], rows: Rows, hidden: Hidden, course: Course) -> dict[str, Moments]:
    """Of the inputs of some modules of a block, over all rows; none of a module that is never called."""
    found: dict[str, Moments] = {}
    block = course.blocks.block(index)
    for number, before in hidden.items() if names else ():
        inputs, _ = inputs_of(block, names, rows.calls[number][index], before)
        for name, x in inputs.items():
            flat = input_rows(block.get_submodule(name), x, rows.mask(number))
            if name not in found:
                found[name] = Moments(flat.shape[-1], flat.device, asymmetric=False)
            found[name].add(flat)
    return found


def _prepare(view: MatrixView, hessian: Tensor, signs: Tensor | None, subject: Subject) -> Prepared:
    assert subject.rounding is not None
    if signs is not None:
        mix_moment(hessian, signs)
    probe = subject.codec.rounding(view.shape, subject.codec.spec(subject.levels[0]), hessian.device)
    order = Order.of(hessian.diagonal(), probe.dim, probe.scope, subject.rounding.order)
    hessian = hessian[order.columns.unsqueeze(1), order.columns]
    return factorize(hessian, subject.rounding.damping, view.name), order


def _round(view: MatrixView, prepared: Prepared | None, level: int, subject: Subject, original: Tensor) -> Tensor:
    """The payload, without signs, of one matrix at one level: a single pass of rounding, without what refines it."""
    weight = mix_weight(original, subject.signs[view.name], torch.float32)
    spec = subject.codec.spec(level)
    if prepared is None:
        return subject.codec.quantize(weight, spec).payload()
    factor, order = prepared
    rounding = subject.codec.rounding(view.shape, spec, weight.device, search=False)
    round_matrix(weight[:, order.columns], factor, order, rounding)
    return rounding.finish().payload()
