"""Transforms of an image together with its objects, for training and evaluation of detection.

Objects are a dict: ``boxes``, float32 ``(N, 4)``, x1, y1, x2, y2 in px; ``labels (N,)``; maybe ``masks``, bool
``(N, h, w)``. The random numbers come from torch's global generator, which a data set has seeded for the image.
"""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2

from tasks.joint import PADDING, fitting_size


class BoxTrainTransform:
    """ViTDet's augmentation with large changes of size: a random size, crop and flip.

    The image is resized to fit into a square of ``size`` px, times a random scale, and padded where the crop is larger.
    Boxes are cut at the crop; those with a side below 1 px are dropped.

    Args:
        size: side of the result.
        scale: range of the random scale.
        hflip: probability of a horizontal flip.
    """

    def __init__(self, size: int, scale: Sequence[float], hflip: float):
        self.size, self.scale = size, scale
        fill = {tv_tensors.Image: PADDING, tv_tensors.Mask: 0}
        self.place = v2.Compose(
            [
                v2.RandomCrop(size, pad_if_needed=True, fill=fill),  # pads on all sides: the place is random
                v2.RandomHorizontalFlip(hflip),
                v2.ClampBoundingBoxes(),
                v2.SanitizeBoundingBoxes(min_size=1),
            ]
        )

    def __call__(self, image: Tensor, objects: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """The image, uint8 ``(3, size, size)``, and its objects."""
        height, width = image.shape[1:]
        boxes = tv_tensors.BoundingBoxes(objects["boxes"], format="XYXY", canvas_size=(height, width))  # type: ignore[call-overload]
        sample: dict[str, Any] = {"image": tv_tensors.Image(image), "boxes": boxes, "labels": objects["labels"]}
        if "masks" in objects:
            sample["masks"] = tv_tensors.Mask(objects["masks"])
        scale = float(torch.empty(()).uniform_(*self.scale))
        sample = self.place(v2.Resize(fitting_size(height, width, self.size, self.size, scale), antialias=True)(sample))
        plain = {name: part.as_subclass(Tensor) for name, part in sample.items()}
        return plain.pop("image"), plain


class BoxEvalTransform:
    """The image resized to fit into a square and padded to it, as in training at scale 1; objects stay as they are."""

    def __init__(self, size: int):
        self.size = size

    def __call__(self, image: Tensor, objects: Mapping[str, Tensor] = MappingProxyType({})) -> dict[str, Any]:
        """``images``, uint8 ``(1, 3, size, size)``, and ``objects``, empty for an image without annotations.

        ``inside`` is the height and width of the image without padding, ``size`` those of the original.
        """
        before = height, width = image.shape[1], image.shape[2]
        height, width = fitting_size(height, width, self.size, self.size)
        resized = v2.functional.resize(image, [height, width], antialias=True)
        padding = [0, 0, self.size - width, self.size - height]
        padded = v2.functional.pad(resized, padding, fill=PADDING)  # type: ignore[arg-type]
        return {"images": padded[None], "objects": dict(objects), "inside": (height, width), "size": before}
