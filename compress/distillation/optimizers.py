"""The optimizers of the trainer.

`adamw` is AdamW. `muon` gives the matrices inside the model to Muon (Jordan et al. 2024: the momentum of each matrix is
replaced by its nearest orthogonal matrix, found by a Newton-Schulz iteration) and everything else (embeddings, norms,
biases) to AdamW, with one learning rate for both: the update of Muon is scaled to the root mean square of an AdamW
update (Liu et al. 2025, "Muon is scalable for LLM training", section 2.2, who report about half the training compute
of AdamW for the same loss).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import nn
from torch.optim import AdamW, Muon, Optimizer
from transformers import PreTrainedModel

OptimizerName = Literal["adamw", "muon"]
BETAS = (0.9, 0.95)


class Combined(Optimizer):
    """Several optimizers as one: their groups are stepped together, and a scheduler sees and sets all of them."""

    def __init__(self, parts: dict[str, Optimizer]) -> None:
        self.parts = parts
        groups = [group for part in parts.values() for group in part.param_groups]
        super().__init__(groups, {})
        self.param_groups = groups

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for part in self.parts.values():
            part.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        for part in self.parts.values():
            part.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        return {name: part.state_dict() for name, part in self.parts.items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for name, part in self.parts.items():
            part.load_state_dict(state_dict[name])
        self.param_groups = [group for part in self.parts.values() for group in part.param_groups]


def make_optimizer(
    name: OptimizerName,
    model: nn.Module,
    learning_rate: float,
    weight_decay: float,
    others: Iterable[nn.Parameter] = (),
) -> Optimizer:
    """The optimizer `name` over the trainable parameters of `model`, and AdamW without weight decay over `others` (what
    losses own). Vectors (norms, biases) get no weight decay."""
    trainable = [(key, parameter) for key, parameter in model.named_parameters() if parameter.requires_grad]
    outer = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    if isinstance(model, PreTrainedModel) and isinstance(model.get_output_embeddings(), nn.Linear):
        outer.add(id(model.get_output_embeddings().weight))
    matrices = [p for _, p in trainable if name == "muon" and p.ndim == 2 and id(p) not in outer]
    taken = {id(p) for p in matrices}
    rest = [p for _, p in trainable if id(p) not in taken]
    groups = [*_decay_groups(rest, weight_decay), {"params": list(others), "weight_decay": 0.0}]
    adamw = AdamW([group for group in groups if group["params"]], lr=learning_rate, betas=BETAS)
    if not matrices:
        return adamw
    muon = Muon(matrices, lr=learning_rate, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
    return Combined({"muon": muon, "adamw": adamw})


def _decay_groups(parameters: Iterable[nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    all_of = list(parameters)
    return [
        {"params": [p for p in all_of if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in all_of if p.ndim < 2], "weight_decay": 0.0},
    ]
