"""Where a model's embedding and head are, and what its embedding does with rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from compress.errors import ModelError
from compress.modeling.tables import Lookup, find_tables, lookup_of, real_embedding
from tests import families

TIED: dict[str, tuple[str, str, dict[str, Any], list[str]]] = {
    "llama": (
        "LlamaForCausalLM", "llama", {"tie_word_embeddings": True}, ["model.embed_tokens", "lm_head"],
    ),
    "gpt2": (
        "GPT2LMHeadModel", "gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 4}, ["transformer.wte", "lm_head"],
    ),
    "bert": (
        "BertForMaskedLM", "bert", {}, ["bert.embeddings.word_embeddings", "cls.predictions.decoder"],
    ),
    "t5": (
        "T5ForConditionalGeneration", "t5", {"d_model": 32, "num_layers": 1, "decoder_start_token_id": 0},
        ["shared", "encoder.embed_tokens", "decoder.embed_tokens", "lm_head"],
    ),
}  # fmt: skip


def on_meta(model: PreTrainedModel) -> PreTrainedModel:
    with torch.device("meta"):
        return type(model)(model.config)


@pytest.mark.parametrize("name", TIED)
@pytest.mark.parametrize("kinds", [("embedding",), ("head",), ("embedding", "head")])
def test_a_tied_table_is_one(name: str, kinds: Any) -> None:
    architecture, family, changes, modules = TIED[name]
    model = families.build(architecture, family, **changes)
    weight = model.get_input_embeddings().weight
    for each in (model, on_meta(model)):
        (table,) = find_tables(each, kinds)
        assert table.kinds == ("embedding", "head")
        assert list(table.modules) == modules
        assert table.view.parameter == f"{modules[0]}.weight"
        assert table.view.shape == tuple(weight.shape)
    assert all(model.get_submodule(module).weight is weight for module in table.modules)


def test_untied_tables_are_two() -> None:
    model = families.llama(tie_word_embeddings=False)
    embedding, head = find_tables(model, ["embedding", "head"])
    assert (embedding.kinds, embedding.modules) == (("embedding",), ("model.embed_tokens",))
    assert (head.kinds, head.modules) == (("head",), ("lm_head",))
    tied = families.llama(tie_word_embeddings=True)
    both = find_tables(tied, ["embedding", "head"], untied=["lm_head.weight"])
    assert [table.modules for table in both] == [("model.embed_tokens",), ("lm_head",)]


def test_what_has_no_table() -> None:
    encoder = families.bert("BertModel")
    assert [table.view.name for table in find_tables(encoder, ["embedding"])] == ["embeddings.word_embeddings"]
    with pytest.raises(ModelError, match="BertModel has no output head") as caught:
        find_tables(encoder, ["head"])
    assert caught.value.remedy == "Leave out --head-bits."
    images = families.build("CLIPVisionModel", "clip_vision_model")
    with pytest.raises(ModelError, match="looks up no tokens"):
        find_tables(images, ["embedding"])


class Scaled(nn.Embedding):
    """Multiplies by a number, as BART does."""

    factor = 5.65685

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return super().forward(ids) * self.factor


class Shifted(nn.Embedding):
    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return super().forward(ids) + 1.0


class Masked(nn.Embedding):
    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return super().forward(ids) * (ids != 0).unsqueeze(-1)


def test_what_an_embedding_does_with_rows() -> None:
    assert lookup_of(nn.Embedding(7, 3, padding_idx=6), "x") == Lookup()
    assert lookup_of(Scaled(7, 3, padding_idx=6), "x") == Lookup(Scaled.factor)
    for other in (Shifted(7, 3), Masked(7, 3)):
        with pytest.raises(ModelError, match="does more with its rows"):
            lookup_of(other, "x")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_factor_of_gemma_is_rounded_as_it_does(dtype: torch.dtype) -> None:
    model = families.build("Gemma3ForCausalLM", "gemma3_text", head_dim=8, hidden_size=48, pad_token_id=0).to(dtype)
    embedding, ids = model.get_input_embeddings(), families.token_ids()
    lookup = lookup_of(embedding, "x")
    assert lookup.rounded == (dtype == torch.float32)  # the factor is a buffer that moves with the model
    assert torch.equal(lookup(embedding.weight[ids]), embedding(ids))
    real = real_embedding(on_meta(model), "model.embed_tokens")
    assert real.weight.is_meta
    again = lookup_of(real, "x")
    assert again.scale == pytest.approx(48**0.5, rel=1e-6 if dtype == torch.float32 else 2**-8)


def test_rows_that_change_are_refused() -> None:
    model: PreTrainedModel = families.llama()
    model.get_input_embeddings().max_norm = 1.0
    with pytest.raises(ModelError, match="max_norm"):
        find_tables(model, ["embedding"])


def test_a_head_that_is_no_linear_map() -> None:
    model: PreTrainedModel = families.llama(tie_word_embeddings=False)

    class Odd(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x).square()

    model.set_submodule("lm_head", Odd(32, 96))
    with pytest.raises(ModelError, match="'lm_head' is a Odd, which is no plain table"):
        find_tables(model, ["head"])
