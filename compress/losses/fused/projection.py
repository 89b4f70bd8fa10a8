"""The matrix products of a language head: from hidden states to logits, and from a gradient at the logits back to both.

Half-precision operands give float32 results and float32 sums, always: logits in bfloat16 falsify a small divergence
several times over, and a bfloat16 sum of the weight's gradient loses digits with every chunk that is added. On CUDA the
tensor cores do that by themselves. Elsewhere operands become float32 first, the weight in blocks of the vocabulary, so
that no float32 copy of it exists. float16 is too narrow for the gradient of a loss that is divided by the number of
tokens, so on the way back its operands are float32 on every device.

Under autocast the operands are rounded to autocast's dtype, as those of a linear layer are; nothing after them is.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from compress.errors import UsageError

BLOCK_VALUES = 2**22
"""Values of a block of the weight that is converted (16 MiB in float32)."""


@dataclass(frozen=True)
class Gradients:
    """Sums of the gradients of hidden states [n, H], weight [V, H] and bias [V]; None for what needs none."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None

    @classmethod
    def zeros(cls, dtype: torch.dtype, wanted: Sequence[bool], *inputs: Tensor | None) -> Gradients:
        """Zeros in the shapes of hidden states, weight and bias, as far as they are wanted."""
        return cls(
            *(
                torch.zeros_like(each, dtype=dtype) if want and each is not None else None
                for want, each in zip(wanted, inputs, strict=True)
            )
        )

    def at(self, rows: slice, columns: slice) -> Gradients:
        """The part of the sums that some rows and columns of logits add to."""
        return Gradients(
            None if self.hidden is None else self.hidden[rows],
            None if self.weight is None else self.weight[columns],
            None if self.bias is None else self.bias[columns],
        )

    def like(self, *inputs: Tensor | None) -> tuple[Tensor | None, ...]:
        """The three in the dtypes of hidden states, weight and bias."""
        return tuple(
            None if total is None or each is None else total.to(each.dtype)
            for total, each in zip((self.hidden, self.weight, self.bias), inputs, strict=True)
        )


@dataclass(frozen=True)
class Projection:
    """z = c tanh(s y / c), y = h W^T + b, of some columns of the vocabulary; s is `scale`, c is `softcap`.

    Operands have or are rounded to the dtype `rounding`; `dtype` is that of the logits and of all sums.
    """

    rounding: torch.dtype
    dtype: torch.dtype
    on_tensor_cores: bool
    scale: float
    softcap: float | None

    @classmethod
    def of(
        cls, hidden: Tensor, weight: Tensor, scale: float, softcap: float | None, dtype: torch.dtype | None = None
    ) -> Projection:
        """For these operands. Without `dtype`, float32, or float64 where an operand is."""
        device, rounding = weight.device.type, torch.promote_types(hidden.dtype, weight.dtype)
        if torch.is_autocast_enabled(device) and rounding != torch.float64:
            rounding = torch.get_autocast_dtype(device)
        dtype = dtype or torch.promote_types(rounding, torch.float32)
        on_tensor_cores = device == "cuda" and rounding.itemsize == 2 and dtype == torch.float32
        return cls(rounding, dtype, on_tensor_cores, scale, softcap)

    def logits(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
        """`out` [n, V], filled with the logits of hidden states [n, H]."""
        dtype = self.rounding if self.on_tensor_cores else self.dtype
        hidden = self._operand(hidden, dtype)
        for place, block in self._blocks(weight, dtype):
            if dtype == self.dtype:
                torch.mm(hidden, block.t(), out=out[:, place])
            else:
                torch.mm(hidden, block.t(), out_dtype=self.dtype, out=out[:, place])
        if bias is not None:
            out.add_(bias.to(self.dtype))
        if self.softcap is not None:
            return out.mul_(self.scale / self.softcap).tanh_().mul_(self.softcap)
        return out if self.scale == 1 else out.mul_(self.scale)

    def before_activation(self, gradient: Tensor, logits: Tensor) -> Tensor:
        """A gradient with respect to z, in place made one with respect to y."""
        if self.softcap is not None:
            gradient.mul_(1 - (logits / self.softcap).square_())
        return gradient if self.scale == 1 else gradient.mul_(self.scale)

    def back(self, gradient: Tensor, hidden: Tensor, weight: Tensor, sums: Gradients) -> None:
        """Add to `sums` what a gradient [n, V] with respect to y gives, y = h W^T + b."""
        dtype = self.rounding if self.on_tensor_cores and self.rounding != torch.float16 else self.dtype
        narrow = gradient.to(dtype)
        hidden = self._operand(hidden, dtype)
        if sums.hidden is not None:
            for place, block in self._blocks(weight, dtype):
                _add_product(sums.hidden, narrow[:, place], block)
        if sums.weight is not None:
            _add_product(sums.weight, narrow.t(), hidden)
        if sums.bias is not None:
            sums.bias.add_(gradient.sum(0))

    def _operand(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        return tensor.to(self.rounding).to(dtype)

    def _blocks(self, weight: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
        """The weight as an operand, in one piece if it is one already, else block by block."""
        if weight.dtype == self.rounding == dtype:
            yield slice(0, len(weight)), weight
            return
        for place in pieces(len(weight), max(1, BLOCK_VALUES // weight.shape[1])):
            yield place, self._operand(weight[place], dtype)


def once(backward: Callable[..., Any]) -> Callable[..., Any]:
    """A backward pass whose result cannot be differentiated: it is refused, where `once_differentiable` would return
    constants to somebody who asked for `create_graph` of a plain loss."""

    @functools.wraps(backward)
    def refusing(ctx: Any, *upstream: Tensor) -> Any:
        if torch.is_grad_enabled():
            raise UsageError(
                "The gradient of a fused loss cannot be differentiated again.", remedy="Leave out create_graph=True."
            )
        return backward(ctx, *upstream)

    return refusing


def pieces(count: int, size: int) -> Iterator[slice]:
    """`count` things in slices of at most `size`, as equal as can be."""
    step = -(-count // max(1, -(-count // size)))
    for start in range(0, count, max(1, step)):
        yield slice(start, min(start + step, count))


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right, summed in the total's dtype."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    else:
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
