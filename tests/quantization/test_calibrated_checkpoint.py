"""Calibrated from folder to folder: the codes of a model in memory, whatever the memory and however often killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import compress
from compress.codecs import codec
from compress.errors import WorkspaceError
from compress.events import Event, Events, Listener
from compress.formats.native import Artifact
from compress.modeling.io import WEIGHTS
from compress.modeling.loading import load_model, read_config
from compress.plan import make_plan
from compress.quantization import run as run_module
from compress.quantization.allocation import uniform
from compress.quantization.calibrated import Calibration
from compress.quantization.modules import packed_modules
from compress.quantization.options import Ldlq
from compress.quantization.rounders import CalibratedRounder, CalibrationOptions
from compress.quantization.run import quantize_checkpoint
from compress.quantization.target import open_target, predict
from compress.quantization.transforms import Hadamard, parse_transform
from compress.recipe import make_recipe
from compress.workspace import Workspace
from tests import families
from tests.tiny_models import write_llama, write_text

HALF = codec("half_pyramid")
TIMED = ("seconds", "peak_rss_bytes")
LAYERS = 3
IDS = families.token_ids(24, 8)
OPTIONS = CalibrationOptions(IDS, Ldlq())


def quantize(
    source: Path, out: Path, options: CalibrationOptions = OPTIONS, listener: Listener | None = None, **more: Any
) -> dict[str, Any]:
    transform = parse_transform(more.pop("transform", "none"))
    target = open_target(source, transform=transform)
    specs = uniform(target.views, HALF, 3.25, target.mixing)
    events = Events([] if listener is None else [listener])
    with Workspace.open(out.with_name(f"{out.name}.work"), {}, events=events) as work:
        return quantize_checkpoint(
            source, out, specs, HALF, work, work.events, calibration=options, transform=transform, **more
        )


def contents(folder: Path) -> Mapping[str, bytes]:
    """All files of an artifact but its checksums; of the report what is not timed."""
    files = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "compress.json"}
    report = json.loads(files["report.json"])
    files["report.json"] = json.dumps({name: value for name, value in report.items() if name not in TIMED}).encode()
    return files


def hidden_states(out: Path) -> set[str]:
    """Of which block and stream there are files."""
    return {path.stem for path in (out.with_name(f"{out.name}.work") / "inputs").iterdir()}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return families.save(families.llama(num_hidden_layers=LAYERS), tmp_path_factory.mktemp("llama") / "tiny")


@pytest.fixture(scope="module")
def artifact(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("artifact") / "out"
    quantize(source, out)
    return out


def assert_same_payloads(folder: Path, model: Any) -> None:
    opened, packed = Artifact(folder), packed_modules(model)
    assert opened.modules.keys() == packed.keys()
    for name, module in packed.items():
        assert torch.equal(opened.matrix(name).payload(), module.quantized().payload()), name


@pytest.mark.parametrize("transform", ["none", "hadamard"])
@pytest.mark.parametrize(
    "options", [Ldlq(), Ldlq(sequential="block", asymmetric=0.0), Ldlq(sequential="nothing", asymmetric=0.0)]
)
def test_payloads_are_those_of_a_model_in_memory(source: Path, tmp_path: Path, options: Ldlq, transform: Any) -> None:
    report = quantize(source, tmp_path / "out", replace(OPTIONS, options=options), transform=transform)
    model = compress.quantize(load_model(source), data=IDS, rounding=options, transform=transform)
    assert_same_payloads(tmp_path / "out", model)
    assert {row["status"] for row in report["matrices"]} == {"calibrated"}
    assert {row["calibration"]["tokens"] for row in report["matrices"]} == {IDS.numel()}


def test_an_encoder_with_filled_rows(tmp_path: Path) -> None:
    folder = families.save(families.bert("BertModel", num_hidden_layers=LAYERS), tmp_path / "bert")
    mask = (torch.arange(24) < torch.tensor([[5], [24], [17], [9], [12], [24], [3], [20]])).long()
    data = [{"input_ids": IDS[:4], "attention_mask": mask[:4]}, {"input_ids": IDS[4:, :], "attention_mask": mask[4:]}]
    report = quantize(folder, tmp_path / "out", replace(OPTIONS, data=data))
    assert_same_payloads(tmp_path / "out", compress.quantize(load_model(folder), data=data, transform="none"))
    assert {row["calibration"]["tokens"] for row in report["matrices"]} == {int(mask.sum())}


@pytest.mark.parametrize("sequential", ["matrix", "block"])
@pytest.mark.parametrize("budget", [0, 60_000])
def test_memory_does_not_change_the_bytes(source: Path, tmp_path: Path, budget: int, sequential: Any) -> None:
    options = replace(OPTIONS, options=Ldlq(sequential=sequential))
    quantize(source, tmp_path / "wide", options)
    quantize(source, tmp_path / "out", replace(options, budget=budget))
    assert contents(tmp_path / "out") == contents(tmp_path / "wide")


class Killed(BaseException):
    """What stands for a kill inside this process."""


def kill_after(blocks: int) -> Listener:
    def listener(event: Event) -> None:
        if event.kind == "step" and event.data["index"] == blocks:
            raise Killed

    return listener


def rounded_blocks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The indices of the blocks that are rounded from now on."""
    seen: list[int] = []
    round_block = CalibratedRounder.round_block

    def counting(self: CalibratedRounder, index: int, views: Any) -> Any:
        seen.append(index)
        return round_block(self, index, views)

    monkeypatch.setattr(CalibratedRounder, "round_block", counting)
    return seen


@pytest.mark.parametrize("blocks", [1, 2, 3])
def test_goes_on_at_the_block(
    source: Path, artifact: Path, tmp_path: Path, blocks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with pytest.raises(Killed):
        quantize(source, out, listener=kill_after(blocks))
    assert not out.exists()
    expected = {f"{blocks:05d}.rounded", f"{blocks:05d}.original"} if blocks < LAYERS else set()
    assert hidden_states(out) == expected
    seen = rounded_blocks(monkeypatch)
    events: list[Event] = []
    quantize(source, out, listener=events.append)
    assert seen == list(range(blocks, LAYERS))
    assert [event.data["index"] for event in events if event.kind == "step"] == [1, 2, 3]
    assert contents(out) == contents(artifact)
    assert hidden_states(out) == set()


@pytest.mark.parametrize(
    ("owner", "name", "call"),
    [
        (run_module, "write_tensors", 2),
        (Calibration, "carry_on", 2),
        (CalibratedRounder, "carry_on", 2),
        (Workspace, "commit_all", 3),
        (CalibratedRounder, "committed", 1),
        (CalibratedRounder, "committed", 2),
        (CalibratedRounder, "committed", 3),
        (CalibratedRounder, "close", 1),
        (run_module, "write_artifact", 1),
    ],
)
def test_killed_between_two_writes(
    source: Path, artifact: Path, tmp_path: Path, owner: Any, name: str, call: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed just before the given call: the same bytes, and no hidden states are left behind."""
    out, calls, whole = tmp_path / "out", [0], vars(owner)[name]

    def dying(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == call:
            raise Killed
        return whole(*args, **kwargs)

    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(owner, name, dying)
        quantize(source, out)
    assert not out.exists()
    quantize(source, out)
    assert contents(out) == contents(artifact)
    assert hidden_states(out) == set()


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("how", [damage, Path.unlink])
@pytest.mark.parametrize("stream", ["rounded", "original"])
def test_damaged_hidden_states(source: Path, artifact: Path, tmp_path: Path, how: Any, stream: str) -> None:
    out = tmp_path / "out"
    with pytest.raises(Killed):
        quantize(source, out, listener=kill_after(2))
    how(out.with_name("out.work") / "inputs" / f"00002.{stream}.00")
    events: list[Event] = []
    quantize(source, out, listener=events.append)
    texts = [event.data["text"] for event in events if event.kind in ("warning", "note")]
    assert any(f"00002.{stream}.00' is missing or changed" in text for text in texts)
    assert any("begun anew" in text for text in texts)
    assert contents(out) == contents(artifact)
    assert hidden_states(out) == set()


def test_progress_after_beginning_anew_is_kept(
    source: Path, artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Anew and killed again: the third run goes on where the second was, though the first had come further."""
    out = tmp_path / "out"
    with pytest.raises(Killed):
        quantize(source, out, listener=kill_after(2))
    damage(out.with_name("out.work") / "inputs" / "00002.rounded.00")
    with pytest.raises(Killed):
        quantize(source, out, listener=kill_after(1))
    seen = rounded_blocks(monkeypatch)
    quantize(source, out)
    assert seen == [1, 2]
    assert contents(out) == contents(artifact)


def test_damaged_block(source: Path, artifact: Path, tmp_path: Path) -> None:
    """A block's own file is damaged: nothing leads back to its inputs, so all is done again."""
    out = tmp_path / "out"
    with pytest.raises(Killed):
        quantize(source, out, listener=kill_after(2))
    damage(out.with_name("out.work") / "blocks" / "00000.safetensors")
    quantize(source, out)
    assert contents(out) == contents(artifact)


SCRIPT = """
import os, signal, sys
from pathlib import Path
from compress.quantization.rounders import CalibratedRounder
from tests.quantization.test_calibrated_checkpoint import quantize

def die(self, index):
    if index == 1:
        os.kill(os.getpid(), signal.SIGKILL)

CalibratedRounder.committed = die
quantize(Path(sys.argv[1]), Path(sys.argv[2]))
"""


def test_a_real_kill(source: Path, artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    run = subprocess.run([sys.executable, "-c", SCRIPT, str(source), str(out)], env=environment, check=False)
    assert run.returncode == -signal.SIGKILL
    assert not out.exists() and hidden_states(out) >= {"00002.rounded", "00002.original"}
    seen = rounded_blocks(monkeypatch)
    quantize(source, out)
    assert seen == [2]
    assert contents(out) == contents(artifact)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A tied Llama with a tokenizer, and text: what a recipe names."""
    folder = tmp_path_factory.mktemp("recipe")
    text = write_text(folder)
    model = write_llama(folder / "model", text, layers=2)
    other = folder / "other.txt"
    other.write_text(text.read_text()[::-1])
    data = [f"text:{text}"]
    return {
        "model": str(model),
        "quantize": {"bits": 3.25, "data": data, "rows": 6, "context": 32},
        "other": str(other),
    }


def run(recipe: dict[str, Any], out: Path, **changes: Any) -> dict[str, Any]:
    value = {"model": recipe["model"], "out": str(out), "quantize": {**recipe["quantize"], **changes}}
    return compress.run(make_recipe(value))


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"data": ["OTHER"]}, r"quantize\.data"),
        ({"rounding": "ldlq:damping=0.02"}, r"quantize\.rounding"),
        ({"rows": 5}, r"quantize\.rows was 6 and is now 5"),
        ({"context": 31}, r"quantize\.context was 32 and is now 31"),
        ({"transform": "hadamard"}, r"quantize\.transform\.name was 'auto' and is now 'hadamard'"),
        ({"data": None}, r"quantize\.data"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_other_arguments_are_refused_by_name(
    recipe: dict[str, Any], tmp_path: Path, change: dict[str, Any], name: str
) -> None:
    run(recipe, tmp_path / "out")
    if change.get("data"):
        change = {"data": [f"text:{recipe['other']}"]}
    with pytest.raises(WorkspaceError, match=name) as caught:
        run(recipe, tmp_path / "out", **change)
    assert "--restart" in caught.value.remedy


def test_changed_text_in_the_same_file_is_refused(recipe: dict[str, Any], tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(Path(recipe["other"]).read_text())
    run(recipe, tmp_path / "out", data=[f"text:{text}"])
    text.write_text(text.read_text() + "more")
    with pytest.raises(WorkspaceError, match=r"the hash of text:.*text\.txt changed"):
        run(recipe, tmp_path / "out", data=[f"text:{text}"])


def last_hidden(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(ids).logits


def test_a_tied_head_is_untied(recipe: dict[str, Any], tmp_path: Path) -> None:
    """The gains of the last norm differ, so that the rotation cannot keep the head tied."""
    source = tmp_path / "model"
    model = load_model(recipe["model"], dtype=None)
    model.model.norm.weight.data = torch.linspace(0.5, 1.5, 32).to(model.dtype)
    model.save_pretrained(source)
    transformers.AutoTokenizer.from_pretrained(recipe["model"]).save_pretrained(source)
    assert read_config(source)["tie_word_embeddings"]
    tied = {**recipe, "model": str(source)}
    report = run(tied, tmp_path / "out", transform="hadamard", bits=3.5)
    assert not read_config(tmp_path / "out")["tie_word_embeddings"]
    target = open_target(source, transform=Hadamard())
    size = predict(target, uniform(target.views, HALF, 3.5, target.mixing)).model_bytes
    assert size == (tmp_path / "out" / WEIGHTS).stat().st_size == report["model_bytes"]
    asked = {**recipe["quantize"], "bits": 3.5, "transform": "hadamard"}
    plan = make_plan(make_recipe({"model": str(source), "out": str(tmp_path / "no"), "quantize": asked}))
    assert plan.quantization is not None and plan.quantization.model_bytes == size
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.lm_head.weight.data_ptr() != loaded.model.embed_tokens.weight.data_ptr()
    ids = torch.arange(40).view(2, 20)
    wanted, found = last_hidden(model, ids).float(), last_hidden(loaded, ids).float()
    assert (found - wanted).square().sum() < 0.3 * wanted.square().sum()
    assert (found - wanted).square().sum() > 0
