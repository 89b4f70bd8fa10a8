"""Images: `images:FOLDER`, `images:FILE.npz#IMAGES`, `images:FILE.npz#IMAGES,LABELS`.

A folder's images are its files .png, .jpg, .jpeg, .webp and .bmp, also further down, sorted by their path. Where all of
them lie in sub-folders, the first of these names an image's class. An archive holds arrays of uint8: [N, H, W],
[N, H, W, C] or [N, C, H, W] with 1 or 3 channels, and labels as integers [N]. Archives with Python objects are refused;
nothing is unpickled. The sizes that its header claims are held against the archive before an array is read.

What a pixel is goes no further than this file: everywhere else images are uint8 [H, W, C], grey or red, green, blue.
"""

from __future__ import annotations

import math
import warnings
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import numpy

from compress.data.base import ImageSource, require_package
from compress.errors import DataError, nearest

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
MODES = {1: "L", 3: "RGB"}
GREY = numpy.array([19595, 38470, 7471], dtype=numpy.uint32)
"""Red, green and blue in a grey value, in 65,536ths (ITU-R BT.601), as Pillow has them."""


def with_channels(image: numpy.ndarray, channels: int) -> numpy.ndarray:
    """An image uint8 [H, W, 1 or 3] with 1 or 3 `channels`: grey is repeated, colours are weighed."""
    if image.shape[2] == channels:
        return image
    if channels == 3:
        return numpy.repeat(image, 3, axis=2)
    return (((image * GREY).sum(2) + (1 << 15)) >> 16).astype(numpy.uint8)[..., None]


class ImageFolder(ImageSource):
    """The image files in a folder."""

    def __init__(self, folder: Path, spec: str) -> None:
        require_package("PIL")
        self.folder, self.spec, self.origin = folder, spec, folder.name
        if not folder.is_dir():
            what = "is a file" if folder.exists() else "does not exist"
            raise DataError(
                f"The folder '{folder}' (from '{spec}') {what}.",
                remedy="Name a folder of images, or images:FILE.npz#IMAGES,LABELS.",
            )
        found = [path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file()]
        self.names = sorted(path.relative_to(folder).as_posix() for path in found)
        if not self.names:
            raise DataError(
                f"The folder '{folder}' (from '{spec}') holds no image.", remedy=f"Images are {', '.join(SUFFIXES)}."
            )
        inside = [name for name in self.names if "/" in name]
        if inside and len(inside) < len(self.names):
            loose = next(name for name in self.names if "/" not in name)
            raise DataError(
                f"'{folder}' has images in sub-folders, which are classes, and beside them, such as '{loose}'.",
                remedy="Put each image into the sub-folder of its class, or all into one folder.",
            )
        if inside:
            of_image = [name.partition("/")[0] for name in self.names]
            self.classes = tuple(sorted(set(of_image)))
            self.labels = [self.classes.index(one) for one in of_image]

    def __len__(self) -> int:
        return len(self.names)

    def pixels(self, index: int, channels: int) -> numpy.ndarray:
        from PIL import Image, ImageOps, UnidentifiedImageError

        path = self.folder / self.names[index]
        bombs = (Image.DecompressionBombError, Image.DecompressionBombWarning)
        try:
            with warnings.catch_warnings(), Image.open(path) as image:
                warnings.simplefilter("error", Image.DecompressionBombWarning)
                upright = ImageOps.exif_transpose(image)
                return numpy.asarray(upright.convert(MODES[channels])).reshape(upright.height, upright.width, channels)
        except (UnidentifiedImageError, OSError, ValueError, SyntaxError, zlib.error, *bombs) as error:
            raise DataError(
                f"The image '{path}' cannot be read: {error}.", remedy="It is damaged, or no image; remove it."
            ) from None

    def contents(self) -> Iterator[tuple[str, bytes]]:
        for name in self.names:
            yield name, (self.folder / name).read_bytes()


class ImageArrays(ImageSource):
    """The images of an array in an archive of numpy's, with labels in another where one is named."""

    def __init__(self, path: Path, images: str, labels: str | None, spec: str) -> None:
        self.path, self.spec, self.origin = path, spec, path.name
        self._images = _to_channels_last(_read(path, images, spec), f"'{images}' of '{path}'")
        if labels is not None:
            found = _read(path, labels, spec)
            if found.ndim != 1 or found.dtype.kind not in "iu":
                raise DataError(
                    f"The labels '{labels}' of '{path}' are {list(found.shape)} of {found.dtype}.",
                    remedy="Labels are integers [N].",
                )
            if len(found) != len(self._images):
                raise DataError(
                    f"'{path}' has {len(self._images)} images in '{images}' and {len(found)} labels in '{labels}'.",
                    remedy="Name the labels of these images.",
                )
            self.labels = [int(label) for label in found]

    def __len__(self) -> int:
        return len(self._images)

    def pixels(self, index: int, channels: int) -> numpy.ndarray:
        return with_channels(self._images[index], channels)

    def contents(self) -> Iterator[tuple[str, bytes]]:
        for index, image in enumerate(self._images):
            label = "" if self.labels is None else f"={self.labels[index]}"
            yield f"{self.path.name}#{index}{label}", image.tobytes()


def _to_channels_last(images: numpy.ndarray, what: str) -> numpy.ndarray:
    """uint8 [N, H, W, C] of the three layouts."""
    shape = images.shape
    channels_first = images.ndim == 4 and shape[1] in MODES and shape[3] not in MODES
    if images.ndim == 3:
        images = images[..., None]
    elif channels_first:
        images = images.transpose(0, 2, 3, 1)
    if images.ndim != 4 or images.shape[3] not in MODES or images.dtype != numpy.uint8:
        raise DataError(
            f"The images {what} are {list(shape)} of {images.dtype}.",
            remedy="Images are uint8 [N, H, W], [N, H, W, C] or [N, C, H, W] with 1 or 3 channels.",
        )
    if not images.size:
        raise DataError(f"The images {what} are {list(shape)}: there is none.", remedy="Name another array.")
    return images


def _read(path: Path, name: str, spec: str) -> numpy.ndarray:
    """An array of an archive. Raises `DataError` for all that can be wrong with either."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = {member.filename.removesuffix(".npy"): member for member in archive.infolist()}
            if name not in members:
                raise DataError(f"'{path}' has no array '{name}'.", remedy=nearest(name, members, "It has"))
            with archive.open(members[name]) as stream:
                _check_header(stream, members[name].file_size, f"The array '{name}' of '{path}'")
            with archive.open(members[name]) as stream:
                found: numpy.ndarray = numpy.lib.format.read_array(stream, allow_pickle=False)
    except FileNotFoundError:
        raise DataError(f"There is no file '{path}' (from '{spec}').", remedy="Check the path.") from None
    except (zipfile.BadZipFile, zlib.error, OSError, ValueError, EOFError, NotImplementedError) as error:
        raise DataError(
            f"'{path}' is no archive of arrays, or damaged: {error}.", remedy="Write it with numpy.savez."
        ) from None
    return found


def _check_header(stream: IO[bytes], size: int, what: str) -> None:
    """Raise `DataError` for an array of Python objects, or one that claims to be larger than its `size` in bytes."""
    version = numpy.lib.format.read_magic(stream)
    read = numpy.lib.format.read_array_header_1_0 if version == (1, 0) else numpy.lib.format.read_array_header_2_0
    shape, _, dtype = read(stream)
    if dtype.hasobject:
        raise DataError(
            f"{what} holds Python objects, which would have to be unpickled.",
            remedy="Images of one size make an array of uint8; write that.",
        )
    if math.prod(shape) * dtype.itemsize > size - stream.tell():
        raise DataError(f"{what} claims to be {list(shape)} of {dtype} and has {size} bytes.", remedy="It is damaged.")
