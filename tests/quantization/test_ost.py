"""Learned transforms: they lower what they are to lower, can be stopped anywhere, and go with every codec."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from torch.nn import functional

import compress
from compress.codecs import codec
from compress.codecs.registry import codec_names
from compress.errors import ModelError, NumericsError, UsageError
from compress.events import Event, Events, Listener
from compress.formats.native import Artifact
from compress.modeling.loading import load_model
from compress.modeling.structure import matrices
from compress.quantization import ost
from compress.quantization.allocation import uniform
from compress.quantization.dynamic import Dynamic, dynamic_quantization
from compress.quantization.learning import Learner, Progress, draw_order
from compress.quantization.looped import LoopedModel
from compress.quantization.modules import packed_modules
from compress.quantization.options import Ldlq, Nearest
from compress.quantization.ost import Learned, frozen, learn_basis, rows_of
from compress.quantization.rounders import CalibrationOptions
from compress.quantization.run import quantize_checkpoint
from compress.quantization.target import open_target
from compress.quantization.transforms import Ost, parse_transform
from compress.recipe import make_recipe
from compress.transforms.incoherence import online_mixing, view_signs
from compress.transforms.learned import PARTS, is_rotation, starting_tensors
from compress.transforms.probe import proven_scalings, proven_sites
from compress.workspace import Workspace
from tests import families
from tests.quantization.test_calibrated_checkpoint import Killed, assert_same_payloads, contents, damage
from tests.tiny_models import write_llama, write_text

IDS = families.token_ids(12, 8)
NEAREST = Nearest()
ROWS = [{"input_ids": part} for part in IDS.split(4)]
OUTLIERS = [3, 11, 20]
INTEGER = codec("integer", group=0, symmetric=True, clip=False)


def outliers(gates: float = 1.0) -> Any:
    """A Llama of one block whose norms put out three channels 30 times as large, which what reads them divides; so for
    the up projection with `gates`: the same function as without."""
    model: Any = families.llama(num_hidden_layers=1)
    block = model.model.layers[0]
    attention, mlp = block.self_attn, block.mlp
    readers = {
        block.input_layernorm: [attention.q_proj, attention.k_proj, attention.v_proj],
        block.post_attention_layernorm: [mlp.gate_proj, mlp.up_proj],
    }
    with torch.no_grad():
        for norm, linears in readers.items():
            norm.weight.fill_(1.0)[OUTLIERS] *= 30
            for linear in linears:
                linear.weight[:, OUTLIERS] /= 30
        model.model.norm.weight.fill_(1.0)
        mlp.up_proj.weight[OUTLIERS] *= gates
        mlp.down_proj.weight[:, OUTLIERS] /= gates
    return model


def held_out_kl(transform: str, gates: float, seed: int) -> float:
    """KL(p || q) in nats of W4A4 on rows that were not learned from."""
    generator = torch.Generator().manual_seed(5)
    rows, held = torch.randint(0, 96, (48, 24), generator=generator).split([32, 16])
    model = outliers(gates)
    plain = families.logits(model, held).double().log_softmax(-1)
    data = rows if transform.startswith("ost") else None
    compress.quantize(model, bits=5.3, codec=INTEGER, rounding="nearest", transform=transform, data=data, seed=seed)
    with dynamic_quantization(model, Dynamic.of_bits(4)):
        found = families.logits(model, held).double().log_softmax(-1)
    return float((plain.exp() * (plain - found)).sum(-1).mean())


@pytest.mark.parametrize(
    ("options", "gates", "part"),
    [
        ("rotation_rate=0.05,scale_rate=0.1", 30.0, 0.5),
        ("rotation_rate=0,scale_rate=0.1", 30.0, 0.5),
        ("rotation_rate=0.05,scale_rate=0", 1.0, 0.92),
    ],
    ids=["both", "scalings", "rotations"],
)
def test_outliers_are_learned_away(options: str, gates: float, part: float) -> None:
    """30 steps with W4A4 in the loop against the mixing that they start at, which is no better than nothing, or far."""
    mixed = held_out_kl("hadamard", gates, seed=1)
    assert held_out_kl(f"ost:steps=30,activations=4,{options}", gates, seed=1) < part * mixed


def learned(options: str, seed: int = 0, model: Any = None, listener: Listener | None = None, **more: Any) -> Learned:
    """Of a Llama of one block, with 4-bit integers."""
    model = families.llama(num_hidden_layers=1) if model is None else model
    views, transform = matrices(model), parse_transform(f"ost:batch=4,{options}")
    assert isinstance(transform, Ost)
    specs = uniform(views, INTEGER, 5.3)
    events = Events([] if listener is None else [listener])
    return learn_basis(model, views, transform, INTEGER, specs, ROWS, seed, events, **more)


def same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


@pytest.mark.parametrize("options", ["steps=19,rotation_rate=0.1", "steps=6,rotation_rate=1,optimizer=cayley"])
def test_rotations_stay_rotations(options: str) -> None:
    found = learned(f"activations=4,kv=4,{options}", model=outliers()).tensors
    start = learned("steps=1,rotation_rate=0,scale_rate=0", model=outliers()).tensors
    rotations = [name for name in found if is_rotation(name)]
    assert len(rotations) == 2 and len(found) == 7
    for name in rotations:
        rotation = found[name].double()
        eye = torch.eye(rotation.shape[-1], dtype=torch.float64)
        assert float((rotation.mT @ rotation - eye).abs().max()) <= 1e-5
    for name, tensor in found.items():
        assert float((tensor - start[name]).abs().max()) > 1e-3, name


def test_the_same_seed_gives_the_same_bits() -> None:
    options = "steps=3,activations=4"
    first = learned(options, seed=3)
    assert same(first.tensors, learned(options, seed=3).tensors)
    assert not same(first.tensors, learned(options, seed=4).tensors)


@pytest.mark.parametrize("part", PARTS)
def test_a_part_alone(part: str) -> None:
    """What is not learned has no tensor; what is gets away from where it started."""
    others = ",".join(f"{other}=false" for other in PARTS if other != part)
    moved = learned(f"steps=3,activations=4,kv=4,{others}").tensors
    start = learned(f"steps=1,rotation_rate=0,scale_rate=0,{others}").tensors
    endings = {
        "residual": ("residual.rotation",),
        "values": ("v_proj.rotation",),
        "norms": ("layernorm.scaling",),
        "value_scales": ("v_proj.scaling",),
        "gates": ("up_proj.scaling",),
        "queries": ("k_proj.scaling",),
    }
    assert moved and all(name.endswith(endings[part]) for name in moved)
    assert all(float((tensor - start[name]).abs().max()) > 1e-3 for name, tensor in moved.items())


def test_figures_are_those_of_the_steps() -> None:
    events: list[Event] = []
    figures = learned("steps=20,activations=4", listener=events.append).figures
    steps = [event.data for event in events if event.kind == "step"]
    losses = [step["loss"] for step in steps]
    assert [(step["stage"], step["index"], step["total"]) for step in steps] == [("learn", i, 20) for i in range(1, 21)]
    assert figures["steps"] == 20
    assert figures["first_loss"] == pytest.approx(sum(losses[:2]) / 2, rel=1e-12)
    assert figures["last_loss"] == pytest.approx(sum(losses[-2:]) / 2, rel=1e-12)
    assert all(0 < loss < 10 for loss in losses)


def test_the_first_loss_is_the_kl_of_the_start() -> None:
    """All classes, and the two rows that the seed draws first: KL against the model that is mixed alone."""
    events: list[Event] = []
    learned("steps=2,k=96,activations=4", listener=events.append)
    model = families.llama(num_hidden_layers=1)
    ids = ROWS[draw_order(2, 2, 0)[0]]["input_ids"]
    plain = families.logits(model, ids).log_softmax(-1)
    compress.quantize(model, bits=5.3, codec=INTEGER, transform="hadamard")
    with dynamic_quantization(model, Dynamic.of_bits(4)):
        found = families.logits(model, ids).log_softmax(-1)
    expected = functional.kl_div(found, plain, log_target=True, reduction="sum") / ids.numel()
    loss = next(event.data["loss"] for event in events if event.kind == "step")
    assert loss == pytest.approx(float(expected), rel=1e-3)


def first_loss(options: str) -> float:
    loss = learned(f"steps=1,activations=4,{options}").figures["first_loss"]
    assert isinstance(loss, float)
    return loss


@pytest.fixture(scope="module")
def whole() -> float:
    """The KL over all classes at the first step."""
    return first_loss("k=96")


@pytest.mark.parametrize("tail", ["residual", "partial", "renormalised", "conditional"])
def test_every_tail(tail: str, whole: float) -> None:
    """With all classes, or more than there are, the four are one."""
    assert first_loss(f"k=5,tail={tail}") != pytest.approx(whole, rel=0.01)
    assert first_loss(f"k=96,tail={tail}") == pytest.approx(whole, rel=1e-5)
    assert first_loss(f"k=1000,tail={tail}") == pytest.approx(whole, rel=1e-5)


def test_other_options() -> None:
    """Each makes a difference, and none breaks anything."""
    plain = learned("steps=2").tensors
    for options in ("start=womi", "optimizer=cayley", "online=false", "weights=false,activations=8"):
        found = learned(f"steps=2,{options}").tensors
        assert found.keys() == plain.keys() and not same(found, plain), options
        assert all(bool(tensor.isfinite().all()) for tensor in found.values()), options


@pytest.mark.parametrize("trained", [True, False])
def test_the_model_is_as_it_was(trained: bool) -> None:
    model = families.llama(num_hidden_layers=1).requires_grad_(trained)
    model.model.norm.weight.requires_grad_(not trained)
    before = {name: (one.clone(), one.requires_grad) for name, one in model.named_parameters()}

    def stop(event: Event) -> None:
        if event.kind == "step" and event.data["index"] == 2:
            raise Killed

    learned("steps=2,activations=4,kv=4", model=model)
    with pytest.raises(Killed):
        learned("steps=3,activations=4,kv=4", model=model, listener=stop)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name][0]) and parameter.requires_grad == before[name][1]
        assert parameter.grad is None
    with pytest.raises(Killed), frozen(model):
        assert not any(parameter.requires_grad for parameter in model.parameters())
        raise Killed
    assert all(parameter.requires_grad == before[name][1] for name, parameter in model.named_parameters())


def make_learner(options: Ost) -> Learner:
    model = families.llama(num_hidden_layers=1).requires_grad_(False)
    views, sites, scalings = matrices(model), proven_sites(model), proven_scalings(model)
    mixing = online_mixing(views, sites)
    signs = {view.name: view_signs(view, mixing[view.name], 0) for view in views}
    looped = LoopedModel(model, views, signs, INTEGER, uniform(views, INTEGER, 5.3, mixing), options.dynamic)
    tensors = starting_tensors(sites, scalings, model.get_parameter, options.start, 0, options.parts)
    return Learner(looped, sites, scalings, tensors, options, 0)


@pytest.mark.parametrize(("optimizer", "stopped"), [("adam", 4), ("cayley", 1)])
def test_a_learner_goes_on(optimizer: Any, stopped: int) -> None:
    """Through tensors by name alone, as they are stored; what was taken does not change with the learner."""
    options = Ost(steps=6, optimizer=optimizer, activations=4)
    whole = make_learner(options)
    expected = whole.learn(ROWS, lambda step, loss: None)
    first, taken = make_learner(options), list[Progress]()

    def stop(step: int, loss: float) -> None:
        if step == stopped:
            taken.append(first.progress())
        if step == stopped + 1:
            raise Killed

    with pytest.raises(Killed):
        first.learn(ROWS, stop)
    again, seen = make_learner(options), list[int]()
    stored = {**taken[0].tensors, **taken[0].state}
    again.restore(Progress.of(stored, taken[0].step, taken[0].losses))
    assert again.step == stopped
    found = again.learn(ROWS, lambda step, loss: seen.append(step))
    assert seen == list(range(stopped + 1, 7))
    assert same(found, expected)
    assert again.figures() == whole.figures()
    assert again.progress().losses == whole.progress().losses
    assert same(again.progress().state, whole.progress().state)


LEARN = "ost:steps=6,batch=4,activations=4"


def quantize(
    source: Path, out: Path, listener: Listener | None = None, transform: str = LEARN, rounding: Any = NEAREST
) -> dict[str, Any]:
    """The checkpoint, with a work folder beside `out`."""
    chosen = parse_transform(transform)
    target = open_target(source, transform=chosen)
    specs = uniform(target.views, INTEGER, 5.3, target.mixing)
    options = CalibrationOptions(IDS, rounding)
    events = Events([] if listener is None else [listener])
    with Workspace.open(out.with_name(f"{out.name}.work"), {}, events=events) as work:
        return quantize_checkpoint(
            source, out, specs, INTEGER, work, work.events, calibration=options, transform=chosen
        )


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return families.save(outliers(), tmp_path_factory.mktemp("llama") / "tiny")


@pytest.fixture(scope="module")
def artifact(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("artifact") / "out"
    quantize(source, out)
    return out


def kill_at(stage: str, index: int) -> Listener:
    def listener(event: Event) -> None:
        if event.kind == "step" and (event.data["stage"], event.data["index"]) == (stage, index):
            raise Killed

    return listener


def steps_of(events: Sequence[Event], stage: str) -> list[int]:
    return [event.data["index"] for event in events if event.kind == "step" and event.data["stage"] == stage]


@pytest.fixture
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every other step is saved."""
    monkeypatch.setattr(ost, "SAVE_EVERY", 2)


@pytest.mark.usefixtures("often")
@pytest.mark.parametrize(("stage", "index", "first"), [("learn", 3, 3), ("learn", 6, 5), ("quantize", 1, 7)])
def test_goes_on_where_it_was_killed(
    source: Path, artifact: Path, tmp_path: Path, stage: str, index: int, first: int
) -> None:
    out, events = tmp_path / "out", list[Event]()
    with pytest.raises(Killed):
        quantize(source, out, kill_at(stage, index))
    assert not out.exists()
    quantize(source, out, events.append)
    assert steps_of(events, "learn") == list(range(first, 7))
    assert contents(out) == contents(artifact)
    names = {path.name for path in (tmp_path / "out.work" / "transform").iterdir()}
    assert names == {"learned.safetensors"}


@pytest.mark.usefixtures("often")
def test_a_damaged_state_is_not_used(source: Path, artifact: Path, tmp_path: Path) -> None:
    out, events = tmp_path / "out", list[Event]()
    with pytest.raises(Killed):
        quantize(source, out, kill_at("learn", 5))
    for path in (tmp_path / "out.work" / "transform").iterdir():
        damage(path)
    quantize(source, out, events.append)
    assert steps_of(events, "learn") == list(range(1, 7))
    assert any(event.kind == "warning" and "missing or changed" in event.data["text"] for event in events)
    assert contents(out) == contents(artifact)


@pytest.mark.usefixtures("often")
def test_a_recipe_goes_on_where_it_was_killed(tmp_path: Path) -> None:
    text = write_text(tmp_path)
    model = write_llama(tmp_path / "model", text)
    part = {"bits": 3.25, "data": [f"text:{text}"], "rows": 8, "context": 12, "transform": "ost:steps=5,batch=4"}

    def run(out: Path, listeners: Sequence[Listener] = ()) -> None:
        recipe = make_recipe({"model": str(model), "out": str(out), "quantize": part})
        compress.run(recipe, events=Events(list(listeners)))

    run(tmp_path / "whole")
    events: list[Event] = []
    with pytest.raises(Killed):
        run(tmp_path / "out", [kill_at("learn", 4)])
    run(tmp_path / "out", [events.append])
    assert steps_of(events, "learn") == [3, 4, 5]
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize("rounding", [NEAREST, Ldlq()], ids=["nearest", "ldlq"])
def test_in_memory_as_from_a_checkpoint(source: Path, tmp_path: Path, rounding: Any) -> None:
    text = "ost:steps=3,batch=4,activations=8"
    quantize(source, tmp_path / "out", transform=text, rounding=rounding)
    model = compress.quantize(load_model(source), bits=5.3, codec=INTEGER, data=IDS, rounding=rounding, transform=text)
    assert_same_payloads(tmp_path / "out", model)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(families.logits(loaded, IDS), families.logits(model, IDS), rtol=0, atol=1e-6)


@pytest.mark.parametrize("rounding", ["nearest", "ldlq"])
@pytest.mark.parametrize("name", codec_names())
def test_with_every_codec(tmp_path: Path, name: str, rounding: str) -> None:
    """Saved by transformers and loaded again: the logits of the model in memory, near those of the original."""
    model = families.llama(num_hidden_layers=1, tie_word_embeddings=True)
    plain = families.logits(model, IDS)
    bits = 4.2 if len(codec(name).widths()) > 1 else None
    options: dict[str, Any] = {"bits": bits, "codec": name, "rounding": rounding, "data": IDS}
    if (name, rounding) == ("pvq", "ldlq"):
        with pytest.raises(UsageError, match="no calibrated rounding"):
            compress.quantize(model, transform="ost:steps=1", **options)
        return
    compress.quantize(model, transform="ost:steps=2", **options)
    found = families.logits(model, IDS)
    assert 0 < float((found - plain).norm() / plain.norm()) < 0.3
    assert {module.spec.codec for module in packed_modules(model).values()} == {name}
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(families.logits(again, IDS), found)


def test_without_a_place_in_the_stream() -> None:
    """Gemma 2 has norms behind its blocks: values, gates and queries alone are learned."""
    model = families.build("Gemma2ForCausalLM", "gemma2", head_dim=8)
    plain = families.logits(model, IDS)
    found = learned("steps=2,kv=4", model=model).tensors
    assert {name.rpartition(".")[0].rpartition(".")[2] for name in found} == {"v_proj", "up_proj", "k_proj"}
    compress.quantize(model, bits=5, codec="integer", data=IDS, transform="ost:steps=2,kv=4")
    assert 0 < float((families.logits(model, IDS) - plain).norm() / plain.norm()) < 0.3


def test_report(artifact: Path) -> None:
    report = json.loads((artifact / "report.json").read_text())
    learning = report["learning"]
    assert report["transform"] == LEARN
    assert learning["steps"] == 6 and min(learning["last_loss"], learning["first_loss"]) > 0
    assert learning["qsur"].keys() == Artifact(artifact).modules.keys()
    for name, figures in learning["qsur"].items():
        before, after = figures["input"]
        assert min(before, after, *figures["weight"]) > 0
        if not name.endswith(("o_proj", "down_proj")):  # those that read the outliers
            assert after > 1.5 * before
        if name.endswith(("gate_proj", "up_proj")):
            assert figures["weight"][1] > figures["weight"][0]


def test_every_rate_falls_to_nothing() -> None:
    """As half a cosine, each from its own."""
    rates: list[list[float]] = []
    learner = make_learner(Ost(steps=4, rotation_rate=0.02, scale_rate=0.5))
    optimizers: Mapping[str, Any] = vars(learner)["_optimizers"]
    learner.learn(ROWS, lambda step, loss: rates.append([o.param_groups[0]["lr"] for o in optimizers.values()]))
    factors = [0.5 + 0.5 * math.cos(math.pi * step / 4) for step in range(4)]
    torch.testing.assert_close(torch.tensor(rates), torch.tensor([[0.02 * f, 0.5 * f] for f in factors]))


def test_rows_of_a_step() -> None:
    rows = rows_of([{"input_ids": part} for part in IDS.split(3)], 5)
    assert [row["input_ids"].shape for row in rows] == [(5, 12), (3, 12)]
    assert torch.equal(torch.cat([row["input_ids"] for row in rows]), IDS)
    assert [len(row["input_ids"]) for row in rows_of([{"input_ids": IDS}], 8)] == [8]
    assert [len(row["input_ids"]) for row in rows_of([{"input_ids": IDS}], 100)] == [8]
    uneven = [{"input_ids": IDS}, {"input_ids": IDS[:, :5]}]
    assert rows_of(uneven, 2) == uneven
    masked = [{"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}]
    assert rows_of(masked, 2) == masked


@pytest.mark.parametrize(("batches", "steps"), [(3, 8), (5, 2), (1, 4)])
def test_every_row_is_seen_as_often(batches: int, steps: int) -> None:
    order = draw_order(batches, steps, 7)
    assert len(order) == steps and order == draw_order(batches, steps, 7)
    for start in range(0, steps, batches):
        part = order[start : start + batches]
        assert len(set(part)) == len(part) and set(part) <= set(range(batches))
    assert draw_order(batches, steps + 3, 7)[:steps] == order
    assert len({tuple(draw_order(5, 5, seed)) for seed in range(8)}) > 4


def test_masked_tokens_are_not_learned_from() -> None:
    """Whatever stands in the places of filled up tokens, the same is learned."""
    mask = (torch.arange(12) < torch.tensor([[12], [7], [3], [12], [9], [12], [12], [5]])).long()
    found = []
    for filling in (0, 5):
        model = families.llama(num_hidden_layers=1)
        batch = {"input_ids": torch.where(mask == 1, IDS, filling), "attention_mask": mask}
        views, options = matrices(model), Ost(steps=2, activations=4)
        specs = uniform(views, INTEGER, 5.3)
        found.append(learn_basis(model, views, options, INTEGER, specs, [batch], 0, Events()).tensors)
    for name, tensor in found[0].items():
        torch.testing.assert_close(tensor, found[1][name], rtol=0, atol=1e-6)


def test_what_cannot_be_learned(tmp_path: Path, source: Path) -> None:
    with pytest.raises(UsageError, match="learned from data"):
        compress.quantize(families.llama(num_hidden_layers=1), transform="ost")
    target = open_target(source, transform=Ost())
    specs = uniform(target.views, INTEGER, 5.3, target.mixing)
    with Workspace.open(tmp_path / "work", {}) as work, pytest.raises(UsageError, match="learned from data"):
        quantize_checkpoint(source, tmp_path / "out", specs, INTEGER, work, work.events, transform=Ost())
    assert not (tmp_path / "out").exists()
    with pytest.raises(UsageError, match="transform ost needs data"):
        recipe = {"model": str(source), "out": str(tmp_path / "out"), "quantize": {"bits": 3.25, "transform": "ost"}}
        compress.run(make_recipe(recipe))
    with pytest.raises(ModelError, match=r"BertForMaskedLM has no place for a learned transform\. .*'.*self_attn'"):
        compress.quantize(families.bert(num_hidden_layers=1), data=IDS, transform="ost:steps=1")
    parts = ",".join(f"{part}=false" for part in PARTS if part != "norms")
    gemma = families.build("Gemma2ForCausalLM", "gemma2", head_dim=8)
    with pytest.raises(ModelError, match="no place for a learned transform"):
        compress.quantize(gemma, data=IDS, transform=f"ost:steps=1,{parts}")
    assert not packed_modules(gemma)


def test_a_loss_that_is_not_finite() -> None:
    model = families.llama(num_hidden_layers=1)
    with torch.no_grad():
        model.get_parameter("lm_head.weight")[0] = torch.inf
    with pytest.raises(NumericsError, match="loss of step 1 of the transform is nan") as caught:
        learned("steps=3", model=model)
    assert "rotation_rate" in str(caught.value.remedy)
    assert all(parameter.requires_grad for parameter in model.parameters())
