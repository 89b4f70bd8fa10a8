"""Models with quantized activations, keys and values, against forward passes that are written out."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache

from compress.codecs import codec
from compress.codecs.dynamic import GroupQuantizer, TokenQuantizer
from compress.errors import ModelError, UsageError
from compress.modeling.structure import matrices
from compress.quantization.dynamic import Dynamic, dynamic_quantization
from compress.quantization.modules import PackedLinear
from compress.transforms.matrices import mix_weight
from compress.transforms.mixing import mix
from compress.transforms.signs import MIXINGS, matrix_signs, random_signs
from tests import families
from tests.transforms.exact import ExactNorm, assert_same

W4A4KV4 = Dynamic(TokenQuantizer(4), GroupQuantizer(4))
IDS = families.token_ids()


def exact(architecture: str = "LlamaForCausalLM", family: str = "llama", **changes: Any) -> Any:
    """A tiny model of which every operation that a rounding could see runs in float64."""
    model = families.build(architecture, family, **changes).double()
    for name, module in list(model.named_modules()):
        if type(module).__name__.endswith("RMSNorm"):
            model.set_submodule(name, ExactNorm(module))
    return model


def nearest(x: Tensor, bits: int) -> Tensor:
    """Every number of the last axis as the nearest of the 2^bits of its row, whose errors are parts of its range."""
    low, high = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True).clamp(min=0)
    step = (high - low).detach() / (2**bits - 1)
    levels = (torch.arange(2**bits, dtype=x.dtype) - (-low.detach() / step).round()) * step
    place = (x.detach().unsqueeze(-1) - levels.unsqueeze(-2)).abs().argmin(-1)
    return x + (high - low) * ((levels.gather(-1, place) - x) / (high - low)).detach()


def in_groups(x: Tensor, bits: int, group: int) -> Tensor:
    return torch.cat([nearest(part, bits) for part in x.split(group, -1)], -1)


def sylvester(n: int) -> Tensor:
    """The orthonormal Hadamard matrix of order n from the parities of i & j."""
    return torch.tensor([[(-1.0) ** (i & j).bit_count() for j in range(n)] for i in range(n)]).double() / n**0.5


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin


def written_out(
    model: Any, ids: Tensor, bits: int | None = None, kv: int | None = None, group: int = 8, mixed: bool = True
) -> Tensor:
    """Logits of a Llama with `bits` for the inputs of its matrices and `kv` for keys and values in groups."""
    inputs = (lambda x: nearest(x, bits)) if bits else (lambda x: x)
    cached = (lambda x: in_groups(x, kv, group)) if kv else (lambda x: x)
    body, batch, tokens = model.model, *ids.shape
    x = body.embed_tokens(ids)
    cos, sin = body.rotary_emb(x, torch.arange(tokens).unsqueeze(0))
    future = torch.full((tokens, tokens), -torch.inf).triu(1)
    for layer in body.layers:
        attention = layer.self_attn
        read = inputs(layer.input_layernorm(x))
        q, k, v = (
            functional.linear(read, each.weight).view(batch, tokens, -1, 8).transpose(1, 2)
            for each in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        q, k = turned(q, cos, sin), turned(k, cos, sin)
        k = cached(k @ sylvester(8)) @ sylvester(8) if mixed else cached(k)
        k, v = (each.repeat_interleave(2, 1) for each in (k, cached(v)))
        weights = (q @ k.mT / 8**0.5 + future).softmax(-1)
        heads = (weights @ v).transpose(1, 2).reshape(batch, tokens, -1)
        x = x + functional.linear(inputs(heads), attention.o_proj.weight)
        read = inputs(layer.post_attention_layernorm(x))
        gated = functional.silu(functional.linear(read, layer.mlp.gate_proj.weight))
        gated = gated * functional.linear(read, layer.mlp.up_proj.weight)
        x = x + functional.linear(inputs(gated), layer.mlp.down_proj.weight)
    found: Tensor = model.lm_head(body.norm(x))
    return found


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(
    ("bits", "kv", "group", "mixed"),
    [(8, None, 8, True), (4, None, 8, True), (None, 4, 8, True), (4, 4, 8, True), (4, 4, 8, False), (3, 2, 3, True)],
)
def test_a_llama_written_out(bits: int | None, kv: int | None, group: int, mixed: bool, attention: str) -> None:
    model, tolerance = exact(), 1e-10 if attention == "sdpa" else 1e-6  # eager softmax runs in float32
    model.set_attn_implementation(attention)
    plain = families.logits(model, IDS)
    assert_same(written_out(model, IDS).detach(), plain, tolerance)
    how = Dynamic(TokenQuantizer(bits) if bits else None, GroupQuantizer(kv, group) if kv else None, mixed)
    with dynamic_quantization(model, how):
        found = families.logits(model, IDS)
    assert_same(found, written_out(model, IDS, bits, kv, group, mixed).detach(), tolerance)
    assert float((found - plain).norm() / plain.norm()) > 1e-3


@pytest.mark.parametrize("mixed", [True, False])
def test_gradients_of_a_llama_written_out(mixed: bool) -> None:
    model = exact()
    direction = torch.randn(2, 12, 96, dtype=torch.float64)
    with dynamic_quantization(model, Dynamic(TokenQuantizer(4), GroupQuantizer(4), mixed)):
        (model(IDS).logits * direction).sum().backward()
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    (written_out(model, IDS, 4, 4, 8, mixed) * direction).sum().backward()
    for name, parameter in model.named_parameters():
        assert_same(found[name], parameter.grad)


@pytest.mark.parametrize(
    ("architecture", "family", "changes"),
    [
        ("LlamaForCausalLM", "llama", {}),
        ("Qwen3ForCausalLM", "qwen3", {"head_dim": 8}),
        ("Gemma2ForCausalLM", "gemma2", {"head_dim": 8}),
        ("GPTNeoXForCausalLM", "gpt_neox", {}),
    ],
)
def test_writing_with_a_cache_rounds_what_reading_rounds(
    architecture: str, family: str, changes: dict[str, int]
) -> None:
    model, cache, steps = exact(architecture, family, **changes), DynamicCache(), []
    with dynamic_quantization(model, W4A4KV4), torch.no_grad():
        whole = model(IDS, use_cache=False).logits
        for part in IDS.split([4, *[1] * 8], 1):
            steps.append(model(part, past_key_values=cache, use_cache=True).logits)
    assert_same(torch.cat(steps, 1), whole, 1e-7)


@pytest.mark.parametrize(
    ("architecture", "family"),
    [("Qwen3ForCausalLM", "qwen3"), ("MistralForCausalLM", "mistral"), ("Gemma2ForCausalLM", "gemma2")],
)
def test_keys_and_values_of_other_families(architecture: str, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same rounded where the model's own code has just rotated keys and projected values."""
    model = exact(architecture, family, head_dim=8)
    with dynamic_quantization(model, Dynamic(kv=GroupQuantizer(4), mix_keys=False)):
        found = families.logits(model, IDS)
    plain = families.logits(model, IDS)
    code = sys.modules[type(model).__module__]
    rotate: Callable[..., tuple[Tensor, Tensor]] = vars(code)["apply_rotary_pos_emb"]

    def rounded(*args: Any, **options: Any) -> tuple[Tensor, Tensor]:
        query, key = rotate(*args, **options)
        return query, nearest(key, 4)

    monkeypatch.setattr(code, "apply_rotary_pos_emb", rounded)
    for name, module in model.named_modules():
        if name.endswith("v_proj"):
            module.register_forward_hook(lambda _, __, y: in_groups(y, 4, 8))
    assert_same(found, families.logits(model, IDS))
    assert float((found - plain).norm() / plain.norm()) > 1e-3


class Explicit(nn.Module):
    """y = Qo (W' round(Qi^T x)) in float64."""

    def __init__(self, packed: PackedLinear, bits: int) -> None:
        super().__init__()
        matrix = packed.quantized()
        self.weight, self.signs, self.bits = matrix.plain.dequantize().double(), matrix.signs, bits

    def forward(self, x: Tensor) -> Tensor:
        return self.signs.unmix_outputs(nearest(self.signs.mix_inputs(x), self.bits) @ self.weight.T)


@pytest.mark.parametrize("mixing", MIXINGS)
@pytest.mark.parametrize(("name", "width"), [("half_pyramid", 26), ("pyramid", 51), ("integer", 4)])
def test_packed_matrices_round_in_their_basis(name: str, width: int, mixing: str) -> None:
    model, rounder = exact(), codec(name)
    explicit = copy.deepcopy(model)
    for view in matrices(model):
        signs = matrix_signs(mixing, view.shape, 0, view.name, view.group)
        linear = model.get_submodule(view.module)
        weight = mix_weight(linear.weight.detach().float(), signs)
        packed = PackedLinear.from_matrix(linear, rounder.quantize(weight, rounder.spec(width)).mixed(signs))
        model.set_submodule(view.module, packed)
        explicit.set_submodule(view.module, Explicit(packed, 8))
    plain = families.logits(model, IDS)
    with dynamic_quantization(model, Dynamic(TokenQuantizer(8))):
        found = families.logits(model, IDS)
    expected = families.logits(explicit, IDS)
    assert_same(found, expected, 1e-5)
    assert float((plain - expected).norm() / expected.norm()) > 1e-3
    assert torch.equal(families.logits(model, IDS), plain)


@pytest.mark.parametrize("roundings", [(), (TokenQuantizer(4),)])
@pytest.mark.parametrize(("name", "width"), [("half_pyramid", 26), ("pyramid", 51)])
def test_a_gradient_after_an_evaluation(name: str, width: int, roundings: tuple[TokenQuantizer, ...]) -> None:
    """A weight that was first decoded in inference mode serves a backward pass too."""
    signs, rounder = matrix_signs("both", (16, 32), 0, "m", "g"), codec(name)
    weight = torch.randn(16, 32, generator=torch.Generator().manual_seed(0))
    packed = PackedLinear.from_matrix(
        nn.Linear(32, 16, bias=False), rounder.quantize(weight, rounder.spec(width)).mixed(signs)
    )
    packed.roundings = roundings
    x = torch.randn(3, 32, dtype=torch.float64, requires_grad=True)
    with torch.inference_mode():
        packed(x)
    direction = torch.randn(3, 16, dtype=torch.float64)
    (packed(x) * direction).sum().backward()
    y = x.detach().requires_grad_()
    exactly = Explicit(packed, 4)(y) if roundings else y @ packed.quantized().dequantize().double().T
    (exactly * direction).sum().backward()
    assert x.grad is not None and y.grad is not None
    assert_same(x.grad, y.grad, 1e-5)


def test_hooks_that_were_there_run_before() -> None:
    model = exact()
    linear = model.model.layers[0].mlp.down_proj
    signs, seen = random_signs(48, 0, "test"), []
    linear.register_forward_pre_hook(lambda _, inputs: (mix(inputs[0], signs),))
    with dynamic_quantization(model, Dynamic(TokenQuantizer(4))):
        linear.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        x = torch.randn(3, 48, dtype=torch.float64)
        y = linear(x)
    assert_same(seen[0], nearest(mix(x, signs), 4))
    assert_same(y.detach(), nearest(mix(x, signs), 4) @ linear.weight.detach().T)


def registered() -> tuple[set[str], set[str]]:
    return set(AttentionInterface().valid_keys()), set(AttentionMaskInterface().valid_keys())


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules())


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_everything_is_as_it_was(attention: str) -> None:
    model = families.llama()
    model.set_attn_implementation(attention)
    before, plain, own = registered(), families.logits(model, IDS), hooks(model)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="halfway"), dynamic_quantization(model, W4A4KV4):
            assert registered() != before and hooks(model) > own
            raise RuntimeError("halfway")
        assert registered() == before and hooks(model) == own
        assert model.config._attn_implementation == attention
        assert torch.equal(families.logits(model, IDS), plain)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_one_within_the_other(attention: str) -> None:
    model = exact()
    model.set_attn_implementation(attention)
    with dynamic_quantization(model, W4A4KV4):
        expected = families.logits(model, IDS)
    with dynamic_quantization(model, Dynamic(W4A4KV4.activations)):
        outer = families.logits(model, IDS)
        with dynamic_quantization(model, Dynamic(kv=W4A4KV4.kv)):
            assert torch.equal(families.logits(model, IDS), expected)
            with dynamic_quantization(model, Dynamic(kv=GroupQuantizer(2))):
                assert not torch.equal(families.logits(model, IDS), expected)
            assert torch.equal(families.logits(model, IDS), expected)
        assert torch.equal(families.logits(model, IDS), outer)


def test_two_models_at_once_even_of_one_config() -> None:
    config = families.config("llama")
    first, second = (type(families.llama())(config).eval() for _ in range(2))
    assert first.config is second.config
    plain = families.logits(second, IDS)
    with dynamic_quantization(first, W4A4KV4):
        alone = families.logits(first, IDS)
        assert torch.equal(families.logits(second, IDS), plain)
        with dynamic_quantization(second, Dynamic(kv=GroupQuantizer(2))):
            assert torch.equal(families.logits(first, IDS), alone)
            assert not torch.equal(families.logits(second, IDS), plain)
    assert torch.equal(families.logits(second, IDS), plain)


def test_recomputed_and_with_other_parameters() -> None:
    model = exact().train()
    with dynamic_quantization(model, W4A4KV4):
        model(IDS).logits.square().sum().backward()
        expected = [parameter.grad.clone() for parameter in model.parameters()]
        model.zero_grad()
        model.activation_checkpointing_enable()
        logits = model(IDS).logits
        logits.square().sum().backward()
        for parameter, gradient in zip(model.parameters(), expected, strict=True):
            assert_same(parameter.grad, gradient)
        halved = {name: parameter.detach() / 2 for name, parameter in model.named_parameters()}
        found = functional_call(model, halved, (IDS,)).logits
    model.load_state_dict({**model.state_dict(), **halved})
    with dynamic_quantization(model, W4A4KV4):
        assert_same(found, families.logits(model, IDS))


def test_in_half_precision() -> None:
    model = families.llama()
    plain = families.logits(model, IDS)
    model.bfloat16()
    with dynamic_quantization(model, Dynamic(TokenQuantizer(8), GroupQuantizer(8))):
        found = families.logits(model, IDS)
    assert found.dtype == torch.bfloat16
    assert float((found.float() - plain).norm() / plain.norm()) < 0.1


def test_an_encoder_has_activations_and_no_cache() -> None:
    model = families.bert()
    plain = families.logits(model, IDS)
    with dynamic_quantization(model, Dynamic(TokenQuantizer(4))):
        found = families.logits(model, IDS)
    assert 1e-3 < float((found - plain).norm() / plain.norm()) < 1
    with pytest.raises(UsageError, match="no decoder"), dynamic_quantization(model, W4A4KV4):
        pass
    assert torch.equal(families.logits(model, IDS), plain)


def test_an_attention_that_is_out_of_reach() -> None:
    model = families.build("BloomForCausalLM", "bloom", n_layer=2, n_head=4)
    own = hooks(model)
    with (
        pytest.raises(UsageError, match="does not go through"),
        dynamic_quantization(model, Dynamic(kv=GroupQuantizer())),
    ):
        families.logits(model, IDS)
    assert hooks(model) == own


def test_attentions_that_are_not_known() -> None:
    model = families.llama()
    model.config._attn_implementation = "flex_attention"
    with pytest.raises(UsageError, match=r"flex_attention.*sdpa"), dynamic_quantization(model, W4A4KV4):
        pass
    mixture = families.build("MixtralForCausalLM", "mixtral")
    with pytest.raises(ModelError, match="MixtralExperts"), dynamic_quantization(mixture, W4A4KV4):
        pass
