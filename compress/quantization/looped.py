"""A model with its transform and its quantizers in the loop: what is learned sees what will be done.

The blocks run with weights that are functions of a basis, W' of `compress.transforms.fold`, rounded with a straight-
through gradient,

    W^ = W' + r stop((Q(W') - W') / r),

where r is what the codec's errors are in proportion to (`Codec.spread`): an error that is held constant would let no
gradient know that a smaller range has smaller errors. Activations, keys and values are quantized the same way. The
rotation of the residual stream is applied to what the embedding puts out and undone before the last norm: embedding and
head, which stay in full precision, need no copy.

Each block is a checkpoint of autograd: kept are the hidden states between blocks, and a block's transformed weights and
activations exist while it runs, and once more in the backward pass. Codes are searched for once a step, and decoded in
the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from compress.codecs.base import Codec, CodecSpec, QuantizedMatrix
from compress.modeling.stack import Substitute, substituted
from compress.modeling.structure import MatrixView
from compress.quantization.dynamic import Dynamic, dynamic_quantization
from compress.transforms.changes import Changes, apply, undo
from compress.transforms.fold import Fold
from compress.transforms.mixing import mix
from compress.transforms.qsur import weight_qsur
from compress.transforms.signs import Signs

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class LoopedModel:
    """`model` in float32, whose parameters need no gradient, with what is done to the matrices `views`.

    `codec` and `specs` round them (None: they are not rounded), `signs` mix them at run time, `dynamic` quantizes what
    goes through them.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        views: Sequence[MatrixView],
        signs: Mapping[str, Signs],
        codec: Codec | None,
        specs: Mapping[str, CodecSpec],
        dynamic: Dynamic,
    ) -> None:
        self.model = model
        self._views, self._signs, self._specs = views, signs, specs
        self._of_parameter = {view.parameter: view.name for view in views}
        self._codec, self._dynamic = codec, dynamic

    @property
    def device(self) -> torch.device:
        return self.model.device

    def logits(self, batch: Mapping[str, Tensor]) -> Tensor:
        """What the model says as it is, [B, T, V]."""
        logits: Tensor = self.model(**batch, use_cache=False).logits
        return logits

    @contextmanager
    def transformed(self, fold: Fold) -> Iterator[None]:
        """Within this, `logits` are those of the transformed and quantized model; so must be the backward pass."""
        codes: dict[str, QuantizedMatrix] = {}

        def stand_in(index: int, name: str, block: nn.Module) -> nn.Module:
            names = {inner: f"{name}.{inner}" for inner, _ in block.named_parameters()}
            return _Block(block, lambda: {inner: self._weight(full, fold, codes) for inner, full in names.items()})

        with ExitStack() as stack:
            for handle in (*self._rotations(fold), *self._mixings()):
                stack.callback(handle.remove)
            stack.enter_context(dynamic_quantization(self.model, self._dynamic))
            stack.enter_context(substituted(self.model, stand_in))
            yield

    def qsur(self, batch: Mapping[str, Tensor], fold: Fold) -> dict[str, dict[str, list[float]]]:
        """By each matrix, of its weight and of its inputs on `batch`, before the transform and after it."""
        plain = LoopedModel(self.model, self._views, self._signs, None, {}, Dynamic())
        before, after = plain._inputs_qsur(batch, None), plain._inputs_qsur(batch, fold)
        found = {}
        with torch.no_grad():
            for view in self._views:
                weights = [self.model.get_parameter(view.parameter), self._mixed(view.parameter, fold)]
                found[view.name] = {
                    "weight": [weight_qsur(weight) for weight in weights],
                    "input": [before[view.name], after[view.name]],
                }
        return found

    def _inputs_qsur(self, batch: Mapping[str, Tensor], fold: Fold | None) -> dict[str, float]:
        found: dict[str, float] = {}
        groups: dict[str, float] = {}

        def measure(view: MatrixView) -> Callable[..., None]:
            def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
                if view.group not in groups:
                    groups[view.group] = weight_qsur(inputs[0].flatten(0, -2))
                found[view.name] = groups[view.group]

            return hook

        with ExitStack() as stack, torch.no_grad():
            if fold is not None:
                stack.enter_context(self.transformed(fold))
            for view in self._views:
                stack.callback(self.model.get_submodule(view.name).register_forward_pre_hook(measure(view)).remove)
            self.logits({name: tensor.to(self.device) for name, tensor in batch.items()})
        return found

    def _weight(self, name: str, fold: Fold, codes: dict[str, QuantizedMatrix]) -> Tensor:
        """What the block's parameter `name` is in the loop."""
        if name not in self._of_parameter:
            return fold.differentiable(name, self.model.get_parameter)
        weight = self._mixed(name, fold)
        if self._codec is not None:
            spread = self._codec.spread(weight)
            error = (self._rounded(name, weight.detach(), codes) - weight) / spread
            weight = weight + spread * torch.where(spread > 0, error, 0).detach()
        return self._signs[self._of_parameter[name]].unmix_outputs(weight.t()).t()

    def _mixed(self, name: str, fold: Fold) -> Tensor:
        """The matrix that is rounded."""
        weight = fold.differentiable(name, self.model.get_parameter)
        signs = self._signs[self._of_parameter[name]]
        weight = signs.mix_inputs(weight)
        return weight if signs.output is None else mix(weight.t(), signs.output).t()

    def _rounded(self, name: str, weight: Tensor, codes: dict[str, QuantizedMatrix]) -> Tensor:
        assert self._codec is not None
        if name not in codes:
            codes[name] = self._codec.quantize(weight.contiguous(), self._specs[self._of_parameter[name]].plain)
        return codes[name].dequantize()

    def _rotations(self, fold: Fold) -> Iterator[torch.utils.hooks.RemovableHandle]:
        residual, stream = fold.basis.sites.residual, fold.basis.residual
        if residual is None:
            return
        embedding = self.model.get_submodule(residual.embedding)
        last = self.model.get_submodule(residual.readers[residual.head])
        yield embedding.register_forward_hook(lambda module, inputs, output: _flat(apply, stream, output))
        yield last.register_forward_pre_hook(lambda module, inputs: (_flat(undo, stream, inputs[0]), *inputs[1:]))

    def _mixings(self) -> Iterator[torch.utils.hooks.RemovableHandle]:
        for view in self._views:
            signs = self._signs[view.name].input
            if signs is not None:
                yield self.model.get_submodule(view.name).register_forward_pre_hook(_mixer(signs))


class _Block(Substitute):
    """A block that runs with other weights, as a checkpoint of autograd."""

    def __init__(self, block: nn.Module, weights: Callable[[], dict[str, Tensor]]) -> None:
        super().__init__(block)
        self._weights = weights

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return checkpoint(self._run, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        return functional_call(self.block, self._weights(), args, kwargs)


def _mixer(signs: Tensor) -> Callable[..., Any]:
    return lambda module, inputs: (mix(inputs[0], signs), *inputs[1:])


def _flat(function: Callable[[Changes, Tensor], Tensor], changes: Changes, hidden: Tensor) -> Tensor:
    return function(changes, hidden.reshape(-1, hidden.shape[-1])).view(hidden.shape)
