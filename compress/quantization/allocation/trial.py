"""A trial: the model rounded block after block as it will be, with some widths, and what it loses then.

Tables and assembled models leave out that each block makes good part of what those before it lost. A trial does not: it
costs as much as the rounding of the result, so only the last few candidates of a search get one. Hidden states are kept
in memory; nothing of what is rounded is.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

from torch import Tensor

from compress.codecs.base import CodecSpec
from compress.data.calibration import Batch
from compress.modeling.structure import MatrixView
from compress.quantization.allocation.course import Course, Subject
from compress.quantization.allocation.source import Resident
from compress.quantization.calibrated import Calibration
from compress.quantization.groups import Scheme


def trial_loss(
    blocks: Resident, subject: Subject, specs: Mapping[str, CodecSpec], calibration: Sequence[Batch], course: Course
) -> float:
    """The loss on the rows of `course` when all matrices are rounded as `specs` say, on the rows of `calibration`."""
    assert subject.rounding is not None
    scheme = Scheme(subject.codec, specs, subject.signs, subject.rounding)
    rounding = Calibration.in_memory(blocks.model, calibration, scheme)
    inputs = rounding.record_inputs(blocks.block(0))
    hidden: Mapping[int, Tensor] = course.rows.start
    for index, views in enumerate(course.views):
        block = copy.deepcopy(blocks.block(index))
        rounded = {
            view.name: matrix.dequantize() for view, matrix, _ in rounding.round_block(index, block, views, inputs)
        }

        def value(index: int, view: MatrixView, original: Tensor, rounded: Mapping[str, Tensor] = rounded) -> Tensor:
            return rounded[view.name]

        hidden = course.after(index, views, value, hidden)
        after = rounding.carry_on(index, block, inputs)
        inputs.discard()
        inputs = after or inputs
    return course.loss(blocks.count, hidden)
