"""LELP: a teacher of few classes taught through pseudo-subclasses, which its embeddings give.

With C classes the teacher's probabilities say C - 1 numbers about an example: one, for a binary task. Its embedding
says more. LELP (Loo et al. 2024, arXiv 2409.20449) cuts each class into S pseudo-subclasses along directions of the
embedding that the teacher's output does not see, and trains a student of C S classes on them. The probability of a
class is then the sum over its subclasses, and the rest is thrown away after training.

    targets    t_cs(x) = p_c(x) softmax_s(<v_cs, h(x) - m_c> / (beta sigma_c))
    loss       -sum_cs t_cs log q_cs
    inference  q_c = sum_s q_cs, that is a logsumexp of the logits

h: the teacher's embedding (the input of its last linear map W), m_c: its mean over class c. v_c1 .. v_cS: the first S
principal directions of class c in the null space of W, turned by a random rotation so that the S coordinates have the
same variance in expectation. p_c: the label, or the teacher's probabilities.

No code was released. Ours are: the scale of the coordinates (sigma_c, the root mean square of the S coordinates over
the class, so that `beta` means the same for every teacher), their centre m_c, and a rotation for each class of its own.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from compress.errors import UsageError
from compress.losses.base import ClosedFormLoss, as_float, positive
from compress.losses.features import check_labels

NEGLIGIBLE = 1e-12
"""Share of a class's largest variance below which a direction is rounding."""


class PseudoSubclasses(nn.Module):
    """S directions for each of C classes of a teacher with embeddings of a width D, made by `fit`.

    Buffers in float64: `directions` [C, S, D], divided by beta sigma_c, and `offsets` [C, S], their product with m_c.
    `state_dict` holds all there is to store, `from_state` makes the object of it.
    """

    directions: Tensor
    offsets: Tensor

    def __init__(self, directions: Tensor, offsets: Tensor) -> None:
        super().__init__()
        self.register_buffer("directions", directions)
        self.register_buffer("offsets", offsets)

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor]) -> PseudoSubclasses:
        return cls(state["directions"], state["offsets"])

    @classmethod
    @torch.no_grad()
    def fit(
        cls,
        features: Tensor,
        labels: Tensor,
        weight: Tensor,
        subclasses: int,
        *,
        beta: float = 1.0,
        seed: int = 0,
        null_space: bool = True,
        rotate: bool = True,
    ) -> PseudoSubclasses:
        """Fit to embeddings [N, D] with labels [N] (true ones, or the teacher's own) and the output weights [C, D] of
        the teacher; [1, D] for a single logit of two classes.

        `beta` is the temperature of a class's subclasses: small ones are nearly hard. `seed` draws the rotations.
        The steps that the paper found useful can be left out: `null_space`, `rotate`. Everything is computed in
        float64, and each direction is given the sign that makes its largest component positive.

        Cost: a D x D eigenproblem for each class. Raises `UsageError` when the null space, or what a class spans of
        it, has fewer than S dimensions: always when W has rank D, as the output layers of language models do.
        """
        classes, width = max(2, len(weight)), features.shape[-1]
        if subclasses < 2:
            raise UsageError(f"{subclasses} subclasses say nothing.", remedy="Give at least 2.")
        if features.ndim != 2 or labels.shape != features.shape[:1] or weight.shape[-1:] != features.shape[1:]:
            shapes = ", ".join(str(tuple(each.shape)) for each in (features, labels, weight))
            raise UsageError(f"Features, labels and weight are {shapes}.", remedy="Give [N, D], [N] and [C, D].")
        check_labels(labels, classes)
        positive(beta, "beta")
        basis = torch.eye(width, dtype=torch.float64, device=weight.device)
        if null_space:
            basis = null_space_of(weight)
            if basis.shape[1] < subclasses:
                raise UsageError(
                    f"The output weights {tuple(weight.shape)} leave a null space of {basis.shape[1]} dimensions; "
                    f"{subclasses} subclasses need {subclasses}.",
                    remedy="LELP is for few classes: take fewer subclasses, or give null_space=False.",
                )
        generator = torch.Generator().manual_seed(seed)
        directions, offsets = [], []
        for label in range(classes):
            rows = features[labels == label].double()
            mean, axes, variances = principal(rows @ basis, subclasses, label)
            axes = with_signs((basis @ axes).T)
            if rotate:
                axes = rotation(subclasses, generator).to(axes.device) @ axes
            axes = axes / (beta * variances.mean().sqrt())
            directions.append(axes)
            offsets.append(axes @ (basis @ mean))
        return cls(torch.stack(directions), torch.stack(offsets))

    @torch.no_grad()
    def targets(self, features: Tensor, labels: Tensor | None = None, probabilities: Tensor | None = None) -> Tensor:
        """Targets [.., C S] from embeddings [.., D] and, for p_c, either labels [..] or probabilities [.., C].

        Subclass s of class c is the column c S + s. float32, or float64 for float64 embeddings.
        """
        classes, subclasses, _ = self.directions.shape
        if (labels is None) == (probabilities is None):
            raise UsageError("Targets need labels or probabilities.", remedy="Give one of the two.")
        if labels is not None:
            check_labels(labels, classes)
            probabilities = torch.nn.functional.one_hot(labels, classes)
        assert probabilities is not None
        coordinates = torch.einsum("csd,...d->...cs", self.directions, features.double()) - self.offsets
        targets = probabilities.double().unsqueeze(-1) * torch.softmax(coordinates, -1)
        return targets.reshape(*features.shape[:-1], classes * subclasses).to(as_float(features[:0]).dtype)


class LELP(ClosedFormLoss):
    """Cross-entropy of pseudo-subclasses, in nats: value -sum_k t_k log q_k, gradient q - t, q = softmax(logits).

    Called `loss(student_logits, targets, labels=None, weights=None, denominator=None)` with logits and targets
    [.., C S], the targets being those of `PseudoSubclasses.targets`. Labels, if given, only say what is left out.
    The paper trains on it alone. Raises `UsageError` for targets that are not distributions.
    """

    def pair(self, student: Tensor, teacher: Tensor | None, labels: Tensor | None) -> tuple[Tensor, Tensor]:
        assert teacher is not None
        log_q = torch.log_softmax(student, -1)
        terms = torch.where(teacher > 0, teacher * log_q, torch.zeros_like(log_q))
        return -terms.sum(-1), log_q.exp() * teacher.sum(-1, keepdim=True) - teacher

    def check(self, student: Tensor, teacher: Tensor | None, labels: Tensor | None) -> None:
        super().check(student, teacher, labels)
        assert teacher is not None
        if len(teacher) and bool((teacher < 0).any() | ((as_float(teacher).sum(-1) - 1).abs() > 1e-2).any()):
            raise UsageError("The targets are not distributions.", remedy="Give those of PseudoSubclasses.targets.")


def class_logits(subclass_logits: Tensor, subclasses: int) -> Tensor:
    """The class logits [.., C] of subclass logits [.., C S]: the logsumexp over the subclasses of each."""
    return subclass_logits.unflatten(-1, (-1, subclasses)).logsumexp(-1)


def null_space_of(weight: Tensor) -> Tensor:
    """An orthonormal basis [D, D - rank] of the vectors that a matrix [C, D] maps to zero."""
    wide = weight.double()
    squares, vectors = torch.linalg.eigh(wide.T @ wide)
    limit = max(weight.shape) * torch.finfo(torch.float32).eps  # the weights' own rounding, of any singular value
    return vectors[:, squares <= squares[-1] * limit**2]


def principal(rows: Tensor, count: int, label: int) -> tuple[Tensor, Tensor, Tensor]:
    """Mean [D], the first `count` principal axes [D, count] and their variances, of rows [n, D] of a class."""
    mean = rows.mean(0)
    centred = rows - mean
    variances, axes = torch.linalg.eigh(centred.T @ centred / max(1, len(rows)))
    found = int((variances > variances[-1] * NEGLIGIBLE).sum()) if len(rows) > 1 and variances[-1] > 0 else 0
    if found < count:
        raise UsageError(
            f"The {len(rows)} embeddings of class {label} vary in {found} directions; {count} subclasses need {count}.",
            remedy="Take fewer subclasses, or more examples.",
        )
    return mean, axes[:, -count:].flip(-1), variances[-count:].flip(-1)


def with_signs(axes: Tensor) -> Tensor:
    """Axes [S, D] of which the largest component is positive: an eigenvector's sign is arbitrary."""
    largest = axes.gather(-1, axes.abs().argmax(-1, keepdim=True))
    return axes * largest.sign()


def rotation(size: int, generator: torch.Generator) -> Tensor:
    """A random orthogonal matrix [size, size], uniform over all."""
    q, r = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
    return q * r.diagonal().sign()
