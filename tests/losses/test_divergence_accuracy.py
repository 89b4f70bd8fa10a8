"""How many digits float32 keeps between close models: here, in torch and in TRL."""

from __future__ import annotations

import pytest

from benchmarks.divergence_accuracy import DIVERGENCES, accuracy, close_pair, errors, kl
from compress.losses import KL


@pytest.mark.parametrize(
    ("distance", "value", "bound"),
    [(0.3, 5e-2, 1e-6), (0.03, 5e-4, 1e-6), (0.003, 5e-6, 2e-6), (0.0003, 5e-8, 5e-5)],
)
def test_kl_of_a_large_vocabulary(distance: float, value: float, bound: float) -> None:
    row = accuracy("kl", distance, rows=64, classes=40_000)
    assert row["value"] == pytest.approx(value, rel=0.2)
    errors = row["errors"]
    assert errors["here"][0] < bound
    assert errors["here"][1] == 0
    for other in ("torch", "trl_kernel", "trl_gkd"):
        assert errors[other][0] > 50 * errors["here"][0]


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize(("distance", "bound"), [(0.3, 2e-6), (0.003, 3e-6), (0.0003, 5e-5)])
def test_every_way_to_measure_keeps_its_digits(name: str, distance: float, bound: float) -> None:
    error, negative = accuracy(name, distance, rows=8, classes=40_000)["errors"]["here"]
    assert error < bound
    assert negative == 0


@pytest.mark.parametrize("temperature", [0.7, 3.0])
def test_a_temperature_costs_no_digits(temperature: float) -> None:
    student, teacher = close_pair(8, 40_000, 0.003)
    values = KL(temperature, reduction="none")(student, teacher)
    truth = kl(student.double() / temperature, teacher.double() / temperature)
    assert errors(values, truth) == (pytest.approx(0, abs=5e-6), 0)
