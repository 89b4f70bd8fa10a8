"""A proof by trial that what looks foldable is: a small copy of the model is folded, and its logits compared.

Structure alone cannot tell whether the code between two matrices does something else with what is rotated, such as
clipping values. So the model's own class is built with two small layers from its own config, given random weights, and
run before and after the fold of each kind of site. Values are made large there, so that a bound on them would bind, and
scalings differ by a factor of ten or more. A model that cannot be built small, or whose logits change, is not folded;
mixing at run time needs no such trust.
"""

from __future__ import annotations

import copy
import typing
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor

from compress.modeling.scalings import Pairs, QuerySite, Scalings, find_scalings
from compress.modeling.sites import Sites, ValueSite, find_sites
from compress.transforms.basis import Basis, hadamard_basis
from compress.transforms.changes import Scaling
from compress.transforms.fold import fold_model, make_fold

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

KV_HEADS, HEADS, LAYERS, INNER, VOCABULARY, TOKENS = 2, 4, 2, 40, 61, 7
LARGE = 1e3
"""Factor on values, undone behind them: beyond the bounds that models put on activations."""
TOLERANCE = 1e-4
"""Of the largest logit. A fold that is right leaves some 1e-6 in float32."""
FAILURES = (
    ValueError,
    TypeError,
    KeyError,
    AttributeError,
    RuntimeError,
    AssertionError,
    StrictDataclassError,
)
"""What models raise that cannot be built small, or not run."""


def proven_sites(model: PreTrainedModel) -> Sites:
    """The sites of `model`, which may be on meta, less those whose fold changes the logits of a small copy; `reasons`
    says so. Takes about a second, whatever the width of the model."""
    sites = find_sites(model)
    if not sites.values:
        return sites  # nothing reads values, so that nothing else was found either
    try:
        trial = _Trial(model, sites.values[0])
    except FAILURES as error:
        return Sites(reasons=(*sites.reasons, _untried(model, error)))
    found, reasons = find_sites(trial.small), list(sites.reasons)
    values, residual = sites.values, sites.residual
    if not trial.keeps(hadamard_basis(Sites(values=found.values), 0)):
        values = ()
        reasons.append(f"Values cannot be rotated in the weights: {_changed(model)}")
    if residual is not None and not trial.keeps(hadamard_basis(Sites(residual=found.residual), 0)):
        residual = None
        reasons.append(f"The residual stream cannot be rotated in the weights: {_changed(model)}")
    return Sites(residual, values, tuple(reasons))


def proven_scalings(model: PreTrainedModel) -> Scalings:
    """The same of scalings; of queries and keys with the pairs of channels that keep the logits."""
    scalings, values = find_scalings(model), find_sites(model).values
    if not values or not (scalings.gates or scalings.queries):
        return Scalings(reasons=scalings.reasons)
    try:
        trial = _Trial(model, values[0])
    except FAILURES as error:
        return Scalings(reasons=(*scalings.reasons, _untried(model, error)))
    found, reasons = find_scalings(trial.small), list(scalings.reasons)
    gates = scalings.gates
    if gates and not trial.keeps(_scaled(Scalings(gates=found.gates))):
        gates = ()
        reasons.append(f"The products of gate and up projection cannot be scaled in the weights: {_changed(model)}")
    queries: tuple[QuerySite, ...] = ()
    for pairs in typing.get_args(Pairs):
        if not queries and trial.keeps(_scaled(Scalings(queries=_paired(found.queries, pairs)))):
            queries = _paired(scalings.queries, pairs)
    if scalings.queries and not queries:
        reasons.append(f"Queries and keys cannot be scaled in the weights: {_changed(model)}")
    return Scalings(gates, queries, tuple(reasons))


def _paired(sites: tuple[QuerySite, ...], pairs: Pairs) -> tuple[QuerySite, ...]:
    return tuple(replace(site, pairs=pairs) for site in sites)


def _scaled(scalings: Scalings) -> Basis:
    """Random factors, by their names, on everything that can be scaled."""
    generator = torch.Generator().manual_seed(1)
    gates = {site.up: Scaling(torch.randn(1, site.width, generator=generator)) for site in scalings.gates}
    queries = {
        site.key: Scaling(site.spread(torch.randn(site.groups, site.head_dim // 2, generator=generator)))
        for site in scalings.queries
    }
    return Basis(scalings=scalings, gates=gates, queries=queries)


def _untried(model: PreTrainedModel, error: Exception) -> str:
    return f"Nothing is folded: no small copy of {type(model).__name__} could be run to try it ({error!r})."


def _changed(model: PreTrainedModel) -> str:
    return f"the logits of {type(model).__name__} change."


class _Trial:
    """A small copy of a model, and what its logits are. Raises one of `FAILURES` for a model that has none."""

    def __init__(self, model: PreTrainedModel, site: ValueSite) -> None:
        self.small = _small_copy(model, site)
        self._expected = _logits(self.small)

    def keeps(self, basis: Basis) -> bool:
        """Whether the logits are the same with `basis` folded."""
        trial = copy.deepcopy(self.small)
        fold_model(trial, make_fold(basis, trial.get_parameter))
        difference = (_logits(trial) - self._expected).abs().max()
        return bool(difference <= TOLERANCE * self._expected.abs().max())


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
    each = {name: field for name, field in before.items() if isinstance(field, list) and len(field) == layers}
    lists = {name: (field * LAYERS)[:LAYERS] for name, field in each.items()}
    text.update({name: size for name, size in (sizes | tokens | lists).items() if name in before})
    return small


def _logits(model: PreTrainedModel) -> Tensor:
    ids = torch.arange(TOKENS).remainder(VOCABULARY).unsqueeze(0)
    with torch.no_grad():
        logits: Tensor = model(input_ids=ids, use_cache=False)[0]
    return logits
