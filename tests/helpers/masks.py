"""Images with masks in VOC's layout and as foregrounds."""

import csv

import numpy as np
import torch
from PIL import Image

from helpers.image_sets import photograph
from readers.masks import VOID


def save_mask(pixels, path):
    """A paletted PNG, as VOC's: the colours of its palette are not its numbers."""
    mask = Image.fromarray(pixels)
    mask.putpalette(np.random.default_rng(0).integers(0, 256, 768, dtype=np.uint8).tobytes())
    assert mask.mode == "P"
    mask.save(path)


def random_labels(generator, size, classes):
    """A mask with a rectangle for each class, the later ones on top, each with a border of void."""
    labels = torch.zeros(size, dtype=torch.uint8)
    for label in classes:
        top, left = (int(torch.randint(0, side - 8, (), generator=generator)) for side in size)
        labels[top : top + 17, left : left + 23] = VOID
        labels[top + 2 : top + 15, left + 2 : left + 21] = label
    return labels


def write_voc(root, kinds=((15,), (3, 12), (), (26,), (VOID,)), split="val"):
    """VOCdevkit/VOC2012 of photographs with rectangles of these classes for objects; returns ``root``."""
    voc = root / "VOCdevkit/VOC2012"
    for folder in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (voc / folder).mkdir(parents=True, exist_ok=True)
    for number, classes in enumerate(kinds):
        image = photograph(number)
        image.save(voc / f"JPEGImages/a {number}.jpg")
        labels = random_labels(torch.Generator().manual_seed(number), image.size[::-1], classes)
        save_mask(labels.numpy(), voc / f"SegmentationClass/a {number}.png")
    names = "".join(f"a {number}\n" for number in range(len(kinds)))
    (voc / f"ImageSets/Segmentation/{split}.txt").write_text(names)
    return root


def write_foregrounds(root):
    """images/ and masks/: of three images the left third is the object, in three kinds of PNG; returns ``root``."""
    for number, mode in enumerate(("L", "1", "RGB")):
        for folder in ("images", "masks"):
            (root / folder / "sub").mkdir(parents=True, exist_ok=True)
        photograph(number).resize((60, 48)).save(root / f"images/sub/{number}.jpg")
        pixels = np.zeros((48, 60), dtype=np.uint8)
        pixels[:, :20] = 255 if mode == "1" else 3
        Image.fromarray(pixels).convert(mode).save(root / f"masks/sub/{number}.png")
    return root


def rows_of(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))
