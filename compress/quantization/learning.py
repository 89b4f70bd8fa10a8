"""Learning a basis: so that a quantized model says what the original says.

    minimise  KL-Top(original(x) || quantized(x; R, S))      over orthogonal R and positive S

by descent on rotations (`compress.transforms.stiefel`) and Adam on the logarithms of scales, each with its own rate,
both of which fall to 0 as a cosine. Every step runs the original and the transformed model on one batch of calibration
rows, drawn in an order that the seed gives.

The state after a step is a handful of tensors, so that a learning that was stopped goes on where it was, with the same
numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Adam, Optimizer

from compress.data.calibration import Batch
from compress.errors import NumericsError
from compress.losses import TopKKL
from compress.modeling.scalings import Scalings
from compress.modeling.sites import Sites
from compress.quantization.looped import LoopedModel
from compress.quantization.transforms import Ost
from compress.transforms.fold import Fold
from compress.transforms.learned import is_rotation, learned_basis
from compress.transforms.stiefel import CayleySGD, RiemannianAdam


@dataclass(frozen=True)
class Progress:
    """What is known after `step` steps: the tensors of the basis, those of the optimisers by `<tensor>/<what>`, and the
    loss of every step in nats."""

    step: int
    tensors: dict[str, Tensor]
    state: dict[str, Tensor]
    losses: list[float]

    @classmethod
    def of(cls, stored: Mapping[str, Tensor], step: int, losses: Sequence[float]) -> Progress:
        """From both kinds of tensors in one mapping."""
        tensors = {name: tensor for name, tensor in stored.items() if "/" not in name}
        return cls(step, tensors, {name: stored[name] for name in stored.keys() - tensors.keys()}, list(losses))


class Learner:
    """The optimisation of the `tensors` of a basis (`compress.transforms.learned.starting_tensors`)."""

    def __init__(
        self,
        looped: LoopedModel,
        sites: Sites,
        scalings: Scalings,
        tensors: Mapping[str, Tensor],
        options: Ost,
        seed: int,
    ) -> None:
        self._looped, self._sites, self._scalings = looped, sites, scalings
        self._options, self._seed = options, seed
        self.tensors = {name: tensor.to(looped.device, copy=True).requires_grad_() for name, tensor in tensors.items()}
        self._loss = TopKKL(k=options.k, tail=options.tail)
        self._optimizers = dict(self._make_optimizers())
        self._losses: list[float] = []

    @property
    def step(self) -> int:
        """Steps that were done."""
        return len(self._losses)

    def learn(self, batches: Sequence[Batch], listener: Callable[[int, float], None]) -> dict[str, Tensor]:
        """Go on to the last step, and tell `listener` the number and the loss of each; the tensors as they are then.
        Raises `NumericsError` when the loss is not finite."""
        order = draw_order(len(batches), self._options.steps, self._seed)
        while self.step < self._options.steps:
            loss = self._descend(batches[order[self.step]])
            if not math.isfinite(loss):
                raise NumericsError(
                    f"The loss of step {self.step + 1} of the transform is {loss}.",
                    remedy="Lower rotation_rate and scale_rate, or use --transform hadamard.",
                )
            self._losses.append(loss)
            listener(self.step, loss)
        return {name: tensor.detach() for name, tensor in self.tensors.items()}

    def figures(self) -> dict[str, Any]:
        """Steps, and the mean loss in nats of the first and the last tenth of them."""
        part = max(1, len(self._losses) // 10)
        first, last = (math.fsum(some) / part for some in (self._losses[:part], self._losses[-part:]))
        return {"steps": self.step, "first_loss": first, "last_loss": last}

    def fold(self) -> Fold:
        """The fold of the present tensors; the head is not touched in the loop."""
        return Fold(learned_basis(self._sites, self._scalings, self.tensors, self._seed), untie=False)

    def _descend(self, batch: Batch) -> float:
        looped = self._looped
        inputs = {name: tensor.to(looped.device) for name, tensor in batch.items()}
        with torch.no_grad():
            wanted = looped.logits(inputs)
        factor = 0.5 * (1 + math.cos(math.pi * self.step / self._options.steps))
        with looped.transformed(self.fold()):
            loss = self._loss(looped.logits(inputs), wanted, weights=inputs.get("attention_mask"))
            loss.backward()  # type: ignore[no-untyped-call]
        for name, optimizer in self._optimizers.items():
            rate = self._options.rotation_rate if name == "rotations" else self._options.scale_rate
            for group in optimizer.param_groups:
                group["lr"] = rate * factor
            optimizer.step()
            optimizer.zero_grad()
        return float(loss.detach())

    def _make_optimizers(self) -> Iterator[tuple[str, Optimizer]]:
        rotations = [tensor for name, tensor in self.tensors.items() if is_rotation(name)]
        scales = [tensor for name, tensor in self.tensors.items() if not is_rotation(name)]
        if rotations:
            optimizer = RiemannianAdam if self._options.optimizer == "adam" else CayleySGD
            yield "rotations", optimizer(rotations, lr=self._options.rotation_rate)
        if scales:
            yield "scales", Adam(scales, lr=self._options.scale_rate, betas=(0.9, 0.99))

    def progress(self) -> Progress:
        """The present state, copied."""
        state = {
            f"{name}/{key}": torch.as_tensor(value).detach().cpu().clone()
            for name, tensor in self.tensors.items()
            for optimizer in self._optimizers.values()
            for key, value in optimizer.state.get(tensor, {}).items()
        }
        tensors = {name: tensor.detach().cpu().clone() for name, tensor in self.tensors.items()}
        return Progress(self.step, tensors, state, list(self._losses))

    def restore(self, progress: Progress) -> None:
        """Go on where `progress` was."""
        self._losses = list(progress.losses)
        for name, tensor in self.tensors.items():
            tensor.data.copy_(progress.tensors[name])
        for optimizer in self._optimizers.values():
            for tensor in (tensor for group in optimizer.param_groups for tensor in group["params"]):
                name = next(name for name, one in self.tensors.items() if one is tensor)
                found = {
                    key.removeprefix(f"{name}/"): value
                    for key, value in progress.state.items()
                    if key.startswith(f"{name}/")
                }
                optimizer.state[tensor] = {key: value.to(tensor.device) for key, value in found.items()}


def draw_order(batches: int, steps: int, seed: int) -> list[int]:
    """The batch of each step: all in an order drawn by the seed, then all in another."""
    generator = torch.Generator().manual_seed(seed)
    rounds = -(-steps // batches)
    return [int(index) for _ in range(rounds) for index in torch.randperm(batches, generator=generator)][:steps]
