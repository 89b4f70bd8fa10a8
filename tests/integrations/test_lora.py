"""LoRA on packed weights: it learns, is saved and loaded as on any model, and is never merged into the payload."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainingArguments

import compress
from compress.errors import UsageError
from compress.quantization.modules import packed_modules
from tests import families
from tests.integrations.conftest import Artifact

peft = pytest.importorskip("peft", reason="needs peft")
TARGETS = ["q_proj", "up_proj", "down_proj"]


def lora(**options: Any) -> Any:
    return peft.LoraConfig(**{"task_type": "CAUSAL_LM", "r": 4, "target_modules": TARGETS, **options})


def train(model: Any, ids: torch.Tensor, steps: int = 20) -> list[float]:
    """The losses of some steps of AdamW on one batch."""
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


@pytest.fixture(scope="module")
def trained(mixed: Artifact, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.Tensor]:
    """An adapter's folder, and the logits of the model with it."""
    torch.manual_seed(0)
    model, payloads = peft.get_peft_model(mixed.load(), lora()), {}
    for name, module in packed_modules(model).items():
        payloads[name] = module.weight.clone()
    assert torch.equal(families.logits(model, mixed.ids), mixed.logits)  # B is zero
    losses = train(model, mixed.ids)
    assert losses[-1] < 0.9 * losses[0]
    for name, module in packed_modules(model).items():
        assert torch.equal(module.weight, payloads[name])
    folder = tmp_path_factory.mktemp("lora")
    model.eval().save_pretrained(folder)
    return folder, families.logits(model, mixed.ids)


def test_the_product_is_that_of_the_decoded_weight_and_the_adapter(mixed: Artifact) -> None:
    """In float64, with A and B at random: y = W x + (alpha / r) B A x."""
    torch.manual_seed(0)
    model = peft.get_peft_model(mixed.load(), lora(init_lora_weights=False, lora_alpha=6))
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    a, b = (each["default"].weight.detach().double() for each in (layer.lora_A, layer.lora_B))
    weight = layer.base_layer.quantized().dequantize().double() + 6 / 4 * b @ a
    x = torch.randn(3, 32)
    torch.testing.assert_close(layer(x).double(), x.double() @ weight.T, rtol=0, atol=1e-5)


def test_saved_and_loaded(mixed: Artifact, trained: tuple[Path, torch.Tensor]) -> None:
    folder, expected = trained
    assert not torch.equal(expected, mixed.logits)
    assert torch.equal(families.logits(peft.PeftModel.from_pretrained(mixed.load(), folder), mixed.ids), expected)
    assert torch.equal(families.logits(peft.AutoPeftModelForCausalLM.from_pretrained(folder), mixed.ids), expected)
    model = mixed.load()
    model.load_adapter(folder)
    assert torch.equal(families.logits(model, mixed.ids), expected)


def test_unloaded(mixed: Artifact, trained: tuple[Path, torch.Tensor]) -> None:
    model = peft.PeftModel.from_pretrained(mixed.load(), trained[0])
    assert torch.equal(families.logits(model.unload(), mixed.ids), mixed.logits)


def test_never_merged_into_packed_weights(mixed: Artifact, trained: tuple[Path, torch.Tensor]) -> None:
    folder, expected = trained
    model = peft.PeftModel.from_pretrained(mixed.load(), folder)
    for merge in (model.merge_adapter, model.merge_and_unload, lambda: model.merge_and_unload(safe_merge=True)):
        with pytest.raises(UsageError, match=r"cannot be merged into packed weights.*dequantize\(\)"):
            merge()
    assert torch.equal(families.logits(model, mixed.ids), expected)


def test_merged_into_decoded_weights(mixed: Artifact, trained: tuple[Path, torch.Tensor]) -> None:
    folder, expected = trained
    merged = peft.PeftModel.from_pretrained(mixed.load().dequantize(), folder).merge_and_unload()
    torch.testing.assert_close(families.logits(merged, mixed.ids), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"init_lora_weights": "pissa"}, "PiSSA"),
        ({"init_lora_weights": "olora"}, "int8"),
    ],
    ids=["dora", "pissa", "olora"],
)
def test_what_needs_the_weight_is_refused(mixed: Artifact, options: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        peft.get_peft_model(mixed.load(), lora(**options))


def test_adapters_of_transformers_alone(mixed: Artifact) -> None:
    model = mixed.load()
    model.add_adapter(lora())
    losses = train(model, mixed.ids)
    assert losses[-1] < 0.9 * losses[0]


def test_in_bfloat16(mixed: Artifact) -> None:
    losses = train(peft.get_peft_model(mixed.load(dtype=torch.bfloat16), lora()), mixed.ids)
    assert losses[-1] < 0.9 * losses[0]


def test_gradient_checkpointing_changes_no_gradient(mixed: Artifact) -> None:
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        base = mixed.load()
        if checkpointing:
            base.gradient_checkpointing_enable()
            base.enable_input_require_grads()
        model = peft.get_peft_model(base, lora(init_lora_weights=False)).train()
        model(input_ids=mixed.ids, labels=mixed.ids).loss.backward()
        gradients.append([one.grad for one in model.parameters() if one.requires_grad])
    assert len(gradients[0]) == 12
    for plain, again in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, again)


def arguments(folder: Path, **options: Any) -> TrainingArguments:
    fields = {"max_steps": 4, "learning_rate": 1e-2, "per_device_train_batch_size": 4, "save_steps": 4, **options}
    return TrainingArguments(output_dir=str(folder), report_to=[], use_cpu=True, disable_tqdm=True, **fields)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_trainer(mixed: Artifact, tmp_path: Path, checkpointing: bool) -> None:
    rows = [{"input_ids": row, "labels": row} for row in mixed.ids.repeat(4, 1)]
    data = {"train_dataset": rows, "eval_dataset": rows}
    model = peft.get_peft_model(mixed.load(), lora())
    trainer = Trainer(model, arguments(tmp_path, gradient_checkpointing=checkpointing), **data)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()["eval_loss"]
    assert after < before
    model = peft.get_peft_model(mixed.load(), lora())
    resumed = Trainer(model, arguments(tmp_path, max_steps=6), **data)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 6
    assert resumed.evaluate()["eval_loss"] < after


def test_trainer_refuses_packed_weights_alone(mixed: Artifact, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="attach trainable adapters"):
        Trainer(mixed.load(), arguments(tmp_path))


PEFT_FIRST = """
import sys, peft, compress
from transformers import AutoModelForCausalLM
config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])
model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(sys.argv[1]), config)
print(type(model.base_model.model.model.layers[0].self_attn.q_proj).__name__)
"""


def test_peft_imported_first(mixed: Artifact) -> None:
    run = subprocess.run(
        [sys.executable, "-c", PEFT_FIRST, str(mixed.folder)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.split()[-1] == "PackedLora"


def test_an_adapter_on_what_was_quantized_in_memory() -> None:
    model = compress.quantize(families.build("GPT2LMHeadModel", "gpt2", n_embd=32, n_layer=1, n_head=4, vocab_size=96))
    ids = families.token_ids()
    expected = families.logits(model, ids)
    adapted = peft.get_peft_model(model, lora(target_modules=["c_attn", "c_fc"]))
    assert torch.equal(families.logits(adapted, ids), expected)
    losses = train(adapted, ids)
    assert losses[-1] < losses[0]
