"""Sets of labelled images, and decoding of image files.

The readers of the data sets return :class:`LabelledImages`; the registry is in :mod:`readers`.
"""

import io
import mmap
import os
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from einops import rearrange, repeat
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.io import ImageReadMode, decode_jpeg

from readers.files import LeftOut
from readers.names import Names
from utils import UserError, logger, readable


class ReadingError(UserError):
    """An error of a file that is found while images are loaded.

    A ``DataLoader`` re-raises a worker's exception with the worker's traceback as its message. This class keeps only
    the last line, which is the original message.

    Attributes:
        reason: what is wrong, without the file and the mend; empty if it came from a worker.
    """

    def __init__(self, message: str, reason: str = ""):
        self.reason = reason
        last_line = message.strip().splitlines()[-1]
        super().__init__(last_line.removeprefix(f"{type(self).__module__}.{type(self).__qualname__}: "))


class UnreadableImage(ReadingError):
    """An image file that cannot be decoded; the message names it."""

    def or_skip(self) -> "UnreadableImage":
        """The same error for a command that has the option and was not given it."""
        return UnreadableImage(
            f"{self}, or give --skip-unreadable; python -m analysis.check lists all unreadable files at once"
        )


# ------------------------------------------------------------------------------------ sets of images


class LabelledImages(Dataset):
    """A data set of pairs: RGB image, uint8 ``(3, h, w)``, and label.

    Attributes:
        names: identifies each image in the published files.
        targets: int64 ``(N,)``, label of each image, an index into ``classes``.
        classes: names of the classes, as text that every file can hold.
        left_out: what the reader found but does not use.
        in_memory: whether the images are decoded already.
        labelled: whether the targets are classes; images with boxes or masks have none of their own.
    """

    in_memory = False
    labelled = True

    def __init__(self, names: Sequence, targets: Sequence[int] | np.ndarray, classes: list[str]):
        self.names: Sequence[Any] = Names(names) if len(names) and isinstance(names[0], str) else names
        self.targets = np.asarray(targets, np.int64)
        self.classes = [readable(name) for name in classes]
        self.left_out = LeftOut()

    def __len__(self) -> int:
        return len(self.targets)


class ArrayImages(LabelledImages):
    """Images in memory, uint8 ``(N, h, w)`` grey or ``(N, h, w, 3)`` RGB; their names are their indices."""

    in_memory = True

    def __init__(self, images: np.ndarray, targets: Sequence[int], classes: list[str]):
        super().__init__(range(len(targets)), targets, classes)
        self.images = images

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        pixels = torch.from_numpy(self.images[index])
        image = repeat(pixels, "h w -> c h w", c=3) if pixels.ndim == 2 else rearrange(pixels, "h w c -> c h w")
        return image, int(self.targets[index])


class EncodedImages(LabelledImages):
    """Images that are decoded on access; subclasses implement ``_open`` (the encoded bytes) and ``_location``.

    Attributes:
        upright: turn images as their EXIF data say. `datasets.read_split` sets it as the registry says,
            `readers.DataSet.upright`.

    Raises:
        UnreadableImage: on access, if the file is missing, truncated, or not an image.
    """

    upright = False

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        with self._errors(index), self._open(index) as file:
            return decode(file.read(), self._location(index), self.upright), int(self.targets[index])

    def encoded(self, index: int) -> bytes:
        """The content of the file."""
        with self._errors(index), self._open(index) as file:
            return file.read()

    def size(self, index: int) -> tuple[int, int]:
        """Width and height in pixels as stored, before EXIF turns the image, from the file's header alone."""
        with self._errors(index), self._open(index) as file, Image.open(file) as image:
            return image.size

    @contextmanager
    def _errors(self, index: int) -> Iterator[None]:
        try:
            yield
        except MemoryError:  # it is the machine's, not the file's
            raise
        except Exception as error:  # Pillow's decoders raise a dozen types on broken files
            reason = "no image" if isinstance(error, UnidentifiedImageError) else one_line(error)
            place = readable(self._location(index)).replace("\n", r"\n")
            raise UnreadableImage(
                f"cannot read the image '{place}' ({reason}): repair or remove the file",
                reason,
            ) from error

    def _open(self, index: int) -> BinaryIO:
        raise NotImplementedError

    def _location(self, index: int) -> str:
        raise NotImplementedError


class ImageFiles(EncodedImages):
    """Image files; ``names`` are their paths below ``root``."""

    def __init__(self, root: Path, names: Sequence[str], targets: Sequence[int], classes: list[str]):
        super().__init__(names, targets, classes)
        self.root = root

    def _open(self, index: int) -> BinaryIO:
        return open(self._location(index), "rb")

    def _location(self, index: int) -> str:
        return os.path.join(self.root, self.names[index])


class SubsetOf(LabelledImages):
    """A subset of another set, given by indices."""

    def __init__(self, images: LabelledImages, indices: Sequence[int]):
        names = [images.names[index] for index in indices]
        super().__init__(names, images.targets[np.asarray(indices)], images.classes)
        self.in_memory, self.labelled = images.in_memory, images.labelled
        self._images: Any = images
        self._indices = np.asarray(indices)

    def __getitem__(self, index: int) -> tuple[Tensor, Any]:
        image, annotation = self._images[self._indices[index]]
        return image, int(self.targets[index]) if self.labelled else annotation  # `datasets.relabel` changes targets

    def size(self, index: int) -> tuple[int, int]:
        return self._images.size(self._indices[index])


def decode(data: bytes, name: str = "", upright: bool = False) -> Tensor:
    """Decode an image file: RGB, uint8 ``(3, h, w)``.

    Baseline and progressive JPEGs, RGB or grey, are decoded by torchvision, which gives Pillow's pixels in less time.
    Pillow decodes all others, such as CMYK, and what torchvision refuses: it may read more, and its errors say more.

    Args:
        data: content of the file.
        name: of the file, for messages.
        upright: turn the image as its EXIF data say. This costs no time where they say nothing.

    Raises:
        Exception: a dozen types, if the file is broken.
    """
    if is_plain_jpeg(data):
        with suppress(RuntimeError):
            encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
            return decode_jpeg(encoded, ImageReadMode.RGB, apply_exif_orientation=upright)
    if not data:
        raise ValueError("an empty file")
    try:
        image = Image.open(io.BytesIO(data))
    except UnidentifiedImageError:
        raise ValueError(f"no image that Pillow knows; it begins with {data[:12]!r}") from None
    with image:
        pixels = as_rgb(turn_upright(image) if upright else image, name)
        return rearrange(torch.from_numpy(np.array(pixels)), "h w c -> c h w")


def turn_upright(image: Image.Image) -> Image.Image:
    """The image turned as its EXIF data say; as it is stored where these are damaged, as its pixels may be intact."""
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # Pillow's parser raises half a dozen types; broken pixels fail again when they are read
        return image


DEEP_MODES = {"I;16": 16, "I;16L": 16, "I;16B": 16, "I;16N": 16, "I": 32, "F": 32}
"""Pillow's modes of grey images with more than 8 bits, and their bits."""
TOLD_OF_DEEP = mmap.mmap(-1, 1)
"""Whether such an image was logged: a byte that is shared with forked workers."""


def as_rgb(image: Image.Image, name: str) -> Image.Image:
    """An image as RGB. Grey with more than 8 bits is scaled from the file's own least and largest value to 0..255.

    Pillow would clip it to 255. Values that are not finite do not count, and become 0 or 255. The first such image of a
    run is logged.
    """
    if image.mode not in DEEP_MODES:
        return image.convert("RGB")
    values = np.asarray(image, np.float64)
    finite = values[np.isfinite(values)]
    low, high = (finite.min(), finite.max()) if len(finite) else (0.0, 0.0)
    scaled = (values - low) * (255 / (high - low) if high > low else 0.0)
    grey = np.nan_to_num(scaled, nan=0, posinf=255, neginf=0).clip(0, 255).round().astype(np.uint8)
    if not TOLD_OF_DEEP[0]:
        TOLD_OF_DEEP[0] = 1
        logger.info(
            f"{readable(name)}: {DEEP_MODES[image.mode]} bits a pixel, values {low:g} to {high:g}; such images are "
            "scaled from their own range to 0..255. This is said once; python -m analysis.check lists them"
        )
    return Image.fromarray(grey).convert("RGB")


def is_plain_jpeg(data: bytes) -> bool:
    """Whether a header is that of a baseline or progressive JPEG, grey or of three colours, of a size Pillow accepts.

    Pillow's own parser would take .05 ms for the tables that are not needed here.
    """
    place = 2 if data[:3] == b"\xff\xd8\xff" else len(data)
    while place + 9 < len(data) and data[place] == 0xFF:
        if data[place + 1] in (0xC0, 0xC1, 0xC2):  # the frame header: bits, height, width, number of colours
            bits, height, width, colours = struct.unpack(">BHHB", data[place + 4 : place + 10])
            return bits == 8 and colours in (1, 3) and height * width <= Image.MAX_IMAGE_PIXELS
        place += 2 + int.from_bytes(data[place + 2 : place + 4], "big")
    return False


def read_image(path: str | Path) -> Image.Image:
    """Read the RGB image in a file, as it is stored: masks and boxes lie on these pixels.

    Raises:
        UnreadableImage: missing, truncated, or not an image.
    """
    with open_image(path) as image:
        return as_rgb(image, str(path))


def read_photograph(path: str | Path) -> Image.Image:
    """Read the RGB image in a file that has no annotations, turned as its EXIF data say.

    Raises:
        UnreadableImage: see `read_image`.
    """
    with open_image(path) as image:
        return as_rgb(turn_upright(image), str(path))


@contextmanager
def open_image(path: str | Path) -> Iterator[Image.Image]:
    """Open an image file in its stored mode; it is closed at the end of the ``with`` block.

    Raises:
        UnreadableImage: missing, truncated, or not an image.
    """
    try:
        with Image.open(path) as image:
            yield image
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # what Pillow raises
        reason = "no image" if isinstance(error, UnidentifiedImageError) else str(error).splitlines()[0]
        raise UnreadableImage(
            f"{readable(str(path))}: cannot be read ({reason}); replace it with an intact file"
        ) from error


def one_line(error: Exception) -> str:
    """An exception's message without line breaks, or its type if it has none."""
    return " ".join(str(error).split()) or type(error).__name__
