"""The figures of `compress eval` against their definitions, window by window, in float64."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from compress.evaluation.causal import evaluate_causal


def tiny(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=32,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("batch_tokens", [1, 40, 10_000])
def test_figures_are_their_definitions(batch_tokens: int) -> None:
    model, reference = tiny(0), tiny(1)
    ids = torch.randint(0, 50, (7, 20), generator=torch.Generator().manual_seed(2))
    sizes = torch.randint(1, 5, (7, 20), generator=torch.Generator().manual_seed(3))
    got = evaluate_causal(model, ids, sizes, reference, batch_tokens=batch_tokens)

    nll, kl, reference_nll, agree = [], [], [], []
    with torch.no_grad():
        for window in ids:
            q = F.log_softmax(model(window[None]).logits[0, :-1].double(), -1)
            p = F.log_softmax(reference(window[None]).logits[0, :-1].double(), -1)
            index = torch.arange(19), window[1:]
            nll.append(-q[index])
            reference_nll.append(-p[index])
            kl.append((p.exp() * (p - q)).sum(-1))
            agree.append((p.argmax(-1) == q.argmax(-1)).double())
    mean_nll = torch.stack(nll).mean().item()
    window_kl = torch.stack(kl).mean(1)
    assert got["tokens"] == 7 * 19
    assert got["nll"] == pytest.approx(mean_nll, rel=1e-6)
    assert got["perplexity"] == pytest.approx(math.exp(mean_nll), rel=1e-6)
    assert got["reference_perplexity"] == pytest.approx(math.exp(torch.stack(reference_nll).mean().item()), rel=1e-6)
    assert got["bits_per_byte"] == pytest.approx(7 * 19 * mean_nll / math.log(2) / int(sizes[:, 1:].sum()), rel=1e-6)
    assert got["kl_divergence"] == pytest.approx(window_kl.mean().item(), rel=1e-5)
    assert got["kl_stderr"] == pytest.approx(window_kl.std().item() / math.sqrt(7), rel=1e-5)
    assert got["top1_agreement"] == pytest.approx(torch.stack(agree).mean().item())


def test_a_model_does_not_differ_from_itself() -> None:
    model = tiny(0)
    ids = torch.randint(0, 50, (3, 10))
    got = evaluate_causal(model, ids, torch.ones_like(ids), model)
    assert got["kl_divergence"] == 0.0
    assert got["top1_agreement"] == 1.0
    assert got["perplexity"] == got["reference_perplexity"]
