"""Strategy "checkpoint": the logits of some rows at a time, thrown away, and made again in the backward pass.

This serves every loss whose positions are independent: with any upstream gradient per position, and with parameters of
its own. A loss that draws random numbers, torch's or from a state in its buffers, draws the same ones both times. It
costs one more projection of both models than the gradient in the forward pass, and the loss once more.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import get_device_states, set_device_states

from compress.losses.fused.gradient import part_values, to_gradient
from compress.losses.fused.plan import Logits, Piece, Plan, Tensors
from compress.losses.fused.projection import Gradients, once

COUNT = len(Tensors._fields)


class _State:
    """Torch's random state and the losses' buffers, as they are now."""

    def __init__(self, plan: Plan, like: Tensor) -> None:
        self.buffers = list(_losses(plan).buffers())
        self.values = [each.clone() for each in self.buffers]
        self.cpu, (self.devices, self.states) = torch.get_rng_state(), get_device_states(like)

    @contextmanager
    def again(self) -> Iterator[None]:
        """What is done inside begins where this was taken, and what comes after goes on as if it had not been done."""
        now = [each.clone() for each in self.buffers]
        with torch.random.fork_rng(self.devices):
            torch.set_rng_state(self.cpu)
            set_device_states(self.devices, self.states)
            try:
                self._put(self.values)
                yield
            finally:
                self._put(now)

    def _put(self, values: Sequence[Tensor]) -> None:
        for buffer, value in zip(self.buffers, values, strict=True):
            buffer.copy_(value)


def values(plan: Plan, tensors: Tensors) -> Tensor:
    """The values [K, n] of K terms; differentiable, once, also with respect to the losses' own parameters."""
    found: Tensor = _Checkpoint.apply(plan, *tensors, *own_parameters(plan))
    return found


def own_parameters(plan: Plan) -> list[Tensor]:
    """What the losses learn themselves."""
    return [each for each in _losses(plan).parameters() if each.requires_grad]


def _losses(plan: Plan) -> nn.ModuleList:
    return nn.ModuleList(term.loss for term in plan.terms)


class _Checkpoint(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, plan: Plan, *tensors: Tensor | None) -> Tensor:
        t = Tensors(*tensors[:COUNT])  # type: ignore[arg-type]
        ctx.plan, ctx.state = plan, _State(plan, t.hidden)
        ctx.save_for_backward(*tensors)
        found = t.hidden.new_empty((len(plan.terms), len(t.hidden)), dtype=plan.dtype)
        with torch.autocast(t.hidden.device.type, enabled=False):
            for piece in Logits(plan, t).pieces():
                for part in piece.parts():
                    found[:, part.rows] = part_values(plan, part)
        return found

    @staticmethod
    @once
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        plan: Plan = ctx.plan
        t, own = Tensors(*ctx.saved_tensors[:COUNT]), own_parameters(plan)
        sums = Gradients.zeros(plan.dtype, plan.wanted, *t[:3])
        own_sums = [torch.zeros_like(each) for each in own]
        columns = slice(plan.classes)
        with ctx.state.again(), torch.autocast(t.hidden.device.type, enabled=False):
            for piece in Logits(plan, t).pieces():
                for part in piece.parts():
                    if own:
                        _add_gradients(plan, part, upstream[:, part.rows], own, own_sums)
                    else:
                        to_gradient(plan, part, upstream[:, part.rows])
                hidden, weight = t.hidden[piece.rows], t.weight[columns]
                plan.student.back(piece.student, hidden, weight, sums.at(piece.rows, columns))
        return None, *sums.like(*t[:3]), None, None, None, None, *own_sums


def _add_gradients(plan: Plan, part: Piece, factors: Tensor, own: Sequence[Tensor], sums: Sequence[Tensor]) -> None:
    """`to_gradient`, and the same gradient with respect to the losses' own parameters added to `sums`."""
    leaf = part.student.detach().requires_grad_()
    with torch.enable_grad():
        values = [term.loss.all_values(*part._replace(student=leaf).seen_by(term)) for term in plan.terms]
    gradient, *of_own = torch.autograd.grad(
        values, [leaf, *own], list(factors), allow_unused=True, materialize_grads=True
    )
    part.student.copy_(plan.student.before_activation(gradient, part.student))
    for total, each in zip(sums, of_own, strict=True):
        total += each
