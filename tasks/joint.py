"""Transforms of an image together with its mask, for training and evaluation of segmentation.

Sizes are in px. The random numbers come from torch's global generator, which a data set has seeded for the image.
torchvision's transforms resize images bilinearly and masks to the nearest pixel.
"""

from collections.abc import Sequence
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2

from readers.masks import VOID

PADDING = [round(255 * mean) for mean in IMAGENET_DEFAULT_MEAN]
"""The colour outside an image: about 0 after normalisation."""
PATCH = 32
"""Sides of images that are not padded to a square are rounded up to multiples of it."""
CROP_ATTEMPTS = 10


def fitting_size(height: int, width: int, shorter: int, longer: int, scale: float = 1.0) -> tuple[int, int]:
    """The largest size whose sides are at most ``scale`` times ``shorter`` and ``longer``, of the same proportions."""
    factor = scale * min(longer / max(height, width), shorter / min(height, width))
    return max(1, int(height * factor + 0.5)), max(1, int(width * factor + 0.5))


class JointTrainTransform:
    """Random size, crop, flip and colours: ``images`` uint8 ``(3, size, size)``, ``masks`` uint8 ``(size, size)``.

    The image is resized to fit into ``size`` x ``longer``, times a random scale, and padded where the crop is larger.

    Args:
        size: side of the result.
        longer: limit of the longer side before the scale.
        scale: range of the random scale.
        most_of_one_class: a crop is drawn again, up to `CROP_ATTEMPTS` times, where one class has at least this share
            of the pixels that are not void; 1 for the first crop.
        hflip: probability of a horizontal flip.
        photometric: change the colours, see `distort_colours`.
    """

    def __init__(
        self, size: int, longer: int, scale: Sequence[float], most_of_one_class: float, hflip: float, photometric: bool
    ):
        self.size, self.longer, self.scale = size, longer, scale
        self.most_of_one_class, self.photometric = most_of_one_class, photometric
        fill = {tv_tensors.Image: PADDING, tv_tensors.Mask: VOID}
        self.crop = v2.RandomCrop(size, pad_if_needed=True, fill=fill)  # pads on all sides: the place is random
        self.flip = v2.RandomHorizontalFlip(hflip)

    def __call__(self, image: Tensor, mask: Tensor) -> dict[str, Tensor]:
        # 1. size; the third map will tell where the image ends
        parts = tv_tensors.Image(image), tv_tensors.Mask(mask), tv_tensors.Mask(torch.zeros_like(mask))
        scale = float(torch.empty(()).uniform_(*self.scale))
        height, width = fitting_size(image.shape[1], image.shape[2], self.size, self.longer, scale)
        parts = v2.Resize((height, width), antialias=True)(*parts)
        # 2. crop and flip
        cropped = self.crop(*parts)
        for _ in range(CROP_ATTEMPTS):
            if self.most_of_one_class >= 1 or share_of_one_class(cropped[1]) < self.most_of_one_class:
                break
            cropped = self.crop(*parts)
        pixels, labels, outside = (part.as_subclass(Tensor) for part in self.flip(*cropped))
        # 3. colours, not those of the padding
        if self.photometric:
            pixels = torch.where(outside == VOID, pixels, distort_colours(pixels))
        return {"images": pixels.contiguous(), "masks": labels.contiguous()}


def share_of_one_class(mask: Tensor) -> float:
    """The largest share that one class has of the pixels ``(h, w)`` that are not void; 1 if all are void."""
    counts = mask.flatten().bincount(minlength=VOID + 1)[:VOID]
    total = int(counts.sum())
    return int(counts.max()) / total if total else 1.0


class JointEvalTransform:
    """The image at its size for evaluation, and the mask as it is.

    The image is resized to fit as in training, at scale 1. If ``longer`` is ``size``, it is padded to a square, as
    training images are. Otherwise its sides are rounded up to multiples of `PATCH` px.

    Returns:
        ``images`` uint8 ``(1, 3, h, w)``; ``masks`` uint8 ``(height, width)``, unless there is no mask; ``inside``, the
        height and width of the image without padding; ``size``, those of the original.
    """

    def __init__(self, size: int, longer: int):
        self.size, self.longer = size, longer

    def __call__(self, image: Tensor, mask: Tensor | None = None) -> dict[str, Any]:
        before = image.shape[1], image.shape[2]
        height, width = fitting_size(*before, self.size, self.longer)
        square = self.longer == self.size
        if not square:
            height, width = (-(-side // PATCH) * PATCH for side in (height, width))
        resized = v2.functional.resize(image, [height, width], antialias=True)
        if square:
            padding = [0, 0, self.size - width, self.size - height]
            resized = v2.functional.pad(resized, padding, fill=PADDING)  # type: ignore[arg-type]
        masks = {} if mask is None else {"masks": mask}
        return {"images": resized[None], "inside": (height, width), "size": before} | masks


# ---------------------------------------------------------------------------------------------------- colours


def distort_colours(image: Tensor) -> Tensor:
    """mmsegmentation's ``PhotoMetricDistortion`` of an image, uint8 ``(3, h, w)``: each step with probability .5.

    Brightness + U(-32, 32); contrast x U(.5, 1.5), before saturation and hue or after them; saturation x U(.5, 1.5);
    hue + a whole number from -18 to 17 of 180. Results of each step are rounded down and cut to bytes.
    """

    def chance() -> bool:
        return bool(torch.rand(()) < 0.5)

    def uniform(low: float, high: float) -> float:
        return float(torch.empty(()).uniform_(low, high))

    if chance():
        image = _bytes(image.float() + uniform(-32, 32))
    contrast_first = chance()
    if contrast_first and chance():
        image = _bytes(image * uniform(0.5, 1.5))
    if chance():
        image = saturate(image, uniform(0.5, 1.5))
    if chance():
        image = v2.functional.adjust_hue(image, int(torch.randint(-18, 18, ())) / 180)
    if not contrast_first and chance():
        image = _bytes(image * uniform(0.5, 1.5))
    return image


def saturate(image: Tensor, factor: float) -> Tensor:
    """Multiply the saturation of HSV, which is at most 1; hue and value stay: uint8 ``(3, h, w)``."""
    value = image.amax(dim=0).float()
    distance = value - image.float()
    most = value / distance.amax(dim=0).clamp(min=1e-6)
    return _bytes((value - distance * most.clamp(max=factor)).round())


def _bytes(image: Tensor) -> Tensor:
    return image.clamp(0, 255).to(torch.uint8)
