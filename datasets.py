"""Every data set by name, its images' transforms, and the loader that feeds them to a model.

A set is one entry of :data:`DATASETS`. Building it checks its files (:mod:`readers`), so building both splits at
start-up is the pre-flight check; what is wrong is one line in a ``UserError``.
An image's augmentation depends on (seed, epoch, position) alone: not on workers or what ran before.
"""

import os
import signal
import tarfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from timm.data import create_transform
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision import transforms

from randomness import isolated_rng, seed_sequence
from readers import DATASETS, canonical_name
from readers.cache import cache_images
from readers.images import LabelledImages, SubsetOf, UnreadableImage
from samplers import Draw, class_subset
from utils import Processes, UserError, logger, write_json

SMALL_IMAGE = 32  # px; up to this size DeiT crops from a padded image instead of resizing a random part of it
MAX_REPLACEMENTS = 10  # unreadable images in a row that are replaced before the run stops after all


def read_split(name: str, split: str, data_path: str | Path | None) -> LabelledImages:
    """One split of a data set by name, its files checked.

    Args:
        name: a key of :data:`DATASETS`, or DeiT's spelling.
        split: "train" or "val".
        data_path: folder with the set's files (layouts: :data:`DATASETS`).

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
        images = entry.read(data_path, split)
    except OSError as error:  # no permission, a broken disk
        raise UserError(f"{error.filename or data_path}: {error.strerror}; {name} must be readable") from error
    if entry.num_classes not in (None, len(images.classes)):
        raise UserError(
            f"{data_path}: {len(images.classes)} classes instead of the {entry.num_classes} of {name}; expected "
            f"{entry.layout}; a folder of other images is trained on with --data-set folder"
        )
    return images


@dataclass(frozen=True)
class SplitSettings:
    """What the splits of a run's data set are read with.

    Attributes:
        name, path: see :func:`read_split`.
        seed, skip_unreadable, pairs: see :class:`AugmentedDataset`; pairs are drawn in the training split alone.
        download: fetch the set before it is read, see :func:`download`.
        sampling_ratio, sampling_seed: the training split is a :func:`samplers.class_subset` of that share.
    """

    name: str
    path: str | Path | None = None
    seed: int = 0
    skip_unreadable: bool = False
    download: bool = False
    sampling_ratio: float = 1.0
    sampling_seed: int = 0
    pairs: int = 0


def build_split(
    settings: SplitSettings, split: str, transform: Callable[[Image.Image], Any] | None, processes: Processes
) -> "AugmentedDataset":
    """One split of a run's data set; called by all processes. No image is decoded.

    Args:
        split: "train" or "val".
        transform: of its images.
        processes: this process among the run's.

    Raises:
        UserError: see :func:`read_split`, :func:`download`.
    """
    if settings.download:
        download(settings.name, settings.path, processes)
    images = read_split(settings.name, split, settings.path)
    if processes.is_main:
        tell_counts(settings.name, split, len(images))
    ratio = settings.sampling_ratio
    if split == "train" and ratio < 1:
        whole, images = images, SubsetOf(images, class_subset(images.targets, ratio, settings.sampling_seed))
        logger.info(f"--sampling-ratio {ratio:g}: {len(images):,} of {len(whole):,} training images")
    pairs = settings.pairs if split == "train" else 0
    return AugmentedDataset(images, transform, settings.seed, settings.skip_unreadable, pairs)


def cache_splits(splits: list["AugmentedDataset"], processes: Processes) -> None:
    """Decode the splits' images into memory, once a machine, and let the splits take them from there.

    Called by all processes, when all else is checked. Each split's ``base`` is replaced in place: a loader of it
    that is built already takes part, as workers start at its first iteration. Digits and CIFAR are in memory as they
    are and stay so.

    Args:
        splits: of one run.

    Raises:
        UserError, UnreadableImage: see :func:`readers.cache.cache_images`; nothing is replaced then.
    """
    on_disk = [split for split in splits if not split.base.in_memory]
    if on_disk:
        skip_unreadable = all(split.skip_unreadable for split in on_disk)
        cached = cache_images([split.base for split in on_disk], processes, skip_unreadable)  # type: ignore[misc]
        for split, images in zip(on_disk, cached, strict=True):
            split.base = images


def save_subset(dataset: "AugmentedDataset", ratio: float, seed: int, path: Path) -> None:
    """Write which images ``--sampling-ratio`` chose, by name in the published files; nothing at ratio 1."""
    if ratio < 1:
        write_json(path, {"sampling_ratio": ratio, "sampling_seed": seed, "images": list(dataset.base.names)})


def tell_counts(name: str, split: str, found: int) -> None:
    """Log a number of images that is not the paper's, and which of DomainNet's lists is in use."""
    entry = DATASETS[canonical_name(name)]
    expected, cleaned = entry.images.get(split), entry.cleaned_images.get(split)
    if found == cleaned:
        logger.warning(
            f"{name} {split}: {found:,} images by the cleaned list; the paper's is the original with {expected:,}"
        )
    elif expected is not None and found != expected:
        logger.warning(f"{name} {split}: {found:,} images instead of {expected:,}; expected {entry.layout}, complete")
    elif cleaned is not None:
        logger.info(f"{name} {split}: {found:,} images by the original list, as in the paper")


def download(name: str, data_path: str | Path | None, processes: Processes) -> None:
    """Let torchvision fetch a set, checked by its checksums; called by all processes, which wait for the files.

    The main process goes first, then one of each machine whose disk is another: torchvision leaves a set
    alone that is there.

    Raises:
        UserError: a set that torchvision cannot fetch, no place for it, or no success.
    """
    name = canonical_name(name)
    entry = DATASETS[name]
    if entry.download is None and not entry.source:
        raise UserError(f"--download: {name} is {entry.about}, so nothing can be fetched; leave --download out")
    if entry.download is None:
        raise UserError(f"--download: {name} cannot be fetched; get it from {entry.source}, and leave --download out")
    if data_path is None:
        raise UserError(f"--download needs --data-path, the folder to put {name} in")
    data_path = Path(data_path).expanduser()
    for my_turn in (processes.is_main, processes.local_rank == 0):
        if my_turn:
            try:
                with _no_empty_folders_left(data_path):
                    entry.download(data_path)
            except (OSError, RuntimeError, EOFError, tarfile.TarError) as error:
                reason = " ".join(str(error).split())
                raise UserError(
                    f"--download {name} to {data_path}: {reason}; try again, or bring {entry.layout} there by hand"
                ) from error
        if processes.world_size > 1:
            dist.barrier()


@contextmanager
def _no_empty_folders_left(data_path: Path) -> Iterator[None]:
    """When the block fails, take away the empty folders that it made: this one, those in it and those above it."""

    def folders() -> list[Path]:
        return [path for path in (*data_path.glob("*"), data_path, *data_path.parents) if path.is_dir()]

    before = folders()
    try:
        yield
    except BaseException:
        for folder in folders():
            if folder not in before:
                with suppress(OSError):  # not empty
                    folder.rmdir()
        raise


# ------------------------------------------------------------------------- augmentation and loading


class AugmentedDataset(Dataset):
    """Draws of a sampler to dicts of ``images``, ``targets`` and ``replaced``, which a loader stacks under these names.

    ``images`` is ``transform``'s tensor ``(3, h, w)`` (without one, the RGB image itself), ``targets`` its
    label and ``replaced`` 1 if this image stands in for an unreadable one, else 0. ``pairs`` are DRLoc's, if any are
    asked for: float32 ``(pairs, 2, 2)`` in [0, 1), row and column of each pair's first and second place. All random
    numbers depend on ``(seed, draw.epoch, draw.position)`` only; the process's own generators do not notice.

    Args:
        base: the images, without a transform.
        seed: not negative.
        skip_unreadable: let the next readable image of ``base`` stand in for an unreadable one.
        pairs: how many to draw.

    Raises:
        UnreadableImage: on access, without ``skip_unreadable`` or when :data:`MAX_REPLACEMENTS` fail too.
    """

    def __init__(
        self,
        base: LabelledImages,
        transform: Callable[[Image.Image], Any] | None = None,
        seed: int = 0,
        skip_unreadable: bool = False,
        pairs: int = 0,
    ):
        self.base = base
        self.classes = base.classes
        self.transform = transform
        self.seed = seed
        self.skip_unreadable = skip_unreadable
        self.pairs = pairs

    def __len__(self) -> int:
        return len(self.base)

    def __getitem__(self, draw: Draw) -> dict[str, Any]:
        image, target, replaced = self._read(draw.index)
        if self.transform is not None:
            with isolated_rng(seed_sequence("augmentation", self.seed, draw.epoch, draw.position)):
                image = self.transform(image)
        item = {"images": image, "targets": target, "replaced": replaced}
        if self.pairs:
            generator = np.random.default_rng(seed_sequence("drloc", self.seed, draw.epoch, draw.position))
            item["pairs"] = generator.random((self.pairs, 2, 2), dtype=np.float32)
        return item

    def _read(self, index: int) -> tuple[Image.Image, int, int]:
        last_try = MAX_REPLACEMENTS if self.skip_unreadable else 0
        for tried in range(last_try + 1):
            try:
                image, target = self.base[(index + tried) % len(self.base)]
                return image, int(target), int(tried > 0)
            except UnreadableImage:
                if tried == last_try:
                    raise
        raise AssertionError("unreachable: the last try returns or raises")


def train_transform(
    size: int,
    *,
    scale: Sequence[float] = (0.08, 1.0),
    hflip: float = 0.5,
    color_jitter: float = 0.4,
    aa: str = "rand-m9-mstd0.5-inc1",
    interpolation: str = "bicubic",
    reprob: float = 0.25,
    remode: str = "pixel",
    recount: int = 1,
) -> transforms.Compose:
    """DeiT's augmentation through timm: an RGB image to a normalised float32 tensor ``(3, size, size)``.

    Random resized crop (up to :data:`SMALL_IMAGE` px: random crop of the image padded by 4), flip, RandAugment (colour
    jitter without it), random erasing.

    Args:
        scale: area of the crop; hflip, reprob: probabilities; aa: timm's policy, or "none".
        interpolation: of the crop; remode, recount: see timm's ``RandomErasing``.

    Raises:
        UserError: ``aa`` is not timm's language.
    """
    try:
        transform = create_transform(
            size,
            is_training=True,
            scale=(scale[0], scale[1]),
            hflip=hflip,
            color_jitter=color_jitter or None,  # type: ignore[arg-type]  # None: no jitter
            auto_augment=None if aa == "none" else aa,
            interpolation=interpolation,
            re_prob=reprob,
            re_mode=remode,
            re_count=recount,
        )
    except (AssertionError, ValueError) as error:
        raise UserError(f"--aa {aa}: not understood by timm ({error}); e.g. rand-m9-mstd0.5-inc1") from error
    if size <= SMALL_IMAGE:
        resize = transforms.Resize(size, transforms.InterpolationMode.BICUBIC)
        transform.transforms[0:1] = [resize, transforms.RandomCrop(size, padding=4)]
    return transform


def eval_transform(size: int, crop_pct: float | None = None) -> transforms.Compose:
    """The evaluation's transform: an RGB image to a normalised float32 tensor ``(3, size, size)``.

    Bicubic resize of the shorter side to ``size / crop_pct``, centre crop.

    Args:
        crop_pct: None is DeiT's: 0.875, images up to :data:`SMALL_IMAGE` px whole.
    """
    if crop_pct is None:
        crop_pct = 1.0 if size <= SMALL_IMAGE else 0.875
    return create_transform(size, interpolation="bicubic", crop_pct=crop_pct)


def build_loader(
    dataset: AugmentedDataset,
    sampler: Sampler[Draw],
    batch_size: int,
    num_workers: int,
    pin_memory: bool = False,
) -> DataLoader:
    """Batches of the data set's items in the sampler's order, e.g. ``images (B, 3, h, w)``, ``targets (B,)``.

    Workers live as long as the loader; each iteration asks the sampler anew, so ``sampler.set_epoch`` counts.
    """
    return DataLoader(
        dataset,
        batch_size=batch_size,
        sampler=sampler,
        num_workers=num_workers,
        pin_memory=pin_memory,
        persistent_workers=num_workers > 0,
        worker_init_fn=_leave_signals_to_main,
        generator=torch.Generator(),  # without one, every iteration takes a number from the global generator
    )


def _leave_signals_to_main(worker_id: int) -> None:
    """Leave signals to the whole process group (Ctrl-C, timeout) or job (Slurm's) to the main process.

    A worker that died of one would break the loader while the run saves. Workers still end with the loader,
    or when orphaned.
    """
    os.setpgrp()
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
