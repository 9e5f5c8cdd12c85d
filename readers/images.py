"""Sets of labelled images, and decoding of image files.

The readers of the data sets return :class:`LabelledImages`; the registry is in :mod:`readers`.
"""

import io
import os
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from einops import rearrange, repeat
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.io import ImageReadMode, decode_jpeg

from readers.names import Names
from utils import UserError


class ReadingError(UserError):
    """An error of a file that is found while images are loaded.

    A ``DataLoader`` re-raises a worker's exception with the worker's traceback as its message. This class keeps only
    the last line, which is the original message.
    """

    def __init__(self, message: str):
        last_line = message.strip().splitlines()[-1]
        super().__init__(last_line.removeprefix(f"{type(self).__module__}.{type(self).__qualname__}: "))


class UnreadableImage(ReadingError):
    """An image file that cannot be decoded; the message names it."""


# ------------------------------------------------------------------------------------ sets of images


class LabelledImages(Dataset):
    """A data set of pairs: RGB image, uint8 ``(3, h, w)``, and label.

    Attributes:
        names: identifies each image in the published files.
        targets: int64 ``(N,)``, label of each image, an index into ``classes``.
        classes: names of the classes.
        in_memory: whether the images are decoded already.
    """

    in_memory = False

    def __init__(self, names: Sequence, targets: Sequence[int] | np.ndarray, classes: list[str]):
        self.names: Sequence[Any] = Names(names) if len(names) and isinstance(names[0], str) else names
        self.targets = np.asarray(targets, np.int64)
        self.classes = classes

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

    Raises:
        UnreadableImage: on access, if the file is missing, truncated, or not an image.
    """

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        with self._errors(index), self._open(index) as file:
            return decode(file.read()), int(self.targets[index])

    def size(self, index: int) -> tuple[int, int]:
        """Width and height in pixels, from the file's header alone."""
        with self._errors(index), self._open(index) as file, Image.open(file) as image:
            return image.size

    @contextmanager
    def _errors(self, index: int) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # Pillow's decoders raise a dozen types on broken files
            raise UnreadableImage(
                f"cannot read the image {self._location(index)!r} ({one_line(error)}): "
                "repair or remove the file, or give --skip-unreadable"
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
        self.in_memory = images.in_memory
        self._images: Any = images
        self._indices = np.asarray(indices)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self._images[self._indices[index]]

    def size(self, index: int) -> tuple[int, int]:
        return self._images.size(self._indices[index])


def list_images(folder: str | Path) -> list[Path]:
    """All image files below a folder except hidden ones, sorted by path; symbolic links are followed.

    Raises:
        UserError: no such folder, or no image in it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give one with images in it")
    found, seen = [], set()
    for place, subfolders, names in os.walk(folder, followlinks=True):
        seen.add(os.path.realpath(place))
        subfolders[:] = [
            name for name in subfolders if os.path.realpath(os.path.join(place, name)) not in seen
        ]  # no cycles of links
        found += [Path(place, name) for name in names]
    found = [path for path in found if path.suffix.lower() in IMG_EXTENSIONS and not path.name.startswith(".")]
    if not found:
        raise UserError(f"{folder}: no image in it or below; known are {', '.join(IMG_EXTENSIONS)}")
    return sorted(found)


def decode(data: bytes) -> Tensor:
    """Decode an image file: RGB, uint8 ``(3, h, w)``.

    Baseline and progressive JPEGs, RGB or grey, are decoded by torchvision, which gives Pillow's pixels in less time.
    Pillow decodes all others, such as CMYK, and what torchvision refuses: it may read more, and its errors say more.

    Args:
        data: content of the file.

    Raises:
        Exception: a dozen types, if the file is broken.
    """
    if is_plain_jpeg(data):
        with suppress(RuntimeError):
            return decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.RGB)
    with Image.open(io.BytesIO(data)) as image:
        return rearrange(torch.from_numpy(np.array(image.convert("RGB"))), "h w c -> c h w")


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
    """Read the RGB image in a file.

    Raises:
        UnreadableImage: missing, truncated, or not an image.
    """
    with open_image(path) as image:
        return image.convert("RGB")


def read_photograph(path: str | Path) -> Image.Image:
    """Read the RGB image in a file that has no annotations, turned as its EXIF data say; 16 bits of grey become 8.

    Raises:
        UnreadableImage: see `read_image`.
    """
    with open_image(path) as image:
        try:
            upright = ImageOps.exif_transpose(image)
        except (TypeError, KeyError, struct.error):  # damaged EXIF data; the pixels may be intact
            upright = image
        if upright.mode.startswith("I;16"):  # Pillow would cut them at 255
            upright = Image.fromarray((np.asarray(upright) // 256).astype(np.uint8))
        return upright.convert("RGB")


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
        raise UnreadableImage(
            f"{path}: cannot be read ({str(error).splitlines()[0]}); replace it with an intact file"
        ) from error


def one_line(error: Exception) -> str:
    """An exception's message without line breaks, or its type if it has none."""
    return " ".join(str(error).split()) or type(error).__name__


def first_few(names: list[str], limit: int = 5) -> str:
    """Up to ``limit`` names, and the number of the others."""
    rest = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {rest} more" if rest > 0 else "")
