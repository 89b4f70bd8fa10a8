"""`compress.quantize` on models in memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import compress
from compress.codecs import codec
from compress.errors import ModelError, NumericsError, UsageError
from compress.events import Event, Events
from compress.modeling.structure import matrices
from compress.quantization.modules import packed_modules
from tests import families


def test_in_place_and_returned() -> None:
    model = families.llama(num_hidden_layers=1)
    original = {view.name: model.get_parameter(view.parameter).detach().clone() for view in matrices(model)}
    events: list[Event] = []
    quantized = compress.quantize(model, bits=3.3, events=Events([events.append]))
    assert quantized is model
    packed = packed_modules(model)
    assert packed.keys() == original.keys()
    bits = 0
    for name, module in packed.items():
        matrix = module.quantized()
        again = codec("half_pyramid").quantize(original[name], matrix.spec)
        assert torch.equal(matrix.payload(), again.payload())
        bits += matrix.bits
    rate = bits / sum(weight.numel() for weight in original.values())
    assert 3.28 <= rate <= 3.3
    config = model.config.quantization_config.to_dict()
    assert config["quant_method"] == "compress"
    assert config["bits_per_weight"] == rate
    assert config["ignore"] == ["lm_head", "model.embed_tokens"]
    assert [event.kind for event in events] == ["stage_start", "step", "stage_end"]
    assert 0.005 < events[1].data["relative_error"] < 0.05


def test_a_folder_and_a_codec_object(tmp_path: Path) -> None:
    folder = families.save(families.llama(num_hidden_layers=1).to(torch.bfloat16), tmp_path)
    model = compress.quantize(folder, bits=2.5, codec=codec("pyramid"))
    assert model.dtype == torch.bfloat16
    assert len(packed_modules(model)) == 7


def test_a_model_that_is_not_of_transformers() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(32, 32)])

    net = compress.quantize(Net(), bits=3.5)
    assert list(packed_modules(net)) == ["layers.0"]


def test_refusals() -> None:
    model = families.llama(num_hidden_layers=1)
    with pytest.raises(UsageError, match="Did you mean 'pyramid'"):
        compress.quantize(model, codec="piramid")
    with pytest.raises(UsageError, match="bits a weight"):
        compress.quantize(model, bits=0.5)
    with pytest.raises(UsageError, match="The rate is '4'"):
        compress.quantize(model, bits="4")
    with pytest.raises(TypeError, match="positional"):
        compress.quantize(model, 3.25)
    with pytest.raises(TypeError, match="'group_size'"):
        compress.quantize(model, group_size=16)
    assert not packed_modules(model)
    compress.quantize(model)
    with pytest.raises(ModelError, match="already quantized"):
        compress.quantize(model)
    broken = families.llama(num_hidden_layers=1)
    with torch.no_grad():
        broken.get_parameter("model.layers.0.mlp.up_proj.weight")[3, 4] = torch.nan
    with pytest.raises(NumericsError, match=r"model\.layers\.0\.mlp\.up_proj"):
        compress.quantize(broken)
