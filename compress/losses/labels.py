"""The loss on labels, in the same form as the distillation losses."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from compress.errors import UsageError
from compress.losses.base import IGNORED, TokenLoss, as_float


class CrossEntropy(TokenLoss):
    """Negative log-likelihood of the labels under the student, in nats: value = -log softmax(z_s)[label]."""

    def values(self, student: Tensor, teacher: Tensor | None, labels: Tensor | None) -> Tensor:
        if labels is None:
            raise UsageError("The loss 'cross_entropy' needs labels.", remedy="Pass labels of the logits' shape.")
        return F.cross_entropy(as_float(student), labels, reduction="none", ignore_index=IGNORED)
