"""Trainings that one process and several do alike; run as a program, one process of several does them.

    python tests/distillation/divided.py FOLDER     as `torchrun` starts it

writes what the first process found to FOLDER/found.json.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import DistributedType, PartialState
from torch import Tensor
from transformers import TrainingArguments
from transformers.trainer_callback import PrinterCallback

import compress
from compress.data import SampledRows
from compress.distillation import DistillTrainer, Term, shard
from compress.distillation.callbacks import Reporter
from compress.distillation.objective import make_term, setting_of
from compress.distillation.optimizers import make_optimizer
from compress.distillation.schedules import make_schedule
from compress.distributed import joined, world
from compress.errors import CompressError
from compress.events import Events
from compress.losses import KL
from compress.recipe import make_recipe
from tests.distillation.test_trainer import VOCABULARY, tiny

STEPS, ROWS = 4, 2
ALL = {
    "kl": {"weight": 1.0},
    "cross_entropy": {"weight": 0.2},
    "sinkhorn": {"balance": 0.1, "max_rows": 8},
    "dist": {"weight": 0.01},
    "uskd": {"weight": 0.1},
    "span": {},
    "nd": {"weight": 0.1},
    "cmi": {"weight": 0.1},
    "sampled_kl": {"weight": 0.1},
    "clipped_kl": {},
    "ofa_staged": {"weight": 0.1},
}
TWO: dict[str, dict[str, Any]] = {"kl": {}, "cross_entropy": {"weight": 0.3}}


class Uneven(SampledRows):
    """Rows of which each has another number of labels that count, and every third has none."""

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids = super().__getitem__(index)["input_ids"]
        labels = ids.clone()
        labels[: 12 if index % 3 == 1 else index % 7] = -100
        return {"input_ids": ids, "labels": labels}


def train(
    folder: Path,
    losses: dict[str, dict[str, Any]],
    *,
    sharded: bool = False,
    fused: bool = False,
    optimizer: str = "adamw",
    resume: str | bool | None = None,
    **options: Any,
) -> list[dict[str, float]]:
    """What a training logs: steps of two forward passes of two rows, whatever the number of processes."""
    student, teacher = tiny(16, 2), tiny(24, 2)
    setting = setting_of(student.config, teacher.config)
    terms = [make_term(name, given, setting, has_teacher=True) for name, given in losses.items()]
    if sharded:
        shard(student)
        shard(teacher, frozen=True)
    owned = [parameter for term in terms for parameter in term.loss.parameters()]
    given: dict[str, Any] = {}
    if not options.get("fsdp"):
        made = make_optimizer(optimizer, student, 1e-2, 0.0, owned)  # type: ignore[arg-type]
        given = {"optimizers": (made, make_schedule(made, "cosine", STEPS, 0))}
    trainer = DistillTrainer(
        student, settings(folder, **options), terms=terms, teacher=teacher, fused=fused, train_dataset=data(), **given
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train(resume)
    wanted = ("loss", "grad_norm")
    return [
        {name: value for name, value in entry.items() if name.startswith(wanted)}
        for entry in trainer.state.log_history
        if "loss" in entry
    ]


def data() -> Uneven:
    rows = torch.randint(0, VOCABULARY, (10, 12), generator=torch.Generator().manual_seed(0))
    return Uneven(rows, STEPS * 2 * ROWS, 3)


def settings(folder: Path, **options: Any) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=ROWS // world().size,
        gradient_accumulation_steps=2,
        max_grad_norm=0.05,
        logging_steps=1,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        **{"save_strategy": "no", **options},
    )


def outcome(work: Callable[[], Any]) -> Any:
    """What `work` returns, or the error of every process, by rank."""
    try:
        return work()
    except CompressError as error:
        return world().gather(f"{type(error).__name__}: {error}")


class Broken(KL):
    """Not finite on one process."""

    def of(self, outputs: Any, denominator: Any = None) -> Tensor:
        return super().of(outputs, denominator) * (torch.nan if world().rank == 1 else 1.0)


class Together(KL):
    """Says that it compares positions, and nothing of several processes."""

    independent = False


def diverge(folder: Path) -> None:
    trainer = DistillTrainer(
        tiny(16, 1),
        settings(folder),
        terms=[Term("broken", Broken())],
        teacher=tiny(24, 2),
        train_dataset=data(),
        callbacks=[Reporter(Events(), STEPS, None)],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()


def distilled(models: Path, out: Path, **options: Any) -> dict[str, Any]:
    """The report of the whole stage, as the command does it."""
    part = {
        "teacher": str(models / "teacher"),
        "data": f"text:{models / 'text.txt'}",
        "losses": ["kl"],
        "steps": 4,
        "batch_size": 4,
        "context": 16,
        "log_every": 1,
        "save_every": 2,
        **options,
    }
    recipe = make_recipe({"model": str(models / "student"), "out": str(out), "distill": part})
    return dict(compress.run(recipe)["distill"])


def main(folder: Path) -> None:
    saving = {"save_strategy": "steps", "save_steps": 2}
    broken = str(folder / "one" / "checkpoint-2")
    found = {
        "ddp": train(folder / "ddp", ALL),
        "fsdp": train(folder / "fsdp", ALL, sharded=True, **saving),
        "ddp fused": train(folder / "ddp_fused", TWO, fused=True),
        "fsdp fused": train(folder / "fsdp_fused", TWO, fused=True, sharded=True),
        "fsdp muon": train(folder / "fsdp_muon", TWO, optimizer="muon", sharded=True, **saving),
        "ddp resumed": train(folder / "ddp_resumed", ALL, resume=broken),
        "fsdp resumed": train(folder / "fsdp_resumed", ALL, sharded=True, resume=broken, **saving),
        "diverged": outcome(lambda: diverge(folder / "diverged")),
        "undivided": outcome(
            lambda: DistillTrainer(tiny(16, 1), settings(folder), terms=[Term("together", Together())])
        ),
        "uneven": outcome(lambda: distilled(folder, folder / "uneven", batch_size=3)),
        "on a CPU": outcome(lambda: train(folder / "refused", TWO, fsdp=True)),
        "stage ddp": distilled(folder, folder / "stage_ddp", fused=True)["loss"],
        "stage fsdp": distilled(folder, folder / "stage_fsdp", fused=True, parallel="fsdp")["loss"],
        "clock": world().gather(distilled(folder, folder / "clock", steps=100_000, max_seconds=0.5)["steps"]),
    }
    # accelerate shards on accelerators alone: let it take the CPU for one
    PartialState._prepare_backend = lambda *args, **kwargs: ("gloo", DistributedType.MULTI_GPU)
    PartialState.set_device = lambda self: setattr(self, "device", torch.device("cpu"))
    accelerated = {"learning_rate": 1e-2, "adam_beta2": 0.95, "weight_decay": 0.0, "lr_scheduler_type": "cosine"}
    found["accelerate"] = train(folder / "accelerate", TWO, fused=True, fsdp=True, **accelerated, **saving)
    if world().first:
        (folder / "found.json").write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    torch.set_num_threads(1)
    with joined():
        main(Path(sys.argv[1]))
