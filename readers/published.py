"""Readers of published data sets in their original layout: Cars, Flowers, Pets, DomainNet, CIFAR, digits."""

import os
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from torchvision.datasets import CIFAR10, CIFAR100, Flowers102, OxfordIIITPet, StanfordCars

from readers import CARS_LAYOUT, DOMAINNET_CLASSES, FLOWERS_LAYOUT, PETS_LAYOUT, domain_layout
from readers.images import ArrayImages, ImageFiles, one_line
from utils import UserError, first_few


def _checked_files(root: Path, names: list[str], targets: list[int], classes: list[str], source: Path) -> ImageFiles:
    """The image files that ``source`` lists; their existence is checked with one directory listing per folder.

    Args:
        root: folder that ``names`` are relative to.
        names, targets: path and label of each image.
        classes: names of the classes.
        source: the list or annotation file, for messages.
    Raises:
        UserError: a label out of range, or a missing file.
    """
    wrong = [label for label in targets if not 0 <= label < len(classes)]
    if wrong:
        raise UserError(f"{source}: label {wrong[0]} is not in 0..{len(classes) - 1}; fetch the file again")
    files = defaultdict(set)
    for folder in {os.path.dirname(name) for name in names}:
        if os.path.isdir(root / folder):
            files[folder] = set(os.listdir(root / folder))
    missing = [name for name in names if os.path.basename(name) not in files[os.path.dirname(name)]]
    if missing:
        raise UserError(
            f"{source} names {len(missing):,} files that are not in {root}, {missing[0]} first; extract them again"
        )
    return ImageFiles(root, names, targets, classes)


@contextmanager
def _errors_in_one_line(root: Path, layout: str) -> Iterator[None]:
    """Convert all exceptions of torchvision and scipy on missing or broken files to a one-line UserError."""
    try:
        yield
    except Exception as error:  # torchvision and scipy raise a dozen types
        reason = "files missing or damaged" if isinstance(error, RuntimeError) else one_line(error)
        raise UserError(f"{root}: {reason}; expected {layout}") from error


def read_cars(data_path: Path, split: str) -> ImageFiles:
    """Stanford Cars, with annotations read by torchvision.

    Raises:
        UserError: files missing or damaged, a label out of range.
    """
    part = "train" if split == "train" else "test"
    with _errors_in_one_line(data_path, CARS_LAYOUT):
        cars = StanfordCars(data_path, part)
        folder = f"stanford_cars/cars_{part}"
        names = [f"{folder}/{os.path.basename(path)}" for path, _ in cars._samples]
        targets = [int(label) for _, label in cars._samples]
    return _checked_files(data_path, names, targets, cars.classes, cars._annotations_mat_path)


def read_flowers(data_path: Path, split: str) -> ImageFiles:
    """Oxford's 102 flowers, read by torchvision; ``train`` is its train and val splits, ``val`` its test split.

    Raises:
        UserError: files missing or damaged.
    """
    with _errors_in_one_line(data_path, FLOWERS_LAYOUT):
        parts = [Flowers102(data_path, part) for part in (("train", "val") if split == "train" else ("test",))]
    names = [str(path.relative_to(data_path)) for part in parts for path in part._image_files]
    targets = [label for part in parts for label in part._labels]
    source = data_path / "flowers-102" / "imagelabels.mat"
    return _checked_files(data_path, names, targets, Flowers102.classes, source)


def read_pets(data_path: Path, split: str) -> ImageFiles:
    """Oxford-IIIT pets (37 breeds), with lists read by torchvision; ``val`` is the test split.

    Raises:
        UserError: files missing or damaged.
    """
    part = "trainval" if split == "train" else "test"
    with _errors_in_one_line(data_path, PETS_LAYOUT):
        pets = OxfordIIITPet(data_path, part)
    names = [str(path.relative_to(data_path)) for path in pets._images]
    return _checked_files(data_path, names, pets._labels, pets.classes, pets._anns_folder / f"{part}.txt")


def read_domainnet(data_path: Path, split: str, domain: str) -> ImageFiles:
    """One domain of DomainNet by its published lists, original or cleaned; ``val`` is the test list.

    Both lists are read, because only together do they name all classes.

    Raises:
        UserError: a missing, empty or binary list; a malformed line; a label out of range, with two names or without
            images; a missing image file.
    """
    lists = {part: data_path / f"{domain}_{part}.txt" for part in ("train", "test")}
    samples = {part: _read_list(path, domain) for part, path in lists.items()}
    folders = {}
    for part, path in lists.items():
        for name, label in samples[part]:
            folder = name.split("/")[1]
            if folders.setdefault(label, folder) != folder:
                raise UserError(f"{path}: label {label} is {folder} here and {folders[label]} before; fetch both lists")
    absent = [str(label) for label in range(DOMAINNET_CLASSES) if label not in folders]
    if absent:
        raise UserError(
            f"{lists['train']}: no images of the labels {first_few(absent)}; the published lists have "
            f"{DOMAINNET_CLASSES} classes"
        )
    classes = [folders[label] for label in range(DOMAINNET_CLASSES)]
    part = "train" if split == "train" else "test"
    names, targets = (list(column) for column in zip(*samples[part], strict=True))
    return _checked_files(data_path, names, targets, classes, lists[part])


def _read_list(path: Path, domain: str) -> list[tuple[str, int]]:
    """(path, label) of each line of a list, such as ``clipart/aircraft_carrier/clipart_001_000018.jpg 0``."""
    if not path.is_file():
        raise UserError(f"{path}: no such list; expected {domain_layout(domain)}")
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: no UTF-8 text ({error}); fetch the list again") from error
    if not lines:
        raise UserError(f"{path}: an empty list; fetch it again")
    samples = []
    for number, line in enumerate(lines, 1):
        name, _, label = line.rpartition(" ")
        if name.count("/") != 2 or not label.isdecimal():
            raise UserError(f"{path}, line {number}: {line!r} is not '{domain}/<class>/<file> <label>'")
        if int(label) >= DOMAINNET_CLASSES:
            raise UserError(f"{path}, line {number}: label {label} is not in 0..{DOMAINNET_CLASSES - 1}")
        samples.append((name, int(label)))
    return samples


def read_cifar(data_path: Path, split: str, reader: str) -> ArrayImages:
    """CIFAR-10 or CIFAR-100 from its Python batches, read and verified (MD5) by torchvision.

    Raises:
        UserError: files missing or damaged.
    """
    kind = {"CIFAR10": CIFAR10, "CIFAR100": CIFAR100}[reader]
    try:
        cifar = kind(data_path, train=split == "train")
    except RuntimeError as error:
        raise UserError(
            f"{data_path / kind.base_folder}: files missing or damaged; give --download, or extract "
            f"{kind.filename} (from https://www.cs.toronto.edu/~kriz/cifar.html) in {data_path}"
        ) from error
    return ArrayImages(cifar.data, cifar.targets, cifar.classes)


def read_digits(data_path: Path | None, split: str) -> ArrayImages:
    """scikit-learn's 1,797 scanned 8 x 8 digits; indices 0, 5, 10, ... (360 images) are ``val``, the rest ``train``.

    Consecutive digits share a writer, so both splits have the same writers, which makes the set easy.
    """
    from sklearn.datasets import load_digits  # takes a second to import; needed for this set only

    digits = load_digits()
    images = np.round(digits.images * (255 / 16)).astype(np.uint8)
    in_val = np.arange(len(images)) % 5 == 0
    chosen = in_val if split == "val" else ~in_val
    return ArrayImages(images[chosen], digits.target[chosen].tolist(), [str(name) for name in digits.target_names])
