"""Images of folders and archives against the arrays they were written from."""

from __future__ import annotations

import importlib.util
import io
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy
import pytest

from compress.data import fingerprint, image_source, text_source
from compress.data.images import with_channels
from compress.errors import DataError, DependencyError

Image = pytest.importorskip("PIL.Image")


def picture(seed: int, height: int = 6, width: int = 9, channels: int = 3) -> numpy.ndarray:
    return numpy.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=numpy.uint8)


def save(path: Path, array: numpy.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array.squeeze()).save(path)
    return path


def classes(folder: Path) -> Path:
    for number, name in enumerate(["dog/b.png", "cat/sub/z.bmp", "cat/a.PNG", "dog/a.webp"]):
        path = save(folder / Path(name).with_suffix(".png"), picture(number))
        if path.suffix != Path(name).suffix:
            options = {"lossless": True} if name.endswith("webp") else {}
            Image.open(path).save(folder / name, **options)
            path.unlink()
    (folder / "cat" / "notes.txt").write_text("no image")
    return folder


def test_a_folder_with_classes(tmp_path: Path) -> None:
    source = image_source(f"images:{classes(tmp_path / 'set')}")
    assert len(source) == 4
    assert source.classes == ("cat", "dog") and source.labels == [0, 0, 1, 1]
    for index, seed in enumerate((2, 1, 3, 0)):
        assert numpy.array_equal(source.pixels(index, 3), picture(seed))
    described = fingerprint(source)
    assert described.documents == 4 and described.origin == "set"
    (tmp_path / "set" / "cat").rename(tmp_path / "set" / "lion")
    assert fingerprint(image_source(f"images:{tmp_path / 'set'}")).sha256 != described.sha256


def test_a_folder_without_classes(tmp_path: Path) -> None:
    save(tmp_path / "a.png", picture(0, channels=1))
    save(tmp_path / "b.png", numpy.concatenate([picture(1), picture(2, channels=1)], 2))
    source = image_source(f"images:{tmp_path}")
    assert source.labels is None and source.classes is None
    assert numpy.array_equal(source.pixels(0, 1), picture(0, channels=1))
    assert numpy.array_equal(source.pixels(0, 3), numpy.repeat(picture(0, channels=1), 3, 2))
    assert numpy.array_equal(source.pixels(1, 3), picture(1)), "an alpha channel is left out"


def test_a_photograph_stands_upright(tmp_path: Path) -> None:
    image = Image.fromarray(picture(0))
    exif = image.getexif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees clockwise
    image.save(tmp_path / "a.png", exif=exif)
    shown = image_source(f"images:{tmp_path}").pixels(0, 3)
    assert numpy.array_equal(shown, numpy.rot90(picture(0), -1))


@pytest.mark.parametrize("layout", ["NHWC", "NCHW", "NHW"])
def test_arrays(layout: str, tmp_path: Path) -> None:
    images = numpy.stack([picture(seed, channels=1 if layout == "NHW" else 3) for seed in range(5)])
    stored = {"NHWC": images, "NCHW": images.transpose(0, 3, 1, 2), "NHW": images[..., 0]}[layout]
    numpy.savez_compressed(tmp_path / "t.npz", x=stored, y=numpy.arange(5, dtype=numpy.uint8) % 3)
    source = image_source(f"images:{tmp_path / 't.npz'}#x,y")
    assert source.labels == [0, 1, 2, 0, 1] and source.classes is None
    for index, image in enumerate(images):
        assert numpy.array_equal(source.pixels(index, image.shape[2]), image)
    bare = image_source(f"images:{tmp_path / 't.npz'}#x")
    assert bare.labels is None
    assert fingerprint(bare).sha256 != fingerprint(source).sha256
    assert fingerprint(source).bytes == images.size


def test_grey_is_pillows(tmp_path: Path) -> None:
    colours = picture(3, 64, 64)
    assert numpy.array_equal(with_channels(colours, 1)[..., 0], numpy.asarray(Image.fromarray(colours).convert("L")))
    grey = colours[..., :1]
    assert numpy.array_equal(with_channels(grey, 3), numpy.asarray(Image.fromarray(grey[..., 0]).convert("RGB")))


def test_no_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DependencyError) as caught:
        image_source(f"images:{tmp_path}")
    assert "model-compress[data]" in caught.value.remedy


def loose(folder: Path) -> None:
    save(folder / "cat" / "a.png", picture(0))
    save(folder / "b.png", picture(1))


def half(folder: Path) -> None:
    path = save(folder / "a.png", picture(0, 200, 200))
    path.write_bytes(path.read_bytes()[:2000])


def no_image(folder: Path) -> None:
    folder.mkdir()
    (folder / "a.jpg").write_bytes(b"GIF, so to say")


def bomb(folder: Path) -> None:
    """Twenty thousand million pixels in a file of some hundred bytes."""
    path = save(folder / "a.png", picture(0))
    content = bytearray(path.read_bytes())
    content[16:24] = (150_000).to_bytes(4, "big") * 2
    content[29:33] = __import__("zlib").crc32(content[12:29]).to_bytes(4, "big")
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: None, "does not exist"),
        (lambda folder: folder.write_text("x"), "is a file"),
        (lambda folder: folder.mkdir(), "holds no image"),
        (loose, "beside them, such as 'b.png'"),
        (half, "a.png' cannot be read"),
        (no_image, "a.jpg' cannot be read"),
        (bomb, "a.png' cannot be read"),
    ],
)
def test_folders_that_are_wrong(make: Callable[[Path], object], message: str, tmp_path: Path) -> None:
    make(tmp_path / "set")
    with pytest.raises(DataError, match=message) as caught:
        image_source(f"images:{tmp_path / 'set'}").pixels(0, 3)
    assert str(tmp_path / "set") in str(caught.value) and caught.value.remedy


def member(shape: str, descr: str, content: bytes) -> bytes:
    """A file of numpy's format with a header of any claims."""
    stream = io.BytesIO()
    header = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    stream.write(b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode() + content)
    return stream.getvalue()


IMAGES = numpy.stack([picture(seed) for seed in range(4)])
ARRAYS = {
    "x": IMAGES,
    "five": numpy.zeros(5, int),
    "float": IMAGES / 255,
    "flat": IMAGES.reshape(4, -1),
    "wide": numpy.zeros((4, 6, 9, 2), numpy.uint8),
    "none": IMAGES[:0],
    "objects": numpy.array([picture(0, 4, 4), picture(1, 5, 5), None, None], dtype=object),
    "halves": numpy.zeros(4),
}


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("images") / "t.npz"
    numpy.savez(path, **ARRAYS)
    with zipfile.ZipFile(path, "a") as stream:
        stream.writestr("huge.npy", member("(1099511627776, 64, 64)", "|u1", b"x"))
        stream.writestr("short.npy", member("(2, 4, 4)", "|u1", b"x" * 31))
        stream.writestr("text.npy", b"no array")
    for name, content in {"half.npz": path.read_bytes()[:-600], "text.npz": b"text", "empty.npz": b""}.items():
        (path.parent / name).write_bytes(content)
    return path


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("t.npz", "names no array"),
        ("t.npz#", "names no array"),
        ("missing.npz#x", "There is no file"),
        ("half.npz#x", "no archive of arrays, or damaged"),
        ("text.npz#x", "no archive of arrays, or damaged"),
        ("empty.npz#x", "no archive of arrays, or damaged"),
        ("t.npz#y", "has no array 'y'"),
        ("t.npz#x,flive", "has no array 'flive'.*Did you mean 'five'"),
        ("t.npz#x,five", "4 images in 'x' and 5 labels in 'five'"),
        ("t.npz#x,halves", "labels 'halves' .* are .4. of float64"),
        ("t.npz#float", "float64"),
        ("t.npz#flat", r"\[4, 162\] of uint8"),
        ("t.npz#wide", r"\[4, 6, 9, 2\]"),
        ("t.npz#none", "there is none"),
        ("t.npz#objects", "would have to be unpickled"),
        ("t.npz#huge", r"claims to be \[1099511627776, 64, 64\]"),
        ("t.npz#short", "claims to be"),
        ("t.npz#text", "no archive of arrays, or damaged"),
    ],
)
def test_archives_that_are_wrong(spec: str, message: str, archive: Path) -> None:
    with pytest.raises(DataError, match=message) as caught:
        image_source(f"images:{archive.parent}/{spec}")
    assert str(archive.parent) in str(caught.value) and caught.value.remedy


def test_text_and_images_are_told_apart(archive: Path) -> None:
    with pytest.raises(DataError, match="are images, where text is needed"):
        text_source(f"images:{archive}#x")
    with pytest.raises(DataError, match="is no source of images"):
        image_source("builtin:python/val")
    with pytest.raises(DataError, match="2 sources of images"):
        image_source([f"images:{archive}#x"] * 2)
