"""Calibrated rounding in memory. The oracle runs the models in float64 and keeps what each linear map gets."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import compress
from compress.codecs import Codec, codec
from compress.errors import NumericsError
from compress.events import Event, Events
from compress.modeling.stack import Batch
from compress.modeling.structure import MatrixView, find_blocks, matrices
from compress.quantization.activations import ChunkedActivations
from compress.quantization.allocation import uniform
from compress.quantization.blocks import by_block
from compress.quantization.calibrated import BlockInputs, Calibration
from compress.quantization.groups import Scheme
from compress.quantization.matrix import MatrixReport
from compress.quantization.modules import packed_modules
from compress.quantization.options import Ldlq
from compress.transforms.incoherence import view_signs
from compress.transforms.signs import Signs
from tests import families

HALF = codec("half_pyramid")
Weights = Mapping[str, Tensor]


def batches(family: str, seed: int = 0) -> list[Batch]:
    """Rows of tokens that follow one another by a rule with exceptions; those of an encoder are filled up."""
    draw = torch.Generator().manual_seed(seed)
    steps = torch.randint(0, 4, (8, 24), generator=draw)
    ids = (torch.randint(0, 96, (8, 1), generator=draw) + (7 * steps).cumsum(1)) % 96
    if family != "bert":
        return [{"input_ids": ids[:5]}, {"input_ids": ids[5:]}]
    lengths = torch.randint(5, 24, (8, 1), generator=draw)
    mask = (torch.arange(24) < lengths).long()
    return [{"input_ids": part, "attention_mask": own} for part, own in zip(ids.split(5), mask.split(5), strict=True)]


def build(family: str, **changes: Any) -> Any:
    return families.llama(**changes) if family == "llama" else families.bert(**changes)


def calibrate(
    model: Any, data: Sequence[Batch], options: Ldlq, bits: float = 3.25
) -> tuple[dict[str, MatrixReport], dict[str, Tensor]]:
    """Round all blocks of `model`, which stays as it is: reports and decoded weights by matrix."""
    views = matrices(model)
    scheme = Scheme(HALF, uniform(views, HALF, bits), {view.name: Signs() for view in views}, options)
    calibration = Calibration.in_memory(model, data, scheme)
    blocks = [copy.deepcopy(block).requires_grad_(False) for _, block in find_blocks(model)]
    inputs, reports, weights = calibration.record_inputs(copy.deepcopy(blocks[0])), {}, {}
    for index, own in enumerate(by_block(views)):
        for view, matrix, report in calibration.round_block(index, blocks[index], own, inputs):
            reports[view.name], weights[view.name] = report, matrix.dequantize()
        inputs = calibration.carry_on(index, blocks[index], inputs)
    return reports, weights


def inputs(model: Any, data: Sequence[Batch], views: Sequence[MatrixView], weights: Weights) -> dict[str, Tensor]:
    """What each matrix gets, float64 [tokens, n] without filling, when the model has `weights` in place of its own."""
    model = copy.deepcopy(model).double()
    for name, weight in weights.items():
        model.get_submodule(name).weight.data = weight.double()
    found: dict[str, list[Tensor]] = {view.name: [] for view in views}
    mask: Tensor | None = None

    def keep(name: str) -> Any:
        return lambda module, args: found[name].append(
            args[0][mask if mask is not None else slice(None)].flatten(0, -2)
        )

    for view in views:
        model.get_submodule(view.module).register_forward_pre_hook(keep(view.name))
    with torch.no_grad():
        for batch in data:
            mask = batch["attention_mask"].bool() if "attention_mask" in batch else None
            model(**batch)
    return {name: torch.cat(parts) for name, parts in found.items()}


def relative_error(x: Tensor, weight: Tensor, rounded: Tensor) -> float:
    wanted = x @ weight.double().T
    return float((wanted - x @ rounded.double().T).square().sum() / wanted.square().sum())


def before(view: MatrixView, sequential: str, weights: Weights, views: Sequence[MatrixView]) -> Weights:
    """The weights that are rounded already when the inputs of `view` are taken. Those of the same block count with
    "matrix": what comes after `view` in its block does not change what it gets."""
    if sequential == "nothing":
        return {}
    last = view.block if sequential == "block" else view.block + 1
    return {other.name: weights[other.name] for other in views if other.block < last}


@pytest.mark.parametrize("sequential", ["matrix", "block", "nothing"])
@pytest.mark.parametrize("family", ["llama", "bert"])
def test_reported_errors_are_those_of_the_outputs(family: str, sequential: Any) -> None:
    model, data = build(family), batches(family)
    views = matrices(model)
    options = Ldlq(sequential=sequential, asymmetric=0.0 if sequential == "nothing" else 1.0)
    reports, weights = calibrate(model, data, options)
    tokens = sum(int(batch.get("attention_mask", torch.ones_like(batch["input_ids"])).sum()) for batch in data)
    for view in views:
        given = inputs(model, data, [view], before(view, sequential, weights, views))[view.name]
        report = reports[view.name]
        expected = relative_error(given, model.get_parameter(view.parameter).detach(), weights[view.name])
        assert report.relative_error == pytest.approx(expected, rel=1e-3), view.name
        assert report.status == "calibrated" and report.calibration is not None
        assert len(given) == report.calibration["tokens"] == tokens
        assert report.calibration["damping"] == pytest.approx(0.01)
        assert report.calibration["dead_channels"] == report.calibration["broken_channels"] == 0
    assert list(reports) != [] and reports.keys() == {view.name for view in views}


def test_each_way_of_taking_inputs_gives_other_weights() -> None:
    model, data = build("llama"), batches("llama")
    ways = [calibrate(model, data, Ldlq(sequential=way, asymmetric=0.0))[1] for way in ("matrix", "block", "nothing")]
    last = "model.layers.1.mlp.down_proj"
    first = "model.layers.0.self_attn.q_proj"
    assert all(torch.equal(way[first], ways[0][first]) for way in ways)
    assert not any(torch.equal(one[last], other[last]) for one, other in ((ways[0], ways[1]), (ways[1], ways[2])))


@pytest.mark.parametrize("sequential", ["matrix", "block"])
def test_memory_does_not_change_the_result(sequential: Any, tmp_path: Path) -> None:
    """Inputs that are found again, because they were not kept, are those that were there at first."""
    model, data = build("llama"), batches("llama")
    views = matrices(model)
    scheme = Scheme(
        HALF,
        uniform(views, HALF, 3.25),
        {view.name: Signs() for view in views},
        Ldlq(sequential=sequential, asymmetric=0),
    )
    found = []
    for budget in (0, 40_000, 1 << 30):
        calibration = Calibration(
            model, data, scheme, torch.device("cpu"), budget, lambda *place: tmp_path / str(place)
        )
        block = copy.deepcopy(find_blocks(model)[0][1]).requires_grad_(False)
        rounded = calibration.round_block(0, block, by_block(views)[0], calibration.record_inputs(copy.deepcopy(block)))
        found.append({view.name: matrix.payload() for view, matrix, _ in rounded})
    assert all(torch.equal(one[name], found[-1][name]) for one in found for name in one)


def one_block(
    options: Ldlq, bits: float, method: Codec = HALF, noise: float = 0.3
) -> tuple[Any, dict[str, Tensor], Tensor, Tensor]:
    """Round the first block of a tiny Llama for inputs that differ from the original ones by `noise`: the model, the
    decoded weights, the original inputs of query, key and value, and those that there are, float64."""
    model, data = build("llama"), batches("llama")
    views = by_block(matrices(model))[0]
    scheme = Scheme(method, uniform(views, method, bits), {view.name: Signs() for view in views}, options)
    calibration = Calibration.in_memory(model, data, scheme)
    block = copy.deepcopy(find_blocks(model)[0][1]).requires_grad_(False)
    original = calibration.record_inputs(copy.deepcopy(block)).rounded
    changed = ChunkedActivations({0: original.shapes}, 1 << 20, lambda chunk: None)
    draw = torch.Generator().manual_seed(5)
    for index, shape in enumerate(original.shapes):
        hidden = original.read(index, torch.device("cpu"))
        changed.write(hidden + noise * hidden.std() * torch.randn(shape, generator=draw))
    norm = copy.deepcopy(model.model.layers[0].input_layernorm)

    def read(stream: ChunkedActivations) -> Tensor:
        with torch.no_grad():
            return torch.cat(
                [norm(stream.read(i, torch.device("cpu"))).flatten(0, 1) for i in range(len(data))]
            ).double()

    x, target = read(changed), read(original)
    both = BlockInputs(changed, original if options.asymmetric else None)
    weights = {view.name: matrix.dequantize() for view, matrix, _ in calibration.round_block(0, block, views, both)}
    return model, weights, target, x


@pytest.mark.parametrize("bits", [2.5, 3.25, 5.0])
def test_asymmetric_aims_at_the_original_outputs(bits: float) -> None:
    """||W X' - V X|| falls from 0 to 1/2 to 1, for inputs X that are the same in all runs."""
    losses = []
    for asymmetric in (0.0, 0.5, 1.0):
        model, weights, target, x = one_block(Ldlq(asymmetric=asymmetric), bits)
        total = 0.0
        for name in ("q_proj", "k_proj", "v_proj"):
            weight = model.get_parameter(f"model.layers.0.self_attn.{name}.weight").detach().double()
            total += float(
                (target @ weight.T - x @ weights[f"model.layers.0.self_attn.{name}"].double().T).square().sum()
            )
        losses.append(total)
    assert losses[2] < losses[1] < losses[0]


def test_asymmetric_without_rounding_is_least_squares() -> None:
    """At 8 bits and with little damping V X is that of the solution of min ||W X' - V X||, here by QR in float64."""
    model, weights, target, x = one_block(Ldlq(asymmetric=1.0, damping=1e-6), 8.53, codec("integer", group=32))
    weight = model.get_parameter("model.layers.0.self_attn.q_proj.weight").detach().double()
    best = torch.linalg.lstsq(x, target @ weight.T).solution.T
    found = weights["model.layers.0.self_attn.q_proj"].double()
    assert (x @ (found - best).T).norm() < 0.01 * (x @ best.T).norm()
    assert (x @ (weight - best).T).norm() > 0.1 * (x @ best.T).norm()


def with_spare_map(model: Any) -> Any:
    """The model with a linear map in each block that is never called."""
    for _, block in find_blocks(model):
        block.add_module("spare", nn.Linear(32, 32))
    return model


def test_a_map_that_is_never_called() -> None:
    data = batches("llama")
    with pytest.raises(NumericsError, match=r"layers\.0\.spare' cannot be calibrated: never called") as caught:
        calibrate(with_spare_map(build("llama")), data, Ldlq())
    assert "fallback=nearest" in caught.value.remedy
    model = with_spare_map(build("llama"))
    reports, weights = calibrate(model, data, Ldlq(fallback="nearest"))
    for index in (0, 1):
        name = f"model.layers.{index}.spare"
        assert reports[name].status == "nearest (never called)"
        weight = model.get_parameter(f"{name}.weight").detach()
        spec = uniform(matrices(model), HALF, 3.25)[name]
        assert torch.equal(weights[name], HALF.quantize(weight, spec).dequantize())
        assert reports[name].relative_error == pytest.approx(
            float((weights[name] - weight).square().sum() / weight.square().sum())
        )
    assert {report.status for name, report in reports.items() if "spare" not in name} == {"calibrated"}


def test_an_indefinite_hessian(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sum of squares is never indefinite but by rounding; so one is made."""
    from compress.quantization import groups

    factorize = groups.factorize

    def spoiled(hessian: Tensor, damping: float, name: str) -> Any:
        if "up_proj" in name or "gate_proj" in name:
            hessian[3, 3] = -100 * hessian.diagonal().mean()
        return factorize(hessian, damping, name)

    monkeypatch.setattr(groups, "factorize", spoiled)
    data = batches("llama")
    with pytest.raises(NumericsError, match=r"layers\.0\.mlp\.(gate|up)_proj' is indefinite") as caught:
        calibrate(build("llama"), data, Ldlq())
    assert "damping" in caught.value.remedy
    reports, _ = calibrate(build("llama"), data, Ldlq(fallback="nearest"))
    assert {name.rpartition(".")[2]: report.status for name, report in reports.items()} == {
        **dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj", "down_proj"), "calibrated"),
        **dict.fromkeys(("gate_proj", "up_proj"), "nearest (indefinite Hessian)"),
    }


def test_dead_channels_are_reported() -> None:
    model = build("llama")
    model.model.layers[1].input_layernorm.weight.data[[3, 8, 9]] = 0
    reports, _ = calibrate(model, batches("llama"), Ldlq())
    dead = {name: report.calibration["dead_channels"] for name, report in reports.items() if report.calibration}
    assert {name for name, count in dead.items() if count == 3} == {
        f"model.layers.1.self_attn.{name}_proj" for name in "qkv"
    }
    assert sum(dead.values()) == 9


def drift(model: Any, original: Any, data: Sequence[Batch]) -> float:
    """Mean square of what changed in the outputs, over that of the outputs, without filling."""
    change = energy = 0.0
    with torch.no_grad():
        for batch in data:
            mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
            wanted, found = original(**batch)[0][mask], model(**batch)[0][mask]
            change += float((found - wanted).double().square().sum())
            energy += float(wanted.double().square().sum())
    return change / energy


@pytest.mark.parametrize("transform", ["none", "hadamard"])
@pytest.mark.parametrize("family", ["llama", "bert"])
def test_outputs_are_closer_than_with_rounding_to_the_nearest(family: str, transform: Any) -> None:
    """On tokens that calibration has not seen, for each of three draws of them; in the mean by a fifth."""
    original = build(family)
    ratios = []
    for seed in range(3):
        held_out = batches(family, 100 + seed)
        data = [batch for part in range(4) for batch in batches(family, 4 * seed + part)]
        drifts = [
            drift(compress.quantize(copy.deepcopy(original), transform=transform, data=given), original, held_out)
            for given in (None, data)
        ]
        ratios.append(drifts[1] / drifts[0])
    assert max(ratios) < 1
    assert sum(ratios) / 3 < 0.8


@pytest.mark.parametrize("transform", ["none", "hadamard"])
@pytest.mark.parametrize("family", ["llama", "bert"])
def test_saved_and_loaded(family: str, transform: Any, tmp_path: Path) -> None:
    model = build(family, tie_word_embeddings=True)
    events: list[Event] = []
    data = batches(family)
    quantized = compress.quantize(model, data=data, transform=transform, events=Events([events.append]))
    assert quantized is model
    mixings = {module.spec.mixing for module in packed_modules(model).values()}
    assert (mixings == {"none"}) == (transform == "none")
    steps = [event.data for event in events if event.kind == "step"]
    assert [step["index"] for step in steps] == [1, 2] and all(0 < step["relative_error"] < 0.1 for step in steps)
    model.save_pretrained(tmp_path)
    auto = transformers.AutoModelForCausalLM if family == "llama" else transformers.AutoModelForMaskedLM
    again = auto.from_pretrained(tmp_path)
    for batch in batches(family, 7):
        with torch.no_grad():
            torch.testing.assert_close(again(**batch)[0], model(**batch)[0], rtol=1e-5, atol=1e-5)


def test_options_reach_the_rounding() -> None:
    """Each way of rounding that differs from the default one gives other weights."""
    model, data = build("llama"), batches("llama")
    default = Ldlq()
    others = [
        replace(default, damping=0.5),
        replace(default, sweeps=0),
        replace(default, order=False),
        replace(default, search=False),
        replace(default, gain="norm"),
        replace(default, refit=True),
        replace(default, asymmetric=0.0),
    ]
    weights = [calibrate(model, data, options)[1] for options in (default, default, *others)]
    name = "model.layers.1.mlp.down_proj"
    assert torch.equal(weights[0][name], weights[1][name])
    assert not any(torch.equal(weights[0][name], other[name]) for other in weights[2:])


def test_an_attention_and_an_mlp_side_by_side_have_their_own_signs() -> None:
    """Both read one tensor, mixed by each in its way: the Hessian of the one says nothing to the other."""
    model = families.build("CohereForCausalLM", "cohere", pad_token_id=0, bos_token_id=1, eos_token_id=2)
    model.requires_grad_(False)
    data, views = batches("llama"), [view for view in matrices(model) if view.block == 0]
    signs = {view.name: view_signs(view, "both", 0) for view in views}
    scheme = Scheme(HALF, uniform(views, HALF, 4.0), signs, Ldlq(asymmetric=0.0))
    calibration, block = Calibration.in_memory(model, data, scheme), copy.deepcopy(find_blocks(model)[0][1])
    inputs_of_block = calibration.record_inputs(copy.deepcopy(block))
    found = {one[0].name: one for one in calibration.round_block(0, block, views, inputs_of_block)}
    names = ["model.layers.0.self_attn.q_proj", "model.layers.0.mlp.gate_proj"]
    given = inputs(model, data, [found[name][0] for name in names], {})
    assert torch.equal(given[names[0]], given[names[1]])
    for name in names:
        view, matrix, report = found[name]
        weight = model.get_parameter(view.parameter)
        expected = relative_error(given[name], weight, matrix.dequantize())
        assert report.relative_error == pytest.approx(expected, rel=1e-3), name
