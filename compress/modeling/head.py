"""A causal language model's head: what it does with the last hidden state.

Most models multiply by the output embedding and are done. Some multiply the logits by a constant, some divide them,
some bend them with a tanh, and each calls it something else in its config. This table is what transformers 5.23 does.
Since a head that did more than is known here would make every loss silently wrong, what the table says is compared
with the model itself before it is used.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from compress.errors import ModelError
from compress.losses.fused import Head

MULTIPLIED: Mapping[str, str] = {
    "cohere": "logit_scale",
    "cohere2": "logit_scale",
    "cohere2_moe": "logit_scale",
    "falcon_h1": "lm_head_multiplier",
    "hyperclovax": "logits_scaling",
}
"""Model types that multiply their logits, with the name of the factor in their config."""

DIVIDED: Mapping[str, str] = {
    "granite": "logits_scaling",
    "granite_swa": "logits_scaling",
    "granitemoe": "logits_scaling",
    "granitemoe_swa": "logits_scaling",
    "granitemoehybrid": "logits_scaling",
    "granitemoeshared": "logits_scaling",
    "minicpm3": "logits_scaling",
}
"""Model types that divide their logits, or what their head reads."""

CAPPED: Mapping[str, str] = {
    "beam": "final_logit_softcapping",
    "gemma2": "final_logit_softcapping",
    "gemma3_text": "final_logit_softcapping",
    "gemma3n_text": "final_logit_softcapping",
    "gemma4_text": "final_logit_softcapping",
    "gemma4_unified_text": "final_logit_softcapping",
    "nanochat": "final_logit_softcapping",
    "recurrent_gemma": "logits_soft_cap",
    "vaultgemma": "final_logit_softcapping",
    "xlstm": "output_logit_soft_cap",
}
"""Model types whose logits are c tanh(z / c); c may be None."""

TOKENS = 3
LARGEST = 50.0
"""The largest logit that the table is compared with the model at: larger than softcaps in use, so that one shows."""
REMEDY = "Compute the losses from the whole logits of this model."


def head_of(model: PreTrainedModel) -> Head:
    """The head of a causal language model: `head(hidden_states[-1])` are its logits, in float32.

    It refers to the model's own weight and bias, so that gradients arrive there and updates are seen. Three tokens go
    through the model to compare it with the table: call this once for a model, not once for a step.

    Raises `ModelError` for an output embedding that is not a linear layer in a floating dtype (a quantized one, one
    with an adapter), and for a model that does with its logits what is not known here.
    """
    output, name = model.get_output_embeddings(), type(model).__name__
    if not isinstance(output, nn.Linear) or not output.weight.is_floating_point():
        raise ModelError(f"The output embedding of {name} is a {type(output).__name__}, not a Linear.", remedy=REMEDY)
    config = model.config.get_text_config()
    kind, scale = config.model_type, 1.0
    if kind in MULTIPLIED:
        scale = getattr(config, MULTIPLIED[kind])
    elif kind in DIVIDED:
        scale = 1 / getattr(config, DIVIDED[kind])
    softcap = getattr(config, CAPPED[kind]) if kind in CAPPED else None
    difference = _difference(model, output, scale, softcap)
    # half precisions are compared as the model computes: its logits are rounded, those of `head` are not
    if not difference <= (0.02 if output.weight.dtype.itemsize == 2 else 0.002) * LARGEST:
        raise ModelError(
            f"The logits of {name} are not what its head makes of the last hidden state: they differ by "
            f"{difference:.3g}, where the largest is {LARGEST:g}.",
            remedy=f"{REMEDY} What {kind!r} models do belongs into compress/modeling/head.py.",
        )
    return Head(output.weight, output.bias, scale, softcap)


@torch.no_grad()
def _difference(model: PreTrainedModel, output: nn.Linear, scale: float, softcap: float | None) -> float:
    """max |logits - head(h)| of the model, with what its output embedding reads enlarged so that max |h W^T| = 50.

    Enlarged, because a softcap of 30 changes a logit of 0.3 by a hundred-thousandth. Infinite if the two cannot be
    compared: logits of another shape, or a head that the model does not call, or calls twice.
    """
    factors: list[float] = []

    def enlarge(module: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        read, *rest = arguments
        largest = Head(output.weight, None, scale)(read).abs().max().clamp(min=torch.finfo(torch.float32).tiny)
        factors.append(float(LARGEST / largest))
        return read * factors[-1], *rest

    ids = torch.arange(1, TOKENS + 1, device=output.weight.device).unsqueeze(0)
    handle = output.register_forward_pre_hook(enlarge)
    try:
        with _evaluating(model):
            found = model(input_ids=ids, output_hidden_states=True, use_cache=False, return_dict=True)
    finally:
        handle.remove()
    head = Head(output.weight, output.bias, scale, softcap)  # a sharded model has its weights from its forward on
    states = found.get("hidden_states")
    if len(factors) != 1 or not states or states[-1].shape[-1] != head.weight.shape[1]:
        return torch.inf
    logits = head((states[-1] * factors[0]).to(head.weight.device))
    if logits.shape != found["logits"].shape:
        return torch.inf
    same = logits == found["logits"]  # also infinities, of classes that a bias leaves out
    return float((logits - found["logits"]).masked_fill(same, 0).abs().max())


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Without dropout, and without taking random numbers from a training run; each module's mode is put back."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
