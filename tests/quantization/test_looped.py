"""The model in the loop is the folded, rounded model, and its gradient that of a forward pass that is written out."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional

from compress.codecs import Codec, codec
from compress.codecs.dynamic import GroupQuantizer, TokenQuantizer
from compress.errors import NumericsError
from compress.modeling.scalings import Scalings
from compress.modeling.sites import Sites
from compress.modeling.structure import matrices
from compress.quantization.dynamic import Dynamic
from compress.quantization.looped import LoopedModel
from compress.transforms.fold import Fold, fold_model, make_fold
from compress.transforms.incoherence import online_mixing, view_signs
from compress.transforms.learned import is_rotation, learned_basis
from compress.transforms.matrices import mix_weight
from compress.transforms.mixing import mix
from compress.transforms.probe import proven_scalings, proven_sites
from compress.transforms.qsur import weight_qsur
from compress.transforms.signs import Signs
from tests import families
from tests.quantization.test_dynamic import in_groups, nearest, sylvester, turned
from tests.transforms.exact import ExactNorm, assert_same
from tests.transforms.test_learned import random_tensors

IDS = families.token_ids()
BATCH = {"input_ids": IDS}
LLAMA: tuple[str, str, dict[str, Any]] = ("LlamaForCausalLM", "llama", {})
CASES: list[tuple[str, str, dict[str, Any]]] = [
    LLAMA,
    ("LlamaForCausalLM", "llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    ("Qwen3ForCausalLM", "qwen3", {"head_dim": 8}),
    ("GemmaForCausalLM", "gemma", {"head_dim": 8}),
    ("Gemma2ForCausalLM", "gemma2", {"head_dim": 8}),
]
CODECS = [("half_pyramid", 26), ("pyramid", 51), ("pvq", 28), ("integer", 4)]
NOTHING = Dynamic()
W4A4KV4 = Dynamic(TokenQuantizer(4), GroupQuantizer(4))


@dataclass(frozen=True)
class Subject:
    """A model in float64, norms included, with random tensors of its basis."""

    model: Any
    sites: Sites
    scalings: Scalings
    tensors: dict[str, Tensor]
    mixing: dict[str, str]

    @property
    def signs(self) -> dict[str, Signs]:
        return {view.name: view_signs(view, self.mixing[view.name], 0) for view in matrices(self.model)}

    def fold(self) -> Fold:
        return Fold(learned_basis(self.sites, self.scalings, self.tensors, 0))

    def looped(self, rounder: Codec | None = None, width: int = 0, dynamic: Dynamic = NOTHING) -> LoopedModel:
        views = matrices(self.model)
        specs = {} if rounder is None else {view.name: rounder.spec(width) for view in views}
        return LoopedModel(self.model, views, self.signs, rounder, specs, dynamic)

    def folded(self) -> Any:
        """A copy, folded in place."""
        model = copy.deepcopy(self.model)
        basis = learned_basis(self.sites, self.scalings, self.tensors, 0)
        fold_model(model, make_fold(basis, self.model.get_parameter))
        return model


def subject(architecture: str, family: str, changes: Mapping[str, Any], seed: int = 0) -> Subject:
    model = families.build(architecture, family, **changes).double()
    sites, scalings = proven_sites(model), proven_scalings(model)
    mixing = online_mixing(matrices(model), sites)
    for name, module in list(model.named_modules()):
        if type(module).__name__.endswith("RMSNorm"):
            model.set_submodule(name, ExactNorm(module))
    model.requires_grad_(False)
    return Subject(model, sites, scalings, random_tensors(sites, scalings, seed), mixing)


def name_of(case: tuple[str, str, dict[str, Any]]) -> str:
    return f"{case[1]}-{len(case[2])}"


def logits(looped: LoopedModel, fold: Fold) -> Tensor:
    with torch.no_grad(), looped.transformed(fold):
        return looped.logits(BATCH)


class Rounded(nn.Module):
    """y = Qo (Q(W') round(Qi^T x)) + b with W' = Qo^T W Qi."""

    def __init__(self, linear: nn.Linear, signs: Signs, rounder: Codec, width: int, bits: int | None) -> None:
        super().__init__()
        self.signs, self.bias, self.bits = signs, linear.bias, bits
        mixed = mix_weight(linear.weight.detach(), signs)
        self.weight = rounder.quantize(mixed, rounder.spec(width)).dequantize().double()

    def forward(self, x: Tensor) -> Tensor:
        x = self.signs.mix_inputs(x)
        y = self.signs.unmix_outputs((x if self.bits is None else nearest(x, self.bits)) @ self.weight.T)
        return y if self.bias is None else y + self.bias


def round_cache(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys in 4 bits behind a Hadamard matrix and values in 4 bits, where the model's own code has just made them."""
    code = sys.modules[type(model).__module__]
    rotate: Callable[..., tuple[Tensor, Tensor]] = vars(code)["apply_rotary_pos_emb"]

    def rounded(*args: Any, **options: Any) -> tuple[Tensor, Tensor]:
        query, key = rotate(*args, **options)
        return query, nearest(key @ sylvester(8), 4) @ sylvester(8)

    monkeypatch.setattr(code, "apply_rotary_pos_emb", rounded)
    for name, module in model.named_modules():
        if name.endswith("v_proj"):
            module.register_forward_hook(lambda _, __, y: in_groups(y, 4, 8))


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_without_rounding_it_is_the_model(case: tuple[str, str, dict[str, Any]]) -> None:
    one = subject(*case)
    plain = families.logits(one.model, IDS)
    assert_same(logits(one.looped(), one.fold()), plain, 1e-9)
    assert torch.equal(one.looped().logits(BATCH), plain)


@pytest.mark.parametrize("case", CASES, ids=name_of)
@pytest.mark.parametrize("dynamic", [NOTHING, W4A4KV4], ids=["weights", "W4A4KV4"])
def test_it_is_the_folded_and_rounded_model(
    case: tuple[str, str, dict[str, Any]], dynamic: Dynamic, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, rounder = subject(*case), codec("integer", group=16)
    found = logits(one.looped(rounder, 4, dynamic), one.fold())
    model, bits = one.folded(), None if dynamic.activations is None else 4
    for view in matrices(model):
        linear = model.get_submodule(view.module)
        model.set_submodule(view.module, Rounded(linear, one.signs[view.name], rounder, 4, bits))
    if dynamic.kv is not None:
        round_cache(model, monkeypatch)
    assert_same(found, families.logits(model, IDS), 1e-9)
    plain = families.logits(one.model, IDS)
    assert float((found - plain).norm() / plain.norm()) > 1e-2


@pytest.mark.parametrize(("name", "width"), CODECS)
def test_every_codec(name: str, width: int) -> None:
    """In Gemma 2, whose matrices are mixed on both sides."""
    one, rounder = subject(*CASES[-1]), codec(name)
    found = logits(one.looped(rounder, width), one.fold())
    model = one.folded()
    for view in matrices(model):
        linear = model.get_submodule(view.module)
        model.set_submodule(view.module, Rounded(linear, one.signs[view.name], rounder, width, None))
    assert_same(found, families.logits(model, IDS), 1e-9)
    plain = families.logits(one.model, IDS)
    assert float((found - plain).norm() / plain.norm()) > 1e-2


def test_filled_rows_are_masked() -> None:
    """Whatever the masked tokens are, the others say the same."""
    one, rounder = subject(*LLAMA), codec("integer")
    looped, mask = one.looped(rounder, 4), (torch.arange(12) < torch.tensor([[12], [7]])).long()
    found = []
    for filling in (0, 5):
        ids = torch.where(mask == 1, IDS, filling)
        with torch.no_grad(), looped.transformed(one.fold()):
            found.append(looped.logits({"input_ids": ids, "attention_mask": mask})[mask == 1])
    assert_same(found[0], found[1])


def require_gradients(one: Subject) -> list[Tensor]:
    """The tensors of the basis, which need gradients from now on."""
    return [tensor.requires_grad_() for tensor in one.tensors.values()]


def mixture(signs: Tensor | None, width: int) -> Tensor:
    """Q as a matrix."""
    eye = torch.eye(width, dtype=torch.float64)
    return eye if signs is None else mix(eye, signs)


def row_spread(weight: Tensor) -> Tensor:
    return weight.pow(2).sum(1, keepdim=True).div(weight.shape[1]).pow(0.5)


def range_spread(weight: Tensor) -> Tensor:
    parts = []
    for part in weight.split(16, 1):
        zero = part.new_zeros(part.shape[0], 1)
        ends = torch.cat([part, zero], 1)
        parts.append((ends.max(1).values - ends.min(1).values).unsqueeze(1).expand_as(part))
    return torch.cat(parts, 1)


def largest_spread(weight: Tensor) -> Tensor:
    return torch.cat([part.abs().max(1, keepdim=True).values.expand_as(part) for part in weight.split(16, 1)], 1)


Spread = Callable[[Tensor], Tensor]
SPREADS: list[tuple[str, dict[str, Any], int, Spread, str | None]] = [
    ("half_pyramid", {}, 26, row_spread, "both"),
    ("pyramid", {}, 51, row_spread, None),
    ("pvq", {}, 28, row_spread, None),
    ("integer", {"group": 16}, 4, range_spread, "both"),
    ("integer", {"group": 16, "symmetric": True}, 3, largest_spread, None),
]
"""A codec and what its errors are in proportion to; which sides of all matrices are mixed (None: as is needed)."""


@dataclass(frozen=True)
class WrittenOut:
    """A Llama whose weights, of the basis `tensors` and rounded, are computed line by line; R is undone by its
    transpose, as in the fold."""

    model: Any
    tensors: Mapping[str, Tensor]
    signs: Mapping[str, Signs]
    rounder: Codec
    width: int
    spread: Spread
    bits: int | None
    kv: int | None

    def linear(self, name: str, weight: Tensor, x: Tensor) -> Tensor:
        """x W^T of the rounded weight in its mixed basis, x rounded there."""
        rows, columns = weight.shape
        left, right = mixture(self.signs[name].output, rows), mixture(self.signs[name].input, columns)
        weight = left.T @ weight @ right
        rounded = self.rounder.quantize(weight.detach(), self.rounder.spec(self.width)).dequantize().double()
        spread = self.spread(weight)
        weight = weight + spread * ((rounded - weight) / spread).detach()
        x = x @ right
        return functional.linear(x if self.bits is None else nearest(x, self.bits), weight) @ left.T

    def scale(self, name: str) -> Tensor:
        return self.tensors[f"{name}.scaling"].exp()

    def __call__(self, ids: Tensor) -> Tensor:
        body, rotation = self.model.model, self.tensors["residual.rotation"][0]
        tokens = ids.shape[1]
        x = body.embed_tokens(ids) @ rotation
        cos, sin = body.rotary_emb(x, torch.arange(tokens).unsqueeze(0))
        for index in range(len(body.layers)):
            x = x + self.attention(f"model.layers.{index}", x, cos, sin, rotation)
            x = x + self.mlp(f"model.layers.{index}", x, rotation)
        found: Tensor = self.model.lm_head(body.norm(x @ rotation.T))
        return found

    def read(self, name: str, norm: str, rotation: Tensor) -> Tensor:
        """The weight of what reads the stream, behind a norm that divides by its scaling."""
        gain = self.model.get_parameter(f"{norm}.weight")
        weight: Tensor = self.model.get_parameter(f"{name}.weight") * gain
        return weight @ rotation * self.scale(norm)

    def normed(self, norm: str, x: Tensor) -> Tensor:
        eps = self.model.get_submodule(norm).eps
        return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() / self.scale(norm)

    def attention(self, block: str, x: Tensor, cos: Tensor, sin: Tensor, rotation: Tensor) -> Tensor:
        norm, part = f"{block}.input_layernorm", f"{block}.self_attn"
        batch, tokens, _ = x.shape
        heads = self.scale(f"{part}.k_proj")
        heads = torch.cat([heads, heads], 1)  # [2, 8], one for each channel of the keys
        turns, values = self.tensors[f"{part}.v_proj.rotation"], self.scale(f"{part}.v_proj")
        query = self.read(f"{part}.q_proj", norm, rotation).view(2, 2, 8, 32) / heads.view(2, 1, 8, 1)
        key = self.read(f"{part}.k_proj", norm, rotation).view(2, 8, 32) * heads.unsqueeze(2)
        value = self.read(f"{part}.v_proj", norm, rotation).view(2, 8, 32)
        value = torch.stack([turn.T @ rows for turn, rows in zip(turns, value, strict=True)]) / values.unsqueeze(2)
        output = (rotation.T @ self.model.get_parameter(f"{part}.o_proj.weight")).view(32, 2, 2, 8)
        output = torch.stack(
            [output[:, head // 2, head % 2] @ turns[head // 2] * values[head // 2] for head in range(4)], 1
        )
        read = self.normed(norm, x)
        q, k, v = (
            self.linear(f"{part}.{name}", weight.reshape(-1, 32), read).view(batch, tokens, -1, 8).transpose(1, 2)
            for name, weight in (("q_proj", query), ("k_proj", key), ("v_proj", value))
        )
        q, k = turned(q, cos, sin), turned(k, cos, sin)
        if self.kv is not None:
            k, v = nearest(k @ sylvester(8), self.kv) @ sylvester(8), nearest(v, self.kv)
        k, v = (each.repeat_interleave(2, 1) for each in (k, v))
        future = torch.full((tokens, tokens), -torch.inf).triu(1)
        seen = (q @ k.mT / 8**0.5 + future).softmax(-1) @ v
        return self.linear(f"{part}.o_proj", output.reshape(32, 32), seen.transpose(1, 2).reshape(batch, tokens, -1))

    def mlp(self, block: str, x: Tensor, rotation: Tensor) -> Tensor:
        norm, part = f"{block}.post_attention_layernorm", f"{block}.mlp"
        factors = self.scale(f"{part}.up_proj")
        down = rotation.T @ self.model.get_parameter(f"{part}.down_proj.weight") * factors
        read = self.normed(norm, x)
        gate, up = (self.read(f"{part}.{name}", norm, rotation) for name in ("gate_proj", "up_proj"))
        gated = functional.silu(self.linear(f"{part}.gate_proj", gate, read))
        return self.linear(f"{part}.down_proj", down, gated * self.linear(f"{part}.up_proj", up / factors.T, read))


@pytest.mark.parametrize(("bits", "kv"), [(4, None), (None, 4)])
@pytest.mark.parametrize(
    ("name", "options", "width", "spread", "mixing"),
    SPREADS,
    ids=["half_pyramid", "pyramid", "pvq", "integer", "symmetric"],
)
def test_gradients_of_a_llama_written_out(
    name: str, options: dict[str, Any], width: int, spread: Spread, mixing: str | None, bits: int | None, kv: int | None
) -> None:
    """Not with both: the first token's values, then a few numbers, are mixed to equal largest ones in front of the
    output projection, which of them has the gradient being a matter of the last digit."""
    one, rounder = subject(*LLAMA), codec(name, **options)
    if mixing is not None:
        one.mixing.update(dict.fromkeys(one.mixing, mixing))
    direction = torch.randn(2, 12, 96, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    tensors = require_gradients(one)
    looped = one.looped(rounder, width, Dynamic.of_bits(bits, kv))
    with looped.transformed(one.fold()):
        found = looped.logits(BATCH)
        gradients = torch.autograd.grad((found * direction).sum(), tensors)
    written = WrittenOut(one.model, one.tensors, one.signs, rounder, width, spread, bits, kv)(IDS)
    assert_same(found.detach(), written.detach(), 1e-9)
    expected = torch.autograd.grad((written * direction).sum(), tensors)
    largest = max(float(gradient.abs().max()) for gradient in expected)
    assert largest > 1
    for one_found, one_expected in zip(gradients, expected, strict=True):
        torch.testing.assert_close(one_found, one_expected, rtol=0, atol=1e-10 * largest)


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_a_function_preserving_basis_has_no_slope(case: tuple[str, str, dict[str, Any]]) -> None:
    """Without rounding: nothing along scalings, and along rotations nothing but what leaves the orthogonal matrices."""
    one = subject(*case)
    tensors = require_gradients(one)
    looped = one.looped()
    direction = torch.randn(2, 12, 96, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    with looped.transformed(one.fold()):
        gradients = torch.autograd.grad((looped.logits(BATCH) * direction).sum(), tensors)
    sizes, slopes = [], []
    for (name, tensor), gradient in zip(one.tensors.items(), gradients, strict=True):
        if is_rotation(name):
            sizes.append(float(gradient.norm()))
            gradient = tensor.detach().mT @ gradient
            gradient = gradient - gradient.mT
        slopes.append(float(gradient.norm()))
    assert max(sizes) > 1
    assert max(slopes) < 1e-9 * max(sizes)


def saved_bytes(layers: int) -> tuple[int, int]:
    """Bytes that a forward pass keeps for the backward pass, and those of the weights of the blocks."""
    one = subject("LlamaForCausalLM", "llama", {"num_hidden_layers": layers})
    require_gradients(one)
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    rounder = codec("integer", group=16)
    looped = one.looped(rounder, 4, W4A4KV4)
    with looped.transformed(one.fold()), saved_tensors_hooks(keep, lambda tensor: tensor):
        found = looped.logits(BATCH)
        total = sum(kept.values())
        found.sum().backward()
    return total, sum(8 * view.weights for view in matrices(one.model))


def test_kept_are_the_hidden_states_alone() -> None:
    (few, small), (many, large) = saved_bytes(2), saved_bytes(6)
    hidden = 8 * IDS.numel() * 32
    assert few > hidden
    assert 4 * hidden <= many - few <= 4 * 2 * hidden < (large - small) / 4


def test_codes_are_searched_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    one, rounder = subject(*LLAMA), codec("half_pyramid")
    calls: list[tuple[int, ...]] = []
    quantize = rounder.quantize

    def counting(weight: Tensor, spec: Any) -> Any:
        calls.append(tuple(weight.shape))
        return quantize(weight, spec)

    monkeypatch.setattr(rounder, "quantize", counting)
    require_gradients(one)
    looped = one.looped(rounder, 26)
    for step in (1, 2):
        with looped.transformed(one.fold()):
            looped.logits(BATCH).sum().backward()
        assert len(calls) == step * 14


def facts(model: Any) -> dict[str, Any]:
    """What must be the same afterwards, of every module: the object, its hooks, its parameters and their values."""
    found: dict[str, Any] = {"attention": model.config._attn_implementation}
    for name, module in model.named_modules():
        hooks = [len(module._forward_hooks), len(module._forward_pre_hooks), len(module._backward_hooks)]
        found[name] = (id(module), hooks)
    for name, parameter in model.named_parameters():
        found[f"parameter {name}"] = (id(parameter), parameter.requires_grad, parameter.grad is None, parameter.sum())
    return found


@pytest.mark.parametrize("ends", ["well", "inside", "forward", "backward"])
def test_the_model_is_as_it_was(ends: str, monkeypatch: pytest.MonkeyPatch) -> None:
    one, rounder = subject(*LLAMA), codec("integer")
    require_gradients(one)
    before, plain = facts(one.model), families.logits(one.model, IDS)
    looped = one.looped(rounder, 4, W4A4KV4)

    class Failure(Exception):
        pass

    def fail(*_: Any) -> Any:
        raise Failure

    if ends == "forward":
        monkeypatch.setattr(rounder, "quantize", fail)
    try:
        with looped.transformed(one.fold()):
            if ends == "inside":
                raise Failure
            loss = looped.logits(BATCH).sum()
            if ends == "backward":
                monkeypatch.setattr(rounder, "spread", fail)
            loss.backward()
            assert facts(one.model) != before
            assert ends == "well"
    except Failure:
        assert ends != "well"
    assert facts(one.model) == before
    assert torch.equal(families.logits(one.model, IDS), plain)


def test_a_weight_that_is_not_finite() -> None:
    one, rounder = subject(*LLAMA), codec("integer")
    one.tensors["model.layers.1.mlp.up_proj.scaling"][0, 3] = torch.nan
    before = facts(one.model)
    looped = one.looped(rounder, 4)
    with pytest.raises(NumericsError, match="not finite"), looped.transformed(one.fold()):
        looped.logits(BATCH)
    assert facts(one.model) == before


@pytest.mark.parametrize(("name", "width"), CODECS)
def test_rows_of_zeros_have_gradients(name: str, width: int) -> None:
    """A pruned channel has no error, and no slope either."""
    one, rounder = subject(*LLAMA), codec(name)
    one.model.get_parameter("model.layers.0.mlp.up_proj.weight")[5] = 0
    require_gradients(one)
    looped = one.looped(rounder, width)
    with looped.transformed(one.fold()):
        looped.logits(BATCH).square().sum().backward()
    for tensor_name, tensor in one.tensors.items():
        assert tensor.grad is not None and bool(tensor.grad.isfinite().all()), tensor_name
    factors = one.tensors["model.layers.0.mlp.up_proj.scaling"].grad
    assert factors is not None and float(factors.abs().max()) > 0


@pytest.mark.parametrize("case", [LLAMA, CASES[-1]], ids=name_of)
def test_qsur_is_that_of_the_folded_model(case: tuple[str, str, dict[str, Any]]) -> None:
    """Of the weights and inputs of a copy that is folded and mixed in front of its maps."""
    one = subject(*case)
    found = one.looped(codec("integer"), 4, W4A4KV4).qsur(BATCH, one.fold())
    models = (one.model, one.folded())
    inputs: list[dict[str, Tensor]] = [{}, {}]
    for place, model in enumerate(models):
        for view in matrices(model):
            module = model.get_submodule(view.module)
            module.register_forward_pre_hook(
                lambda _, x, place=place, view=view: inputs[place].update({view.name: x[0]})
            )
        families.logits(model, IDS)
    assert found.keys() == one.mixing.keys()
    for view in matrices(one.model):
        signs = one.signs[view.name]
        weights = [model.get_parameter(view.parameter) for model in models]
        reads = [each[view.name].flatten(0, 1) for each in inputs]
        weights[1], reads[1] = mix_weight(weights[1], signs), signs.mix_inputs(reads[1])
        assert found[view.name]["weight"] == pytest.approx([weight_qsur(weight) for weight in weights], rel=1e-6)
        assert found[view.name]["input"] == pytest.approx([weight_qsur(read) for read in reads], rel=1e-6)


@pytest.mark.parametrize(("name", "options", "width", "spread", "mixing"), SPREADS)
def test_errors_grow_with_the_spread(
    name: str, options: dict[str, Any], width: int, spread: Spread, mixing: str | None
) -> None:
    """The matrix, or groups of 16 that have a grid of their own, times powers of two: so are the spread and the errors.
    Not rows by themselves, whose scales are stored as parts of the largest."""
    rounder, generator = codec(name, **options), torch.Generator().manual_seed(0)
    weight = torch.randn(24, 48, generator=generator)
    powers = torch.randint(-3, 4, (24, 3), generator=generator) if "group" in options else torch.full((24, 1), -2)
    factors = (2.0**powers).repeat_interleave(48 // powers.shape[1], 1)
    errors = [rounder.quantize(each, rounder.spec(width)).dequantize() - each for each in (weight, factors * weight)]
    spreads = [rounder.spread(each).expand(24, 48) for each in (weight, factors * weight)]
    assert float(errors[0].norm() / weight.norm()) > 0.01
    torch.testing.assert_close(spreads[1], factors * spreads[0], rtol=1e-6, atol=0)
    torch.testing.assert_close(spreads[0], spread(weight).expand(24, 48), rtol=1e-6, atol=0)
    relative = [error / each for error, each in zip(errors, spreads, strict=True)]
    torch.testing.assert_close(relative[1], relative[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize(("name", "options", "width", "spread", "mixing"), SPREADS)
@pytest.mark.parametrize("columns", [48, 41])
def test_the_slope_of_the_spread(
    name: str, options: dict[str, Any], width: int, spread: Spread, mixing: str | None, columns: int
) -> None:
    """Against differences, in float64; the last group may be a short one."""
    weight = torch.randn(6, columns, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.autograd.gradcheck(codec(name, **options).spread, weight.requires_grad_())


def test_the_spread_of_nothing() -> None:
    """Rows and groups of zeros have no spread and no slope; those of one sign reach down, or up, to 0."""
    for name, options, *_ in SPREADS:
        weight = torch.zeros(2, 32, requires_grad=True)
        spread = codec(name, **options).spread(weight)
        assert torch.equal(spread, torch.zeros_like(spread))
        spread.sum().backward()
        assert weight.grad is not None and bool(weight.grad.isfinite().all())
    ones = torch.full((1, 16), 2.0)
    assert torch.equal(codec("integer", group=16).spread(ones), ones)
    assert torch.equal(codec("integer", group=16).spread(-ones), ones)
