"""Models whose every operation runs in float64, and folded or mixed copies of them."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from compress.modeling.structure import matrices
from compress.transforms.incoherence import view_signs
from compress.transforms.matrices import mix_weight
from tests import families


class ExactNorm(nn.Module):
    """RMSNorm in the type of its input; transformers' own computes in float32 whatever it is given."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.weight = norm.weight
        known = vars(norm)
        self.eps = known.get("variance_epsilon", known.get("eps"))
        self.offset = 1.0 if "Gemma" in type(norm).__name__ else 0.0

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * (self.offset + self.weight)


class MixedLinear(nn.Module):
    """y = Qo (W' (Qi^T x)) + b with W' as it is, unrounded."""

    def __init__(self, linear: nn.Linear, signs: Any) -> None:
        super().__init__()
        self.signs, self.bias = signs, linear.bias
        self.mixed = mix_weight(linear.weight, signs)

    def forward(self, x: Tensor) -> Tensor:
        y = self.signs.unmix_outputs(nn.functional.linear(self.signs.mix_inputs(x), self.mixed))
        return y if self.bias is None else y + self.bias


def double(architecture: str, family: str, **changes: Any) -> Any:
    """A tiny model in float64, of random weights, gains and biases."""
    return families.build(architecture, family, **changes).double()


def exact_logits(model: Any, tokens: int = 9) -> Tensor:
    """Logits of a copy of `model` in which the norms are exact."""
    model = copy.deepcopy(model)
    for name, module in list(model.named_modules()):
        if type(module).__name__.endswith("RMSNorm"):
            model.set_submodule(name, ExactNorm(module))
    found: Tensor = families.logits(model, families.token_ids(tokens))
    return found


def mix_online(model: Any, mixing: dict[str, str], seed: int = 0) -> None:
    """Every linear map of the target set with the sides of `mixing` mixed at run time, in place."""
    for view in matrices(model):
        linear = model.get_submodule(view.module)
        model.set_submodule(view.module, MixedLinear(linear, view_signs(view, mixing[view.name], seed)))


def assert_same(found: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    """Equal to `tolerance` of the largest, and not because all are nothing."""
    largest = float(expected.abs().max())
    assert largest > 1e-3
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * largest)
