"""Training a student to be like a teacher. The public names are loaded when they are used: they need transformers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from compress.distillation.objective import Objective, Term
    from compress.distillation.sharding import shard
    from compress.distillation.teacher import OnlineTeacher, TeacherSignal
    from compress.distillation.trainer import DistillTrainer

__all__ = ["DistillTrainer", "Objective", "OnlineTeacher", "TeacherSignal", "Term", "shard"]

_HOMES = {
    "DistillTrainer": "trainer",
    "Objective": "objective",
    "OnlineTeacher": "teacher",
    "TeacherSignal": "teacher",
    "Term": "objective",
    "shard": "sharding",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
