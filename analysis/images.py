"""Images for the analysis: selection from a data set, conversion to model inputs and back to pictures."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torchvision import transforms

from datasets import AugmentedDataset
from samplers import Draw


def choose_samples(dataset: AugmentedDataset, count: int) -> list[tuple[Any, int]]:
    """Up to ``count`` pairs (image, label) of different classes, evenly spaced over the set; deterministic."""
    chosen = {}
    for index in np.linspace(0, len(dataset) - 1, num=min(10 * count, len(dataset)), dtype=int).tolist():
        if dataset.base.targets[index] not in chosen:
            item = dataset[Draw(index, 0, index)]
            chosen.setdefault(item["targets"], (item["images"], item["targets"]))
        if len(chosen) == count:
            break
    return list(chosen.values())


def squash(
    size: int, interpolation: transforms.InterpolationMode = transforms.InterpolationMode.BICUBIC
) -> Callable[[Image.Image], torch.Tensor]:
    """A transform to a normalised tensor ``(3, size, size)``: the whole image, resized without its aspect ratio."""
    return transforms.Compose(
        [
            transforms.Resize((size, size), interpolation),
            transforms.ToTensor(),
            transforms.Normalize(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD),
        ]
    )


def as_picture(image: torch.Tensor) -> np.ndarray:
    """Undo the normalisation: ``(3, h, w)`` -> ``(h, w, 3)`` in 0..1."""
    mean, std = torch.tensor(IMAGENET_DEFAULT_MEAN), torch.tensor(IMAGENET_DEFAULT_STD)
    return (image.permute(1, 2, 0).cpu() * std + mean).clamp(0, 1).numpy()
