"""Quantized embeddings and heads: their rows, their state, their size, and what transformers makes of them."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel

import compress
from compress.codecs import codec
from compress.codecs.base import CodecSpec
from compress.errors import ArtifactError, ModelError, NumericsError, UsageError
from compress.formats.inspect import inspect_artifact
from compress.formats.native import Artifact
from compress.modeling.io import WEIGHTS, Checkpoint
from compress.modeling.loading import load_model
from compress.modeling.tables import find_tables
from compress.plan import make_plan
from compress.quantization.embedding import PackedEmbedding
from compress.quantization.modules import PackedLinear, packed_modules
from compress.quantization.tables import TableBits, round_table
from compress.recipe import make_recipe
from tests import families
from tests.tiny_models import write_llama, write_text

FAMILIES: dict[str, dict[str, Any]] = {
    "llama-tied": {"architecture": "LlamaForCausalLM", "family": "llama", "tie_word_embeddings": True},
    "llama-untied": {"architecture": "LlamaForCausalLM", "family": "llama", "tie_word_embeddings": False},
    "gemma3": {"architecture": "Gemma3ForCausalLM", "family": "gemma3_text", "head_dim": 8, "pad_token_id": 0},
    "bert": {"architecture": "BertForMaskedLM", "family": "bert"},
    "gpt2": {"architecture": "GPT2LMHeadModel", "family": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4},
}


def tables(model: nn.Module) -> dict[str, Any]:
    stacks = ("layers.", "layer.", ".h.")
    return {name: one for name, one in packed_modules(model).items() if not any(part in name for part in stacks)}


@pytest.mark.parametrize("columns", [5, 32, 100])
@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("options", [{}, {"group": 8}, {"group": 0, "symmetric": True}])
def test_rows_are_those_of_the_decoded_matrix(columns: int, bits: int, options: dict[str, Any]) -> None:
    """To the bit, also where rows of codes or zero points begin within a byte."""
    torch.manual_seed(bits)
    rounder = codec("integer", **options)
    matrix = rounder.quantize(torch.randn(37, columns), rounder.spec(bits))
    rows = torch.tensor([36, 0, 5, 5, 17, 35])
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.equal(rounder.rows(matrix, rows, dtype), matrix.dequantize(dtype)[rows])
    for beyond in (37, -1):
        with pytest.raises((IndexError, RuntimeError)):
            rounder.rows(matrix, torch.tensor([beyond]), torch.float32)


@pytest.mark.parametrize("name", ["half_pyramid", "nf4"])
def test_rows_of_other_codecs(name: str) -> None:
    rounder = codec(name)
    matrix = rounder.quantize(torch.randn(9, 64), rounder.spec(rounder.widths()[0]))
    rows = torch.tensor([8, 0, 0])
    assert torch.equal(rounder.rows(matrix, rows, torch.float32), matrix.dequantize()[rows])


def test_rounding_by_parts_is_rounding_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = families.llama()
    (table,) = find_tables(model, ["embedding"])
    weight, spec = model.get_input_embeddings().weight.detach(), codec("integer").spec(3)
    whole = codec("integer").quantize(weight, spec)
    monkeypatch.setattr("compress.quantization.tables.CHUNK_WEIGHTS", 300)
    parts, report = round_table(table, weight, spec)
    assert torch.equal(parts.payload(), whole.payload())
    error = (whole.dequantize() - weight).double().square().sum() / weight.double().square().sum()
    assert report.relative_error == pytest.approx(float(error), rel=1e-12)
    with pytest.raises(NumericsError, match=r"model\.embed_tokens"):
        round_table(table, weight.clone().fill_(torch.inf), spec)


@pytest.mark.parametrize("name", FAMILIES)
def test_in_memory_and_through_a_folder(name: str, tmp_path: Path) -> None:
    """Logits are those of the decoded model; saving, loading and saving gives the same bytes; weights tied before are
    tied after."""
    original = families.build(**FAMILIES[name])
    weight = original.get_input_embeddings().weight.detach().clone()
    tied = original.get_output_embeddings().weight is original.get_input_embeddings().weight
    model = compress.quantize(original, codec="integer", bits=8.4, embedding_bits=4, head_bits=4)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert isinstance(embedding, PackedEmbedding)
    assert isinstance(head, PackedLinear)
    assert (head.payload is embedding.payload) == tied
    expected = codec("integer").quantize(weight, codec("integer").spec(4))
    assert torch.equal(embedding.payload, expected.payload())
    ids = families.token_ids()
    found = families.logits(model, ids)
    families.save(model, tmp_path / "first")
    loaded = compress.load(tmp_path / "first")
    assert tables(loaded).keys() == tables(model).keys()
    assert torch.equal(families.logits(loaded, ids), found)
    loaded.tie_weights()
    assert torch.equal(families.logits(loaded, ids), found)
    loaded.save_pretrained(tmp_path / "second")
    for file in (WEIGHTS, "config.json"):
        assert (tmp_path / "second" / file).read_bytes() == (tmp_path / "first" / file).read_bytes()
    stored = Checkpoint(tmp_path / "first")
    payloads = {f"{where}.weight" for where, one in tables(model).items() if one.holder is one}
    assert {each for each in stored.names() if stored.info(each).dtype == "I8"} >= payloads
    assert all(len(stored.info(each).shape) == 1 for each in payloads)
    plain = loaded.dequantize()
    assert not packed_modules(plain)
    assert type(plain.get_input_embeddings()) is type(families.build(**FAMILIES[name]).get_input_embeddings())
    assert (plain.get_output_embeddings().weight is plain.get_input_embeddings().weight) == tied
    assert torch.equal(plain.get_input_embeddings().weight, expected.dequantize())
    assert torch.equal(families.logits(plain, ids), found)
    plain.save_pretrained(tmp_path / "plain")
    assert torch.equal(families.logits(type(plain).from_pretrained(tmp_path / "plain"), ids), found)


def test_lookup_decodes_only_its_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest thing that a lookup decodes is its rows."""
    model = compress.quantize(families.llama(vocab_size=4096, tie_word_embeddings=False), embedding_bits=3)
    embedding = model.get_input_embeddings()
    table, ids = embedding.table(), torch.tensor([[4095, 7, 7]])
    expected = table.dequantize()[ids]

    def never(*_: object) -> torch.Tensor:
        raise AssertionError

    monkeypatch.setattr("compress.codecs.integer.codec.unpack_codes", never)
    assert torch.equal(embedding(ids), expected)
    with pytest.raises(AssertionError):
        table.dequantize()
    with pytest.raises((IndexError, RuntimeError)):
        embedding(torch.tensor([4096]))


def test_the_factor_of_gemma(tmp_path: Path) -> None:
    """In every dtype that it is loaded in the lookup is that of the decoded embedding."""
    families.save(compress.quantize(families.build(**FAMILIES["gemma3"]), embedding_bits=8), tmp_path)
    ids = families.token_ids()
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        packed = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype).get_input_embeddings()
        plain = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype).dequantize().get_input_embeddings()
        assert packed(ids).dtype == dtype
        assert torch.equal(packed(ids), plain(ids))


def test_dtypes_copies_and_states() -> None:
    model = compress.quantize(families.llama(tie_word_embeddings=True), embedding_bits=5)
    ids = families.token_ids()
    expected = families.logits(model, ids)
    other = compress.quantize(families.llama(tie_word_embeddings=True, initializer_range=1.0), embedding_bits=5)
    other.load_state_dict({name: torch.zeros_like(tensor) for name, tensor in model.state_dict().items()})
    families.logits(other, ids)
    other.load_state_dict(model.state_dict())
    twin = copy.deepcopy(model)
    assert twin.lm_head.holder is twin.model.embed_tokens
    for each in (other, twin):
        assert torch.equal(families.logits(each, ids), expected)
    half = twin.to(torch.bfloat16)
    assert half.model.embed_tokens(ids).dtype == torch.bfloat16
    assert half.model.embed_tokens.weight.dtype == torch.int8
    assert families.logits(half, ids).dtype == torch.bfloat16
    assert not any("lm_head" in name for name in model.state_dict())


def test_compiled() -> None:
    model = compress.quantize(families.llama(tie_word_embeddings=True, num_hidden_layers=1), embedding_bits=4)
    ids = families.token_ids()
    expected = families.logits(model, ids)
    graph = torch.compile(model.model.embed_tokens, fullgraph=True, backend="eager")
    assert torch.equal(graph(ids), model.model.embed_tokens(ids))
    found = families.logits(torch.compile(model, backend="eager"), ids)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def test_a_backbone_of_an_artifact_with_a_packed_head(tmp_path: Path) -> None:
    model = compress.quantize(families.llama(tie_word_embeddings=False), embedding_bits=6, head_bits=3)
    families.save(model, tmp_path / "whole")
    backbone, ids = AutoModel.from_pretrained(tmp_path / "whole"), families.token_ids()
    assert tables(backbone).keys() == {"embed_tokens"}
    expected = families.logits(model.model, ids)
    assert torch.equal(families.logits(backbone, ids), expected)
    backbone.save_pretrained(tmp_path / "bare")
    assert torch.equal(families.logits(AutoModel.from_pretrained(tmp_path / "bare"), ids), expected)


def test_generation_and_device_map(tmp_path: Path) -> None:
    model = compress.quantize(families.llama(tie_word_embeddings=True), embedding_bits=8)
    families.save(model, tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, device_map="auto")
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    ids = families.token_ids(5, 1)
    assert torch.equal(loaded.generate(ids, **options), model.generate(ids, **options))


def payload_bytes(shape: tuple[int, int], bits: int, group: int = 64) -> int:
    """A float16 scale for each group, zero points of `bits` (none at 8), and the codes, in whole bytes each."""
    rows, columns = shape
    groups = rows * -(-columns // min(group, columns))
    zeros = 0 if bits == 8 else -(-groups * bits // 8)
    return 2 * groups + zeros + -(-rows * columns * bits // 8)


@pytest.mark.parametrize("bits", [8, 3])
@pytest.mark.parametrize("tied", [True, False])
def test_a_checkpoint(tmp_path: Path, tied: bool, bits: int) -> None:
    """The folder is that of the model in memory to the byte; its size is the plan's and the closed form; reports and
    inspection list the tables apart from the blocks' rate."""
    model = families.llama(tie_word_embeddings=tied, hidden_size=72)
    source = families.save(model, tmp_path / "model")
    options: dict[str, Any] = {"embedding_bits": bits} if tied else {"embedding_bits": bits, "head_bits": 11 - bits}
    recipe = {"model": str(source), "out": str(tmp_path / "out"), "quantize": {"bits": 4.0, **options}}
    plan = make_plan(make_recipe(recipe)).quantization
    assert plan is not None
    report = compress.run(make_recipe(recipe))
    names = ["model.embed_tokens"] if tied else ["model.embed_tokens", "lm_head"]
    assert report["tables"] == names
    assert [row["name"] for row in report["matrices"][-len(names) :]] == names
    shape = (96, 72)
    sizes = [payload_bytes(shape, rate) for rate in options.values()]
    assert [row["bits_per_weight"] for row in report["matrices"][-len(names) :]] == [
        8 * size / (96 * 72) for size in sizes
    ]
    assert report["bits_per_weight"] <= 4.0
    files = sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors"))
    assert report["model_bytes"] == plan.model_bytes == files
    assert [(row.name, row.bytes) for row in plan.tables] == list(zip(names, sizes, strict=True))
    assert plan.bits_per_weight == report["bits_per_weight"]
    found = inspect_artifact(tmp_path / "out")
    assert found.tables == tuple(names)
    assert found.bits_per_weight == pytest.approx(report["bits_per_weight"], rel=1e-12)
    assert found.model_bytes == files
    assert set(found.ignore).isdisjoint({*names, "lm_head"})
    in_memory = compress.quantize(load_model(source), bits=4.0, **options)
    ids = families.token_ids()
    assert torch.equal(families.logits(compress.load(tmp_path / "out"), ids), families.logits(in_memory, ids))


@pytest.mark.parametrize("rounding", ["ldlq:asymmetric=0", "ldlq", "ldlq:sequential=nothing,asymmetric=0"])
def test_calibration_sees_the_rounded_embedding(tmp_path: Path, rounding: str) -> None:
    """The blocks of one that is rounded along with its embedding are those of a model that had the decoded embedding
    before, where rounding looks at the rounded model alone; not where it also looks at the original one."""
    source = families.save(families.llama(tie_word_embeddings=False), tmp_path / "model")
    ids = families.token_ids(24, 8)
    options: dict[str, Any] = {"bits": 3.25, "codec": "integer", "data": ids, "rounding": rounding}
    model = compress.quantize(load_model(source), **options, embedding_bits=2)
    before = load_model(source)
    matrix = round_table(*first_table(before))[0]
    before.get_input_embeddings().weight.data = matrix.dequantize()
    blocks = blocks_of(compress.quantize(before, **options))
    alone = blocks_of(compress.quantize(load_model(source), **options))
    same = [torch.equal(payload, blocks[name]) for name, payload in blocks_of(model).items()]
    kept = [torch.equal(payload, alone[name]) for name, payload in blocks_of(model).items()]
    assert all(same) == (rounding == "ldlq:asymmetric=0")
    assert all(kept) == ("nothing" in rounding)
    assert isinstance(model.get_input_embeddings(), PackedEmbedding)


def first_table(model: PreTrainedModel) -> tuple[Any, torch.Tensor, CodecSpec]:
    (table,) = find_tables(model, ["embedding"])
    return table, model.get_input_embeddings().weight.detach(), codec("integer").spec(2)


def blocks_of(model: Any) -> dict[str, torch.Tensor]:
    return {name: one.payload for name, one in packed_modules(model).items() if "layers." in name}


def test_calibrated_in_a_folder_and_untied(tmp_path: Path) -> None:
    """With a transform that unties the head: two matrices, each of its own rate, folded before they are rounded; the
    same from folder to folder as in memory."""
    text = write_text(tmp_path, 800)
    source = write_llama(tmp_path / "model", text)
    with torch.no_grad():
        plain = load_model(source)
        plain.model.norm.weight.mul_(torch.linspace(0.5, 2, 32))
        plain.save_pretrained(source)
    options: dict[str, Any] = {"bits": 3.5, "rows": 4, "context": 16, "embedding_bits": 8, "head_bits": 4}
    quantize = {**options, "data": [f"text:{text}"], "transform": "hadamard"}
    compress.run(make_recipe({"model": str(source), "out": str(tmp_path / "out"), "quantize": quantize}))
    loaded = compress.load(tmp_path / "out", dtype=None)
    assert {name: one.spec.width for name, one in tables(loaded).items()} == {"model.embed_tokens": 8, "lm_head": 4}
    memory = compress.quantize(source, **options, data=f"text:{text}", transform="hadamard")
    for name, payload in memory.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], payload), name
    only_head = {**quantize, "embedding_bits": None}
    compress.run(make_recipe({"model": str(source), "out": str(tmp_path / "head"), "quantize": only_head}))
    head = compress.load(tmp_path / "head", dtype=None)
    assert tables(head).keys() == {"lm_head"}
    assert isinstance(head.get_input_embeddings(), nn.Embedding)


def test_without_the_options_nothing_is_different(tmp_path: Path) -> None:
    model = compress.quantize(families.llama())
    assert "tables" not in model.config.quantization_config.to_dict()
    families.save(model, tmp_path)
    assert Artifact(tmp_path).tables == ()


def test_refusals() -> None:
    tied = families.llama(tie_word_embeddings=True)
    with pytest.raises(UsageError, match=r"are one matrix .*--embedding-bits 4 and --head-bits 8 are two rates"):
        compress.quantize(tied, embedding_bits=4, head_bits=8)
    for bits in (1, 9, 4.5, True, "4"):
        with pytest.raises(UsageError, match="The embedding is to have"):
            compress.quantize(tied, embedding_bits=bits)
    with pytest.raises(ModelError, match="has no output head"):
        compress.quantize(families.bert("BertModel"), head_bits=8)
    assert not packed_modules(tied)
    with pytest.raises(UsageError, match="Only transformers models"):
        compress.quantize(nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(32, 32)])}), embedding_bits=8)
    assert TableBits(8, None).asked == {"embedding": 8}


def test_a_tied_table_that_is_stored_twice(tmp_path: Path) -> None:
    """Once in truth is fine; with different values config and weights are of different models."""
    model = families.llama(tie_word_embeddings=False)
    model.lm_head.weight.data = model.model.embed_tokens.weight.data.clone()
    recipe = {"model": str(tmp_path), "quantize": {"bits": 4.0, "embedding_bits": 8}}
    for equal in (True, False):
        if not equal:
            model.lm_head.weight.data[3, 4] += 1
        families.save(model, tmp_path)
        config = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
        out = tmp_path.parent / f"{tmp_path.name}-{equal}"
        if equal:
            compress.run(make_recipe({**recipe, "out": str(out)}))
            stored = Checkpoint(out)
            assert "lm_head.weight" not in set(stored.names())
        else:
            with pytest.raises(ModelError, match="with different values"):
                compress.run(make_recipe({**recipe, "out": str(out)}))
            assert not out.exists()


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        ([], "'tables' is no table"),
        ({"model.embed_tokens": 8}, "is no table"),
        ({"model.norm": None}, "an embedding or head that the model lacks"),
        ({"nowhere": None}, "an embedding or head that the model lacks"),
        ({"model.embed_tokens": {"mixing": "input"}}, "is mixed"),
    ],
)
def test_damaged_configurations(tmp_path: Path, tables: Any, message: str) -> None:
    families.save(compress.quantize(families.llama(), embedding_bits=8), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    spec = config["quantization_config"]["tables"]["model.embed_tokens"]
    if isinstance(tables, dict):
        tables = {key: {**spec, **(change or {})} if change != 8 else 8 for key, change in tables.items()}
    config["quantization_config"]["tables"] = tables
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ArtifactError, match=message):
        Artifact(tmp_path)


def test_a_payload_of_another_length(tmp_path: Path) -> None:
    families.save(compress.quantize(families.llama(), embedding_bits=8), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["tables"]["model.embed_tokens"]["width"] = 7
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ArtifactError, match="embed_tokens"):
        Artifact(tmp_path)
