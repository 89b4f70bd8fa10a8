"""From images to what an image model reads: float32 [B, C, H, W], by the model's own image processor.

The processor (`preprocessor_config.json`) resizes, crops, rescales and normalizes as it did in training. It is the one
on top of Pillow, also where torchvision is installed: the two resize a little differently, and figures should not
depend on what else is on a machine. One image goes through it at a time, so that images of all sizes may come; what
leaves it must be of one size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy
import torch
from torch import Tensor

from compress.data.base import ImageSource, require_package
from compress.data.images import MODES, with_channels
from compress.errors import DataError, ModelError
from compress.modeling.resolve import resolve_model

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

PROCESSORS = ("preprocessor_config.json", "processor_config.json")
BATCH_PIXELS = 1 << 18
"""Pixels that go through a model at once, rounded down to whole images, but at least one: 256 images of 32 x 32, 5 of
224 x 224."""
REMEDY = "Save it into the model's folder with save_pretrained, or pass batches {'pixel_values': ...} in Python."

ImageProcessor = Callable[..., Any]
"""An image processor of transformers."""


def load_image_processor(ref: str | Path, trust_remote_code: bool = False) -> ImageProcessor:
    """The image processor of model `ref`. Raises `ModelError` when the folder has none, `DependencyError` without
    Pillow."""
    require_package("PIL")
    from transformers import AutoImageProcessor

    folder = resolve_model(str(ref))
    try:
        loaded: ImageProcessor = AutoImageProcessor.from_pretrained(
            folder, backend="pil", trust_remote_code=trust_remote_code
        )
    except (ValueError, OSError, KeyError, TypeError, ImportError) as error:
        found = any((folder / name).is_file() for name in PROCESSORS)
        reason = str(error).partition("\n")[0]
        cause = f"an image processor that transformers cannot read: {reason}" if found else f"no {PROCESSORS[0]}."
        raise ModelError(f"'{folder}' has {cause}", remedy=REMEDY) from error
    return loaded


def check_processors(first_name: str, first: ImageProcessor, second_name: str, second: ImageProcessor) -> None:
    """Raise `ModelError` unless two models that are to be compared see an image alike."""
    settings, others = (processor.to_dict() for processor in (first, second))  # type: ignore[attr-defined]
    if settings != others:
        key = min(key for key in settings.keys() | others.keys() if settings.get(key) != others.get(key))
        one, other = settings.get(key), others.get(key)
        raise ModelError(
            f"The image processors of '{first_name}' and '{second_name}' differ: {key} is {one!r} in the one and "
            f"{other!r} in the other.",
            remedy="Only models that see the same images can be compared.",
        )


def image_processor_of(model: PreTrainedModel) -> ImageProcessor:
    """The image processor in the folder that `model` came from. Raises `ModelError` for a model that came from none."""
    if not model.config.name_or_path:
        raise ModelError(f"The {type(model).__name__} comes from no folder with an image processor.", remedy=REMEDY)
    return load_image_processor(model.config.name_or_path)


def channels_of(config: PreTrainedConfig) -> int:
    """Channels of the images that a model reads. Raises `ModelError` for one that does not read grey or colours."""
    channels = int(config.to_dict().get("num_channels", 3))
    if channels not in MODES:
        raise ModelError(f"The model reads images of {channels} channels.", remedy="Supported are 1 and 3.")
    return channels


def preprocess(image: numpy.ndarray, processor: ImageProcessor, channels: int, what: str) -> Tensor:
    """float32 [1, C, H, W] of an image uint8 [H, W, 1 or 3]. Raises `DataError` for one that the processor refuses."""
    try:
        made = processor(with_channels(image, channels), input_data_format="channels_last", return_tensors="pt")
        values: Tensor = made["pixel_values"]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"The model's image processor refuses an image of {what} ({image.shape[0]} x {image.shape[1]}): {error}",
            remedy="Give images like those that the model was trained with.",
        ) from error
    if values.ndim != 4 or values.shape[:2] != (1, channels):
        raise ModelError(
            f"The image processor makes {list(values.shape)} of an image, not [1, {channels}, H, W].",
            remedy="Pass batches {'pixel_values': ...} in Python.",
        )
    return values.to(torch.float32)


def require_one_size(one: Tensor, other: Tensor, what: str) -> None:
    """Raise `DataError` when images [1, C, H, W] differ in size after pre-processing."""
    if one.shape != other.shape:
        sizes = " and ".join("x".join(map(str, image.shape[2:])) for image in (one, other))
        raise DataError(
            f"The images of {what} have the sizes {sizes}, and the model's image processor leaves them so.",
            remedy="Bring them to one size, or set do_resize in preprocessor_config.json.",
        )


def image_batches(
    source: ImageSource, indices: Sequence[int], processor: ImageProcessor, channels: int
) -> Iterator[tuple[list[int], Tensor]]:
    """The images `indices` of `source` in batches: their indices, and float32 [B, C, H, W]."""
    what = f"'{source.spec}'"
    part: list[int] = []
    made: list[Tensor] = []
    size = 1
    first: Tensor | None = None
    for index in indices:
        one = preprocess(source.pixels(index, channels), processor, channels, what)
        if first is None:
            first, size = one, max(1, BATCH_PIXELS // (one.shape[2] * one.shape[3]))
        require_one_size(first, one, what)
        part.append(index)
        made.append(one)
        if len(part) == size:
            yield part, torch.cat(made)
            part, made = [], []
    if part:
        yield part, torch.cat(made)


def calibration_images(
    source: ImageSource, processor: ImageProcessor, channels: int, *, rows: int = 128, seed: int = 0
) -> list[dict[str, Tensor]]:
    """`rows` images drawn by `seed`, none of them twice, as batches `pixel_values` float32 [B, C, H, W]. Raises
    `DataError` for a source of fewer."""
    if len(source) < rows:
        raise DataError(
            f"The data '{source.spec}' has {len(source)} images, not {rows}.",
            remedy=f"Give more images, or use --rows {len(source)}.",
        )
    chosen = torch.randperm(len(source), generator=torch.Generator().manual_seed(seed))[:rows].tolist()
    return [{"pixel_values": pixels} for _, pixels in image_batches(source, chosen, processor, channels)]


def pixel_batches(images: Tensor, processor: Callable[[], ImageProcessor], channels: int) -> list[dict[str, Tensor]]:
    """Images [N, C, H, W] in batches: uint8 ones (1 or 3 channels) pre-processed, floating-point ones as they are."""
    if images.dtype == torch.uint8:
        if images.shape[1] not in MODES:
            raise DataError(f"Images of {images.shape[1]} channels are neither grey nor colour.", remedy="Give 1 or 3.")
        process = processor()
        arrays = images.permute(0, 2, 3, 1).numpy()
        images = torch.cat([preprocess(image, process, channels, "the tensor") for image in arrays])
    size = max(1, BATCH_PIXELS // (images.shape[2] * images.shape[3]))
    return [{"pixel_values": part.to(torch.float32)} for part in images.split(size)]
