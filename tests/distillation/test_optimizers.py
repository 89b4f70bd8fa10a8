"""Optimizers and schedules against torch's own and closed forms."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from compress.distillation.optimizers import Combined, make_optimizer
from compress.distillation.schedules import ScheduleName, factor, make_schedule


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(7, 4)
        self.inner = nn.Linear(4, 6)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.inner(self.embedding(ids)).sum() + self.head(self.embedding(ids)).square().sum()


def trained(optimizers: list[torch.optim.Optimizer], model: Model, steps: int = 4) -> Model:
    for _ in range(steps):
        for optimizer in optimizers:
            optimizer.zero_grad()
        model(torch.arange(5)).backward()
        for optimizer in optimizers:
            optimizer.step()
    return model


def test_muon_gets_the_inner_matrices_and_adamw_the_rest() -> None:
    model, twin = Model(), Model()
    made = make_optimizer("muon", model, 1e-2, 0.1)
    assert isinstance(made, Combined)
    trained([made], model)
    muon = torch.optim.Muon([twin.inner.weight], lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    groups = [
        {"params": [twin.embedding.weight], "weight_decay": 0.1},
        {"params": [twin.inner.bias], "weight_decay": 0.0},
    ]
    trained([muon, torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95))], twin)
    for (name, got), want in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert torch.equal(got, want), name


def test_state_survives_a_round_trip() -> None:
    whole = Model()
    trained([make_optimizer("muon", whole, 1e-2, 0.1)], whole, 6)
    broken = Model()
    first = make_optimizer("muon", broken, 1e-2, 0.1)
    trained([first], broken, 3)
    second = make_optimizer("muon", broken, 1e-2, 0.1)
    second.load_state_dict(first.state_dict())
    trained([second], broken, 3)
    for got, want in zip(broken.parameters(), whole.parameters(), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize(
    ("name", "progress", "want"),
    [
        ("constant", 0.7, 1.0),
        ("linear", 0.25, 0.75),
        ("linear", 1.5, 0.0),
        ("cosine", 0.5, 0.5),
        ("cosine", 1 / 3, 0.5 * (1 + math.cos(math.pi / 3))),
        ("wsd", 0.5, 1.0),
        ("wsd", 0.9, 0.5),
    ],
)
def test_schedule_is_its_closed_form(name: ScheduleName, progress: float, want: float) -> None:
    assert factor(name, progress) == pytest.approx(want)


def test_a_clock_that_runs_ahead_brings_the_rate_down() -> None:
    clock = [0.0]
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=2.0)
    schedule = make_schedule(optimizer, "linear", steps=100, warmup_steps=1, elapsed_part=lambda: clock[0])
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1.0)
    optimizer.step()
    clock[0] = 0.75
    schedule.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.5)
