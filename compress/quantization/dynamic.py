"""Activations and the cache of keys and values as integers, in a model that runs.

What a model would compute with W4A4KV4 is computed with ordinary numbers that lie on the integers' grids: exact, and as
slow as the model. `dynamic_quantization` does it for as long as a `with` lasts:

    y = W round(x)                         for every matrix of the target set, x rounded token by token
    softmax(q round(k)^T) round(v)         k after RoPE, k and v rounded for each token and head by itself

Queries are not rounded, nor are embeddings and the head, as published. Keys may be mixed first, with a Hadamard matrix
H over the channels of a head: q k = (q H)(k H), so rounding k H is what a model that mixes both would do. Here it is
unmixed again, and nobody sees q H.

Since rounding looks at one token at a time, a model that is fed a whole text and one that writes it token by token
round the same numbers. A cache holds keys and values unrounded, and each step rounds all of them again.

The inputs of an `nn.Linear` are rounded by a forward pre-hook, after those that were registered before; a packed matrix
rounds in its mixed basis. Keys and values are rounded in a function of transformers' attention interface, which hands
them on to the one that the model had. Gradients are straight-through. A backward pass that computes activations again
(`torch.utils.checkpoint`) has to run within the `with`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from compress.codecs.dynamic import GroupQuantizer, TokenQuantizer
from compress.errors import ModelError, UsageError
from compress.modeling.structure import matrices
from compress.quantization.modules import Packed, PackedLinear, packed_modules
from compress.transforms.mixing import mix, unmix

PREFIX = "dynamic_kv_"
"""Begins the names under which attention functions are registered."""

Attention = Callable[..., tuple[Tensor, Tensor | None]]


@dataclass(frozen=True)
class Dynamic:
    """What is rounded while a model runs: the inputs of matrices, keys and values; None leaves them as they are.

    mix_keys: mix keys over the channels of a head before they are rounded, and unmix them behind it.
    """

    activations: TokenQuantizer | None = None
    kv: GroupQuantizer | None = None
    mix_keys: bool = True

    @classmethod
    def of_bits(
        cls, activations: int | None = None, kv: int | None = None, kv_group: int | None = None, mix_keys: bool = True
    ) -> Self:
        """The published grids, asymmetric and unclipped, with so many bits: of activations, one for each token, and of
        keys and values, one for each `kv_group` channels of a head (None: a head); None leaves them as they are.

        Raises `UsageError` for other than 2 to 8 bits, and for a group without anything to group.
        """
        if kv is None and kv_group is not None:
            raise UsageError("Groups of keys and values that are not quantized.", remedy="Say their bits with kv.")
        return cls(
            TokenQuantizer(activations) if activations is not None else None,
            GroupQuantizer(kv, kv_group) if kv is not None else None,
            mix_keys,
        )

    def figures(self) -> dict[str, Any]:
        """What is quantized, for a report: the bits by `activations` and `kv`, and of these the group and whether keys
        are mixed. What is not quantized is not there."""
        figures: dict[str, Any] = {} if self.activations is None else {"activations": self.activations.bits}
        if self.kv is not None:
            figures |= {"kv": self.kv.bits, "kv_group": self.kv.group, "mix_keys": self.mix_keys}
        return figures

    def keys(self, key: Tensor) -> Tensor:
        """The keys [B, heads, T, head_dim] as attention sees them."""
        if self.kv is None:
            return key
        if not self.mix_keys:
            return self.kv(key)
        ones = torch.ones(key.shape[-1], dtype=torch.int8, device=key.device)
        return unmix(self.kv(mix(key, ones)), ones)

    def values(self, value: Tensor) -> Tensor:
        """The values [B, heads, T, head_dim] as attention sees them."""
        return value if self.kv is None else self.kv(value)


@contextmanager
def dynamic_quantization(model: PreTrainedModel, how: Dynamic) -> Iterator[None]:
    """Run `model` with rounded activations, keys and values, and leave it as it was. Contexts of one model may be
    nested: what is rounded in both is rounded twice.

    Raises `UsageError` where keys and values cannot be reached: in a model that writes no text, one whose attention
    does not go through transformers' interface (its first forward pass raises), or whose implementation is neither sdpa
    nor eager. Raises `ModelError` for a model whose matrices are not known.
    """
    with ExitStack() as undo:
        if how.activations is not None:
            _round_inputs(model, how.activations, undo)
        if how.kv is not None:
            _round_cache(model, how, undo)
        yield


def _round_inputs(model: PreTrainedModel, quantizer: TokenQuantizer, undo: ExitStack) -> None:
    for module in _targets(model):
        if isinstance(module, PackedLinear):
            undo.callback(setattr, module, "roundings", module.roundings)
            module.roundings = (*module.roundings, quantizer)
        else:
            hook = module.register_forward_pre_hook(lambda _, inputs: (quantizer(inputs[0]), *inputs[1:]))
            undo.callback(hook.remove)


def _targets(model: PreTrainedModel) -> list[nn.Module]:
    """The modules of the target set: packed ones, or ordinary ones, or those of a stack that has both."""
    packed = packed_modules(model)
    if not packed:
        found = [model.get_submodule(view.module) for view in matrices(model)]
    else:
        stacks = [module for module in model.modules() if isinstance(module, nn.ModuleList) and packed_modules(module)]
        inside = {id(module): module for stack in stacks for module in stack.modules()}
        found = [module for module in inside.values() if isinstance(module, (nn.Linear, Packed))]
    for module in found:
        if not isinstance(module, nn.Linear | Conv1D | PackedLinear):
            raise ModelError(
                f"The inputs of a {type(module).__name__} cannot be quantized: it is no linear layer.",
                remedy="Leave out --activations.",
            )
    return found


def _round_cache(model: PreTrainedModel, how: Dynamic, undo: ExitStack) -> None:
    name = type(model).__name__
    if not model.can_generate() or model.config.is_encoder_decoder:
        raise UsageError(f"{name} is no decoder and keeps no keys and values.", remedy="Quantize activations only.")
    inner = model.config._attn_implementation
    if inner not in ("sdpa", "eager") and not str(inner).startswith(PREFIX):
        raise UsageError(
            f"Keys and values cannot be quantized in front of the attention '{inner}'.",
            remedy='Call model.set_attn_implementation("sdpa").',
        )
    configs = _configs(model)
    if any(config._attn_implementation != inner for config in configs):
        raise UsageError(
            f"The parts of {name} have different implementations of attention.",
            remedy='Call model.set_attn_implementation("sdpa").',
        )
    members, called = {id(module) for module in model.modules()}, [0]

    def attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **options: Any) -> Any:
        attention = _implementation(inner, module)
        if id(module) not in members:  # of a model that shares its config with this one
            return attention(module, query, key, value, *args, **options)
        called[0] += 1
        return attention(module, query, how.keys(key), how.values(value), *args, **options)

    def check(*_: Any) -> None:
        if not called[0]:
            raise UsageError(
                f"The attention of {name} does not go through transformers' interface.",
                remedy="Quantize activations only.",
            )

    key = f"{PREFIX}{id(attend)}"
    AttentionInterface.register(key, attend)
    undo.callback(AttentionInterface._global_mapping.pop, key)
    AttentionMaskInterface.register(key, AttentionMaskInterface()[inner])
    undo.callback(AttentionMaskInterface._global_mapping.pop, key)
    for config in configs:
        undo.callback(setattr, config, "_attn_implementation", inner)
        config._attn_implementation = key
    undo.callback(model.register_forward_hook(check).remove)


def _configs(model: PreTrainedModel) -> list[PreTrainedConfig]:
    """The configs of a model and its parts, each once."""
    parts = [module.config for module in model.modules() if isinstance(module, PreTrainedModel)]
    return list({id(config): config for config in parts}.values())


def _implementation(name: str, module: nn.Module) -> Attention:
    """The attention function `name`. Eager attention is a function of each architecture, beside its module's class."""
    if name != "eager":
        found: Attention = AttentionInterface()[name]
        return found
    beside = inspect.unwrap(type(module).forward).__globals__
    if "eager_attention_forward" not in beside:
        raise UsageError(
            f"The eager attention of {type(module).__name__} is not known.",
            remedy='Call model.set_attn_implementation("sdpa").',
        )
    eager: Attention = beside["eager_attention_forward"]
    return eager
