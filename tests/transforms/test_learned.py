"""What is learned stays the same function: every rotation and scaling at random, folded, in float64 and in float32."""

from __future__ import annotations

import copy
import math
import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.cohere import modeling_cohere

from compress.modeling.loading import skeleton
from compress.modeling.scalings import Scalings, find_scalings
from compress.modeling.sites import Sites, find_sites
from compress.modeling.structure import matrices
from compress.transforms.basis import hadamard_basis
from compress.transforms.fold import Fold, fold_model, make_fold
from compress.transforms.incoherence import online_mixing
from compress.transforms.learned import PARTS, RESIDUAL, is_rotation, learned_basis, learned_shapes, starting_tensors
from compress.transforms.probe import proven_scalings, proven_sites
from tests import families
from tests.transforms.exact import assert_same, double, exact_logits, mix_online
from tests.transforms.test_fold import FOLDABLE, name_of

OTHERS: list[tuple[str, str, dict[str, Any]]] = [
    ("Gemma2ForCausalLM", "gemma2", {}),
    ("Olmo2ForCausalLM", "olmo2", {}),
    ("CohereForCausalLM", "cohere", {}),
    ("StableLmForCausalLM", "stablelm", {}),
]


def random_tensors(
    sites: Sites, scalings: Scalings, seed: int = 0, dtype: torch.dtype = torch.float64
) -> dict[str, Tensor]:
    """Orthogonal matrices and factors between about 1/5 and 5."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in learned_shapes(sites, scalings).items():
        draw = torch.randn(shape, generator=generator, dtype=torch.float64)
        tensors[name] = (torch.linalg.qr(draw).Q if is_rotation(name) else 0.8 * draw).to(dtype)
    return tensors


@pytest.fixture(autouse=True)
def exact_rotations(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cohere's RoPE computes in float32 whatever it is given; here it does in the type of its input."""

    def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        other = torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)
        return x * cos + other * sin

    def both(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
        cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
        return turn(q, cos, sin), turn(k, cos, sin)

    monkeypatch.setattr(modeling_cohere, "apply_rotary_pos_emb", both)


def places(model: Any) -> tuple[Sites, Scalings]:
    return proven_sites(model), proven_scalings(model)


@pytest.mark.parametrize("case", FOLDABLE + OTHERS, ids=name_of)
def test_the_same_logits(case: tuple[str, str, dict[str, Any]]) -> None:
    architecture, family, changes = case
    model = double(architecture, family, **changes)
    expected = exact_logits(model)
    sites, scalings = places(model)
    tensors = random_tensors(sites, scalings)
    assert len(scalings.gates) == len(scalings.queries) == 2 or scalings.reasons
    after = copy.deepcopy(model)
    fold_model(after, make_fold(learned_basis(sites, scalings, tensors, 0), model.get_parameter))
    assert_same(exact_logits(after), expected, 1e-9)
    changed = {
        name
        for name, one in after.named_parameters()
        if not torch.equal(one, dict(model.named_parameters()).get(name, one))
    }
    for site in sites.values:
        assert {f"{site.value}.weight", f"{site.output}.weight"} <= changed
    mix_online(after, online_mixing(matrices(model), sites))
    assert_same(exact_logits(after), expected, 1e-9)
    for part in PARTS:
        alone = copy.deepcopy(model)
        shapes = learned_shapes(sites, scalings, [part])
        basis = learned_basis(sites, scalings, {name: tensors[name] for name in shapes}, 0)
        fold_model(alone, make_fold(basis, model.get_parameter))
        assert_same(exact_logits(alone), expected, 1e-9)


@pytest.mark.parametrize("case", FOLDABLE[:1] + FOLDABLE[6:10] + OTHERS, ids=name_of)
def test_in_float32(case: tuple[str, str, dict[str, Any]]) -> None:
    model = double(case[0], case[1], **case[2]).float()
    expected = families.logits(model, families.token_ids())
    sites, scalings = places(model)
    tensors = random_tensors(sites, scalings, dtype=torch.float32)
    fold_model(model, make_fold(learned_basis(sites, scalings, tensors, 0), model.get_parameter))
    found = families.logits(model, families.token_ids())
    assert float((found - expected).abs().max()) <= 1e-4 * float(expected.abs().max())


@pytest.mark.parametrize(
    ("family", "pairs", "norms"),
    [("llama", "halves", False), ("qwen3", "halves", True), ("cohere", "neighbours", False)],
)
def test_pairs_are_found_by_trial(family: str, pairs: str, norms: bool) -> None:
    architecture = {"llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM", "cohere": "CohereForCausalLM"}[family]
    scalings = proven_scalings(double(architecture, family))
    assert len(scalings.queries) == 2 and not scalings.reasons
    for site in scalings.queries:
        assert site.pairs == pairs and (site.norms is not None) == norms
        assert site.groups == (1 if norms else site.kv_heads)


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("bert", "there is no '.*self_attn'"),
        ("mixtral", "has no 'down_proj'|has no 'gate_proj'|no '.*mlp'"),
        ("stablelm", "Queries and keys cannot be scaled in the weights: the logits of StableLmForCausalLM change"),
        ("olmo2", "is not RMSNorm over"),
    ],
)
def test_what_cannot_be_scaled_says_why(family: str, reason: str) -> None:
    scalings = proven_scalings(skeleton(families.config(family, pad_token_id=0, hidden_size=64)))
    assert any(re.search(reason, text) for text in scalings.reasons), scalings.reasons


def test_untied_pairs_would_change_the_model() -> None:
    """RoPE turns pairs: factors of their own for both channels of one are no equivalent model."""
    model = double("LlamaForCausalLM", "llama")
    expected = exact_logits(model)
    scalings = find_scalings(model)
    wrong = replace(scalings, queries=tuple(replace(site, pairs="neighbours") for site in scalings.queries))
    shapes = learned_shapes(Sites(), wrong, ["queries"])
    tensors = {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}
    fold_model(model, make_fold(learned_basis(Sites(), wrong, tensors, 0), model.get_parameter))
    assert float((exact_logits(model) - expected).abs().max()) > 1e-3


def test_it_starts_as_hadamard() -> None:
    model = double("LlamaForCausalLM", "llama")
    sites, scalings = find_sites(model), find_scalings(model)
    tensors = starting_tensors(sites, scalings, model.get_parameter, "hadamard", 3)
    fold, mixed = Fold(learned_basis(sites, scalings, tensors, 3)), Fold(hadamard_basis(sites, 3))
    for name, parameter in model.named_parameters():
        if mixed.changes(name):
            difference = fold.tensor(name, model.get_parameter) - mixed.tensor(name, model.get_parameter)
            assert float(difference.abs().max()) <= 1e-6 * float(parameter.detach().abs().max()) * math.sqrt(
                parameter.shape[-1]
            )


def test_womi_starts_at_the_principal_axes() -> None:
    """Without the mixing, the second moments of what reads the stream are diagonal, and those of W_o's columns."""
    model = double("LlamaForCausalLM", "llama")
    sites, scalings = find_sites(model), find_scalings(model)
    assert sites.residual is not None
    tensors = starting_tensors(sites, scalings, model.get_parameter, "womi", 3)
    plain = starting_tensors(sites, scalings, model.get_parameter, "hadamard", 3)
    axes = (tensors[RESIDUAL][0] @ plain[RESIDUAL][0].T).double()
    rows = torch.cat(
        [
            model.get_parameter(f"{name}.weight") * model.get_parameter(f"{norm}.weight")
            for name, norm in sites.residual.readers.items()
            if name != sites.residual.head
        ]
    )
    moments = axes.T @ rows.T @ rows @ axes
    assert float((moments - moments.diag().diag()).abs().max()) < 1e-5 * float(moments.abs().max())
    site = sites.values[0]
    output = model.get_parameter(f"{site.output}.weight").view(
        -1, site.kv_heads, site.heads // site.kv_heads, site.head_dim
    )
    for head in range(site.kv_heads):
        turned = (tensors[f"{site.value}.rotation"][head] @ plain[f"{site.value}.rotation"][head].T).double()
        columns = output[:, head].reshape(-1, site.head_dim)
        moments = turned.T @ columns.T @ columns @ turned
        assert float((moments - moments.diag().diag()).abs().max()) < 1e-5 * float(moments.abs().max())


@pytest.mark.parametrize("case", FOLDABLE[:4] + FOLDABLE[8:10], ids=name_of)
def test_the_loop_computes_what_is_folded(case: tuple[str, str, dict[str, Any]]) -> None:
    """Fold chunk by chunk in float64 and the function that autograd follows are the same numbers."""
    model = double(case[0], case[1], **case[2])
    sites, scalings = places(model)
    basis = learned_basis(sites, scalings, random_tensors(sites, scalings), 0)
    fold = make_fold(basis, model.get_parameter)
    for name, _ in model.named_parameters():
        found, expected = fold.differentiable(name, model.get_parameter), fold.tensor(name, model.get_parameter)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
