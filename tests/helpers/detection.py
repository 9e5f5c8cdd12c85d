"""A small set of images with boxes, and the command line of a small detection run on it."""

from pathlib import Path

import numpy as np
from PIL import Image

COLOURS = {"red": (220, 60, 60), "blue": (60, 60, 220)}
CLASSES = list(COLOURS)

# 11 training images make 5 updates of 2, and 7 validation images; every regulariser of this task is on.
WORDS = (
    "--task detect --data-set folder --model vit_tiny --input-size 64 --patch-size 16 --num-workers 0 "
    "--model-kwargs embed_dim=24 depth=2 num_heads=3 pretrain_size=32 window_size=2 --warmup-updates 3 --lr 1e-3 "
    "--head-kwargs channels=8 features=16 regions=32 smallest_anchor=8 canonical_size=28 --scale-range 0.5 1.5 "
    "--batch-size 2 --total-batch 2 --epochs 2 --drop 0.1 --drop-path 0.2 --sar-weight 0.1 --print-every 3"
).split()
UPDATES = 5


def picture(number: int) -> tuple[Image.Image, list[tuple[str, int, int, int, int]]]:
    """An image of coloured rectangles, and their classes and boxes, 1-based and inclusive; every fifth has none."""
    height, width = 48 + 2 * (number % 5), 64 - 3 * (number % 4)
    pixels, objects = np.full((height, width, 3), 40, np.uint8), []
    for place, name in enumerate(CLASSES if number % 5 else []):
        left, top = 3 + number % 7 + 26 * place, 4 + (5 * number + 7 * place) % 11
        right, bottom = left + 14 + number % 5, top + 18 + number % 3
        pixels[top:bottom, left:right] = COLOURS[name]
        objects.append((name, left + 1, top + 1, right, bottom))
    return Image.fromarray(pixels), objects


def write_annotation(path: Path, objects) -> None:
    """Objects are (class, xmin, ymin, xmax, ymax, more XML)."""
    parts = [
        f"<object><name>{label}</name>{''.join(more)}<bndbox><xmin>{x1}</xmin><ymin>{y1}</ymin><xmax>{x2}</xmax>"
        f"<ymax>{y2}</ymax></bndbox></object>"
        for label, x1, y1, x2, y2, *more in objects
    ]
    path.write_text(f"<annotation>{''.join(parts)}</annotation>")


def write_pictures(root: Path, train: int = 11, val: int = 7) -> Path:
    """``{train,val}/{images,annotations}/*`` and ``classes.txt``; returns ``root``."""
    for split, numbers in (("train", range(train)), ("val", range(100, 100 + val))):
        for kind in ("images", "annotations"):
            (root / split / kind).mkdir(parents=True)
        for number in numbers:
            image, objects = picture(number)
            image.save(root / split / f"images/{number}.png")
            write_annotation(root / split / f"annotations/{number}.xml", objects)
    (root / "classes.txt").write_text("\n".join(CLASSES) + "\n")
    return root


def write_image(root: Path, year: int, name: str, objects=(), size=(40, 30), mode="RGB") -> None:
    """An image with its annotation below VOCdevkit; objects are (class, xmin, ymin, xmax, ymax, more XML)."""
    folder = root / f"VOC{year}"
    for part in ("JPEGImages", "Annotations", "ImageSets/Main", "SegmentationObject"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    Image.new(mode, size).save(folder / f"JPEGImages/{name}.jpg")
    write_annotation(folder / f"Annotations/{name}.xml", objects)


def write_list(root: Path, year: int, name: str, *images: str) -> None:
    """A list in ImageSets/Main."""
    (root / f"VOC{year}/ImageSets/Main/{name}.txt").write_text("".join(f"{image}\n" for image in images))


def write_instances(path: Path, pixels) -> None:
    """A PNG with a palette, as in SegmentationObject."""
    image = Image.fromarray(np.array(pixels, np.uint8))
    image.putpalette(bytes(range(256)) * 3)
    image.save(path)
