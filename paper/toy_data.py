"""Toy versions of the evaluation sets for --smoke, made of scikit-learn's scanned digits.

    imagenet-a/<digit>/*                            the digits
    imagenet-c/<corruption>/<severity>/<digit>/*    two corruptions at two severities, SIDE px like the smoke models
    VOCdevkit/VOC2012/                              masks: strong ink is class 1, weak ink is void
    imagenet/val/<digit>/*                          the digits

They test the pipeline; results on them are meaningless.
"""

from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

SIDE = 20  # px: --input-size of recipes/smoke.args
PER_DIGIT = 2
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
    digits = load_digits()
    for digit in range(10):
        for number, pixels in enumerate(digits.images[digits.target == digit][:PER_DIGIT]):
            image = Image.fromarray((pixels * (255 / 16)).astype(np.uint8)).resize(
                (SIDE, SIDE), Image.Resampling.BICUBIC
            )
            write_digit(root, f"{digit}/{number}.png", np.asarray(image, dtype=np.float64))


def write_digit(root: Path, name: str, image: np.ndarray) -> None:
    """Write one grey image ``(SIDE, SIDE)`` of 0 to 255 into every set."""
    for folder in ("imagenet-a", "imagenet/val"):
        save(root / folder / name, image)
    for corruption, corrupt in CORRUPTIONS.items():
        for severity in SEVERITIES:
            save(root / "imagenet-c" / corruption / str(severity) / name, corrupt(image, severity))
    voc, stem = root / "VOCdevkit/VOC2012", name.removesuffix(".png").replace("/", "_")
    save(voc / f"JPEGImages/{stem}.jpg", image)
    save(voc / f"SegmentationClass/{stem}.png", np.select([image > INK * 255, image > RIM * 255], [CLASS, VOID]))
    names = sorted(path.stem for path in (voc / "JPEGImages").iterdir())
    (voc / "ImageSets/Segmentation").mkdir(parents=True, exist_ok=True)
    (voc / "ImageSets/Segmentation/val.txt").write_text("".join(f"{name}\n" for name in names))


def save(path: Path, pixels: np.ndarray) -> None:
    """Write a grey image ``(h, w)``; values are clipped to 0..255."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path)
