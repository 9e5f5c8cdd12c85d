"""Shear and translation of Pillow images along one axis: timm's operations of RandAugment, several times faster.

Both move each row (or column) by a distance of its own, so interpolation is needed along that axis alone. Pillow
computes all 16 taps of its bicubic kernel. The results differ from Pillow's by rounding, at most 1 of 255.
"""

import random
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data.auto_augment import RandAugment
from torch import Tensor

TAPS = (-1, 0, 1, 2)  # columns, from the one at or before the sampled point


def _weights(fraction: np.ndarray, resample: int) -> Tensor:
    """Weights of the four taps at points ``fraction`` ``(h, 1)`` behind the second one, ``(4, h, 1)``: Pillow's."""
    d, zero = fraction, np.zeros_like(fraction)
    if resample == Image.Resampling.BICUBIC:  # Keys' kernel with a = -1
        square, cube = d * d, d * d * d
        weights = [2 * square - d - cube, 1 - 2 * square + cube, d + square - cube, cube - square]
    else:
        weights = [zero, 1 - d, d, zero]
    return torch.from_numpy(np.stack(weights).astype(np.float32))


def shift_rows(pixels: Tensor, shifts: np.ndarray, fill: int, resample: int) -> Tensor:
    """Sample each row at its columns plus a distance; points outside of the image get the colour ``fill``.

    Args:
        pixels: int32 ``(h, w)``, four uint8 channels each.
        shifts: float64 ``(h, 1)``, distance of each row in pixels; numpy is faster with so few numbers.
        fill: a colour of the same form.
        resample: Pillow's BILINEAR or BICUBIC.
    """
    # 1. the neighbours of all points of a row, side by side; columns beyond the edge repeat it
    w = pixels.shape[1]
    whole = np.floor(shifts)
    columns = torch.from_numpy(whole.astype(np.int64)) + torch.arange(TAPS[0], w + TAPS[-1])
    neighbours = pixels.gather(1, columns.clamp_(0, w - 1)).view(torch.uint8).float()
    # 2. their weighted sum, which Pillow truncates
    first_weight, *weights = _weights(shifts - whole, resample)
    total = first_weight * neighbours[:, : 4 * w]
    for tap, weight in enumerate(weights, start=1):
        total.addcmul_(weight, neighbours[:, 4 * tap : 4 * (tap + w)])
    sampled = total.clamp_(0, 255).short().byte().view(torch.int32)  # straight to bytes is slower
    # 3. points outside: x + 1/2 + shift is not in [0, w)
    first, after = (torch.from_numpy(np.ceil(edge - 0.5 - shifts).astype(np.int32)) for edge in (0, w))
    column = torch.arange(w, dtype=torch.int32)
    return sampled.masked_fill_((column < first) | (column >= after), fill)


def shift(image: Image.Image, distance: Callable[[np.ndarray], Any], vertically: bool, fillcolor, resample):
    """Move each row of an RGB image along itself, or each column.

    Args:
        distance: of the centres ``(n, 1)`` of the rows or columns, in pixels.
        fillcolor: RGB colour of points outside of the image.
        resample: Pillow's BILINEAR or BICUBIC, or several to choose one at random, as timm does.
    """
    if isinstance(resample, tuple | list):
        resample = random.choice(resample)
    data = bytearray(image.tobytes("raw", "RGBX"))
    pixels = torch.frombuffer(data, dtype=torch.int32).view(image.height, image.width)
    pixels = pixels.T.contiguous() if vertically else pixels
    centres = np.arange(len(pixels))[:, None] + 0.5
    colour = int.from_bytes(bytes([*fillcolor, 255]), sys.byteorder, signed=True)
    moved = shift_rows(pixels, np.broadcast_to(distance(centres), centres.shape), colour, resample)
    moved = moved.T.contiguous() if vertically else moved
    return Image.frombytes("RGB", image.size, moved.numpy().tobytes(), "raw", "RGBX")


def shear_x(image, factor, **settings):
    return shift(image, lambda centres: factor * centres, False, **settings)


def shear_y(image, factor, **settings):
    return shift(image, lambda centres: factor * centres, True, **settings)


def translate_x(image, share, **settings):
    return shift(image, lambda centres: share * image.width, False, **settings)


def translate_y(image, share, **settings):
    return shift(image, lambda centres: share * image.height, True, **settings)


FUNCTIONS: dict[str, Callable] = {
    "ShearX": shear_x,
    "ShearY": shear_y,
    "TranslateXRel": translate_x,
    "TranslateYRel": translate_y,
}
"""By the names of timm's operations, with the arguments of timm's functions."""


def speed_up(transform) -> None:
    """Let a RandAugment of timm, wherever it is in a ``Compose``, use the functions of this module."""
    for part in transform.transforms:
        if isinstance(part, RandAugment):
            for operation in part.ops:
                operation.aug_fn = FUNCTIONS.get(operation.name, operation.aug_fn)
