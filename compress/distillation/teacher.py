"""Where the teacher's signal comes from. A loss cannot tell one source from another."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from compress.losses.fused import Head
from compress.modeling.head import head_of


@dataclass(frozen=True)
class Signal:
    """What a teacher makes of a batch; nothing at all without a teacher.

    Either `logits`, [B, T, V] or [B, C], with `features`, the hidden states from the embedding to the last layer, when
    they are asked for; or, for a loss that makes the logits itself, the last hidden state [B, T, H] and the `head`.
    """

    logits: Tensor | None = None
    features: tuple[Tensor, ...] = ()
    hidden: Tensor | None = None
    head: Head | None = None


class TeacherSignal(Protocol):
    """Gives what the teacher makes of the inputs of a batch, without gradient."""

    def __call__(self, inputs: Mapping[str, Tensor], features: bool = False) -> Signal: ...

    def before_head(self, inputs: Mapping[str, Tensor]) -> Signal:
        """The last hidden state and the head, instead of the logits."""
        ...


class OnlineTeacher:
    """A teacher that runs beside the student, in evaluation mode, with its parameters frozen."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model: PreTrainedModel = model.eval().requires_grad_(False)
        self.caching = {"use_cache": False} if model.can_generate() else {}
        self.head: Head | None = None

    def to(self, device: torch.device) -> OnlineTeacher:
        self.model.to(device)  # type: ignore[arg-type]
        return self

    @torch.no_grad()
    def __call__(self, inputs: Mapping[str, Tensor], features: bool = False) -> Signal:
        outputs = self.model(**inputs, **self.caching, output_hidden_states=features)
        return Signal(outputs.logits, tuple(outputs.hidden_states) if features else ())

    @torch.no_grad()
    def before_head(self, inputs: Mapping[str, Tensor]) -> Signal:
        if self.head is None:
            self.head = head_of(self.model)
        outputs = self.model.base_model(**inputs, **self.caching)
        return Signal(hidden=outputs.last_hidden_state, head=self.head)
