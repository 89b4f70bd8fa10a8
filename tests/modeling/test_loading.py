"""Loading: the right class, every weight there, and one message for each kind of bad folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from compress.errors import ModelError
from compress.modeling.io import WEIGHTS, Checkpoint, read_tensors
from compress.modeling.loading import (
    check_tokenizers,
    check_vocabularies,
    config_from_file,
    load_config,
    load_model,
    load_tokenizer,
    parameter_count,
    require_unquantized,
    skeleton,
)
from compress.modeling.writer import write_tensors
from tests import families


@pytest.fixture(scope="module")
def llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return families.save(families.llama(), tmp_path_factory.mktemp("llama"))


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("architecture", "family"),
    [
        ("LlamaForCausalLM", "llama"),
        ("LlamaModel", "llama"),
        ("MistralForCausalLM", "mistral"),
        ("BertModel", "bert"),
        ("BertForMaskedLM", "bert"),
        ("BertForSequenceClassification", "bert"),
    ],
)
def test_class_and_weights(tmp_path: Path, architecture: str, family: str) -> None:
    original = families.build(architecture, family)
    folder = families.save(original, tmp_path)
    model = load_model(folder)
    assert type(model).__name__ == architecture
    assert not model.training
    ids = families.token_ids()
    assert torch.equal(families.logits(model, ids), families.logits(original, ids))
    meta = skeleton(load_config(folder))
    assert type(meta).__name__ == architecture
    assert parameter_count(meta) == parameter_count(original)


def test_dtype(llama_folder: Path) -> None:
    assert load_model(llama_folder, dtype=torch.bfloat16).dtype == torch.bfloat16
    assert load_model(llama_folder, dtype=None).dtype == torch.float32


def test_expect_causal(tmp_path: Path, llama_folder: Path) -> None:
    load_model(llama_folder, expect="causal")
    with pytest.raises(ModelError, match="BertForMaskedLM, not a causal language model"):
        load_model(families.save(families.bert(), tmp_path), expect="causal")


def test_no_config(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"has no config\.json") as caught:
        load_model(tmp_path)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("text", ["{", "[]", "\x00"])
def test_config_that_is_no_object(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ModelError, match="JSON"):
        load_config(tmp_path)


def test_unknown_model_type(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "frobnicator"}')
    with pytest.raises(ModelError, match="model_type 'frobnicator'"):
        load_config(tmp_path)


def test_unsupported_architecture(tmp_path: Path) -> None:
    families.save(families.llama(), tmp_path)
    edit_config(tmp_path, architectures=["LlamaForSomething"])
    with pytest.raises(ModelError, match="'LlamaForSomething' of model_type 'llama' is not supported"):
        load_model(tmp_path)


def test_missing_weight_is_an_error(tmp_path: Path) -> None:
    families.save(families.llama(), tmp_path)
    tensors = read_tensors(tmp_path / WEIGHTS)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    write_tensors(tmp_path / WEIGHTS, tensors)
    with pytest.raises(ModelError, match=r"lacks 1 weights .* 'model\.layers\.1\.mlp\.up_proj\.weight'"):
        load_model(tmp_path)


def test_wrong_shape_is_an_error(tmp_path: Path) -> None:
    families.save(families.llama(), tmp_path)
    edit_config(tmp_path, intermediate_size=64)
    with pytest.raises(ModelError, match=r"has shape \[48, 32\], and by config\.json it is \[64, 32\]"):
        load_model(tmp_path)


def test_pickle_only(tmp_path: Path) -> None:
    families.save(families.llama(), tmp_path)
    (tmp_path / WEIGHTS).rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelError, match="pickles"):
        load_model(tmp_path)


def test_no_tokenizer(llama_folder: Path) -> None:
    with pytest.raises(ModelError, match="no tokenizer"):
        load_tokenizer(llama_folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[1]", "is not a JSON object"),
        ("{}", "names no model_type"),
        ('{"model_type": 3}', "names no model_type"),
        ('{"model_type": "lama"}', "'lama', which transformers does not know. Did you mean 'llama'"),
        ('{"model_type": "llama", "hidden_size": "a"}', "'hidden_size' expected int, got str"),
        ('{"model_type": "llama", "hidden_size": 33}', "not a multiple of the number of attention heads"),
        ('{"model_type": "llama", "dtype": "float1"}', "refuses the config"),
    ],
)
def test_config_file_that_makes_no_model(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "student.json"
    path.write_text(text)
    with pytest.raises(ModelError, match=message) as caught:
        config_from_file(path)
    assert str(path) in str(caught.value)


def test_config_from_file(tmp_path: Path) -> None:
    path = tmp_path / "student.json"
    with pytest.raises(ModelError, match="There is no config"):
        config_from_file(path)
    path.write_text(families.config("llama").to_json_string(use_diff=False))
    assert config_from_file(path).to_dict() == families.config("llama").to_dict()


def test_check_vocabularies() -> None:
    small, large = families.llama(), families.llama(vocab_size=97)
    check_vocabularies("a", small, "b", families.bert())
    with pytest.raises(ModelError, match="vocabulary of 'small' has 96 tokens, that of 'large' 97"):
        check_vocabularies("small", small, "large", large)


def bpe(vocabulary: dict[str, int], merges: list[tuple[str, str]]) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(BPE(vocabulary, merges)))


def test_check_tokenizers() -> None:
    tokens = {"a": 0, "b": 1, "c": 2, "ab": 3, "bc": 4, "abc": 5}
    merges = [("a", "b"), ("b", "c"), ("ab", "c")]
    first = bpe(tokens, merges)
    check_tokenizers("one", first, "two", bpe(tokens, merges))
    with pytest.raises(ModelError, match=r"'one' and 'two' have different tokenizers: token 'ab' is 3 .* and 4"):
        check_tokenizers("one", first, "two", bpe({**tokens, "ab": 4, "bc": 3}, merges))
    other = bpe(tokens, [("b", "c"), ("a", "b"), ("a", "bc")])
    assert first.tokenize("abc") == other.tokenize("abc")
    with pytest.raises(ModelError, match="'one' and 'two' have the same tokens and form them in different ways"):
        check_tokenizers("one", first, "two", other)


def test_require_unquantized() -> None:
    config = families.config("llama")
    require_unquantized(config, "here")
    config.quantization_config = {"quant_method": "gptq", "bits": 4}
    with pytest.raises(ModelError, match=r"'here' is already quantized \(quant_method 'gptq'\)"):
        require_unquantized(config, "here")


@pytest.mark.parametrize(("name", "parameters"), [("stories260k", 260_032), ("babyllama", 936_448)])
def test_real_models(real_data: Path, name: str, parameters: int) -> None:
    folder = real_data / "models" / name
    model = load_model(folder, expect="causal")
    assert parameter_count(model) == parameters
    assert len(load_tokenizer(folder)) == model.config.vocab_size
    stored = Checkpoint(folder)
    for key, tensor in model.state_dict().items():
        if key in stored.names():
            assert torch.equal(stored.read(key).float(), tensor)
