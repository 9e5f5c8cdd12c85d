"""The images of training and evaluation: crop, flip, colours by timm, random erasing; normalisation on the device.

Transforms run in the loader's workers, and take and return uint8 images. What is cheap on the device is done there:
`normalise`, and `erase` with the boxes that a worker drew.
"""

import math
import random
from collections.abc import Callable, Sequence
from functools import cache

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageOps
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, create_transform
from torch import Tensor
from torchvision.transforms import v2

from affine import speed_up
from crops import random_box, resize_crops
from utils import UserError

SMALL_IMAGE = 32  # px; up to this size DeiT crops the padded image instead of a resized random crop
THINNEST = 32  # ratio of an image's sides up to which it is resized whole; ordinary photographs are not thinner
ERASED_AREA = (0.02, 1 / 3)  # range of an erased area, as a fraction of the image; here and below timm's defaults
ERASED_ASPECT = 0.3  # its sides' smallest ratio
ERASING_ATTEMPTS = 10  # at a box inside the image
NOISE = 2**23  # length of the list of random numbers that erased pixels take theirs from; it serves 1,600 px


# -------------------------------------------------------------------------------------------- in the workers


def eval_transform(
    size: int, crop_pct: float | None = None, interpolation: str = "bicubic"
) -> Callable[[Tensor], Tensor]:
    """The transform of evaluation: uint8 ``(3, h, w)`` -> uint8 ``(3, size, size)``.

    Resize of the shorter side to ``size / crop_pct``, then a centre crop. Thinner images than :data:`THINNEST` are cut.

    Args:
        size: side of the result, px.
        crop_pct: see :func:`crop_pct_of`.
        interpolation: of the resize, "bicubic" or "bilinear".
    """
    resize = v2.Resize(
        math.floor(size / crop_pct_of(size, crop_pct)), v2.InterpolationMode(interpolation), antialias=True
    )
    return v2.Compose([cut_thin, resize, v2.CenterCrop(size)])


def crop_pct_of(size: int, given: float | None) -> float:
    """The share of the resized image that evaluation crops: as given, else DeiT's, 0.875, or 1 for small images."""
    return given or (1.0 if size <= SMALL_IMAGE else 0.875)


def cut_thin(image: Tensor) -> Tensor:
    """The middle of an image ``(3, h, w)`` that is thinner than :data:`THINNEST`; any other image as it is.

    Resizing the shorter side of 1 x 8,000 px to 256 px would take gigabytes for pixels that are cropped afterwards.
    """
    height, width = image.shape[1:]
    longest = THINNEST * min(height, width)
    if max(height, width) <= longest:
        return image
    return v2.functional.center_crop(image, [min(height, longest), min(width, longest)])


class TrainTransform:
    """DeiT's augmentation: uint8 ``(3, h, w)`` -> ``images``, uint8 ``(3, size, size)``, and what `erase` needs.

    Random resized crop (up to :data:`SMALL_IMAGE` px: random crop of the image padded by 4 px), flip, then timm's
    RandAugment, or colour jitter without it. With ``reprob`` above 0 the result also has ``erased``, see
    `random_erasing`. Random numbers come from the global generators.

    Args:
        size: side of the result, px.
        scale: range of the crop's area, as a fraction of the image.
        hflip, reprob: probabilities of a flip and of random erasing.
        color_jitter: strength, used with ``aa="none"`` only.
        aa: timm's name of an augmentation policy, or "none".
        interpolation: of the random crop: "bicubic", "bilinear", or "random" for either.
        recount: largest number of erased areas.

    Raises:
        UserError: timm does not know the policy ``aa``.
    """

    def __init__(
        self,
        size: int,
        *,
        scale: Sequence[float] = (0.08, 1.0),
        hflip: float = 0.5,
        color_jitter: float = 0.4,
        aa: str = "rand-m9-mstd0.5-inc1",
        interpolation: str = "bicubic",
        reprob: float = 0.25,
        recount: int = 1,
    ):
        self.size, self.scale, self.hflip = size, scale, hflip
        self.reprob, self.recount = reprob, recount
        self.interpolations = ["bilinear", "bicubic"] if interpolation == "random" else [interpolation]
        self.colours = _colour_transform(size, color_jitter, aa, interpolation)
        bicubic = v2.InterpolationMode.BICUBIC
        self.shift = v2.Compose([cut_thin, v2.Resize(size, bicubic, antialias=True), v2.RandomCrop(size, padding=4)])

    def __call__(self, image: Tensor) -> dict[str, Tensor]:
        # 1. crop
        if self.size <= SMALL_IMAGE:
            image = self.shift(image)
        else:
            box = random_box(image.shape[1], image.shape[2], self.scale)
            image = resize_crops(image, [box], self.size, random.choice(self.interpolations))[0]
        # 2. flip and colours, which Pillow does faster than torch
        picture = as_pillow(image)
        if random.random() < self.hflip:
            picture = ImageOps.mirror(picture)
        image = as_tensor(self.colours(picture))
        # 3. areas to erase
        erased = {"erased": random_erasing(self.size, self.reprob, self.recount)} if self.reprob > 0 else {}
        return {"images": image} | erased


def _colour_transform(size: int, color_jitter: float, aa: str, interpolation: str):
    """timm's transform between crop and tensor, which takes Pillow images."""
    try:
        _, colours, _ = create_transform(
            size,
            is_training=True,
            color_jitter=color_jitter or None,  # type: ignore[arg-type]  # None: no jitter
            auto_augment=None if aa == "none" else aa,
            interpolation=interpolation,
            separate=True,
        )
    except (AssertionError, ValueError) as error:
        raise UserError(f"--aa {aa}: not a policy of timm ({error}); an example is rand-m9-mstd0.5-inc1") from error
    speed_up(colours)
    return colours


def as_pillow(image: Tensor) -> Image.Image:
    """uint8 ``(3, h, w)`` -> RGB image."""
    pixels = image.permute(1, 2, 0).contiguous().numpy()  # einops is slow for one small image
    return Image.frombuffer("RGB", pixels.shape[1::-1], pixels, "raw", "RGB", 0, 1)


def as_tensor(image: Image.Image) -> Tensor:
    """RGB image -> uint8 ``(3, h, w)``."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def random_erasing(size: int, probability: float, most: int) -> Tensor:
    """Areas to erase by timm's ``RandomErasing``: int64 ``(most, 5)``, drawn from Python's global generator.

    A row holds top, left, height and width in pixels, and where in the list of random numbers the area's begin (see
    `erase`). Rows without an area are 0.

    Args:
        size: side of the image, px.
        probability: that anything is erased.
        most: largest number of areas; their number is uniform from 1 to it.
    """
    areas = torch.zeros(most, 5, dtype=torch.int64)
    if random.random() > probability:
        return areas
    count = random.randint(1, most) if most > 1 else 1
    for row in areas[:count]:
        for _ in range(ERASING_ATTEMPTS):
            area = random.uniform(*ERASED_AREA) * size**2 / count
            aspect = math.exp(random.uniform(math.log(ERASED_ASPECT), -math.log(ERASED_ASPECT)))
            height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if height < size and width < size:
                top, left = random.randint(0, size - height), random.randint(0, size - width)
                row[:] = torch.tensor([top, left, height, width, random.randrange(NOISE - 3 * size**2)])
                break
    return areas


# --------------------------------------------------------------------------------------------- on the device


def normalise(images: Tensor) -> Tensor:
    """uint8 ``(..., 3, h, w)`` -> float32, with ImageNet's mean and standard deviation of each channel."""
    mean, std = _statistics(images.device)
    return (images.contiguous().float() / 255 - mean) / std


@cache
def _statistics(device: torch.device) -> tuple[Tensor, Tensor]:
    """ImageNet's mean and standard deviation, ``(3, 1, 1)`` each; copied once, as a copy waits for the device."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
    return mean.to(device), std.to(device)


def erase(images: Tensor, erased: Tensor, mode: str) -> Tensor:
    """Replace areas of normalised images; no synchronisation with the device.

    Random values are taken from a fixed list of normal numbers, so they are the same on every device.

    Args:
        images: float32 ``(B, 3, h, w)``.
        erased: int64 ``(B, n, 5)``, see `random_erasing`.
        mode: content of an area: "const" for 0, "rand" for one random colour, "pixel" for random pixels.
    """
    c, h, w = images.shape[1:]
    row, column = (torch.arange(length, device=images.device) for length in (h, w))
    step = {"pixel": torch.arange(c * h * w, device=images.device), "rand": torch.arange(c, device=images.device)}
    for top, left, height, width, first in rearrange(erased, "b n place -> n place b 1 1 1"):
        inside = (row[:, None] >= top) & (row[:, None] < top + height) & (column >= left) & (column < left + width)
        if mode == "const":
            values = images.new_zeros(())
        else:
            places = first[..., 0] + step[mode]
            values = _noise(images.device)[places].view(len(images), c, *((h, w) if mode == "pixel" else (1, 1)))
        images = torch.where(inside, values, images)
    return images


@cache
def _noise(device: torch.device) -> Tensor:
    """The list of random numbers: normal, float32 ``(NOISE,)``."""
    return torch.randn(NOISE, generator=torch.Generator().manual_seed(0)).to(device)
