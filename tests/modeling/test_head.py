"""Facts about language heads, against what the models themselves make of their last hidden state."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from compress.errors import ModelError
from compress.losses import KL
from compress.losses.fused import linear_loss
from compress.modeling.head import head_of
from tests import families

SMALL_GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4}
GRIFFIN = {"num_hidden_layers": 3, "lru_width": 32, "attention_window_size": 8, "head_dim": 8}
MODELS: list[tuple[str, str, dict[str, Any], float, float | None]] = [
    ("LlamaForCausalLM", "llama", {}, 1, None),
    ("Qwen2ForCausalLM", "qwen2", {"tie_word_embeddings": True}, 1, None),
    ("Gemma2ForCausalLM", "gemma2", {"head_dim": 8}, 1, 30),
    ("Gemma2ForCausalLM", "gemma2", {"head_dim": 8, "final_logit_softcapping": None}, 1, None),
    ("Gemma3ForCausalLM", "gemma3_text", {"head_dim": 8, "final_logit_softcapping": 20.0}, 1, 20),
    ("VaultGemmaForCausalLM", "vaultgemma", {"head_dim": 8}, 1, 30),
    ("RecurrentGemmaForCausalLM", "recurrent_gemma", GRIFFIN, 1, 30),
    ("CohereForCausalLM", "cohere", {"eos_token_id": 2}, 1 / 16, None),
    ("Cohere2ForCausalLM", "cohere2", {"logit_scale": 0.5}, 0.5, None),
    ("GraniteForCausalLM", "granite", {"logits_scaling": 8.0}, 1 / 8, None),
    ("GraniteMoeForCausalLM", "granitemoe", {"logits_scaling": 6.0}, 1 / 6, None),
    ("GPT2LMHeadModel", "gpt2", SMALL_GPT, 1, None),
    ("GPTJForCausalLM", "gptj", {**SMALL_GPT, "rotary_dim": 4}, 1, None),
    ("PhiForCausalLM", "phi", {}, 1, None),
    ("OPTForCausalLM", "opt", {"ffn_dim": 48, "word_embed_proj_dim": 16}, 1, None),
    ("BloomForCausalLM", "bloom", {"n_layer": 2, "n_head": 4}, 1, None),
]
"""Architecture, config, and the scale and softcap that its paper or config names."""


@pytest.mark.parametrize(
    ("architecture", "family", "changes", "scale", "softcap"), MODELS, ids=[f"{each[0]}-{each[4]}" for each in MODELS]
)
def test_head_of_the_last_hidden_state_is_the_logits(
    architecture: str, family: str, changes: dict[str, Any], scale: float, softcap: float | None
) -> None:
    model = families.build(architecture, family, **changes)
    head = head_of(model)
    assert (head.scale, head.softcap) == (scale, softcap)
    assert head.weight is model.get_output_embeddings().weight
    with torch.no_grad():
        found = model(families.token_ids(), output_hidden_states=True, use_cache=False)
        logits = head(found.hidden_states[-1])
    assert logits.abs().max() > 0.01
    torch.testing.assert_close(logits, found.logits, rtol=1e-5, atol=1e-6)


def test_a_fused_loss_trains_the_whole_model() -> None:
    """The gradients of all parameters, the tied embedding's too, are those of the loss on the model's own logits."""
    model = families.build("Gemma2ForCausalLM", "gemma2", head_dim=8, tie_word_embeddings=True)
    teacher = families.llama(hidden_size=48)
    ids = families.token_ids()
    labels = ids[:, 1:]
    head, teacher_head = head_of(model), head_of(teacher)
    with torch.no_grad():
        signal = teacher(ids, output_hidden_states=True)
    found = model(ids, output_hidden_states=True, use_cache=False)
    want = KL()(found.logits[:, :-1], signal.logits[:, :-1], labels)
    expected = torch.autograd.grad(want, list(model.parameters()))
    states = model(ids, output_hidden_states=True, use_cache=False, logits_to_keep=1).hidden_states[-1]
    got = linear_loss(KL(), states[:, :-1], head, signal.hidden_states[-1][:, :-1], teacher_head, labels)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(got, list(model.parameters())), expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_are_known_too(dtype: torch.dtype) -> None:
    for architecture, family, changes, scale, softcap in MODELS[:9]:
        if family != "recurrent_gemma":
            head = head_of(families.build(architecture, family, **changes).to(dtype))
            assert (head.scale, head.softcap) == (scale, softcap)


def test_the_comparison_leaves_the_model_as_it_was() -> None:
    model = families.llama(attention_dropout=0.5).train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    head_of(model)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert not model.lm_head._forward_pre_hooks
    assert all(parameter.grad is None for parameter in model.parameters())


class Bent(nn.Linear):
    """A head that does what no table knows."""

    change: Any

    def forward(self, hidden: Tensor) -> Tensor:
        return self.change(super().forward(hidden))


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda z: 30 * torch.tanh(z / 30), id="softcap"),
        pytest.param(lambda z: 1.01 * z, id="scale"),
        pytest.param(lambda z: z[..., :90], id="fewer classes"),
        pytest.param(lambda z: z.index_fill(-1, torch.tensor([5]), -1e9), id="masked class"),
    ],
)
def test_a_head_that_does_more_is_refused(change: Any) -> None:
    model = families.llama()
    model.lm_head.__class__ = Bent
    model.lm_head.change = change
    with pytest.raises(ModelError, match=r"LlamaForCausalLM are not what its head makes.*whole logits"):
        head_of(model)


@pytest.mark.parametrize(
    ("architecture", "family", "changes", "message"),
    [
        ("BertLMHeadModel", "bert", {"is_decoder": True}, "not what its head makes of the last hidden state"),
        ("BertForMaskedLM", "bert", {}, "not what its head makes of the last hidden state"),
        ("BertForSequenceClassification", "bert", {}, "is a NoneType, not a Linear"),
    ],
)
def test_models_without_a_plain_head_are_refused(
    architecture: str, family: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ModelError, match=message):
        head_of(families.build(architecture, family, **changes))


def test_an_output_embedding_with_an_adapter_is_refused() -> None:
    model = families.llama()
    model.set_output_embeddings(nn.Sequential(model.get_output_embeddings(), nn.Identity()))
    with pytest.raises(ModelError, match="is a Sequential, not a Linear"):
        head_of(model)
