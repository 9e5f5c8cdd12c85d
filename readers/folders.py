"""Image folders: ``train/<class>/*`` and ``val/<class>/*``, all classes or those of a list; or ``<class>/*`` alone."""

import os
from collections.abc import Mapping
from pathlib import Path

from readers import FOLDER_LAYOUT
from readers.files import (
    EXTENSIONS,
    KNOWN,
    LeftOut,
    find_images,
    is_hidden,
    leads_back,
    no_images,
    suffix_of,
)
from readers.images import ImageFiles
from utils import UserError, first_few, readable

CLASS_LISTS = Path(__file__).parent / "class_lists"


def read_folder(data_path: Path, split: str, class_list: str | None = None) -> ImageFiles:
    """One split of ``train/<class>/*`` and ``val/<class>/*``; labels are positions in the sorted class names.

    Args:
        data_path: the folder that holds ``train/`` and ``val/``.
        split: "train" or "val".
        class_list: file in :data:`CLASS_LISTS` with the classes to keep. Default: all classes, which must then be the
            same in both splits.

    Raises:
        UserError: a split is missing, flat, empty or one folder too deep, a class empty or missing, or the splits
            differ.
    """
    found = _class_folders(data_path, split)
    if class_list is None:
        check_same_classes(data_path, split, found, _class_folders)
        return _check_filled(read_classes(data_path, split, found), data_path / split)
    wanted = _read_class_list(class_list)
    missing = sorted(set(wanted) - set(found))
    if missing:
        raise UserError(
            f"{data_path / split}: no folders for the classes {first_few(missing)}; "
            f"--data-path must hold all of readers/class_lists/{class_list}"
        )
    return _check_filled(read_classes(data_path, split, wanted), data_path / split)


def class_root(data_path: Path) -> Path:
    """Where the class folders of a set without ``val/`` are: in ``train/`` if there is one, else in ``data_path``.

    Raises:
        UserError: the set has ``val/``.
    """
    parts = [part for part in ("train", "val") if (data_path / part).is_dir()]
    if parts == ["train", "val"]:
        raise UserError(f"--val-split: {data_path} has a folder val/ of its own; leave --val-split out")
    return data_path / "train" if parts == ["train"] else data_path


def read_class_folders(data_path: Path) -> ImageFiles:
    """All images of a single folder of classes, see `class_root`; their names are paths below that.

    Raises:
        UserError: it has ``val/``, is flat, empty or one folder too deep, or a class is empty.
    """
    root = class_root(data_path)
    classes = class_folders(root)
    if not classes:
        raise UserError(f"{root}: no class folders; --val-split needs <class>/* or train/<class>/* in --data-path")
    names, targets, left_out = find_in_classes(root, {name: label for label, name in enumerate(classes)})
    if len(classes) == 1:
        _check_depth(root, classes[0], {os.path.dirname(name) for name in names})
    images = ImageFiles(root, names, targets, classes)
    images.left_out = left_out
    return _check_filled(images, root)


def count_training(data_path: Path, enough: int) -> int:
    """The number of images in the class folders of ``train/``, or of ``data_path`` itself if it has none."""
    root = data_path / "train" if (data_path / "train").is_dir() else data_path
    found, _ = find_images(root, enough=enough)
    return sum(folder != "" for folder, _ in found)


def read_images(data_path: Path, split: str) -> ImageFiles:
    """All images of a folder and of those below it, without classes; there is no other split than "train".

    Raises:
        UserError: no image.
    """
    found, left_out = find_images(data_path)
    if not found:
        raise no_images(data_path, left_out)
    names = [str(path) for path in sorted(Path(*place) for place in found)]
    images = ImageFiles(data_path, names, [0] * len(names), [])
    images.left_out = left_out
    return images


def find_in_classes(root: Path, labels: Mapping[str, int]) -> tuple[list[str], list[int], LeftOut]:
    """The images of some class folders, ordered by label, folder and name.

    Args:
        root: the folder that holds them.
        labels: label of each class; a class may have no folder, or an empty one.

    Returns:
        Their paths below ``root``, their labels, and what is left out.
    """
    found, left_out = find_images(root, only=labels)
    left_out.beside.extend(name for folder, name in found if not folder)
    rows = sorted((labels[folder.partition("/")[0]], folder, name) for folder, name in found if folder)
    return [f"{folder}/{name}" for _, folder, name in rows], [label for label, _, _ in rows], left_out


def read_classes(data_path: Path, split: str, classes: list[str]) -> ImageFiles:
    """All images of these classes of a split; a class may be empty.

    Raises:
        UserError: the classes lie one folder too deep.
    """
    root = data_path / split
    names, targets, left_out = find_in_classes(root, {name: label for label, name in enumerate(classes)})
    if len(classes) == 1:
        _check_depth(root, classes[0], {os.path.dirname(name) for name in names})
    images = ImageFiles(data_path, [f"{split}/{name}" for name in names], targets, classes)
    images.left_out = left_out.below(split)
    return images


def _check_depth(root: Path, name: str, folders: set[str]) -> None:
    """Refuse a single class folder that itself holds what looks like the class folders."""
    common = os.path.commonpath(folders) if folders else name
    if folders and common not in folders:
        inside = sorted({os.path.relpath(folder, common).partition("/")[0] for folder in folders})
        raise UserError(
            f"{root}: its only class folder is {name}/, whose images lie in the folders {first_few(inside)}; if these "
            f"are the classes, move them from {root / common} to {root}. Without classes, give --data-set images"
        )


def _check_filled(images: ImageFiles, root: Path) -> ImageFiles:
    filled = set(images.targets.tolist())
    empty = [name for label, name in enumerate(images.classes) if label not in filled]
    if empty:
        rest = f"; left out: {images.left_out}" if str(images.left_out) else ""
        raise UserError(
            f"{root}: no images in the class folders {first_few(empty)}; "
            f"remove them or fill them with images ({KNOWN}){rest}"
        )
    return images


def class_folders(root: Path) -> list[str]:
    """The sorted names of the folders in ``root`` that are no system's, hidden, or links back into it."""
    top = os.path.realpath(root)
    return sorted(
        entry.name
        for entry in os.scandir(root)
        if entry.is_dir() and not is_hidden(entry.name) and not leads_back(entry, top)
    )


def _class_folders(data_path: Path, split: str) -> list[str]:
    root = data_path / split
    if not root.is_dir():
        deeper = sorted(path.parent for path in data_path.glob(f"*/{split}") if path.is_dir())
        mend = f"; did you mean --data-path {deeper[0]}?" if len(deeper) == 1 else ""
        if not deeper and class_folders(data_path):
            mend = "; --data-set folder --val-split 0.1 holds a tenth of each class out of train/<class>/* or <class>/*"
        raise UserError(f"{data_path}: no folder {split}/; expected {FOLDER_LAYOUT}{mend}")
    classes = class_folders(root)
    if classes:
        return classes
    if any(suffix_of(entry.name) in EXTENSIONS and not is_hidden(entry.name) for entry in os.scandir(root)):
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
    difference = {split: set(map(readable, classes)), other: set(map(readable, classes_of(data_path, other)))}
    only = [
        f"only in {name}/: {first_few(sorted(difference[name] - difference[against]))}"
        for name, against in ((split, other), (other, split))
        if difference[name] - difference[against]
    ]
    if only:
        raise UserError(f"{data_path}: train/ and val/ must have the same class folders; {'; '.join(only)}")


def _read_class_list(name: str) -> list[str]:
    lines = (CLASS_LISTS / name).read_text(encoding="utf-8").splitlines()
    return sorted(line for line in lines if line and not line.startswith("#"))
