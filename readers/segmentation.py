"""Sets of images with a class for each pixel: PASCAL VOC 2012 with SBD, ADE20K, a user's own folder.

A mask is read as the numbers that its file stores, never as colours. It holds classes from 0 on, and 255 (void) where
there is none. `readers.masks` finds the files of VOC's layout, which the analysis of attention shares.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from scipy.io import loadmat
from torch import Tensor

from readers import ADE_LAYOUT, MASKS_LAYOUT, VOC_LAYOUT
from readers.images import DEEP_MODES, ImageFiles, ReadingError, UnreadableImage, one_line, open_image
from readers.masks import VOC_CLASSES, VOID, MaskedImages, pair_by_name, read_voc_list, voc_folder
from readers.names import Names
from utils import UserError, first_few

SPLITS = {"train": "training", "val": "validation"}
"""Names of ADE20K's folders."""


class WrongMask(ReadingError):
    """A mask that is no array of this set's classes; the message names its file and what to change."""


class SegmentationImages(ImageFiles):
    """Pairs of an image, uint8 ``(3, h, w)``, and its mask, uint8 ``(h, w)``; each mask is checked when it is read.

    Args:
        root: folder of the images.
        names: their paths below it.
        masks: their masks' files: PNGs, or SBD's ``.mat``; an empty string for an image without labels.
        classes: by their number in a mask.
        first_class: the number of class 0 in the files. With 1, a 0 in the files is void.

    Raises:
        UnreadableImage: on access, if a file is missing, truncated, or not an image.
        WrongMask: on access, if a mask holds colours or numbers that are no class, or differs from its image in size.
    """

    labelled = False

    def __init__(
        self, root: Path, names: Sequence[str], masks: Sequence[str], classes: list[str], first_class: int = 0
    ):
        super().__init__(root, names, [0] * len(names), classes)
        self.masks, self.first_class = Names(masks), first_class

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        image, _ = super().__getitem__(index)
        path = self.masks[index]
        if not path:
            return image, torch.full(image.shape[1:], VOID, dtype=torch.uint8)
        mask = read_mask(path) - np.uint8(self.first_class)  # 0 - 1 is 255
        if mask.shape != tuple(image.shape[1:]):
            sizes = " and ".join(f"{width} x {height}" for height, width in (image.shape[1:], mask.shape))
            raise WrongMask(
                f"{self._location(index)} and {path} differ in size: {sizes} px; bring the image's own mask"
            )
        self._check_classes(mask, path)
        return image, torch.from_numpy(mask)

    def _check_classes(self, mask: np.ndarray, path: str) -> None:
        wrong = mask[(mask >= len(self.classes)) & (mask != VOID)]
        if len(wrong):
            number, first, last = int(wrong[0]) + self.first_class, self.first_class, len(self.classes) - 1
            raise WrongMask(
                f"{path}: {number} is no class; the numbers are {first} to {last + first}, and "
                f"{0 if first else VOID} for void. Take the original file: a palette that was saved as grey or as "
                "colours has lost its numbers"
            )


def read_mask(path: str) -> np.ndarray:
    """The numbers in a mask's file, uint8 ``(h, w)``.

    Raises:
        UnreadableImage: missing, truncated, or not of its format.
        WrongMask: the file holds colours.
    """
    if path.endswith(".mat"):
        try:
            return np.array(loadmat(path, squeeze_me=True)["GTcls"]["Segmentation"].item(), np.uint8)
        except Exception as error:  # scipy's reader raises a dozen types on broken files
            raise UnreadableImage(
                f"{path}: cannot be read ({one_line(error)}); replace it with an intact file"
            ) from error
    with open_image(path) as mask:
        if mask.mode in DEEP_MODES or mask.mode == "1":  # numbers, stored with more bits or fewer
            pixels = np.array(mask)
            if pixels.min() >= 0 and pixels.max() <= VOID and (pixels == pixels.round()).all():
                return pixels.astype(np.uint8)
            raise WrongMask(
                f"{path}: values from {pixels.min()} to {pixels.max()}; a mask's are whole, and at most {VOID}"
            )
        if mask.mode not in ("P", "L"):
            raise WrongMask(
                f"{path}: {mask.mode} pixels instead of class numbers; this is the palette saved as colours: take the "
                "original file (mode P), or turn each colour back into its number"
            )
        return np.array(mask)


# ------------------------------------------------------------------------------------------------- the sets


def read_voc2012(data_path: Path, split: str, lists: dict[str, str]) -> SegmentationImages:
    """PASCAL VOC 2012, with background and 20 classes.

    Args:
        data_path: VOCdevkit, its parent, or its folder VOC2012.
        split: "train" or "val".
        lists: split -> name of a list in ImageSets/Segmentation; ``train_aug`` for train and SBD; ``test`` has no
            masks; empty for a split that does not exist.

    Raises:
        UserError: files are missing, or there is no such split.
    """
    if not lists[split]:
        raise UserError("--data-set voc2012_test has no labels to train on; train on voc2012_trainval")
    root = voc_folder(data_path)
    if root is None:
        raise UserError(f"{data_path}: no VOC2012 in it; expected {VOC_LAYOUT}")
    name, classes = lists[split], ["background", *VOC_CLASSES[1:]]
    if name == "test":
        found = read_voc_list(root, name, labelled=False)
        return _from_files(found, classes, masks=[""] * len(found))
    if name != "train_aug":
        return _from_files(read_voc_list(root, name), classes)
    train, val = (read_voc_list(root, part) for part in ("train", "val"))
    more = _read_sbd(data_path, root, without={*train.names, *val.names})
    names, images, masks = train.names + more.names, train.images + more.images, train.masks + more.masks
    return _from_files(MaskedImages(names, images, masks, name), classes)


def _from_files(
    found: MaskedImages, classes: list[str], masks: list[str] | None = None, first_class: int = 0
) -> SegmentationImages:
    """The images in ``found``, which lie below one folder."""
    root = found.images[0].parents[len(Path(found.names[0]).parts) - 1]
    names = [str(path.relative_to(root)) for path in found.images]
    return SegmentationImages(root, names, masks or [str(path) for path in found.masks], classes, first_class)


def _read_sbd(data_path: Path, voc: Path, without: set[str]) -> MaskedImages:
    """SBD's images (Hariharan et al., 2011) but for ``without``: VOC's JPEGs with SBD's classes, which have no void.

    Raises:
        UserError: files are missing.
    """
    places = [folder / "benchmark_RELEASE/dataset" for folder in (data_path, *voc.parents[:2])]
    root = next((place for place in places if (place / "cls").is_dir()), None)
    if root is None:
        raise UserError(f"{places[0]}: no such folder, or no cls/ in it; voc2012_aug needs SBD's images there")
    try:
        lines = [
            line.strip()
            for part in ("train", "val")
            for line in (root / f"{part}.txt").read_text(encoding="utf-8-sig").splitlines()
        ]
    except (OSError, ValueError) as error:
        raise UserError(
            f"{root}: train.txt and val.txt cannot be read ({one_line(error)}); extract SBD again"
        ) from error
    names = sorted(set(filter(None, lines)) - without)
    files = [voc / "JPEGImages" / f"{name}.jpg" for name in names], [root / "cls" / f"{name}.mat" for name in names]
    for paths in files:
        there = {path.name for path in paths[0].parent.iterdir()} if paths else set()
        missing = [str(path) for path in paths if path.name not in there]
        if missing:
            raise UserError(f"{missing[0]}: no such file, but SBD's lists name it ({len(missing):,} are missing)")
    return MaskedImages(names, *files, "sbd")


def read_ade20k(data_path: Path, split: str) -> SegmentationImages:
    """ADE20K's scene parsing: 150 classes, numbered from 1 in the files, where 0 is all else and becomes void.

    Raises:
        UserError: files are missing, or the list of classes is not as published.
    """
    places = (data_path, data_path / "ADEChallengeData2016")
    root = next((place for place in places if (place / "annotations").is_dir()), None)
    if root is None:
        raise UserError(f"{data_path}: no ADE20K in it; expected {ADE_LAYOUT}")
    found = pair_by_name(*(root / kind / SPLITS[split] for kind in ("images", "annotations")))
    try:
        _, *rows = (root / "objectInfo150.txt").read_text(encoding="utf-8-sig").splitlines()
    except (OSError, ValueError) as error:
        raise UserError(
            f"{root / 'objectInfo150.txt'} cannot be read ({one_line(error)}); it names the classes"
        ) from error
    classes = [row.split("\t")[-1].split(",")[0].strip() for row in rows if row.strip()]
    return _from_files(found, classes, first_class=1)


def read_masks_folder(data_path: Path, split: str) -> SegmentationImages:
    """A user's own images: ``{train,val}/images/*``, ``{train,val}/masks/*.png``, and classes in ``classes.txt``.

    Raises:
        UserError: files are missing, or there are more classes than a mask can hold.
    """
    path = data_path / "classes.txt"
    try:
        classes = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({one_line(error)}); expected {MASKS_LAYOUT}") from error
    if not 2 <= len(classes) <= VOID:
        raise UserError(f"{path}: {len(classes)} classes; it needs 2 to {VOID} names, the first of them for number 0")
    twice = sorted({name for name in classes if classes.count(name) > 1})
    if twice:
        raise UserError(f"{path}: the names {first_few(twice)} are there twice; each class needs its own")
    return _from_files(pair_by_name(*(data_path / split / kind for kind in ("images", "masks"))), classes)
