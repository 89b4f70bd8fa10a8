"""How far an image model is from a reference, and how often it is right.

A classifier has logits [C] of each image. With q its distribution over the classes and p the reference's, over N images

    kl_divergence  = (1/N) sum KL(p || q)  (nats per image, in the form that does not cancel),
    kl_stderr      = standard error of that mean,
    top1_agreement = the part of the images where both have the same most likely class,

and where the source has labels, `accuracy` and `reference_accuracy` are the parts where that class is the label.

Of a model without classes, `cosine` is the mean of the cosines between the two models' pooled outputs of an image: what
the model itself calls so, or the mean of its last hidden states over patches or positions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from compress.data import ImageSource
from compress.data.pixels import ImageProcessor, channels_of, image_batches
from compress.errors import DataError, ModelError, NumericsError, UsageError
from compress.losses import KL

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

Figures = dict[str, float | int | str | None]


def spread(count: int, limit: int | None) -> Sequence[int]:
    """`limit` of `count` images at equal distances, so that images sorted by class are all represented; all without
    it."""
    if limit is None or limit >= count:
        return range(count)
    return [index * count // limit for index in range(limit)]


def class_numbers(source: ImageSource, config: PreTrainedConfig) -> tuple[list[int] | None, str | None]:
    """The model's number of each image's class, or None with the reason.

    Numbers of an archive are the model's own. Names of folders are the model's names of its classes, or its numbers;
    for a model that names none, the folders in alphabetical order where there are as many as classes.
    """
    if source.labels is None:
        return None, "the images have none"
    names = source.classes
    of_number = {int(number): name for number, name in (config.id2label or {}).items()}
    count = len(of_number)
    if names is None:
        numbers = list(source.labels)
    else:
        known = {name.casefold(): number for number, name in of_number.items()}
        unknown = [name for name in names if name.casefold() not in known]
        if not unknown:
            of_name = {name: known[name.casefold()] for name in names}
        elif all(name.isdecimal() for name in names):
            of_name = {name: int(name) for name in names}
        elif len(names) == count and _are_unnamed(of_number):
            of_name = {name: number for number, name in enumerate(names)}
        else:
            return None, f"'{unknown[0]}' is no class of the model"
        numbers = [of_name[names[label]] for label in source.labels]
    if min(numbers) < 0 or max(numbers) >= count:
        raise DataError(
            f"The labels of '{source.spec}' go from {min(numbers)} to {max(numbers)}; the model has the classes 0 to "
            f"{count - 1}.",
            remedy="Name the labels that belong to the model, or none.",
        )
    return numbers, None


def _are_unnamed(classes: Mapping[int, str]) -> bool:
    return all(name == f"LABEL_{number}" for number, name in classes.items())


@dataclass
class _Sums:
    kl: list[float] = field(default_factory=list)
    cosines: list[float] = field(default_factory=list)
    agreement: int = 0
    right: int = 0
    reference_right: int = 0


def _run(model: PreTrainedModel, pixels: Tensor, spec: str) -> Mapping[str, Tensor]:
    try:
        output: Mapping[str, Tensor] = model(pixel_values=pixels.to(model.device, model.dtype))
    except ValueError as error:
        raise DataError(
            f"The {type(model).__name__} refuses images of '{spec}' ({pixels.shape[2]} x {pixels.shape[3]}): {error}",
            remedy="Correct the sizes in preprocessor_config.json.",
        ) from error
    return output


def _classes(output: Mapping[str, Tensor]) -> Tensor | None:
    """Logits float32 [B, C] of a classifier."""
    logits = output.get("logits")
    return logits.float() if logits is not None and logits.ndim == 2 else None


def pooled(output: Mapping[str, Tensor]) -> Tensor:
    """One vector of each image, float32 [B, H]. Raises `ModelError` for a model that makes none."""
    found = output.get("pooler_output")
    if found is not None:
        return found.float().flatten(1)
    hidden = output.get("last_hidden_state")
    if hidden is None or hidden.ndim not in (3, 4):
        raise ModelError(
            f"The model's output ({', '.join(output)}) has neither classes nor hidden states.",
            remedy="Measured are image classifiers, and models of hidden states [B, T, H] or [B, H, Y, X].",
        )
    return hidden.float().mean(1) if hidden.ndim == 3 else hidden.float().mean((2, 3))


@torch.inference_mode()
def evaluate_images(
    model: PreTrainedModel,
    reference: PreTrainedModel | None,
    processor: ImageProcessor,
    source: ImageSource,
    *,
    limit: int | None = None,
) -> Figures:
    """The figures above over the images of `source`, at most `limit`; without a reference `accuracy` alone.

    Raises `UsageError` without a reference and labels, `ModelError` for models of other classes, `DataError` for images
    that cannot be read or that the model refuses, `NumericsError` for an output of NaN.
    """
    chosen = spread(len(source), limit)
    sums = _Sums()
    labels: list[int] | None = None
    why_not: str | None = None
    for indices, pixels in image_batches(source, chosen, processor, channels_of(model.config)):
        output = _run(model, pixels, source.spec)
        wanted = None if reference is None else _run(reference, pixels, source.spec)
        logits = _classes(output)
        if logits is None:
            if wanted is None:
                raise UsageError(
                    "An image model without classes is measured against another.", remedy="Name one with --reference."
                )
            sums.cosines += F.cosine_similarity(*_vectors(output, wanted)).double().tolist()
            continue
        if not sums.kl and labels is None and why_not is None:
            labels, why_not = class_numbers(source, model.config)
            if labels is None and wanted is None:
                raise UsageError(
                    f"Without a reference a classifier is measured by labels: {why_not}.",
                    remedy="Name a model with --reference, or images with the model's classes.",
                )
        _compare(sums, logits, wanted, None if labels is None else [labels[index] for index in indices])
    return _figures(sums, len(chosen), reference is not None, labels is not None, why_not)


def _vectors(output: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    one, other = pooled(output), pooled(wanted)
    if one.shape != other.shape:
        raise ModelError(
            f"The model makes vectors of {one.shape[1]}, the reference of {other.shape[1]}.",
            remedy="Name a reference of the same kind.",
        )
    if not one.isfinite().all():
        raise NumericsError("The model's output is not finite.", remedy="Its weights are damaged.")
    return one, other


def _compare(sums: _Sums, logits: Tensor, wanted: Mapping[str, Tensor] | None, labels: Sequence[int] | None) -> None:
    if not logits.isfinite().all():
        raise NumericsError("The model's logits are not finite.", remedy="Its weights are damaged.")
    top = logits.argmax(1)
    right = None if labels is None else torch.tensor(labels, device=top.device)
    if right is not None:
        sums.right += int((top == right).sum())
    if wanted is None:
        return
    target = _classes(wanted)
    if target is None or target.shape != logits.shape:
        count = "none" if target is None else target.shape[1]
        raise ModelError(
            f"The model has {logits.shape[1]} classes, the reference {count}.",
            remedy="Name a reference with the same classes.",
        )
    sums.kl += KL(reduction="none")(logits, target).double().tolist()
    sums.agreement += int((top == target.argmax(1)).sum())
    if right is not None:
        sums.reference_right += int((target.argmax(1) == right).sum())


def _figures(sums: _Sums, count: int, compared: bool, labelled: bool, why_not: str | None) -> Figures:
    if sums.cosines:
        return {"cosine": math.fsum(sums.cosines) / count, "images": count}
    found: Figures = {"images": count}
    if compared:
        values = torch.tensor(sums.kl, dtype=torch.float64)
        found["kl_divergence"] = float(values.mean())
        found["kl_stderr"] = float(values.std() / math.sqrt(count)) if count > 1 else None
        found["top1_agreement"] = sums.agreement / count
    if labelled:
        found["accuracy"] = sums.right / count
        if compared:
            found["reference_accuracy"] = sums.reference_right / count
    else:
        found["labels"] = f"not used: {why_not}"
    return found
