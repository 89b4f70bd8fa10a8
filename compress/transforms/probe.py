"""A proof by trial that what looks foldable is: a small copy of the model is folded, and its logits compared.

Structure alone cannot tell whether the code between two matrices does something else with what is rotated, such as
clipping values. So the model's own class is built with two small layers from its own config, given random weights, and
run before and after the fold of each kind of site. Values are made large there, so that a bound on them would bind. A
model that cannot be built small, or whose logits change, is not folded; mixing at run time needs no such trust.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor

from compress.modeling.sites import Sites, ValueSite, find_sites
from compress.transforms.fold import fold_model, make_fold

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

KV_HEADS, HEADS, LAYERS, INNER, VOCABULARY, TOKENS = 2, 4, 2, 40, 61, 7
LARGE = 1e3
"""Factor on values, undone behind them: beyond the bounds that models put on activations."""
TOLERANCE = 1e-4
"""Of the largest logit. A fold that is right leaves some 1e-6 in float32."""


def proven_sites(model: PreTrainedModel) -> Sites:
    """The sites of `model`, which may be on meta, less those whose fold changes the logits of a small copy; `reasons`
    says so. Takes about a second, whatever the width of the model."""
    sites = find_sites(model)
    if not sites.values:
        return sites  # nothing reads values, so that nothing else was found either
    try:
        small = _small_copy(model, sites.values[0])
        found, expected = find_sites(small), _logits(small)
    except (
        ValueError,
        TypeError,
        KeyError,
        AttributeError,
        RuntimeError,
        AssertionError,
        StrictDataclassError,
    ) as error:
        reason = f"Nothing is folded: no small copy of {type(model).__name__} could be run to try it ({error!r})."
        return Sites(reasons=(*sites.reasons, reason))
    reasons = list(sites.reasons)
    values, residual = sites.values, sites.residual
    changed = f"the logits of {type(model).__name__} change."
    if not _keeps(small, Sites(values=found.values), expected):
        values = ()
        reasons.append(f"Values cannot be rotated in the weights: {changed}")
    if residual is not None and not _keeps(small, Sites(residual=found.residual), expected):
        residual = None
        reasons.append(f"The residual stream cannot be rotated in the weights: {changed}")
    return Sites(residual, values, tuple(reasons))


def _keeps(small: PreTrainedModel, sites: Sites, expected: Tensor) -> bool:
    """Whether the logits of `small` are `expected` with `sites` folded."""
    trial = copy.deepcopy(small)
    fold_model(trial, make_fold(sites, 0, trial.get_parameter))
    difference = (_logits(trial) - expected).abs().max()
    return bool(difference <= TOLERANCE * expected.abs().max())


def _small_copy(model: PreTrainedModel, site: ValueSite) -> PreTrainedModel:
    """The model's class with two layers of random weights in float32; gains differ from one, values are large."""
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        small: PreTrainedModel = type(model)(_small_config(model.config, site.head_dim))
    small.set_attn_implementation("eager")
    small = small.float().eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in small.parameters():
            draw = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(0.2 * draw if parameter.ndim > 1 else 1 + 0.3 * draw)
        for each in find_sites(small).values:
            for parameter in small.get_submodule(each.value).parameters():
                parameter.mul_(LARGE)
            small.get_submodule(each.output).get_parameter("weight").div_(LARGE)
    return small


def _small_config(config: PreTrainedConfig, head_dim: int) -> PreTrainedConfig:
    """The config with few and narrow layers; heads keep their width, to which rotary frequencies may be fitted."""
    small = copy.deepcopy(config)
    text = small.get_text_config()
    before = text.to_dict()
    sizes = {
        "hidden_size": HEADS * head_dim,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "vocab_size": VOCABULARY,
    }
    tokens = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"))
    layers = before["num_hidden_layers"]
    lists = {name: field[:LAYERS] for name, field in before.items() if isinstance(field, list) and len(field) == layers}
    text.update({name: size for name, size in (sizes | tokens | lists).items() if name in before})
    return small


def _logits(model: PreTrainedModel) -> Tensor:
    ids = torch.arange(TOKENS).remainder(VOCABULARY).unsqueeze(0)
    with torch.no_grad():
        logits: Tensor = model(input_ids=ids, use_cache=False)[0]
    return logits
