"""Tables as they are measured, beside whole models whose matrices are replaced one group at a time."""

from __future__ import annotations

import copy
import random
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from compress.codecs import codec
from compress.codecs.base import Codec
from compress.data.calibration import causal_batches
from compress.events import Events
from compress.modeling.structure import MatrixView, as_matrix, matrices
from compress.quantization.allocation import Evolve, Rates, Sensitivity, make_groups
from compress.quantization.allocation.choose import Data, Problem
from compress.quantization.allocation.course import Course, Subject
from compress.quantization.allocation.evolve import Assembly, State, evolve, mutated
from compress.quantization.allocation.groups import budget_of, cost
from compress.quantization.allocation.measure import measure, payload_name
from compress.quantization.allocation.source import BlocksInMemory, Resident
from compress.quantization.allocation.store import StoreInMemory
from compress.quantization.allocation.table import Table
from compress.quantization.options import Ldlq
from compress.transforms.signs import Signs
from tests import families

INTEGER = codec("integer", group=32)
CALIBRATION = causal_batches(families.token_ids(24, 96))
CALIBRATED = Ldlq()
MEASURED = causal_batches(families.token_ids(16, 140))


def subject_of(model: PreTrainedModel, method: Codec = INTEGER, rounding: Ldlq | None = CALIBRATED) -> Subject:
    views = matrices(model)
    return Subject(views, method, {view.name: Signs() for view in views}, rounding)


def measured(
    model: PreTrainedModel, store: StoreInMemory, subject: Subject | None = None, budget: int = 1 << 30
) -> Table:
    blocks = Resident(BlocksInMemory(model), budget)
    return measure(blocks, subject or subject_of(model), CALIBRATION, MEASURED, store, Events())


def with_matrices(model: PreTrainedModel, values: Mapping[MatrixView, Tensor]) -> PreTrainedModel:
    changed = copy.deepcopy(model)
    with torch.no_grad():
        for view, value in values.items():
            as_matrix(changed.get_parameter(view.parameter), view).copy_(value)
    return changed


def kl_of(model: PreTrainedModel, other: PreTrainedModel) -> float:
    """Mean KL(model || other) over all positions, from float64 softmax."""
    sums, count = 0.0, 0
    for batch in MEASURED:
        with torch.no_grad():
            p, q = (functional.log_softmax(one(**batch).logits.double(), -1) for one in (model, other))
        sums += float((p.exp() * (p - q)).sum())
        count += batch["input_ids"].numel()
    return sums / count


def decoded(subject: Subject, store: StoreInMemory, level: int) -> dict[MatrixView, Tensor]:
    return {
        view: subject.matrix(view, level, store.payloads(view.block)[payload_name(view, level)]).dequantize()
        for view in subject.views
    }


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    return families.llama(num_hidden_layers=3)


@pytest.fixture(scope="module")
def found(llama: PreTrainedModel) -> tuple[Table, StoreInMemory]:
    store = StoreInMemory()
    return measured(llama, store), store


def test_losses_are_those_of_models_with_one_group_rounded(
    llama: PreTrainedModel, found: tuple[Table, StoreInMemory]
) -> None:
    table, store = found
    subject = subject_of(llama)
    assert table.figure == "kl_divergence"
    assert table.losses.keys() == {view.group for view in subject.views}
    for place, level in ((0, 2), (2, 4)):
        values = decoded(subject, store, level)
        for group in table.losses:
            one = {view: value for view, value in values.items() if view.group == group}
            assert table.losses[group][place] == pytest.approx(kl_of(llama, with_matrices(llama, one)), rel=1e-3)
        assert table.together[place] == pytest.approx(kl_of(llama, with_matrices(llama, values)), rel=1e-3)
        for view, value in values.items():
            weight = as_matrix(llama.get_parameter(view.parameter), view).detach().double()
            error = (weight - value.double()).square().sum() / weight.square().sum()
            assert table.errors[view.name][place] == pytest.approx(float(error), rel=1e-6)


def test_rounding_is_calibrated(llama: PreTrainedModel, found: tuple[Table, StoreInMemory]) -> None:
    """With the moments of the inputs most groups lose less than when rounded to the nearest."""
    table, _ = found
    nearest = measured(llama, StoreInMemory(), subject_of(llama, rounding=None))
    better = sum(table.losses[group][1] < nearest.losses[group][1] for group in table.losses)
    assert better >= 0.75 * len(table.losses)
    assert table.together[1] < nearest.together[1]


def test_an_encoders_loss_is_that_of_its_embeddings() -> None:
    model, store = families.bert("BertModel"), StoreInMemory()
    lengths = [5, 9, 12, 12]
    mask = torch.tensor([[int(place < length) for place in range(12)] for length in lengths])
    batch = {"input_ids": families.token_ids(12, 4), "attention_mask": mask}
    subject = subject_of(model)
    table = measure(Resident(BlocksInMemory(model), 0), subject, CALIBRATION, [batch], store, Events())
    values = {view: value for view, value in decoded(subject, store, 3).items() if view.block == 1}
    first = table.losses[next(view.group for view in values)][1]
    group = {view: value for view, value in values.items() if view.group == next(iter(values)).group}

    def embeddings(one: PreTrainedModel) -> Tensor:
        with torch.no_grad():
            hidden = one(**batch).last_hidden_state.double()
        return (hidden * mask.unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True)

    cosine = functional.cosine_similarity(embeddings(model), embeddings(with_matrices(model, group)))
    assert table.figure == "cosine"
    assert first == pytest.approx(1 - float(cosine.mean()), rel=1e-3)


def test_memory_and_what_is_there_already_change_nothing(
    llama: PreTrainedModel, found: tuple[Table, StoreInMemory], monkeypatch: pytest.MonkeyPatch
) -> None:
    table, whole = found
    store = StoreInMemory()
    store.put(0, whole.payloads(0), whole.record(0))
    store.put(1, whole.payloads(1), whole.record(1))
    measured_blocks: list[int] = []
    put = StoreInMemory.put

    def note(self: StoreInMemory, index: int, *rest: Any) -> None:
        measured_blocks.append(index)
        put(self, index, *rest)

    monkeypatch.setattr(StoreInMemory, "put", note)
    assert measured(llama, store, budget=0) == table
    assert measured_blocks == [2]


def test_experts_and_mixed_matrices() -> None:
    """Experts are measured, rounded to the nearest; a model of which nothing can be run to its end refuses."""
    model = families.build("Qwen2MoeForCausalLM", "qwen2_moe", num_hidden_layers=1, shared_expert_intermediate_size=24)
    table = measured(model, StoreInMemory())
    assert any("expert" in group for group in table.losses)
    assert all(losses[0] > losses[-1] > 0 for losses in table.losses.values())


class TestEvolution:
    def assembly(self, model: PreTrainedModel, found: tuple[Table, StoreInMemory]) -> Assembly:
        subject = subject_of(model)
        course = Course(
            Resident(BlocksInMemory(model), 1 << 30), subject.views, causal_batches(families.token_ids(16, 300))
        )
        return Assembly(course, subject, *found)

    def test_assembled_models_are_whole_models(
        self, llama: PreTrainedModel, found: tuple[Table, StoreInMemory]
    ) -> None:
        table, store = found
        subject = subject_of(llama)
        values = decoded(subject, store, 3)
        course = Course(Resident(BlocksInMemory(llama), 0), subject.views, MEASURED)
        loss = Assembly(course, subject, table, store).loss(dict.fromkeys(table.losses, 3), range(course.count))
        assert loss == pytest.approx(kl_of(llama, with_matrices(llama, values)), rel=1e-3)

    def test_mutants_keep_the_budget(self, llama: PreTrainedModel, found: tuple[Table, StoreInMemory]) -> None:
        groups = make_groups(matrices(llama), INTEGER, {})
        budget = budget_of(groups, INTEGER, 4.9)
        widths, seen = dict.fromkeys(found[0].losses, 3), set()
        for number in range(200):
            widths = mutated(widths, groups, budget, found[0], random.Random(number))
            assert cost(groups, widths) <= budget
            seen.add(tuple(widths.values()))
        assert len(seen) > 50

    def test_never_worse_than_its_start_and_taken_up_again(
        self, llama: PreTrainedModel, found: tuple[Table, StoreInMemory]
    ) -> None:
        assembly, table = self.assembly(llama, found), found[0]
        groups = make_groups(matrices(llama), INTEGER, {})
        budget = budget_of(groups, INTEGER, 4.6)
        start = [dict.fromkeys(table.losses, 2)]
        options = Evolve(generations=3, offspring=6)
        states: list[State] = []

        def run(stopped: State | None = None, save: Any = states.append) -> State:
            return evolve(assembly, groups, budget, {}, start, table, options, 0, Events(), stopped, save)

        end = run()
        losses = [state.fitness for state in states]
        assert len(states) == 3
        assert losses == sorted(losses, reverse=True)
        assert end.fitness == pytest.approx(assembly.fitness(end.widths, range(assembly.batches)), rel=1e-6)
        assert end.fitness <= end.start == pytest.approx(assembly.fitness(start[0], range(assembly.batches)), rel=1e-6)
        assert cost(groups, end.widths) <= budget
        assert run(states[0], save=lambda state: None) == end

    def test_as_many_generations_as_the_time_holds(
        self, llama: PreTrainedModel, found: tuple[Table, StoreInMemory]
    ) -> None:
        store = StoreInMemory()
        for index in range(3):
            store.put(index, found[1].payloads(index), found[1].record(index))
        blocks, subject = Resident(BlocksInMemory(llama), 1 << 30), subject_of(llama)
        groups = make_groups(subject.views, INTEGER, {})
        data = Data(lambda: CALIBRATION, lambda: MEASURED, lambda: MEASURED)
        ask = (blocks, subject, groups, Rates(4.6))
        choice = Problem(*ask, Evolve(seconds=1e-6, offspring=2), data, store, 0, Events()).solve()
        assert choice.figures["generations"] == 1
        table = Problem(*ask, Sensitivity(), data, store, 0, Events()).solve()
        assert choice.figures["fitness"] <= choice.figures["fitness_uniform"]
        assert table.figures["predicted"] <= table.figures["predicted_uniform"]
