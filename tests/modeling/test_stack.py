"""Blocks run one by one are the model: compared with what hooks hear when it runs as a whole."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from compress.errors import ModelError
from compress.modeling.stack import Batch, Call, Recording, record
from compress.modeling.structure import find_blocks
from tests import families

DECODERS: list[tuple[str, str, dict[str, Any]]] = [
    ("LlamaForCausalLM", "llama", {}),
    ("MistralForCausalLM", "mistral", {"sliding_window": 4}),
    ("Qwen2ForCausalLM", "qwen2", {"use_sliding_window": True, "max_window_layers": 1, "sliding_window": 4}),
    ("Qwen3ForCausalLM", "qwen3", {}),
    ("Gemma2ForCausalLM", "gemma2", {"head_dim": 8, "sliding_window": 4}),
    (
        "Gemma3ForCausalLM",
        "gemma3_text",
        {"head_dim": 8, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    ("Phi3ForCausalLM", "phi3", {"pad_token_id": 0}),
    ("GPTNeoXForCausalLM", "gpt_neox", {}),
    ("OPTForCausalLM", "opt", {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    ("FalconForCausalLM", "falcon", {}),
]
ENCODERS: list[tuple[str, str, dict[str, Any]]] = [
    ("BertModel", "bert", {}),
    ("BertForMaskedLM", "bert", {}),
    ("RobertaModel", "roberta", {}),
    ("DistilBertModel", "distilbert", {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48}),
    ("MPNetModel", "mpnet", {}),
    (
        "ModernBertModel",
        "modernbert",
        {"local_attention": 4, "global_attn_every_n_layers": 2, "pad_token_id": 0},
    ),
]
TUPLES = {"falcon", "mpnet"}
"""Families whose blocks return tuples."""
WINDOWED = {"qwen2", "gemma2", "gemma3_text", "modernbert"}
"""Those in which a layer sees a window of the tokens and another all of them."""


def batches() -> dict[str, Batch]:
    """Whole rows; rows filled up on the right, and on the left; no mask, and shorter."""
    ids = families.token_ids(10, 3)
    masks = {side: torch.ones_like(ids) for side in ("none", "right", "left")}
    masks["right"][0, 6:], masks["right"][1, 9:] = 0, 0
    masks["left"][0, :4], masks["left"][2, :1] = 0, 0
    return {
        **{side: {"input_ids": ids, "attention_mask": mask} for side, mask in masks.items()},
        "short": {"input_ids": ids[:, :7]},
    }


def heard(model: nn.Module, batch: Batch) -> tuple[list[Tensor], set[type]]:
    """The outputs of the blocks when the model runs, and the types in which they come."""
    outputs: list[Tensor] = []
    types: set[type] = set()

    def hear(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        outputs.append(output[0] if isinstance(output, tuple) else output)
        types.add(tuple if isinstance(output, tuple) else Tensor)

    handles = [block.register_forward_hook(hear) for _, block in find_blocks(model)]
    with torch.no_grad():
        model(**batch)
    for handle in handles:
        handle.remove()
    return outputs, types


def walk(blocks: list[nn.Module], recording: Recording) -> Iterator[Tensor]:
    hidden = recording.hidden
    with torch.no_grad():
        for block, call in zip(blocks, recording.calls, strict=True):
            hidden = call.run(block, hidden)
            yield hidden


def tensors(call: Call) -> Mapping[str, Any]:
    return {name: value for name, value in call.kwargs.items() if isinstance(value, Tensor)}


@pytest.mark.parametrize("case", [*DECODERS, *ENCODERS], ids=lambda case: f"{case[0]}")
def test_one_by_one_is_the_model(case: tuple[str, str, dict[str, Any]]) -> None:
    architecture, family, changes = case
    model = families.build(architecture, family, **changes)
    blocks = [block for _, block in find_blocks(model)]
    assert len(blocks) == 2
    before = dict(model.named_modules())
    given = batches()
    recordings = list(record(model, list(given.values()), blocks[0]))
    after = dict(model.named_modules())
    assert list(after) == list(before) and all(after[name] is before[name] for name in before)
    for (side, batch), recording in zip(given.items(), recordings, strict=True):
        expected, types = heard(model, batch)
        assert types == {tuple if family in TUPLES else Tensor}
        for found, wanted in zip(walk(blocks, recording), expected, strict=True):
            torch.testing.assert_close(
                found, wanted, rtol=1e-5, atol=1e-5, msg=lambda text, side=side: f"{side}: {text}"
            )
    if family in WINDOWED:
        first, second = (tensors(call) for call in recordings[1].calls)
        assert any(
            first[name].shape != second[name].shape or not torch.equal(first[name], second[name]) for name in first
        )


def test_masks_matter() -> None:
    """The comparison above sees masks at all: calls of another batch give other hidden states."""
    model = families.bert()
    blocks = [block for _, block in find_blocks(model)]
    given = batches()
    whole, right = record(model, [given["none"], given["right"]], blocks[0])
    found = list(walk(blocks, Recording(right.hidden, whole.calls)))
    assert (found[-1] - heard(model, given["right"])[0][-1]).abs().max() > 1e-3


def test_blocks_on_the_meta_device_and_half_precision_around() -> None:
    """As for a checkpoint: blocks have no weights but the first, and what is recorded is float32 whatever the model."""
    model = families.llama().to(torch.bfloat16)
    blocks = [copy.deepcopy(block).float() for _, block in find_blocks(model)]
    batch = batches()["left"]
    wanted = [*record(model, [batch], blocks[0])]
    for name, block in find_blocks(model):
        model.set_submodule(name, copy.deepcopy(block).to("meta"))
    found = [*record(model, [batch], blocks[0])]
    assert torch.equal(found[0].hidden, wanted[0].hidden)
    assert found[0].hidden.dtype == torch.float32
    for call in found[0].calls:
        parts = [*tensors(call).values(), *call.kwargs["position_embeddings"]]
        assert {part.dtype for part in parts} <= {torch.float32, torch.int64, torch.bool}
    assert [state.dtype for state in walk(blocks, found[0])] == [torch.float32] * 2


def test_equal_tensors_are_held_once() -> None:
    model = families.llama()
    blocks = [block for _, block in find_blocks(model)]
    given = batches()
    first, second, other = record(model, [given["right"], given["right"], given["left"]], blocks[0])
    for name, tensor in tensors(first.calls[0]).items():
        assert all(tensors(recording.calls[block])[name] is tensor for recording in (first, second) for block in (0, 1))
    rotations = [recording.calls[0].kwargs["position_embeddings"] for recording in (first, second, other)]
    assert rotations[0][0] is rotations[1][0] is rotations[2][0]
    masks = [recording.calls[0].kwargs["attention_mask"] for recording in (first, second, other)]
    assert masks[0] is masks[1] and masks[2] is not masks[0]


@pytest.mark.parametrize("when", ["before the blocks", "in the caller"])
def test_the_model_is_whole_after_an_error(when: str) -> None:
    model = families.llama()
    before = dict(model.named_modules())
    first = find_blocks(model)[0][1]
    bad = (
        {"input_ids": torch.full((1, 4), 10**6)} if when == "before the blocks" else {"input_ids": families.token_ids()}
    )
    with pytest.raises(IndexError):
        for _ in record(model, [bad], first):
            raise IndexError
    assert all(module is before[name] for name, module in model.named_modules())


@pytest.mark.parametrize(
    ("architecture", "family", "changes"),
    [
        ("T5EncoderModel", "t5", {"d_model": 32, "d_ff": 48, "num_layers": 2, "num_heads": 4, "d_kv": 8}),
        ("AlbertModel", "albert", {"embedding_size": 16}),
        ("DebertaV2Model", "deberta-v2", {}),
    ],
    ids=["a bias from the first block", "one block for all layers", "a pair of outputs"],
)
def test_other_ways_of_calling_blocks_are_refused(architecture: str, family: str, changes: dict[str, Any]) -> None:
    model = families.build(architecture, family, **changes)
    before = dict(model.named_modules())
    with pytest.raises(ModelError, match=rf"blocks of {architecture} cannot be run one by one") as caught:
        list(record(model, [{"input_ids": families.token_ids()}], find_blocks(model)[0][1]))
    assert caught.value.remedy
    assert all(module is before[name] for name, module in model.named_modules())


@pytest.mark.parametrize("order", [[1, 0], [0], [0, 1, 1], []])
def test_blocks_in_another_order_are_refused(order: list[int]) -> None:
    """A model that calls its blocks by a list of its own."""
    model = families.llama()
    blocks = find_blocks(model)

    def forward(input_ids: Tensor, **options: Any) -> Tensor:
        hidden = model.get_input_embeddings()(input_ids)
        for index in order:
            hidden = model.get_submodule(blocks[index][0])(hidden)
        return hidden

    model.base_model.forward = forward
    with pytest.raises(ModelError, match="not called at all" if not order else "calls of 2 blocks"):
        list(record(model, [{"input_ids": families.token_ids()}], nn.Identity()))
