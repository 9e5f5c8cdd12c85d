"""Every data set by name, its images' transforms, and the loader that feeds them to a model.

A set is one entry of :data:`DATASETS`. Building it checks its files (layout, classes, nothing empty), so
building both splits at start-up is the pre-flight check; what is wrong is one line in a ``UserError``.
An image's augmentation depends on (seed, epoch, position) alone: not on workers or what ran before.
"""

import difflib
import os
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import create_transform
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision import transforms
from torchvision.datasets import CIFAR10, CIFAR100, ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS, default_loader

from samplers import Draw, seed_sequence
from utils import Processes, UserError

CLASS_LISTS = Path(__file__).parent / "class_lists"
SMALL_IMAGE = 32  # px; up to this size DeiT crops from a padded image instead of resizing a random part of it
MAX_REPLACEMENTS = 10  # unreadable images in a row that are replaced before the run stops after all


class UnreadableImage(UserError):
    """An image file that cannot be decoded; the message names it.

    A ``DataLoader`` raises a worker's exception again with the worker's whole traceback as the message. The
    last line of that is the original message, and all that is kept.
    """

    def __init__(self, message: str):
        last_line = message.strip().splitlines()[-1]
        super().__init__(last_line.removeprefix(f"{type(self).__module__}.{type(self).__qualname__}: "))


# ------------------------------------------------------------------ readers: files to (image, label)


def read_image(path: str) -> Image.Image:
    """Decode an image file to RGB.

    Raises:
        UnreadableImage: missing, truncated, or no image.
    """
    try:
        return default_loader(path)
    except Exception as error:  # Pillow's decoders raise a dozen types on broken files
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UnreadableImage(
            f"cannot read the image {str(path)!r} ({reason}): mend or remove the file, or give --skip-unreadable"
        ) from error


class ClassFolders(ImageFolder):
    """Images in one folder a class; labels are positions in ``classes``, other folders are left out."""

    def __init__(self, root: Path, classes: list[str]):
        self._wanted = classes
        super().__init__(root, loader=read_image, allow_empty=True)
        filled = set(self.targets)
        empty = [name for label, name in enumerate(classes) if label not in filled]
        if empty:
            raise UserError(
                f"{root}: no images in the class folders {_some(empty)}; "
                f"remove them or fill them with images ({' '.join(IMG_EXTENSIONS)})"
            )

    def find_classes(self, directory: str) -> tuple[list[str], dict[str, int]]:
        return self._wanted, {name: label for label, name in enumerate(self._wanted)}


def read_folder(
    data_path: Path, split: str, num_classes: int | None = None, class_list: str | None = None
) -> ClassFolders:
    """One split of ``train/<class>/*`` and ``val/<class>/*``; labels are the sorted class names.

    Args:
        num_classes: so many classes there must be.
        class_list: file of :data:`CLASS_LISTS` with the classes to keep; without it all are kept, and the two
            splits must have the same ones.

    Raises:
        UserError: a split is missing, flat or empty, a class empty or missing, the splits differ, or there is
            another number of classes.
    """
    found = _class_folders(data_path, split)
    if class_list is not None:
        wanted = _read_class_list(class_list)
        missing = sorted(set(wanted) - set(found))
        if missing:
            raise UserError(
                f"{data_path / split}: no folders for the classes {_some(missing)}; "
                f"--data-path must hold all of class_lists/{class_list}"
            )
        return ClassFolders(data_path / split, wanted)
    if num_classes is not None and len(found) != num_classes:
        raise UserError(
            f"{data_path / split}: {len(found)} class folders instead of {num_classes}; "
            "a folder of other images is trained on with --data-set folder"
        )
    _check_other_split(data_path, split, found)
    return ClassFolders(data_path / split, found)


def _class_folders(data_path: Path, split: str) -> list[str]:
    root = data_path / split
    if not root.is_dir():
        raise UserError(f"{data_path}: no folder {split}/; expected train/<class>/* and val/<class>/*")
    entries = list(os.scandir(root))
    classes = sorted(entry.name for entry in entries if entry.is_dir())
    if classes:
        return classes
    if any(entry.name.lower().endswith(IMG_EXTENSIONS) for entry in entries):
        raise UserError(
            f"{root}: images lie directly in it; sort them into one folder a class, {split}/<class>/* "
            "(for ILSVRC-2012's validation images, extract_ILSVRC.sh of PyTorch's ImageNet example does so)"
        )
    raise UserError(f"{root}: no images; expected train/<class>/* and val/<class>/*")


def _check_other_split(data_path: Path, split: str, classes: list[str]) -> None:
    """Labels are positions among the class folders: one that a split lacks would shift all after it."""
    other = "val" if split == "train" else "train"
    if not (data_path / other).is_dir():
        return  # evaluation needs no training images; a training run builds the other split, too
    difference = {split: set(classes), other: set(_class_folders(data_path, other))}
    only = [
        f"only in {name}/: {_some(sorted(difference[name] - difference[against]))}"
        for name, against in ((split, other), (other, split))
        if difference[name] - difference[against]
    ]
    if only:
        raise UserError(f"{data_path}: train/ and val/ must have the same class folders; {'; '.join(only)}")


def _read_class_list(name: str) -> list[str]:
    lines = (CLASS_LISTS / name).read_text().splitlines()
    return sorted(line for line in lines if line and not line.startswith("#"))


def _some(names: list[str], limit: int = 5) -> str:
    rest = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {rest} more" if rest > 0 else "")


def read_cifar(reader: type[CIFAR10], data_path: Path, split: str) -> CIFAR10:
    """CIFAR's python batches, as torchvision reads (and checksums) them.

    Raises:
        UserError: files missing or damaged.
    """
    try:
        return reader(data_path, train=split == "train")
    except RuntimeError as error:
        raise UserError(
            f"{data_path / reader.base_folder}: files missing or damaged; extract {reader.filename} "
            f"(from https://www.cs.toronto.edu/~kriz/cifar.html) in {data_path}"
        ) from error


class ArrayImages(Dataset):
    """Grey images ``(N, h, w)`` uint8 in memory with labels ``(N,)``, read as RGB."""

    def __init__(self, images: np.ndarray, targets: np.ndarray, classes: list[str]):
        self.images = images
        self.targets = targets.tolist()
        self.classes = classes

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.images[index]).convert("RGB"), self.targets[index]

    def __len__(self) -> int:
        return len(self.targets)


def read_digits(data_path: Path | None, split: str) -> ArrayImages:
    """scikit-learn's 1,797 scanned 8 x 8 digits; numbers 0, 5, 10, ... (360) are ``val``, the rest ``train``.

    Consecutive digits are one writer's, so ``val`` has the same writers: an easy set.
    """
    from sklearn.datasets import load_digits  # a second to import, for this set only

    digits = load_digits()
    images = np.round(digits.images * (255 / 16)).astype(np.uint8)
    in_val = np.arange(len(images)) % 5 == 0
    chosen = in_val if split == "val" else ~in_val
    return ArrayImages(images[chosen], digits.target[chosen], [str(name) for name in digits.target_names])


# ---------------------------------------------------------------------------- the data sets by name


@dataclass(frozen=True)
class DataSet:
    """How to read a set, and what to know of it.

    ``read(data_path, split)`` gives a set of (RGB image, label) with ``classes``; ``about`` says what it is,
    ``layout`` what ``--data-path`` must hold (empty: the set needs none); ``defaults`` are the values it
    brings for arguments not given.
    """

    read: Callable[[Path | None, str], Dataset]
    about: str
    layout: str = ""
    defaults: dict[str, Any] = field(default_factory=dict)


FOLDER_LAYOUT = "train/<class>/* and val/<class>/*"
DATASETS: dict[str, DataSet] = {
    "digits": DataSet(
        read_digits,
        "1,797 scanned digits that come with scikit-learn",
        defaults={  # minutes on a laptop; digits are not mirrored, nor cropped to a part
            "input_size": 20,
            "patch_size": 4,
            "batch_size": 32,
            "total_batch": 32,
            "epochs": 5,
            "warmup_epochs": 1,
            "sched_on_updates": True,
            "lr": 8e-3,
            "model_ema": False,
            "mixup": 0.0,
            "cutmix": 0.0,
            "aa": "none",
            "hflip": 0.0,
            "reprob": 0.0,
            "crop_pct": 1.0,
            "num_workers": 0,
        },
    ),
    "folder": DataSet(read_folder, "your own images", FOLDER_LAYOUT),
    "imagenet": DataSet(partial(read_folder, num_classes=1000), "ImageNet-1k (ILSVRC-2012)", FOLDER_LAYOUT),
    "imagenet100": DataSet(
        partial(read_folder, class_list="imagenet100.txt"),
        "the 100 classes of ImageNet-1k in class_lists/imagenet100.txt",
        f"{FOLDER_LAYOUT}, of all ImageNet-1k or of the 100 classes",
    ),
    "cifar10": DataSet(partial(read_cifar, CIFAR10), "CIFAR-10", "cifar-10-batches-py/"),
    "cifar100": DataSet(partial(read_cifar, CIFAR100), "CIFAR-100", "cifar-100-python/"),
}
DEIT_NAMES = {"imnet": "imagenet", "cifar": "cifar100"}


def canonical_name(name: str) -> str:
    """The key of :data:`DATASETS` that ``name`` means; any case and DeiT's IMNET and CIFAR are understood.

    Raises:
        UserError: no such set; names the nearest.
    """
    key = DEIT_NAMES.get(name.lower(), name.lower())
    if key in DATASETS:
        return key
    nearest = difflib.get_close_matches(key, DATASETS)
    hint = f"did you mean {' or '.join(nearest)}?" if nearest else f"known are {', '.join(DATASETS)}"
    raise UserError(f"unknown data set {name!r}: {hint}")


def build_dataset(
    name: str,
    split: str,
    data_path: str | Path | None = None,
    transform: Callable[[Image.Image], Any] | None = None,
    seed: int = 0,
    skip_unreadable: bool = False,
) -> tuple["AugmentedDataset", int]:
    """One split of a data set by name, and its number of classes.

    Args:
        name: a key of :data:`DATASETS`, or DeiT's spelling.
        split: "train" or "val".
        data_path: folder with the set's files (layouts: :data:`DATASETS`).
        transform, seed, skip_unreadable: see :class:`AugmentedDataset`.

    Raises:
        UserError: unknown name, or files that are not as they should be.
        ValueError: unknown split.
    """
    if split not in ("train", "val"):
        raise ValueError(f"split must be 'train' or 'val', not {split!r}")
    name = canonical_name(name)
    entry = DATASETS[name]
    if data_path is not None:
        data_path = Path(data_path).expanduser()
    if entry.layout:
        if data_path is None:
            raise UserError(f"data set {name} needs --data-path, a folder with {entry.layout}")
        if not data_path.is_dir():
            raise UserError(f"--data-path {data_path}: no such folder; {name} needs one with {entry.layout}")
    try:
        base = entry.read(data_path, split)
    except OSError as error:  # no permission, a broken disk
        raise UserError(f"{error.filename or data_path}: {error.strerror}; {name} must be readable") from error
    return AugmentedDataset(base, transform, seed, skip_unreadable), len(base.classes)


def build_split(args: Any, split: str, processes: Processes) -> tuple["AugmentedDataset", int]:
    """One split of the run's data set with its transform, and the number of classes.

    Args:
        args: the command line's.
        processes: this process among the run's.

    Raises:
        UserError: see :func:`build_dataset`, :func:`build_transform`.
    """
    transform = build_transform(split == "train", args)
    return build_dataset(
        args.data_set,
        split,
        args.data_path,
        transform,
        seed=args.seed,
        skip_unreadable=args.skip_unreadable,
    )


# ------------------------------------------------------------------------- augmentation and loading


@contextmanager
def isolated_rng(seeds: np.random.SeedSequence) -> Iterator[None]:
    """Let the CPU's global generators (random, numpy, torch) start from ``seeds`` within the block.

    After it they go on as if it had not been; CUDA's are not touched.
    """
    saved = random.getstate(), np.random.get_state(), torch.default_generator.get_state()  # noqa: NPY002
    for_random, for_torch, for_numpy = seeds.generate_state(3, np.uint64)
    random.seed(int(for_random))
    torch.default_generator.manual_seed(int(for_torch))  # torch.manual_seed would reseed CUDA, too
    np.random.seed(np.array([for_numpy]).view(np.uint32))  # noqa: NPY002  timm draws from the global generator
    try:
        yield
    finally:
        random.setstate(saved[0])
        np.random.set_state(saved[1])  # noqa: NPY002
        torch.default_generator.set_state(saved[2])


class AugmentedDataset(Dataset):
    """Draws of a sampler to ``(image, target, replaced)``.

    ``image`` is ``transform``'s tensor ``(3, h, w)`` (without one, the RGB image itself), ``target`` its
    label and ``replaced`` 1 if this image stands in for an unreadable one, else 0. The transform's random
    numbers depend on ``(seed, draw.epoch, draw.position)`` only; the process's own generators do not notice.

    Args:
        base: set of (RGB image, label).
        seed: not negative.
        skip_unreadable: let the next readable image of ``base`` stand in for an unreadable one.

    Raises:
        UnreadableImage: on access, without ``skip_unreadable`` or when :data:`MAX_REPLACEMENTS` fail too.
    """

    def __init__(
        self,
        base: Dataset,
        transform: Callable[[Image.Image], Any] | None = None,
        seed: int = 0,
        skip_unreadable: bool = False,
    ):
        self.base = base
        self.classes = base.classes
        self.transform = transform
        self.seed = seed
        self.skip_unreadable = skip_unreadable

    def __len__(self) -> int:
        return len(self.base)

    def __getitem__(self, draw: Draw) -> tuple[Any, int, int]:
        image, target, replaced = self._read(draw.index)
        if self.transform is not None:
            with isolated_rng(seed_sequence("augmentation", self.seed, draw.epoch, draw.position)):
                image = self.transform(image)
        return image, target, replaced

    def _read(self, index: int) -> tuple[Image.Image, int, int]:
        last_try = MAX_REPLACEMENTS if self.skip_unreadable else 0
        for tried in range(last_try + 1):
            try:
                image, target = self.base[(index + tried) % len(self.base)]
                return image, int(target), int(tried > 0)
            except UnreadableImage:
                if tried == last_try:
                    raise


def build_transform(train: bool, args: Any) -> transforms.Compose:
    """DeiT's transforms through timm: an RGB image to a float32 tensor ``(3, input_size, input_size)``.

    Training: random resized crop (up to :data:`SMALL_IMAGE` px: random crop of the image padded by 4), flip,
    RandAugment (colour jitter without it), random erasing. Evaluation: bicubic resize of the shorter side to
    ``input_size / crop_pct``, centre crop. Both normalise by ImageNet's mean and deviation.

    Args:
        args: has ``input_size, color_jitter, aa, train_interpolation, reprob, remode, recount, crop_pct,
            hflip, scale``. ``aa`` "none" is no RandAugment; ``crop_pct`` None is DeiT's: 0.875, small images
            whole.

    Raises:
        UserError: ``aa`` is not timm's language.
    """
    small = args.input_size <= SMALL_IMAGE
    if not train:
        crop_pct = args.crop_pct
        if crop_pct is None:
            crop_pct = 1.0 if small else 0.875
        return create_transform(args.input_size, interpolation="bicubic", crop_pct=crop_pct)
    try:
        transform = create_transform(
            args.input_size,
            is_training=True,
            scale=tuple(args.scale),
            hflip=args.hflip,
            color_jitter=args.color_jitter or None,
            auto_augment=None if args.aa == "none" else args.aa,
            interpolation=args.train_interpolation,
            re_prob=args.reprob,
            re_mode=args.remode,
            re_count=args.recount,
        )
    except (AssertionError, ValueError) as error:
        raise UserError(f"--aa {args.aa}: not understood by timm ({error}); e.g. rand-m9-mstd0.5-inc1") from error
    if small:
        resize = transforms.Resize(args.input_size, transforms.InterpolationMode.BICUBIC)
        transform.transforms[0:1] = [resize, transforms.RandomCrop(args.input_size, padding=4)]
    return transform


def build_loader(
    dataset: AugmentedDataset,
    sampler: Sampler[Draw],
    batch_size: int,
    num_workers: int,
    pin_memory: bool = False,
) -> DataLoader:
    """Batches ``(images (B, 3, h, w), targets (B,), replaced (B,))`` in the sampler's order.

    Workers live as long as the loader; each iteration asks the sampler anew, so ``sampler.set_epoch`` counts.
    """
    return DataLoader(
        dataset,
        batch_size=batch_size,
        sampler=sampler,
        num_workers=num_workers,
        pin_memory=pin_memory,
        persistent_workers=num_workers > 0,
        worker_init_fn=_leave_process_group,
        generator=torch.Generator(),  # without one, every iteration takes a number from the global generator
    )


def _leave_process_group(worker_id: int) -> None:
    """Leave signals to the whole process group (Ctrl-C, timeout, a cluster's notice) to the main process.

    A worker that died of one would break the loader while the run saves. Workers still end with the loader,
    or when orphaned.
    """
    os.setpgrp()
