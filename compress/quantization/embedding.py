"""Packed embeddings, and what shares their payload.

    lookup   y_t = scale E_t,    E [V, d] in its payload, of which the rows t alone are decoded

A `PackedEmbedding` stands where an `nn.Embedding` stood, or a kind of it that multiplies by a constant. Of a tied table
(`compress.modeling.tables`) the first module has the payload, under the original parameter's name, and the others refer
to it: the state has it once, and there is nothing left to be tied. A head that is packed is a `PackedLinear`.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from compress.codecs.base import CodecSpec, QuantizedMatrix
from compress.codecs.registry import codec_of
from compress.modeling.experts import without
from compress.modeling.tables import Table, lookup_of, real_embedding
from compress.quantization.compiled import packed_rows, spec_text
from compress.quantization.modules import PackedLinear, PackedMatrix, Ties


class PackedEmbedding(PackedMatrix):
    """An embedding of V tokens by rows of W [V, d], of which those that are asked for are decoded.

    Rows have the dtype of the original weight, or that to which the module was moved.
    """

    _like: Tensor

    def __init__(self, embedding: nn.Embedding, spec: CodecSpec, payload: Tensor | PackedMatrix) -> None:
        """`embedding` has the buffers that its forward function needs; its weight, which may be on meta, is dropped."""
        weight = embedding.weight
        super().__init__(
            spec,
            (embedding.num_embeddings, embedding.embedding_dim),
            payload.to(weight.device) if isinstance(payload, Tensor) else payload,
        )
        self.num_embeddings, self.embedding_dim = embedding.num_embeddings, embedding.embedding_dim
        self.padding_idx = embedding.padding_idx
        self.lookup = lookup_of(embedding, type(embedding).__name__)
        self.register_buffer("_like", torch.empty(0, dtype=weight.dtype, device=weight.device), persistent=False)
        self._spec_text = spec_text(spec)
        self._matrix: QuantizedMatrix | None = None
        # in a tuple, so that it is no child; its weight has no memory
        self._embedding: tuple[nn.Module] = (without(embedding, "weight"),)

    def table(self) -> QuantizedMatrix:
        """The matrix as codes, checked and kept."""
        if self._matrix is None:
            self._matrix = self.quantized()
        return self._matrix

    def forward(self, ids: Tensor) -> Tensor:
        """int64 [...] -> [..., d]. Raises `IndexError` or `RuntimeError` for a token that is not there."""
        dtype, kept = self._like.dtype, self.holder._decoded
        if torch.compiler.is_compiling():
            rows = packed_rows(ids, self.payload, self._spec_text, self._shape, dtype)
        elif kept is not None and kept.dtype == dtype:  # for a tied head
            rows = functional.embedding(ids, kept)
        else:
            rows = codec_of(self.spec).rows(self.table(), ids.flatten(), dtype).view(*ids.shape, self.embedding_dim)
        return self.lookup(rows)

    def to_module(self, dtype: torch.dtype) -> nn.Module:
        """The original embedding with the decoded weight."""
        embedding = copy.deepcopy(self._embedding[0])
        for name, buffer in embedding.named_buffers():
            embedding.register_buffer(name, buffer.to(self.payload.device), persistent=False)
        return self._unpacked(embedding, self.quantized().dequantize(), dtype)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, codec={self.spec.codec}, width={self.spec.width}"

    def _forget(self) -> None:
        super()._forget()
        self._matrix = None


def pack_tables(model: PreTrainedModel, rounded: Iterable[tuple[Table, QuantizedMatrix]]) -> None:
    """Replace, in place, the modules of tables by packed ones."""
    for table, matrix in rounded:
        _set(model, table, matrix.spec, matrix.payload())


def prepare_tables(model: PreTrainedModel, specs: Iterable[tuple[Table, CodecSpec]]) -> None:
    """The same with payloads that are still to be loaded."""
    for table, spec in specs:
        _set(model, table, spec, torch.empty(codec_of(spec).bits(spec, table.view.shape) // 8, dtype=torch.int8))


def _set(model: PreTrainedModel, table: Table, spec: CodecSpec, payload: Tensor) -> None:
    source: Tensor | PackedMatrix = payload
    for name in table.modules:
        module = model.get_submodule(name)
        packed: PackedMatrix
        if isinstance(module, nn.Embedding):
            packed = PackedEmbedding(real_embedding(model, name), spec, source)
        else:
            packed = PackedLinear.like(module, spec, source)
        model.set_submodule(name, packed)
        if isinstance(source, Tensor):
            source = packed
    if isinstance(source, PackedMatrix):
        source.ties = _undeclare(model, table)


def _undeclare(model: PreTrainedModel, table: Table) -> Ties:
    """Take the modules of `table` out of what `model` and its parts say is tied: that is done. What was taken out."""
    taken = {}
    for prefix, part in model.named_modules():
        if isinstance(part, PreTrainedModel):
            start = f"{prefix}." if prefix else ""
            names = [name.removeprefix(start) for name in table.parameters if name.startswith(start)]
            declared: dict[str, str] = part._tied_weights_keys or {}  # type: ignore[assignment]
            done = {key: of for key, of in declared.items() if any(re.match(key, name) for name in names)}
            if done:
                taken[prefix] = done
                part._tied_weights_keys = {key: of for key, of in declared.items() if key not in done}
    tied = model.all_tied_weights_keys.items()
    model.all_tied_weights_keys = {one: other for one, other in tied if one not in table.parameters}
    return taken
