"""Throughput: what is counted and reported. No absolute times."""

from __future__ import annotations

import statistics

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from compress.errors import UsageError
from compress.evaluation import latency
from compress.evaluation.latency import tokens_per_second


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=50)).eval()


def test_the_figure_is_tokens_over_the_median(model: LlamaForCausalLM) -> None:
    result = tokens_per_second(model, prompt_tokens=3, new_tokens=4, batch=2, repeats=3)
    assert len(result.seconds) == 3
    assert result.tokens_per_second == pytest.approx(8 / statistics.median(result.seconds))
    assert (result.runtime, result.threads) == ("torch", torch.get_num_threads())
    assert result.to_dict()["batch"] == 2


def test_only_decoding_is_timed_and_the_warm_up_left_out(
    model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths: list[int] = []

    class Clock:
        """Seconds = tokens that have gone through the model."""

        @staticmethod
        def perf_counter() -> float:
            return float(sum(lengths))

    hook = model.register_forward_pre_hook(
        lambda _, args, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    monkeypatch.setattr(latency, "time", Clock)
    result = tokens_per_second(model, prompt_tokens=6, new_tokens=5, warmup=2, repeats=2)
    hook.remove()
    assert result.seconds == (5.0, 5.0)
    assert lengths == [6, 1, 1, 1, 1, 1] * 4


@pytest.mark.parametrize("count", ["prompt_tokens", "new_tokens", "batch", "repeats"])
def test_nothing_to_measure(model: LlamaForCausalLM, count: str) -> None:
    with pytest.raises(UsageError, match=f"{count} is 0"):
        tokens_per_second(model, **{count: 0})
