"""The random views of an image that DINO and MoCo-v3 train on.

A view is a random resized crop followed by changes of its colours, which Pillow and torchvision compute as in the
official programs. All random numbers come from the global generators, which a data set has seeded for the image.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from PIL import Image, ImageFilter
from torch import Tensor
from torchvision import transforms

from augmentation import as_pillow, as_tensor
from crops import random_box, resize_crops


class GaussianBlur:
    """Pillow's Gaussian blur of a random radius, which is its standard deviation in px."""

    def __init__(self, low: float = 0.1, high: float = 2.0):
        self.low, self.high = low, high

    def __call__(self, picture: Image.Image) -> Image.Image:
        return picture.filter(ImageFilter.GaussianBlur(random.uniform(self.low, self.high)))


@dataclass(frozen=True)
class View:
    """One view.

    Attributes:
        size: side, px.
        scale: range of the crop's area, as a fraction of the image.
        interpolation: "bicubic" or "bilinear".
        change: what follows the crop, from an RGB picture to another.
    """

    size: int
    scale: tuple[float, float]
    interpolation: str
    change: Callable[[Image.Image], Image.Image]


class Views:
    """A transform from a uint8 image ``(3, h, w)`` to groups of its views, uint8 ``(views, 3, size, size)``, by name.

    Args:
        groups: the views by name; those of a group have one size and one interpolation.
    """

    def __init__(self, groups: dict[str, list[View]]):
        self.groups = groups

    def __call__(self, image: Tensor) -> dict[str, Tensor]:
        return {name: self._group(image, views) for name, views in self.groups.items()}

    @staticmethod
    def _group(image: Tensor, views: list[View]) -> Tensor:
        height, width = image.shape[1:]
        boxes = [random_box(height, width, view.scale) for view in views]
        crops = resize_crops(image, boxes, views[0].size, views[0].interpolation)
        changed = [view.change(as_pillow(crop)) for view, crop in zip(views, crops, strict=True)]
        return torch.stack([as_tensor(picture) for picture in changed])


def colour_steps() -> list[Callable]:
    """The first changes of colour, which both programs share; the four steps of the jitter are in random order."""
    jitter = transforms.ColorJitter(brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1)
    return [transforms.RandomApply([jitter], p=0.8), transforms.RandomGrayscale(p=0.2)]


def blur_and_solarise(blur: float, solarise: float) -> list[Callable]:
    """Blur and solarisation (threshold 128) with these probabilities; a step of probability 0 is left out."""
    steps: list[Callable] = [transforms.RandomApply([GaussianBlur()], p=blur)]
    return steps + [transforms.RandomSolarize(128, p=solarise)] * (solarise > 0)


def dino_views(
    size: int, local_size: int, local_views: int, scale: Sequence[float], local_scale: Sequence[float]
) -> Views:
    """DINO's multi-crop (``main_dino.DataAugmentationDINO``): two global views, and small local ones if any.

    Args:
        size, local_size: px.
        local_views: number of local views.
        scale, local_scale: ranges of the crops' areas.
    """

    def view(size: int, scale: Sequence[float], blur: float, solarise: float = 0.0) -> View:
        steps = [transforms.RandomHorizontalFlip(0.5), *colour_steps(), *blur_and_solarise(blur, solarise)]
        return View(size, (scale[0], scale[1]), "bicubic", transforms.Compose(steps))

    groups = {"global_views": [view(size, scale, blur=1.0), view(size, scale, blur=0.1, solarise=0.2)]}
    if local_views:
        groups["local_views"] = [view(local_size, local_scale, blur=0.5)] * local_views
    return Views(groups)


def moco_views(size: int, smallest: float = 0.08) -> Views:
    """MoCo-v3's two views (``main_moco.py``), ``views (2, 3, size, size)``; the flip comes last.

    Args:
        size: px.
        smallest: the crop's smallest area, as a fraction of the image.
    """

    def view(blur: float, solarise: float = 0.0) -> View:
        steps = [*colour_steps(), *blur_and_solarise(blur, solarise), transforms.RandomHorizontalFlip(0.5)]
        return View(size, (smallest, 1.0), "bilinear", transforms.Compose(steps))

    return Views({"views": [view(blur=1.0), view(blur=0.1, solarise=0.2)]})
