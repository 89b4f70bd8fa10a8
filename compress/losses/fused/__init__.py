"""Losses from hidden states and the heads' weights, without the logits ever being whole."""

from compress.losses.fused.head import Head
from compress.losses.fused.linear import Strategy, linear_loss, linear_losses

__all__ = ["Head", "Strategy", "linear_loss", "linear_losses"]
