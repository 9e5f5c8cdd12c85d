"""Toy versions of the data sets for --smoke, made of scikit-learn's scanned digits.

    imagenet-a/<digit>/*                            the digits
    imagenet-c/<corruption>/<severity>/<digit>/*    two corruptions at two severities, SIDE px like the smoke models
    VOCdevkit/VOC{2007,2012}/                       masks: strong ink is class 1, weak ink is void; boxes around the ink
    ADEChallengeData2016/                           masks: strong ink is class 1, all else void
    imagenet/val/<digit>/*                          the digits

They test the pipeline; results on them are meaningless.
"""

import itertools
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

SIDE = 20  # px: --input-size of recipes/smoke.args
PER_DIGIT = 2
YEARS = (2007, 2012)
CLASS, VOID = 1, 255
INK, RIM = 0.5, 0.25  # thresholds of the object and of its void rim, as fractions of full ink


def noise(image: np.ndarray, severity: int) -> np.ndarray:
    """Add Gaussian noise to a grey image ``(h, w)`` of 0 to 255; the seed is the severity."""
    return image + np.random.default_rng(severity).normal(0, 20 * severity, image.shape)


def contrast(image: np.ndarray, severity: int) -> np.ndarray:
    """Reduce the contrast of a grey image ``(h, w)`` of 0 to 255."""
    return image.mean() + (image - image.mean()) / (1 + severity)


CORRUPTIONS = {"gaussian_noise": noise, "contrast": contrast}
SEVERITIES = (1, 3)


def write_toy_data(root: Path) -> None:
    """Write all toy sets below ``root``; existing files are overwritten."""
    digits, names = load_digits(), []
    for digit in range(10):
        for number, pixels in enumerate(digits.images[digits.target == digit][:PER_DIGIT]):
            small = Image.fromarray((pixels * (255 / 16)).astype(np.uint8))
            image = np.asarray(small.resize((SIDE, SIDE), Image.Resampling.BICUBIC), dtype=np.float64)
            write_with_class(root, f"{digit}/{number}.png", image)
            write_with_mask(root, f"{digit}_{number}", image)
            names.append(f"{digit}_{number}")
    write_lists(root, names)


def write_with_class(root: Path, name: str, image: np.ndarray) -> None:
    """Write one grey image ``(SIDE, SIDE)`` of 0 to 255 into every set of labelled images."""
    for folder in ("imagenet-a", "imagenet/val"):
        save(root / folder / name, image)
    for corruption, corrupt in CORRUPTIONS.items():
        for severity in SEVERITIES:
            save(root / "imagenet-c" / corruption / str(severity) / name, corrupt(image, severity))


def write_with_mask(root: Path, name: str, image: np.ndarray) -> None:
    """Write one grey image ``(SIDE, SIDE)`` of 0 to 255 into every set of images with masks or boxes."""
    ink, rim = image > INK * 255, image > RIM * 255
    (top, bottom), (left, right) = ((places.min() + 1, places.max() + 1) for places in np.nonzero(ink))  # from 1
    box = f"<xmin>{left}</xmin><ymin>{top}</ymin><xmax>{right}</xmax><ymax>{bottom}</ymax>"
    annotation = f"<annotation><object><name>aeroplane</name><bndbox>{box}</bndbox></object></annotation>"
    for year in YEARS:
        voc = root / f"VOCdevkit/VOC{year}"
        save(voc / f"JPEGImages/{name}.jpg", image)
        save(voc / f"SegmentationClass/{name}.png", np.select([ink, rim], [CLASS, VOID]))
        save_text(voc / f"Annotations/{name}.xml", annotation)
    for split in ("training", "validation"):
        save(root / f"ADEChallengeData2016/images/{split}/{name}.jpg", image)
        save(root / f"ADEChallengeData2016/annotations/{split}/{name}.png", ink * CLASS)


def write_lists(root: Path, names: list[str]) -> None:
    """Write VOC's lists, each of which names all images, and ADE20K's names of the classes."""
    for year, kind, name in itertools.product(YEARS, ("Main", "Segmentation"), ("train", "val", "trainval", "test")):
        save_text(root / f"VOCdevkit/VOC{year}/ImageSets/{kind}/{name}.txt", "".join(f"{each}\n" for each in names))
    classes = "".join(f"{number}\tclass {number}\n" for number in range(1, 151))
    save_text(root / "ADEChallengeData2016/objectInfo150.txt", f"Idx\tName\n{classes}")


def save(path: Path, pixels: np.ndarray) -> None:
    """Write a grey image ``(h, w)``; values are clipped to 0..255."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path)


def save_text(path: Path, text: str) -> None:
    """Write a text file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
