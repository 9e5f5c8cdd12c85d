"""Images with segmentation masks: PASCAL VOC's layout, or a folder of images and a folder of foreground masks.

    VOCdevkit/VOC2012/JPEGImages/a.jpg  SegmentationClass/a.png  ImageSets/Segmentation/val.txt
    images/a.jpg                        masks/a.png

Each pixel of VOC's masks holds the number of a class; 0 is background, 255 is void (object borders and ambiguous
regions). A foreground mask has one object, its nonzero pixels.
"""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.models.segmentation import FCN_ResNet50_Weights

from readers import VOC_LAYOUT
from readers.files import list_images
from readers.images import open_image, read_image
from utils import UserError

BACKGROUND, VOID = 0, 255
VOC_CLASSES = FCN_ResNet50_Weights.COCO_WITH_VOC_LABELS_V1.meta["categories"]
"""PASCAL VOC's background and 20 classes, by label."""

FOREGROUND_LAYOUT = "images/ and masks/ (a PNG of the same name for every image)"
FOREGROUND_MODES = ("1", "L", "P", "I;16", "I", "RGB")


@dataclass(frozen=True)
class MaskedImages:
    """Paths of images and their masks, from :func:`read_masked_images`.

    Attributes:
        names: of the images, without suffix.
        images, masks: their files.
        split: name of VOC's list; None for foreground masks.
    """

    names: list[str]
    images: list[Path]
    masks: list[Path]
    split: str | None

    def __len__(self) -> int:
        return len(self.names)

    def image(self, index: int) -> Image.Image:
        """The RGB image; raises UnreadableImage."""
        return read_image(self.images[index])

    def labels(self, index: int, size: int) -> Tensor:
        """The mask resized to ``(size, size)`` (nearest): uint8 labels; 0 and 1 for a foreground mask.

        Raises:
            UnreadableImage: a file that is truncated or not an image.
        """
        with open_image(self.masks[index]) as mask:
            pixels: np.ndarray = np.array(mask)
        if self.split is None:
            pixels = np.any(pixels.reshape(*pixels.shape[:2], -1) > 0, axis=-1)
        labels = Image.fromarray(pixels.astype(np.uint8)).resize((size, size), Image.Resampling.NEAREST)
        return torch.from_numpy(np.array(labels))

    def class_name(self, label: int) -> str:
        """VOC's name of a class; the number itself if VOC has no such class."""
        if self.split is None:
            return "foreground"
        return VOC_CLASSES[label] if label < len(VOC_CLASSES) else str(label)


def read_masked_images(data_path: str | Path, split: str | None = None) -> MaskedImages:
    """Find images and masks, and check everything that needs no decoding.

    Args:
        data_path: VOCdevkit, its parent or its VOC2012 folder; or the parent folder of images/ and masks/.
        split: name of the list in ImageSets/Segmentation (default: val).

    Raises:
        UserError: neither layout, an image without mask or vice versa, different sizes, masks without class numbers.
        UnreadableImage: a file whose header cannot be read.
    """
    root = Path(data_path).expanduser()
    if not root.is_dir():
        raise UserError(f"{root}: no such folder; give one with {VOC_LAYOUT}; or with {FOREGROUND_LAYOUT}")
    voc = voc_folder(root)
    if voc is not None:
        found = read_voc_list(voc, split or "val")
    elif (root / "images").is_dir() and (root / "masks").is_dir():
        if split is not None:
            raise UserError(f"--split {split}: {root} has images/ and masks/ without lists; leave --split out")
        found = pair_by_name(root / "images", root / "masks")
    else:
        raise UserError(f"{root}: no images with masks; expected {VOC_LAYOUT}; or {FOREGROUND_LAYOUT}")
    for image, mask in zip(found.images, found.masks, strict=True):
        _check_pair(image, mask, found.split is not None)
    return found


def voc_folder(root: Path) -> Path | None:
    """The folder VOC2012: ``root``, or the one in it or in its VOCdevkit; None if there is none."""
    places = (root, root / "VOC2012", root / "VOCdevkit/VOC2012")
    return next((place for place in places if (place / "SegmentationClass").is_dir()), None)


def read_voc_list(root: Path, split: str, labelled: bool = True) -> MaskedImages:
    """The images of a list in ``ImageSets/Segmentation``, whose files are checked to exist.

    Args:
        root: VOC2012.
        split: name of the list.
        labelled: whether the images have masks; those of VOC's test have none.

    Raises:
        UserError: a list or a file is missing, or the list is empty or names an image twice.
    """
    # torchvision's VOCSegmentation supports only VOC's own lists, and does not check the files.
    lists = root / "ImageSets/Segmentation"
    if not (lists / f"{split}.txt").is_file():
        there = ", ".join(sorted(path.stem for path in lists.glob("*.txt")))
        raise UserError(f"{lists / split}.txt: no such list; " + (f"--split can be {there}" if there else VOC_LAYOUT))
    try:
        lines = (lists / f"{split}.txt").read_text(encoding="utf-8-sig").splitlines()
    except ValueError:
        raise UserError(f"{lists / split}.txt is not text in UTF-8; it needs one name a line, without suffix") from None
    names = [line.strip() for line in lines if line.strip()]
    twice = [name for name, times in Counter(names).items() if times > 1]
    if twice:
        raise UserError(f"{lists / split}.txt names {twice[0]} twice ({len(twice):,} names are); take one out")
    if not names:
        raise UserError(f"{lists / split}.txt names no image; it needs one name a line, without suffix")
    images = [root / "JPEGImages" / f"{name}.jpg" for name in names]
    masks = [root / "SegmentationClass" / f"{name}.png" for name in names]
    for kind, paths in (("image", images), ("mask", masks if labelled else [])):
        missing = [path for path in paths if not path.is_file()]
        if missing:
            raise UserError(
                f"{missing[0]}: no such {kind}, but {split}.txt names it ({len(missing):,} of {len(paths):,} are "
                "missing); bring it there, or take its name out of the list"
            )
    return MaskedImages(names, images, masks, split)


def pair_by_name(image_folder: Path, mask_folder: Path) -> MaskedImages:
    """Images and masks of the same name in two folders.

    Raises:
        UserError: an image without mask or vice versa, two of one name, or masks that are no PNG files.
    """

    def by_name(folder: Path) -> dict[str, Path]:
        found = {}
        for path in list_images(folder):
            name = path.relative_to(folder).with_suffix("").as_posix()
            if name in found:
                raise UserError(f"{found[name]} and {path}: two files of the same name; remove one of them")
            found[name] = path
        return found

    images, masks = by_name(image_folder), by_name(mask_folder)
    lossy = [path for path in masks.values() if path.suffix.lower() != ".png"]
    if lossy:
        raise UserError(f"{lossy[0]}: masks must be PNG files, as other formats may change their pixels")
    for kind, folder, here, there in (("mask", mask_folder, images, masks), ("image", image_folder, masks, images)):
        alone = sorted(here.keys() - there.keys())
        if alone:
            raise UserError(f"{here[alone[0]]} has no {kind} {folder / alone[0]}.* ({len(alone):,} have none)")
    return MaskedImages(list(images), list(images.values()), [masks[name] for name in images], None)


def _check_pair(image: Path, mask: Path, voc: bool) -> None:
    """Check sizes and modes of an image and its mask, from the headers; raise UserError if they do not fit."""
    with open_image(image) as picture, open_image(mask) as labels:
        if picture.size != labels.size:
            sizes = " and ".join("{} x {}".format(*file.size) for file in (picture, labels))
            raise UserError(f"{image} and {mask} differ in size: {sizes} px; bring the mask that belongs to the image")
        if voc and labels.mode not in ("P", "L"):
            raise UserError(
                f"{mask}: {labels.mode} pixels instead of class numbers; this is the palette saved as colours: "
                "take the original file (mode P), or turn each colour back into its number"
            )
        if not voc and labels.mode not in FOREGROUND_MODES:
            raise UserError(f"{mask}: {labels.mode} pixels; save the mask as black and white, without transparency")


def count_labels(labels: Tensor, h: int, w: int) -> tuple[Tensor, Tensor]:
    """Count the pixels of each label in every patch, for a batch.

    Args:
        labels: uint8 ``(B, H, W)``; ``H`` and ``W`` are multiples of ``h`` and ``w``.
        h, w: rows and columns of the patch grid.

    Returns:
        ``present``, int64 ``(K,)``: the labels in the batch, ascending; ``counts``, int64 ``(B, K, h, w)``.
    """
    batch, height, width = labels.shape
    device = labels.device
    present = labels.flatten().bincount().nonzero().flatten()
    place = torch.zeros(256, dtype=torch.int32, device=device)
    place[present] = torch.arange(len(present), dtype=torch.int32, device=device)
    image = torch.arange(batch, dtype=torch.int32, device=device)[:, None, None]
    row = torch.arange(height, dtype=torch.int32, device=device)[:, None] // (height // h)
    column = torch.arange(width, dtype=torch.int32, device=device) // (width // w)
    bins = (image * h + row) * (w * len(present)) + column * len(present)  # (B, H, W): index of the patch's first bin
    bins = bins.flatten() + place.index_select(0, labels.flatten().int())
    counts = bins.bincount(minlength=batch * h * w * len(present)).view(batch, h, w, -1)
    return present, counts.permute(0, 3, 1, 2)
