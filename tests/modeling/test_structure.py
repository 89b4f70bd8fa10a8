"""The target set of each family, against what a person reads off the architecture's parameters."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn

from compress.errors import ModelError
from compress.modeling.loading import parameter_count, skeleton
from compress.modeling.structure import as_matrix, find_blocks, find_stacks, matrices, require_linear, require_one_stack
from tests import families

LLAMA_BLOCK = {
    "self_attn.q_proj": (32, 32),
    "self_attn.k_proj": (16, 32),
    "self_attn.v_proj": (16, 32),
    "self_attn.o_proj": (32, 32),
    "mlp.gate_proj": (48, 32),
    "mlp.up_proj": (48, 32),
    "mlp.down_proj": (32, 48),
}
BERT_BLOCK = {
    "attention.self.query": (32, 32),
    "attention.self.key": (32, 32),
    "attention.self.value": (32, 32),
    "attention.output.dense": (32, 32),
    "intermediate.dense": (48, 32),
    "output.dense": (32, 48),
}


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_decoders(family: str) -> None:
    model = skeleton(families.config(family, head_dim=8))
    assert next(model.parameters()).device.type == "meta"
    assert [prefix for prefix, _ in find_blocks(model)] == ["model.layers.0", "model.layers.1"]
    views = matrices(model)
    expected = {f"model.layers.{i}.{name}": shape for i in range(2) for name, shape in LLAMA_BLOCK.items()}
    assert {view.name: view.shape for view in views} == expected
    assert [view.block for view in views] == [0] * 7 + [1] * 7
    for view in views:
        assert view.parameter == f"{view.name}.weight"
        assert view.index is None
        assert tuple(model.get_parameter(view.parameter).shape) == view.shape
    require_linear(views, model)
    require_one_stack(views, model)
    assert len({view.group for view in views}) == 2 * 4


@pytest.mark.parametrize(("architecture", "prefix"), [("BertModel", ""), ("BertForMaskedLM", "bert.")])
def test_encoder(architecture: str, prefix: str) -> None:
    views = matrices(families.bert(architecture))
    expected = {f"{prefix}encoder.layer.{i}.{name}": shape for i in range(2) for name, shape in BERT_BLOCK.items()}
    assert {view.name: view.shape for view in views} == expected
    assert len({view.group for view in views}) == 2 * 4


@pytest.mark.parametrize(("family", "inner"), [("mixtral", 48), ("qwen3_moe", 24)])
def test_fused_experts_are_views_of_slices(family: str, inner: int) -> None:
    model = skeleton(families.config(family))
    views = [view for view in matrices(model) if view.index is not None]
    assert len(views) == 2 * 2 * 4  # blocks x (gate_up, down) x experts
    first = views[1]
    assert first.name == "model.layers.0.mlp.experts.gate_up_proj.1"
    assert first.parameter == "model.layers.0.mlp.experts.gate_up_proj"
    assert first.module == "model.layers.0.mlp.experts"
    assert (first.index, first.shape) == (1, (2 * inner, 32))
    parameter = torch.arange(4 * 2 * inner * 32).reshape(4, 2 * inner, 32)
    assert torch.equal(as_matrix(parameter, first), parameter[1])
    assert {view.shape for view in views} == {(2 * inner, 32), (32, inner)}
    assert len({view.group for view in views}) == 2 * 2
    # the target set is the whole model but embeddings, head, norms and routers
    rest = [p for n, p in model.named_parameters() if "norm" in n or "mlp.gate." in n or "embed" in n or "lm_head" in n]
    assert sum(view.weights for view in matrices(model)) == parameter_count(model) - sum(p.numel() for p in rest)
    assert {view.place for view in views} == {view.parameter for view in views}
    with pytest.raises(ModelError, match="learned for linear layers alone"):
        require_linear(matrices(model), model)


@pytest.mark.parametrize(
    ("known", "down", "message"),
    [
        (True, (4, 48, 16), "unknown layout"),
        (True, (3, 48, 32), "unknown layout"),
        (False, (4, 48, 32), "is not known"),
    ],
)
def test_experts_of_another_form_are_refused(known: bool, down: tuple[int, ...], message: str) -> None:
    experts = nn.Module()
    experts.gate_up_proj = nn.Parameter(torch.empty(4, 32, 96))
    experts.down_proj = nn.Parameter(torch.empty(down))
    if known:
        experts.is_transposed = True  # type: ignore[assignment]
    model = nn.Module()
    model.layers = nn.ModuleList([nn.ModuleDict({"experts": experts})])
    with pytest.raises(ModelError, match=message):
        matrices(model)


def test_gates_beside_experts_are_no_matrices() -> None:
    model = skeleton(families.config("qwen2_moe", shared_expert_intermediate_size=48))
    names = {view.name.rpartition(".")[2] for view in matrices(model) if view.index is None}
    assert names == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def test_no_stack_and_several_stacks_are_refused() -> None:
    with pytest.raises(ModelError, match="has no stack of blocks"):
        matrices(nn.Sequential(nn.Linear(4, 4)))
    two = nn.ModuleDict({name: nn.ModuleList([nn.Linear(4, 4)]) for name in ("encoder", "decoder")})
    assert [view.block for view in matrices(two)] == [0, 1]
    with pytest.raises(ModelError, match="'encoder' and 'decoder'"):
        find_blocks(two)


def test_transposed_maps_are_turned() -> None:
    model = skeleton(families.config("gpt2", n_embd=32, n_layer=2, n_head=4))
    views = matrices(model)
    assert [view.shape for view in views[:4]] == [(96, 32), (32, 32), (128, 32), (32, 128)]
    stored = torch.randn(32, 96)
    assert torch.equal(as_matrix(stored, views[0]), stored.T)


def test_convolutions_are_matrices_but_grouped_ones() -> None:
    block = nn.Sequential(
        nn.Conv2d(4, 6, (3, 2)), nn.Conv2d(6, 6, 3, groups=6), nn.Conv1d(6, 8, 5), nn.Conv3d(8, 2, 3), nn.Linear(2, 3)
    )
    views = matrices(nn.ModuleDict({"layers": nn.ModuleList([block])}))
    assert {view.name.rpartition(".")[2]: view.shape for view in views} == {
        "0": (6, 24),
        "2": (8, 30),
        "3": (2, 216),
        "4": (3, 2),
    }


def test_convolutions_in_front_of_a_transformer_are_no_blocks() -> None:
    model = nn.ModuleDict(
        {
            "features": nn.ModuleList([nn.Conv1d(1, 8, 10), nn.Conv1d(8, 8, 3)]),
            "layers": nn.ModuleList([nn.Linear(8, 8)]),
        }
    )
    assert [stack.name for stack in find_stacks(model)] == ["layers"]
    alone = nn.ModuleDict({"features": model["features"]})
    assert [stack.name for stack in find_stacks(alone)] == ["features"]


def test_what_a_module_multiplies_itself_is_left_to_it() -> None:
    block = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2), "mlp": nn.Linear(8, 8)})
    assert [view.name for view in matrices(nn.ModuleDict({"layers": nn.ModuleList([block])}))] == ["layers.0.mlp"]


def test_towers_are_asked_for() -> None:
    text, vision = families.config("llama"), families.config("clip_vision_model", image_size=16, patch_size=4)
    model = skeleton(transformers.LlavaConfig(text_config=text, vision_config=vision, architectures=["LlavaModel"]))
    stacks = {stack.name: stack.tower for stack in find_stacks(model)}
    assert stacks == {"vision_tower.encoder.layers": True, "language_model.layers": False}
    assert all(view.name.startswith("language_model.") for view in matrices(model))
    both = matrices(model, towers=True)
    assert len(both) == 2 * 6 + 2 * 7
    with pytest.raises(ModelError, match="outside of the blocks"):
        require_one_stack(both, model)


class Written(nn.Linear):
    """As some models write it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x @ self.weight.T
        return y if self.bias is None else y + self.bias


class Scaled(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


class Pair(nn.Linear):
    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + y


def test_a_linear_layer_that_computes_something_else_is_no_matrix() -> None:
    with torch.device("meta"):
        block = nn.Sequential(Written(40, 20), Scaled(40, 20), Pair(40, 20), Written(20, 9, bias=False))
    views = matrices(nn.ModuleDict({"layers": nn.ModuleList([block])}))
    assert [view.name for view in views] == ["layers.0.0", "layers.0.3"]


def test_tied_parameters_count_once() -> None:
    tied, untied = (skeleton(families.config("llama", tie_word_embeddings=tie)) for tie in (True, False))
    assert parameter_count(untied) - parameter_count(tied) == 96 * 32
