"""Data sets by name, and the loader of their images.

A data set is one entry of :data:`DATASETS`. Reading it checks its files (:mod:`readers`), so building both splits at
start-up reports every error as one line, a ``UserError``. The augmentation of an image depends on (seed, epoch,
position) alone, not on workers or on earlier images.
"""

import atexit
import ctypes
import os
import signal
import tarfile
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.distributed as dist
from einops import rearrange
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from torch.utils.data._utils.collate import collate as collate_by_type
from torch.utils.data._utils.collate import default_collate_fn_map

from holdout import Holdout, read_part
from randomness import isolated_rng, seed_sequence
from readers import DATASETS, DataSet, canonical_name, sets_of
from readers.cache import cache_images
from readers.images import EncodedImages, ImageFiles, LabelledImages, SubsetOf, UnreadableImage
from samplers import Draw, class_subset
from utils import Processes, StopSignal, UserError, end_workers, first_few, logger, write_json

LONGEST_TMPDIR = 70  # characters: workers make sockets there, whose paths may have 107
PR_SET_PDEATHSIG = 1  # of Linux's prctl: the signal that a process gets when its parent ends
MAX_REPLACEMENTS = 10  # next images that stand in for an unreadable one, before ever further ones are tried
FURTHER = 10  # doublings of the distance, to 10,240 images: passes a folder of broken files, but not a lost disk


def read_split(
    name: str,
    split: str,
    data_path: str | Path | None,
    sets: Mapping[str, DataSet] = DATASETS,
    holdout: Holdout | None = None,
) -> LabelledImages:
    """Read one split of a data set by name, and check its files.

    Args:
        name: a key of ``sets``, or DeiT's spelling.
        split: "train" or "val".
        data_path: folder of the data set (layouts: :data:`DATASETS`).
        holdout: how the validation images are chosen from a single folder of classes; only for ``folder``.

    Raises:
        UserError: unknown name, or files that are missing or not as expected.
        ValueError: unknown split.
    """
    if split not in ("train", "val"):
        raise ValueError(f"split must be 'train' or 'val', not {split!r}")
    name = canonical_name(name, sets)
    entry = sets[name]
    if data_path is not None:
        data_path = Path(data_path).expanduser()
    if entry.layout:
        if data_path is None:
            raise UserError(f"data set {name} needs --data-path, a folder with {entry.layout}")
        if not data_path.is_dir():
            raise UserError(f"--data-path {data_path}: no such folder; {name} needs one with {entry.layout}")
    if holdout is not None and entry is not DATASETS["folder"]:
        raise UserError("--val-split needs --data-set folder, with a folder for each class; give both, or neither")
    try:
        images = read_part(cast(Path, data_path), split, holdout) if holdout else entry.read(data_path, split)
    except OSError as error:  # no permission, a broken disk
        raise UserError(f"{error.filename or data_path}: {error.strerror}; {name} must be readable") from error
    if entry.num_classes not in (None, len(images.classes)):
        raise UserError(
            f"{data_path}: {len(images.classes)} classes instead of the {entry.num_classes} of {name}; expected "
            f"{entry.layout}; for other images use --data-set folder"
        )
    if isinstance(images, EncodedImages):
        images.upright = entry.upright
    return images


@dataclass(frozen=True)
class SplitSettings:
    """The settings of the splits of a run's data set.

    Attributes:
        name, path: see :func:`read_split`.
        seed, skip_unreadable, pairs: see :class:`AugmentedDataset`; only the training split has pairs.
        download: download the data set first, see :func:`download`.
        sampling_ratio, sampling_seed: the training split is this :func:`samplers.class_subset`.
        task: the name is that of one of this task's data sets, :func:`readers.sets_of`.
        holdout: see :func:`read_split`.
    """

    name: str
    path: str | Path | None = None
    seed: int = 0
    skip_unreadable: bool = False
    download: bool = False
    sampling_ratio: float = 1.0
    sampling_seed: int = 0
    pairs: int = 0
    task: str = "classify"
    holdout: Holdout | None = None


def build_split(
    settings: SplitSettings, split: str, transform: Callable[[Tensor], Any] | None, processes: Processes
) -> "AugmentedDataset":
    """Build one split of a run's data set: `read_images` with a transform; no image is decoded."""
    images = read_images(settings, split, processes)
    pairs = settings.pairs if split == "train" else 0
    return AugmentedDataset(images, transform, settings.seed, settings.skip_unreadable, pairs)


def read_images(settings: SplitSettings, split: str, processes: Processes) -> LabelledImages:
    """Read one split of a run's data set; called by all processes.

    Args:
        split: "train" or "val".
        processes: this process among the run's.

    Raises:
        UserError: see :func:`read_split`, :func:`download`.
    """
    sets = sets_of(settings.task)
    if settings.download:
        download(settings.name, settings.path, processes, sets)
    images = read_split(settings.name, split, settings.path, sets, settings.holdout)
    if processes.is_main:
        log_image_count(settings.name, split, len(images), sets)
        images.left_out.tell(f"{settings.name} {split}")
        if len(images.classes) == 1:
            logger.warning(f"{settings.name} {split}: one class only, {images.classes[0]}; a classifier learns nothing")
        own = sets[canonical_name(settings.name, sets)].num_classes is None
        if split == "train" and own and images.labelled and len(images.classes) > 1:
            warn_of_single_images(images, settings)
    ratio = settings.sampling_ratio
    if split == "train" and ratio < 1:
        whole, images = images, SubsetOf(images, class_subset(images.targets, ratio, settings.sampling_seed))
        logger.info(f"--sampling-ratio {ratio:g}: {len(images):,} of {len(whole):,} training images")
    return images


def warn_of_single_images(images: LabelledImages, settings: SplitSettings) -> None:
    """Warn of classes with a single training image."""
    counts = np.bincount(images.targets, minlength=len(images.classes))
    if single := [images.classes[label] for label in np.flatnonzero(counts == 1)]:
        what = "class has" if len(single) == 1 else "classes have"
        logger.warning(
            f"{settings.name} train: {len(single):,} {what} a single image, from which little is learnt: "
            f"{first_few(single)}"
        )


def relabel(dataset: "AugmentedDataset", classes: Sequence[str]) -> list[str]:
    """Number the labels of images to evaluate as in a list of classes that has all of theirs.

    Args:
        dataset: its labels and ``classes`` are changed in place.
        classes: names, such as those of a checkpoint.

    Returns:
        A line to log if anything was changed.

    Raises:
        UserError: the images have a class that the list lacks.
    """
    own, numbers = dataset.classes, {name: number for number, name in enumerate(classes)}
    if list(own) == list(classes):
        return []
    unknown = [name for name in own if name not in numbers]
    if unknown:
        raise UserError(
            f"the checkpoint has no class {first_few(unknown)}; its {len(classes):,} are {first_few(list(classes))}: "
            "rename the folders, or evaluate images of its classes"
        )
    base = dataset.base
    base.targets = np.array([numbers[name] for name in own])[base.targets]
    base.classes = dataset.classes = list(classes)
    return [f"the images are of {len(own):,} of its {len(classes):,} classes, which were found by name"]


def cache_splits(splits: list["AugmentedDataset"], processes: Processes) -> None:
    """Decode the images of the splits into memory, once per machine, and let the splits read them from there.

    Called by all processes, after all other checks. The ``base`` of each split is replaced in place. A loader may
    already exist, as its workers start at its first iteration. Digits and CIFAR are in memory anyway.

    Args:
        splits: the splits of one run.

    Raises:
        UserError, UnreadableImage: see :func:`readers.cache.cache_images`; no split is changed then.
    """
    # 1. each set once, as k-NN's bank is the training set; a split may join others
    parts = [part for split in splits for part in getattr(split, "parts", (split,))]
    on_disk = [split for split in parts if not split.base.in_memory]
    different: list[LabelledImages] = []
    for split in on_disk:
        if not any(same_images(split.base, images) for images in different):
            different.append(split.base)
    # 2. decode them
    if different:
        skip_unreadable = all(split.skip_unreadable for split in on_disk)
        cached = cache_images(different, processes, skip_unreadable)  # type: ignore[arg-type]
        for split in on_disk:
            (split.base,) = (new for old, new in zip(different, cached, strict=True) if same_images(split.base, old))


def same_images(images: LabelledImages, others: LabelledImages) -> bool:
    """Whether two sets read the same files with the same labels."""
    if images is others:
        return True
    if not (isinstance(images, ImageFiles) and type(images) is type(others) and images.root == others.root):
        return False
    return list(images.names) == list(others.names) and np.array_equal(images.targets, others.targets)


def save_subset(dataset: "AugmentedDataset", ratio: float, seed: int, path: Path) -> None:
    """Write the file names of the images that ``--sampling-ratio`` chose; nothing at ratio 1."""
    if ratio < 1:
        write_json(path, {"sampling_ratio": ratio, "sampling_seed": seed, "images": list(dataset.base.names)})


def log_image_count(name: str, split: str, found: int, sets: Mapping[str, DataSet] = DATASETS) -> None:
    """Warn if the number of images differs from the paper's; log which of DomainNet's two lists is used."""
    entry = sets[canonical_name(name, sets)]
    expected, cleaned = entry.images.get(split), entry.cleaned_images.get(split)
    if found == cleaned:
        logger.warning(
            f"{name} {split}: {found:,} images of the cleaned list; the paper uses the original list with {expected:,}"
        )
    elif expected is not None and found != expected:
        logger.warning(f"{name} {split}: {found:,} images instead of {expected:,}; expected {entry.layout}, complete")
    elif cleaned is not None:
        logger.info(f"{name} {split}: {found:,} images of the original list, as in the paper")


def download(
    name: str, data_path: str | Path | None, processes: Processes, sets: Mapping[str, DataSet] = DATASETS
) -> None:
    """Download a data set with torchvision, which verifies checksums; called by all processes, which wait for it.

    The main process downloads first, then one process per machine, in case the machines have no common disk.
    torchvision skips a data set that is complete.

    Raises:
        UserError: torchvision cannot download the data set, ``data_path`` is missing, or the download failed.
    """
    # 1. is there something to download, and a place for it?
    name = canonical_name(name, sets)
    entry = sets[name]
    if entry.download is None and not entry.source:
        raise UserError(f"--download: {name} is {entry.about}, so nothing can be downloaded; remove --download")
    if entry.download is None:
        raise UserError(
            f"--download: {name} cannot be downloaded automatically; get it from {entry.source}, and remove --download"
        )
    if data_path is None:
        raise UserError(f"--download needs --data-path, the folder for {name}")
    data_path = Path(data_path).expanduser()
    # 2. download: the main process, then the first one of each machine
    for my_turn in (processes.is_main, processes.local_rank == 0):
        if my_turn:
            try:
                with _remove_new_folders_on_error(data_path):
                    entry.download(data_path)
            except (OSError, RuntimeError, EOFError, tarfile.TarError) as error:
                reason = " ".join(str(error).split())
                raise UserError(
                    f"--download {name} to {data_path}: {reason}; try again, or copy {entry.layout} there yourself"
                ) from error
        if processes.world_size > 1:
            dist.barrier()


@contextmanager
def _remove_new_folders_on_error(data_path: Path) -> Iterator[None]:
    """If the block fails, remove the empty folders that it made: ``data_path``, those in it and those above it."""

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
    """A data set indexed by the draws of a sampler; its items are dicts, which a loader collates to batches.

    An item holds what ``transform`` makes of the image: a dict, or a tensor that becomes ``images``. Without one,
    ``images`` is the image itself, uint8 ``(3, h, w)``. ``targets`` is its label, and ``replaced`` is 1 if the image
    replaces an unreadable one, else 0. With ``pairs``, the item has DRLoc's ``pairs``: float32 ``(pairs, 2, 2)`` in
    [0, 1), row and column of both positions of each pair. All random numbers depend on
    ``(seed, draw.epoch, draw.position)`` alone; the global generators are not changed.

    Args:
        base: the images, without a transform.
        transform: applied to each image.
        seed: not negative.
        skip_unreadable: replace an unreadable image by the next readable one of ``base``; after
            :data:`MAX_REPLACEMENTS` unreadable ones by one further on.
        pairs: number of DRLoc's pairs per image.

    Raises:
        UnreadableImage: on access, without ``skip_unreadable`` or if all that could stand in fail, too.
    """

    def __init__(
        self,
        base: LabelledImages,
        transform: Callable[..., Any] | None = None,
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
        views: Any = image
        if self.transform is not None:
            with isolated_rng("augmentation", self.seed, draw.epoch, draw.position):
                views = self.transform(image)
        item = views if isinstance(views, dict) else {"images": views}
        item |= {"targets": target, "replaced": replaced}
        if self.pairs:
            generator = np.random.default_rng(seed_sequence("drloc", self.seed, draw.epoch, draw.position))
            item["pairs"] = generator.random((self.pairs, 2, 2), dtype=np.float32)
        return item

    def _read(self, index: int) -> tuple[Tensor, Any, int]:
        """The image, its label, and whether it replaces an unreadable one (1 or 0)."""
        if not self.skip_unreadable:
            try:
                return *self.base[index], 0
            except UnreadableImage as error:
                raise error.or_skip() from error
        steps = [*range(MAX_REPLACEMENTS + 1), *(MAX_REPLACEMENTS * 2**power for power in range(1, FURTHER + 1))]
        for step in steps:
            try:
                image, target = self.base[(index + step) % len(self.base)]
                return image, target, int(step > 0)
            except UnreadableImage as error:
                last = error
        raise UnreadableImage(
            f"{last}; it is one of {len(steps)} in a row, more than --skip-unreadable replaces: is the disk there? "
            "python -m analysis.check lists all unreadable files"
        )


def build_loader(
    dataset: AugmentedDataset,
    sampler: Sampler[Draw],
    batch_size: int,
    num_workers: int,
    pin_memory: bool = False,
) -> DataLoader:
    """A loader of batches in the sampler's order, such as ``images (B, 3, h, w)`` and ``targets (B,)``.

    A data set may have a function ``collate``, which makes a batch of a list of items, as those of different sizes.
    Workers persist between epochs. Each iteration starts the sampler again, so ``sampler.set_epoch`` takes effect.

    Raises:
        UserError: TMPDIR is too long a path for the workers' sockets.
    """
    if num_workers and len(folder := tempfile.gettempdir()) > LONGEST_TMPDIR:
        raise UserError(
            f"TMPDIR={folder} has {len(folder)} characters, and sockets of loader workers allow {LONGEST_TMPDIR}; "
            "set TMPDIR=/tmp, or give --num-workers 0"
        )
    return DataLoader(
        dataset,
        batch_size=batch_size,
        sampler=sampler,
        num_workers=num_workers,
        pin_memory=pin_memory,
        persistent_workers=num_workers > 0,
        worker_init_fn=_leave_signals_to_the_run,
        collate_fn=getattr(dataset, "collate", collate),
        generator=torch.Generator(),  # without one, each iteration draws from the global generator
    )


def collate(items: list[Any]) -> Any:
    """Batch items as torch does by default, but images in the layout of their memory.

    A decoded image is a view of Pillow's layout, with the channels last. Turning it round in a worker costs more than
    copying it; the device turns the whole batch round.
    """
    return collate_by_type(items, collate_fn_map=default_collate_fn_map | {Tensor: _stack})


def _stack(tensors: list[Tensor], *, collate_fn_map=None) -> Tensor:
    stack = default_collate_fn_map[Tensor]  # writes into shared memory in a worker
    if tensors[0].ndim != 3 or tensors[0].stride(0) != 1:
        return stack(tensors, collate_fn_map=collate_fn_map)
    pixels = stack([rearrange(tensor, "c h w -> h w c") for tensor in tensors], collate_fn_map=collate_fn_map)
    return rearrange(pixels, "b h w c -> b c h w")


def _leave_signals_to_the_run(worker_id: int) -> None:
    """Let a worker ignore signals to the process group (Ctrl-C, timeout) or to the job (SLURM), and end with the run.

    A worker that a signal ends would break the loader while the run saves. Workers end with the loader; if the main
    process is gone, the system kills them at once, even in a read that never returns (Linux).
    """
    os.setpgrp()
    signal.set_wakeup_fd(-1)  # the main process counts its own signals alone
    for number in StopSignal.numbers:
        signal.signal(number, signal.SIG_IGN)
    with suppress(AttributeError):  # not Linux: torch's worker looks after its parent every few seconds
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


atexit.register(end_workers)
