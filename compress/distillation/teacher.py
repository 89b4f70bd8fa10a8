"""Where the teacher's signal comes from. A loss cannot tell one source from another."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor, nn


class TeacherSignal(Protocol):
    """Gives the teacher's logits [B, T, V] for the inputs of a batch, without gradient."""

    def __call__(self, inputs: Mapping[str, Tensor]) -> Tensor: ...


class OnlineTeacher:
    """A teacher that runs beside the student, in evaluation mode, with its parameters frozen."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model.eval().requires_grad_(False)

    def to(self, device: torch.device) -> OnlineTeacher:
        self.model.to(device)
        return self

    @torch.no_grad()
    def __call__(self, inputs: Mapping[str, Tensor]) -> Tensor:
        return self.model(**inputs, use_cache=False).logits
