"""Distillation losses: functions of logits, in pure torch."""

from compress.losses.base import IGNORED, TokenLoss
from compress.losses.divergences import KL, kl_terms
from compress.losses.labels import CrossEntropy
from compress.losses.registry import NEEDS_TEACHER, loss_names, loss_options, make_loss

__all__ = [
    "IGNORED",
    "KL",
    "NEEDS_TEACHER",
    "CrossEntropy",
    "TokenLoss",
    "kl_terms",
    "loss_names",
    "loss_options",
    "make_loss",
]
