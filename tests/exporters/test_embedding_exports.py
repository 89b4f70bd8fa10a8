"""Packed embeddings and heads in ONNX: rows gathered from integers, a tied table once, the numbers of torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from onnx import numpy_helper

import compress
from compress.errors import ExportError
from compress.exporters import export_onnx
from compress.exporters.bitsandbytes import build_bitsandbytes
from compress.modeling.loading import parameter_count
from tests import families

LLAMA: dict[str, Any] = {"architecture": "LlamaForCausalLM", "family": "llama"}
MODELS: dict[str, dict[str, Any]] = {
    "untied": {**LLAMA, "tie_word_embeddings": False, "hidden_size": 72},
    "gemma3": {"architecture": "Gemma3ForCausalLM", "family": "gemma3_text", "head_dim": 8, "pad_token_id": 0},
    "bert": {"architecture": "BertForMaskedLM", "family": "bert"},
}
CASES = [("untied", 8), ("gemma3", 3), ("bert", 4)]
VOCABULARY = 700
"""So many that the exporter does not fold a table's reshaped copy."""


@pytest.mark.parametrize(("name", "bits"), CASES)
def test_onnx(name: str, bits: int, tmp_path: Path) -> None:
    """The export verifies itself against torch. Its integers are the codes, 4 bits or 8 of them; no table of floats is
    left."""
    original = families.build(**MODELS[name], num_hidden_layers=1, vocab_size=VOCABULARY)
    parameters, (rows, columns) = parameter_count(original), original.get_input_embeddings().weight.shape
    tied = original.get_output_embeddings().weight is original.get_input_embeddings().weight
    model = compress.quantize(original, codec="integer", bits=4.3, embedding_bits=bits, head_bits=bits)
    report = export_onnx(model, tmp_path / "out")
    assert report.max_relative_error < 1e-5
    assert report.parameters == parameters
    graph = onnx.load(tmp_path / "out" / "model.onnx").graph
    nodes = [node for node in graph.node if node.op_type == "GatherBlockQuantized"]
    assert len(nodes) == 1
    attributes = {each.name: onnx.helper.get_attribute_value(each) for each in nodes[0].attribute}
    width = 4 if bits <= 4 else 8
    assert attributes["bits"] == width
    padded = -(-columns // attributes["block_size"]) * attributes["block_size"]
    tables = [one for one in graph.initializer if one.dims and one.dims[0] == rows]
    codes = [one for one in tables if numpy_helper.to_array(one).size == rows * padded * width // 8]
    assert len(codes) == (1 if tied else 2)
    assert not any(list(one.dims) in ([rows, columns], [columns, rows]) for one in graph.initializer)


def test_bitsandbytes_refuses_tables(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    for options in ({"embedding_bits": 8}, {"head_bits": 8}):
        model = compress.quantize(families.llama(tie_word_embeddings=False).to(torch.bfloat16), codec="nf4", **options)
        with pytest.raises(ExportError, match=r"embed_tokens|lm_head"):
            build_bitsandbytes(model, tmp_path / "out")
        assert not (tmp_path / "out").exists()
