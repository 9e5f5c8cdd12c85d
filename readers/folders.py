"""Image folders: ``train/<class>/*`` and ``val/<class>/*``, with all classes or those of a list."""

import os
from pathlib import Path

from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset

from readers import FOLDER_LAYOUT
from readers.images import ImageFiles, first_few, list_images
from utils import UserError

CLASS_LISTS = Path(__file__).parent / "class_lists"


def read_folder(data_path: Path, split: str, class_list: str | None = None) -> ImageFiles:
    """One split of ``train/<class>/*`` and ``val/<class>/*``; labels are positions in the sorted class names.

    Args:
        data_path: the folder that holds ``train/`` and ``val/``.
        split: "train" or "val".
        class_list: file in :data:`CLASS_LISTS` with the classes to keep. Default: all classes, which must then be the
            same in both splits.

    Raises:
        UserError: a split is missing, flat or empty, a class empty or missing, or the splits differ.
    """
    found = _class_folders(data_path, split)
    if class_list is None:
        check_same_classes(data_path, split, found, _class_folders)
        return _read_classes(data_path, split, found)
    wanted = _read_class_list(class_list)
    missing = sorted(set(wanted) - set(found))
    if missing:
        raise UserError(
            f"{data_path / split}: no folders for the classes {first_few(missing)}; "
            f"--data-path must hold all of readers/class_lists/{class_list}"
        )
    return _read_classes(data_path, split, wanted)


def read_images(data_path: Path, split: str) -> ImageFiles:
    """All images of a folder and of those below it, without classes; there is no other split than "train".

    Raises:
        UserError: no image.
    """
    names = [str(path.relative_to(data_path)) for path in list_images(data_path)]
    return ImageFiles(data_path, names, [0] * len(names), [])


def _read_classes(data_path: Path, split: str, classes: list[str]) -> ImageFiles:
    labels = {name: label for label, name in enumerate(classes)}
    root = data_path / split
    samples = make_dataset(root, labels, IMG_EXTENSIONS, allow_empty=True)
    targets = [label for _, label in samples]
    filled = set(targets)
    empty = [name for label, name in enumerate(classes) if label not in filled]
    if empty:
        raise UserError(
            f"{root}: no images in the class folders {first_few(empty)}; "
            f"remove them or fill them with images ({' '.join(IMG_EXTENSIONS)})"
        )
    prefix = len(os.path.join(root, ""))
    return ImageFiles(data_path, [f"{split}/{path[prefix:]}" for path, _ in samples], targets, classes)


def _class_folders(data_path: Path, split: str) -> list[str]:
    root = data_path / split
    if not root.is_dir():
        raise UserError(f"{data_path}: no folder {split}/; expected {FOLDER_LAYOUT}")
    entries = list(os.scandir(root))
    classes = sorted(entry.name for entry in entries if entry.is_dir())
    if classes:
        return classes
    if any(entry.name.lower().endswith(IMG_EXTENSIONS) for entry in entries):
        raise UserError(
            f"{root}: images lie directly in it; sort them into one folder per class, {split}/<class>/* "
            "(for ILSVRC-2012's validation images, extract_ILSVRC.sh of PyTorch's ImageNet example does so)"
        )
    raise UserError(f"{root}: no images; expected {FOLDER_LAYOUT}")


def check_same_classes(data_path: Path, split: str, classes: list[str], classes_of) -> None:
    """Check that both splits have the same classes; labels are positions among the class names of a split.

    A class missing from one split would shift all later labels. Without the other split there is nothing to check.

    Args:
        data_path: the folder that holds both splits.
        split: the split that was read.
        classes: its class names.
        classes_of: ``classes_of(data_path, split)`` returns those of the other split.
    Raises:
        UserError: the class names differ.
    """
    other = "val" if split == "train" else "train"
    if not (data_path / other).is_dir() and not (data_path / f"{other}.tar").is_file():
        return  # evaluation needs no training images; training reads the other split later
    difference = {split: set(classes), other: set(classes_of(data_path, other))}
    only = [
        f"only in {name}/: {first_few(sorted(difference[name] - difference[against]))}"
        for name, against in ((split, other), (other, split))
        if difference[name] - difference[against]
    ]
    if only:
        raise UserError(f"{data_path}: train/ and val/ must have the same class folders; {'; '.join(only)}")


def _read_class_list(name: str) -> list[str]:
    lines = (CLASS_LISTS / name).read_text().splitlines()
    return sorted(line for line in lines if line and not line.startswith("#"))
