"""The size of the images that an exported model takes: its graph has one, unless the model takes any."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy

from compress.data.pixels import PROCESSORS, channels_of, load_image_processor, preprocess

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PICTURES = ((480, 640), (640, 480))


def has_processor(folder: Path) -> bool:
    return any((folder / name).is_file() for name in PROCESSORS)


def image_size_of(model: PreTrainedModel, folder: Path | None) -> tuple[int, int] | None:
    """Height and width to which the image processor in `folder` brings all pictures; without such a one, those of the
    model's config, and None where that names none."""
    if folder is not None and has_processor(folder):
        sizes = {_processed(model, folder, picture) for picture in PICTURES}
        if len(sizes) == 1:
            return sizes.pop()
    size = model.config.to_dict().get("image_size")
    if isinstance(size, list | tuple):
        height, width = size
        return height, width
    return None if size is None else (size, size)


def _processed(model: PreTrainedModel, folder: Path, picture: tuple[int, int]) -> tuple[int, int]:
    channels = channels_of(model.config)
    image = numpy.zeros((*picture, channels), numpy.uint8)
    height, width = preprocess(image, load_image_processor(folder), channels, "the size of a photograph").shape[2:]
    return height, width
