"""Crops of one decoded image: a random box, and several boxes resized from the same pixels."""

from collections.abc import Sequence

import torch
from timm.data.transforms import RandomResizedCropAndInterpolation
from torch import Tensor
from torch.nn.functional import interpolate

Box = tuple[int, int, int, int]
"""Top, left, height and width in pixels."""


def random_box(height: int, width: int, scale: Sequence[float], ratio: Sequence[float] = (3 / 4, 4 / 3)) -> Box:
    """The box of a random resized crop by timm's rule, which is torchvision's; drawn from Python's generator.

    Args:
        height, width: size of the image, px.
        scale: range of the box's area, as a fraction of the image.
        ratio: range of width / height.
    """
    image = torch.empty(1, height, width, device="meta")  # only its size is read
    return RandomResizedCropAndInterpolation.get_params(image, scale, ratio)


def resize_crops(image: Tensor, boxes: Sequence[Box], size: int, interpolation: str = "bicubic") -> list[Tensor]:
    """Cut boxes out of an image and resize each to a square, with antialiasing.

    Args:
        image: uint8 ``(3, h, w)``.
        boxes: inside the image.
        size: side of the results, px.
        interpolation: "bicubic" or "bilinear". The results differ from Pillow's by rounding, at most 2 of 255.

    Returns:
        For each box, uint8 ``(3, size, size)``, laid out in memory as the image is.
    """
    pixels = image.permute(1, 2, 0)[None]  # einops is slow for one small image
    crops = []
    for top, left, height, width in boxes:
        cut = pixels[:, top : top + height, left : left + width].permute(0, 3, 1, 2)
        crops.append(interpolate(cut, size=(size, size), mode=interpolation, antialias=True)[0])
    return crops
