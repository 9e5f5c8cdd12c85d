"""Sets of images with boxes: PASCAL VOC by year and list, and a user's own folder with annotations of VOC's form.

A box in the files is 1-based and inclusive; here it is ``x1, y1, x2, y2`` in px from 0, where x2 - x1 is the width. So
1 is subtracted from x1 and y1 alone. Coordinates need not be whole.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import torch
from torch import Tensor

from readers import BOXES_LAYOUT, VOC_BOXES_LAYOUT
from readers.files import list_images
from readers.images import ImageFiles, one_line
from readers.masks import VOC_CLASSES, VOID
from readers.names import Names
from readers.segmentation import WrongMask, read_mask
from utils import UserError, logger

CLASSES = VOC_CLASSES[1:]
"""PASCAL VOC's 20 classes, in the order of the alphabet."""
SIDES = ("xmin", "ymin", "xmax", "ymax")


class BoxedImages(ImageFiles):
    """Pairs of an image, uint8 ``(3, h, w)``, and its objects.

    The objects are a dict: ``boxes``, float32 ``(N, 4)``; ``labels``, int64 ``(N,)``; ``difficult``, bool ``(N,)``; and
    ``masks``, the path of `read_instances`' file, or an empty string. An image may have no objects: N is 0.

    Args:
        root: folder of the images.
        names: their paths below it.
        annotations: their XML files.
        masks: their files for `read_instances`; an empty string where there is none.
        classes: by label.

    Raises:
        UserError: see `read_objects`; or no image has an object.
    """

    labelled = False

    def __init__(
        self, root: Path, names: Sequence[str], annotations: Sequence[Path], masks: Sequence[str], classes: list[str]
    ):
        super().__init__(root, names, [0] * len(names), classes)
        numbers = {name: number for number, name in enumerate(classes)}
        objects = [read_objects(path, numbers) for path in annotations]
        self.masks, self._ends = Names(masks), np.cumsum([0, *map(len, objects)])
        if not self._ends[-1]:
            raise UserError(f"{root}: none of {len(names):,} images has an object; is this the right folder?")
        self._objects = np.array([row for rows in objects for row in rows])
        outside = int((self._objects[:, 2:4] < 0).any(axis=1).sum())
        if outside:
            logger.warning(
                f"{root}: {outside:,} of {len(self._objects):,} boxes begin at 0, but VOC's count from 1: if all "
                "annotations count from 0, add 1 to xmin and ymin"
            )

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Any]]:  # type: ignore[override]
        image, _ = super().__getitem__(index)
        rows = torch.from_numpy(self._objects[self._ends[index] : self._ends[index + 1]])
        return image, {
            "boxes": rows[:, 2:].float(),
            "labels": rows[:, 0].long(),
            "difficult": rows[:, 1].bool(),
            "masks": self.masks[index],
        }


def read_objects(path: Path, numbers: dict[str, int]) -> list[tuple[float, ...]]:
    """Label, ``difficult`` and box of each object in an annotation of VOC's form.

    Parts of an object, such as a person's head, have boxes of their own, which are left out.

    Args:
        path: an XML file.
        numbers: labels by the classes' names.

    Raises:
        UserError: the file cannot be read, or an object has no class of the set or no box with an area.
    """
    try:
        found = ElementTree.parse(path).getroot().findall("object")
    except (OSError, ElementTree.ParseError) as error:
        raise UserError(f"{path}: cannot be read ({one_line(error)}); each image needs an annotation in XML") from error
    objects: list[tuple[float, ...]] = []
    for place, item in enumerate(found, 1):
        name, box = (item.findtext("name") or "").strip(), item.find("bndbox")
        if name not in numbers:
            known = ", ".join(numbers)
            raise UserError(f"{path}: object {place} is of the class {name!r}, which the set does not have: {known}")
        try:
            sides = [math.nan if box is None else float(box.findtext(side, "nan")) for side in SIDES]
            difficult = int(item.findtext("difficult") or 0)
        except ValueError as error:
            raise UserError(f"{path}: object {place} ({name}): {error}; correct the file") from error
        x1, y1, x2, y2 = sides[0] - 1, sides[1] - 1, *sides[2:]
        if not (all(map(math.isfinite, sides)) and x1 < x2 and y1 < y2):
            text = ", ".join(f"{side} {value:g}" for side, value in zip(SIDES, sides, strict=True))
            raise UserError(f"{path}: object {place} ({name}) has no box with an area ({text}); correct or remove it")
        objects.append((numbers[name], difficult, x1, y1, x2, y2))
    return objects


def read_instances(path: str, number: int) -> Tensor:
    """The masks of all objects of an image from VOC's SegmentationObject: bool ``(number, h, w)``.

    Pixels of the value k belong to the k-th object of the annotation; 0 is background, 255 void.

    Raises:
        UnreadableImage: missing, truncated, or not an image.
        WrongMask: the file holds colours, or more objects than the annotation.
    """
    pixels = read_mask(path)
    most = int(pixels[pixels != VOID].max(initial=0))
    if most > number:
        raise WrongMask(f"{path}: it has an object {most}, but the annotation has {number}; bring the image's own mask")
    return torch.from_numpy(pixels[None] == np.arange(1, number + 1)[:, None, None])


# ------------------------------------------------------------------------------------------------- the sets


def read_voc_boxes(data_path: Path, split: str, lists: dict[str, list[tuple[int, str]]]) -> BoxedImages:
    """PASCAL VOC's images of some years.

    Args:
        data_path: VOCdevkit, or its parent.
        split: "train" or "val".
        lists: split -> pairs of a year and the name of a list in its ImageSets/Main.

    Raises:
        UserError: files are missing, a list names an image twice, or see `read_objects`.
    """
    years = [f"VOC{year}" for year, _ in lists[split]]
    places = (data_path, data_path / "VOCdevkit", data_path.parent)
    root = next((place for place in places if all((place / year).is_dir() for year in years)), None)
    if root is None:
        raise UserError(f"{data_path}: no {' and '.join(years)} in it; expected {VOC_BOXES_LAYOUT}")
    names, annotations, masks = [], [], []
    for year, (_, part) in zip(years, lists[split], strict=True):
        folder = root / year
        ids = _read_list(folder / "ImageSets/Main" / f"{part}.txt")
        _check_there(folder / "JPEGImages", ids, ".jpg")
        _check_there(folder / "Annotations", ids, ".xml")
        with_masks = {path.stem for path in (folder / "SegmentationObject").glob("*.png")}
        names += [f"{year}/JPEGImages/{each}.jpg" for each in ids]
        annotations += [folder / "Annotations" / f"{each}.xml" for each in ids]
        masks += [str(folder / "SegmentationObject" / f"{each}.png") if each in with_masks else "" for each in ids]
    return BoxedImages(root, names, annotations, masks, CLASSES)


def _read_list(path: Path) -> list[str]:
    """The names in a list, whose first words they are."""
    try:
        names = [line.split()[0] for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        there = ", ".join(sorted(other.stem for other in path.parent.glob("*.txt") if "_" not in other.stem))
        raise UserError(
            f"{path}: cannot be read ({one_line(error)}); expected {VOC_BOXES_LAYOUT}"
            + (f"; lists there: {there}" if there else "")
        ) from error
    if len(set(names)) < max(len(names), 1):
        raise UserError(f"{path}: it names no image, or one twice; it needs one name a line, without suffix")
    return names


def _check_there(folder: Path, names: list[str], suffix: str) -> None:
    there = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    missing = [name for name in names if name + suffix not in there]
    if missing:
        raise UserError(
            f"{folder / missing[0]}{suffix}: no such file, but the list names it ({len(missing):,} missing)"
        )


def read_boxes_folder(data_path: Path, split: str) -> BoxedImages:
    """A user's own images: ``{train,val}/images/*``, ``{train,val}/annotations/*.xml``, classes in ``classes.txt``.

    Raises:
        UserError: files are missing, or see `read_objects`.
    """
    path = data_path / "classes.txt"
    try:
        classes = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({one_line(error)}); expected {BOXES_LAYOUT}") from error
    if len(set(classes)) < max(len(classes), 1):
        raise UserError(f"{path}: it has no name, or one twice; it needs one class a line")
    folder = data_path / split / "images"
    images = list_images(folder)
    annotations = [
        (data_path / split / "annotations" / image.relative_to(folder)).with_suffix(".xml") for image in images
    ]
    names = [str(image.relative_to(folder)) for image in images]
    return BoxedImages(folder, names, annotations, [""] * len(names), classes)
