"""OFA: one loss on logits for a teacher and a student of different architectures, at the end and at exit branches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Unpack

import torch
from torch import Tensor, nn
from torch.nn.utils import skip_init

from compress.errors import UsageError
from compress.losses.base import (
    ClosedFormLoss,
    Common,
    Loss,
    Needs,
    Outputs,
    Reduction,
    Vocabulary,
    between,
    check_positions,
    counted,
    positive,
)
from compress.losses.decoupled import weighed
from compress.losses.labels import LabelSplit


class OneForAll(ClosedFormLoss):
    """OFA distillation, -sum_c [(p_c + 1[c = y])^eps - 1[c = y]] log q_c: a cross-entropy that stresses the label.

    In nats, p = softmax(z_t / T), q = softmax(z_s / T), times T^2 if `t2`. Hao et al. 2023 (NeurIPS, arXiv 2310.19444)
    with the settings of its released code: T = 1, no T^2, eps from 1 to 1.5. With eps = 1 it is the cross-entropy with
    p, whose gradient is that of KL(p || q); a larger eps raises the label's weight, up to 2^eps - 1 where the teacher
    is sure, and lowers those of the other classes.

    The weights w_c do not sum to one and the minimum is at q = w / sum w, not at p. The value there is not 0. Infinite
    where the student leaves out a class that the teacher does not. The released code takes the logarithm of a softmax.
    """

    needs = Needs.TEACHER | Needs.LABELS

    def __init__(self, eps: float = 1.5, temperature: float = 1.0, t2: bool = False, **common: Unpack[Common]) -> None:
        super().__init__(**common)
        self.eps = 1.0 if eps == 1 else between(eps, "eps", 1, float("inf"))
        self.temperature = positive(temperature, "temperature")
        self.t2 = t2

    def pair(self, student: Tensor, teacher: Tensor | None, labels: Tensor | None) -> tuple[Tensor, Tensor]:
        assert teacher is not None and labels is not None
        s, t = LabelSplit(student / self.temperature, labels), LabelSplit(teacher / self.temperature, labels)
        of_label = torch.expm1(self.eps * torch.log1p(t.log_label.exp()))
        weights = torch.exp(self.eps * (t.log_others + t.log_rest))
        rest = weights.sum(-1, keepdim=True)
        log_q = s.log_others + s.log_rest
        value = -(weighed(of_label, s.log_label).squeeze(-1) + weighed(weights, log_q).sum(-1))
        gradient = log_q.exp_().mul_(rest + of_label).sub_(weights)
        # sum(w) q - w of the label, without the difference of two numbers near 1 where both models are sure
        gradient.scatter_(-1, s.column, rest * s.log_label.exp() - of_label * s.log_rest.exp())
        scale = self.temperature**2 if self.t2 else 1.0
        return value * scale, gradient.mul_(scale / self.temperature)


class BranchedOneForAll(Loss):
    """OFA on the student's logits and at exit branches: the sum of the OFA losses of all of them, each with weight 1.

    A branch is a module that makes logits from a hidden state of the student. `branches` maps the index of a hidden
    state (0 is the embedding) to the module, which is given that state at the positions that count and returns logits
    [n, V]: for a convolutional student [n, C, H, W] -> [n, V]. Their parameters train with the student's. `final` says
    whether the student's own logits are in the sum; the other arguments are those of `OneForAll`, whose reduction and
    masks hold for each part. Hao et al. 2023 (NeurIPS, arXiv 2310.19444): with `final`, this beside a cross-entropy is
    the paper's objective.
    """

    needs = Needs.TEACHER | Needs.LABELS | Needs.FEATURES
    divisible = True

    def __init__(
        self,
        branches: Mapping[int, nn.Module],
        eps: float = 1.5,
        temperature: float = 1.0,
        t2: bool = False,
        final: bool = True,
        **common: Unpack[Common],
    ) -> None:
        super().__init__(**common)
        if not branches or min(branches) < 0:
            raise UsageError("There are no branches, or one has a negative layer.", remedy="Give {layer: module}.")
        self.layers = tuple(sorted(branches))
        self.branches = nn.ModuleList(branches[layer] for layer in self.layers)
        self.loss = OneForAll(eps, temperature, t2, **common)
        self.final = final

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor | None,
        labels: Tensor | None,
        weights: Tensor | None = None,
        denominator: Tensor | float | None = None,
        *,
        features: Sequence[Tensor],
    ) -> Tensor:
        """`features`: hidden states of the student; their first dimensions are those of the labels, [N] or [B, T]."""
        if teacher_logits is None or labels is None:
            raise UsageError(f"{type(self).__name__} needs the teacher's logits and labels.", remedy="Pass both.")
        check_positions(teacher_logits, labels=labels, weights=weights)
        for layer in self.layers:
            if layer >= len(features):
                raise UsageError(
                    f"There are {len(features)} hidden states; a branch reads number {layer}.",
                    remedy="Pass all from the embedding to the last layer, and check the layers of the branches.",
                )
            if features[layer].shape[: labels.ndim] != labels.shape:
                raise UsageError(
                    f"Hidden state {layer} is {tuple(features[layer].shape)}, the labels {tuple(labels.shape)}.",
                    remedy="The first dimensions of a hidden state are those of the labels.",
                )
        keep = counted(labels, weights)
        counts = slice(None) if keep is None else keep
        teacher_logits, labels = teacher_logits[counts], labels[counts]
        weights = None if weights is None else weights[counts]
        made = [branch(features[at][counts]) for at, branch in zip(self.layers, self.branches, strict=True)]
        made += [student_logits[counts]] if self.final else []
        return torch.stack([self.loss(each, teacher_logits, labels, weights, denominator) for each in made]).sum(0)

    def of(self, outputs: Outputs, denominator: Tensor | float | None = None) -> Tensor:
        return self(
            outputs.logits,
            outputs.teacher_logits,
            outputs.labels,
            outputs.weights,
            denominator,
            features=outputs.features,
        )


class StagedOneForAll(BranchedOneForAll):
    """OFA on the student's logits and on those that exit branches make from its hidden states in `stages` places.

    Layers round(L k / stages), k = 1 .. stages, of the student's L = `student_layers`; the last one is among them, as
    in the released code, whose `stages` is 4. A branch is LayerNorm, Linear(student_width -> bottleneck), GELU,
    Linear(bottleneck -> classes), about bottleneck (student_width + classes) parameters: our choice, for a student that
    predicts at each token. The paper's branches are made for images (separable convolutions; patch merging and
    transformer blocks): give such ones to `BranchedOneForAll`. The last Linear starts at 0, so that at first a branch
    learns and does not push the student. The first one depends on `seed` alone: torch's global generator is neither
    read nor moved.
    """

    def __init__(
        self,
        student_width: int,
        student_layers: int,
        classes: int,
        stages: int = 2,
        bottleneck: int = 256,
        seed: int = 0,
        eps: float = 1.5,
        temperature: float = 1.0,
        t2: bool = False,
        final: bool = True,
        reduction: Reduction = "mean",
        vocabulary: Vocabulary = "equal",
    ) -> None:
        if not 1 <= stages <= student_layers:
            raise UsageError(f"stages is {stages}.", remedy=f"The student has {student_layers} layers: give 1 to that.")
        if bottleneck < 1:
            raise UsageError(f"bottleneck is {bottleneck}.", remedy="Give a width of at least 1.")
        generator = torch.Generator().manual_seed(seed)
        layers = [(2 * student_layers * stage + stages) // (2 * stages) for stage in range(1, stages + 1)]
        branches = {layer: ExitBranch(student_width, bottleneck, classes, generator) for layer in layers}
        super().__init__(branches, eps, temperature, t2, final, reduction=reduction, vocabulary=vocabulary)


class ExitBranch(nn.Module):
    """Hidden states [.., width] -> logits [.., classes]: LayerNorm, Linear, GELU, Linear, in the parameters' dtype."""

    def __init__(self, width: int, bottleneck: int, classes: int, generator: torch.Generator) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, device="cpu")
        self.down = skip_init(nn.Linear, width, bottleneck, device="cpu")
        self.up = skip_init(nn.Linear, bottleneck, classes, device="cpu")
        nn.init.normal_(self.down.weight, std=width**-0.5, generator=generator)
        for zero in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(zero)

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = self.norm(hidden.to(self.norm.weight.dtype))
        logits: Tensor = self.up(nn.functional.gelu(self.down(hidden)))
        return logits
