"""A small set of images with masks, and the command line of a small segmentation run on it."""

from pathlib import Path

import numpy as np
from PIL import Image

from helpers.masks import save_mask
from readers.masks import VOID

COLOURS = np.array([[40, 40, 40], [220, 60, 60], [60, 60, 220]], np.uint8)
CLASSES = ["ground", "red", "blue"]

# 11 training images make 5 updates of 2, and 7 validation images; every regulariser of this task is on.
WORDS = (
    "--task segment --data-set folder --model vit_tiny --input-size 24 --patch-size 8 --num-workers 0 "
    "--model-kwargs embed_dim=24 depth=2 num_heads=3 pretrain_size=16 window_size=1 --warmup-updates 3 --lr 1e-3 "
    "--batch-size 2 --total-batch 2 --epochs 2 --drop 0.1 --drop-path 0.2 --sar-weight 0.1 --print-every 3"
).split()
UPDATES = 5


def pair(number: int) -> tuple[Image.Image, np.ndarray]:
    """An image of coloured rectangles, and its mask, with a border of void; sizes and places differ by number."""
    height, width = 14 + number % 5, 20 - number % 3
    mask = np.zeros((height, width), np.uint8)
    for label in (1, 2):
        top, left = (3 * number + 5 * label) % 7, (5 * number + 7 * label) % 10
        mask[top : top + 8, left : left + 8] = VOID
        mask[top + 1 : top + 7, left + 1 : left + 7] = label
    return Image.fromarray(COLOURS[np.where(mask == VOID, 0, mask)]), mask


def write_pairs(root: Path, train: int = 11, val: int = 7) -> Path:
    """``{train,val}/{images,masks}/*`` and ``classes.txt``; returns ``root``."""
    for split, numbers in (("train", range(train)), ("val", range(100, 100 + val))):
        for kind in ("images", "masks"):
            (root / split / kind).mkdir(parents=True)
        for number in numbers:
            image, mask = pair(number)
            image.save(root / split / f"images/{number}.png")
            save_mask(mask, root / split / f"masks/{number}.png")
    (root / "classes.txt").write_text("\n".join(CLASSES) + "\n")
    return root
