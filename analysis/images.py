"""Images to look at: files, the two ways to bring them to a model's size, and back to pictures."""

import argparse
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torchvision import transforms
from torchvision.datasets.folder import IMG_EXTENSIONS

from datasets import AugmentedDataset, build_transform
from readers import UnreadableImage
from samplers import Draw
from utils import UserError


def list_images(folder: str | Path) -> list[Path]:
    """All image files below a folder, hidden ones left out, in the order of their names.

    Raises:
        UserError: no such folder, or no image in it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; name one with images in it")
    found, seen = [], set()
    for place, below, names in os.walk(folder, followlinks=True):
        seen.add(os.path.realpath(place))
        below[:] = [name for name in below if os.path.realpath(os.path.join(place, name)) not in seen]  # no circles
        found += [Path(place, name) for name in names]
    found = [path for path in found if path.suffix.lower() in IMG_EXTENSIONS and not path.name.startswith(".")]
    if not found:
        raise UserError(f"{folder}: no image in it or below; known are {', '.join(IMG_EXTENSIONS)}")
    return sorted(found)


def read_image(path: str | Path) -> Image.Image:
    """The RGB image in a file.

    Raises:
        UnreadableImage: missing, truncated, or no image.
    """
    with opened(path) as image:
        return image.convert("RGB")


@contextmanager
def opened(path: str | Path) -> Iterator[Image.Image]:
    """The image in a file, as it is stored, for as long as the block lasts.

    Raises:
        UnreadableImage: missing, truncated, or no image.
    """
    try:
        with Image.open(path) as image:
            yield image
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # what Pillow raises
        raise UnreadableImage(f"{path}: cannot be read ({str(error).splitlines()[0]}); bring a whole file") from error


def choose_samples(dataset: AugmentedDataset, count: int) -> list[tuple[torch.Tensor, int]]:
    """Up to ``count`` (image, label) of different classes, spread evenly over the set; always the same ones."""
    chosen = {}
    for index in np.linspace(0, len(dataset) - 1, num=min(10 * count, len(dataset)), dtype=int).tolist():
        if dataset.base.targets[index] not in chosen:
            image, label, _ = dataset[Draw(index, 0, index)]
            chosen.setdefault(label, (image, label))
        if len(chosen) == count:
            break
    return list(chosen.values())


def squash(
    size: int, interpolation: transforms.InterpolationMode = transforms.InterpolationMode.BICUBIC
) -> Callable[[Image.Image], torch.Tensor]:
    """A transform to a normalised ``(3, size, size)``: the whole image, its aspect ratio given up."""
    return transforms.Compose(
        [
            transforms.Resize((size, size), interpolation),
            transforms.ToTensor(),
            transforms.Normalize(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD),
        ]
    )


def centre_crop(size: int, crop_pct: float | None = None) -> Callable[[Image.Image], torch.Tensor]:
    """A transform to a normalised ``(3, size, size)``: the evaluation's, see `datasets.build_transform`."""
    return build_transform(False, argparse.Namespace(input_size=size, crop_pct=crop_pct))


def as_picture(image: torch.Tensor) -> np.ndarray:
    """Undo the normalisation: ``(3, h, w)`` -> ``(h, w, 3)`` in 0..1."""
    mean, std = torch.tensor(IMAGENET_DEFAULT_MEAN), torch.tensor(IMAGENET_DEFAULT_STD)
    return (image.permute(1, 2, 0).cpu() * std + mean).clamp(0, 1).numpy()
