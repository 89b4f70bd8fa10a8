"""Generation step by step against `model.generate`, and against a loop that has no cache."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from compress.errors import DependencyError, ExportError, UsageError
from compress.evaluation.generate import (
    OnnxDecoder,
    TorchDecoder,
    decode_greedy,
    generate_greedy,
    generate_sampled,
    positions_of,
)
from compress.evaluation.ort import open_session

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES, initializer_range=0.3)).eval()


@torch.no_grad()
def without_cache(model: LlamaForCausalLM, ids: Tensor, count: int) -> Tensor:
    for _ in range(count):
        fresh = model(input_ids=ids, use_cache=False).logits[:, -1:].argmax(-1)
        ids = torch.cat([ids, fresh], 1)
    return ids


def test_greedy_is_the_same_three_ways(model: LlamaForCausalLM) -> None:
    ids = torch.randint(64, (3, 4), generator=torch.Generator().manual_seed(1))
    expected = without_cache(model, ids, 20)
    assert torch.equal(generate_greedy(model, ids, 20), expected)
    assert torch.equal(decode_greedy(TorchDecoder(model), ids, 20), expected)


def test_padding_on_the_left_changes_nothing() -> None:
    torch.manual_seed(0)
    model = MistralForCausalLM(MistralConfig(**SIZES, sliding_window=3, initializer_range=0.3)).eval()
    ids = torch.tensor([[5, 6, 7, 8, 9], [0, 0, 11, 12, 13]])
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
    alone = without_cache(model, ids[1:, 2:], 10)
    for tokens in (
        generate_greedy(model, ids, 10, attention_mask=mask),
        decode_greedy(TorchDecoder(model), ids, 10, attention_mask=mask),
    ):
        assert torch.equal(tokens[1:, 2:], alone)


def test_rows_end_at_a_stop_token_and_are_padded(model: LlamaForCausalLM) -> None:
    ids = torch.randint(64, (2, 4), generator=torch.Generator().manual_seed(2))
    free = generate_greedy(model, ids, 12)
    stop = int(free[0, 7])
    expected = generate_greedy(model, ids, 12, stop=[stop], pad=63)
    assert torch.equal(decode_greedy(TorchDecoder(model), ids, 12, stop=[stop], pad=63), expected)
    end = 4 + free[0, 4:].tolist().index(stop)
    assert torch.equal(expected[0, : end + 1], free[0, : end + 1])
    assert (expected[0, end + 1 :] == 63).all()


def test_all_rows_ended_ends_the_text(model: LlamaForCausalLM) -> None:
    ids = torch.tensor([[1, 2, 3]])
    stop = int(generate_greedy(model, ids, 1)[0, -1])
    assert generate_greedy(model, ids, 9, stop=[stop]).shape == (1, 4)
    assert decode_greedy(TorchDecoder(model), ids, 9, stop=[stop]).shape == (1, 4)


def test_greedy_ignores_the_models_own_settings_and_keeps_them(model: LlamaForCausalLM) -> None:
    ids = torch.tensor([[1, 2, 3]])
    expected = generate_greedy(model, ids, 10)
    before = model.generation_config
    own = GenerationConfig(repetition_penalty=5.0, do_sample=True, eos_token_id=int(expected[0, 5]))
    model.generation_config = own
    assert torch.equal(generate_greedy(model, ids, 10), expected)
    assert model.generation_config is own
    model.generation_config = before


def test_sampling_follows_the_seed_and_leaves_the_global_state(model: LlamaForCausalLM) -> None:
    ids = torch.tensor([[1, 2, 3]])
    state = torch.random.get_rng_state()
    one, same, other = (generate_sampled(model, ids, 30, temperature=2.0, seed=seed) for seed in (4, 4, 5))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_sampling_from_the_top_is_greedy(model: LlamaForCausalLM) -> None:
    ids = torch.tensor([[1, 2, 3]])
    assert torch.equal(generate_sampled(model, ids, 20, top_p=1e-6), generate_greedy(model, ids, 20))


def test_positions_begin_after_the_padding() -> None:
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])
    assert positions_of(mask).tolist() == [[0, 1, 2, 3], [0, 0, 0, 1]]


def test_no_token_to_start_from(model: LlamaForCausalLM) -> None:
    with pytest.raises(UsageError, match="no token to start from"):
        decode_greedy(TorchDecoder(model), torch.zeros(1, 0, dtype=torch.int64), 3)


def test_a_provider_that_is_not_there_is_an_error_and_no_fallback(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no TensorrtExecutionProvider"):
        open_session(tmp_path / "model.onnx", "TensorrtExecutionProvider")


@pytest.mark.parametrize("content", [None, b"no model"])
def test_a_file_that_is_no_model(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "model.onnx").write_bytes(content)
    with pytest.raises(ExportError, match=r"model\.onnx"):
        OnnxDecoder(tmp_path)


def test_onnxruntime_is_optional(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(DependencyError, match="onnxruntime"):
        OnnxDecoder(tmp_path)
