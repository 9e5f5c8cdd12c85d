"""A cache of decoded images in memory: one copy per machine, shared by all ranks and their loader workers.

A small data set that is trained on for thousands of epochs is decoded once. The lowest rank of each machine fills an
anonymous memory file (memfd_create); the other ranks map the same pages through that rank's /proc entry. There is no
file on disk or in /dev/shm. The size limit of /dev/shm (64 MB in Docker) therefore does not apply, and nothing is left
behind if a process is killed.
"""

import mmap
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from readers.images import EncodedImages, LabelledImages, SubsetOf, UnreadableImage
from utils import Processes, UserError, logger, progress

GIB = 2**30
USABLE = 0.9  # fraction of the available memory that images may take; training needs the rest
NOT_HELD = -1  # offset of an image that is not in memory


def cache_images(
    sets: list[EncodedImages | SubsetOf], processes: Processes, skip_unreadable: bool
) -> list["CachedImages"]:
    """Decode the images of all sets into memory that all processes of the run on this machine share.

    All ranks call it. The lowest rank of each machine first checks that all sets fit, then decodes them with one worker
    per core.

    Args:
        sets: the data sets.
        processes: of the run.
        skip_unreadable: do not cache images that cannot be decoded; accessing them raises, as without a cache.

    Raises:
        UserError: not on Linux, or too little memory; raised before any image is decoded.
        UnreadableImage: an image that cannot be decoded, without ``skip_unreadable``.
    """
    if not hasattr(os, "memfd_create"):
        raise UserError("--cache-images needs Linux; leave it out")
    machines = _gather(_machine(), processes)
    decoder = machines.index(machines[processes.rank])
    memories = _decode_all(sets, skip_unreadable) if processes.rank == decoder else [None] * len(sets)
    paths = _gather([memory and f"/proc/{os.getpid()}/fd/{memory.fileno()}" for memory in memories], processes)
    cached = [CachedImages(*each) for each in zip(sets, paths[decoder], memories, strict=True)]
    if processes.world_size > 1:
        dist.barrier()  # the decoding rank must not exit before all ranks have mapped its memory
    return cached


class CachedImages(LabelledImages):
    """``images`` with cached pixels from shared memory; uncached images are read from ``images``.

    The memory starts with a table, int64 ``(N, 3)``: offset in bytes (or ``NOT_HELD``), width and height in pixels. An
    image is uint8 ``(height, width, 3)`` at its offset.

    Args:
        images: the data set.
        path: of the memory file, valid for every process on this machine.
        memory: the open file in the process that created it, where it keeps the path valid; else None.
    """

    in_memory = True

    def __init__(self, images: LabelledImages, path: str, memory: Any = None):
        super().__init__(images.names, images.targets, images.classes)
        self._images = images
        self._path = path
        self._memory = memory
        self._map()

    def _map(self) -> None:
        with open(self._path, "rb") as file:
            pixels = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
        self._bytes = np.frombuffer(pixels, np.uint8)
        self._table = _table_of(self._bytes, len(self))

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        offset, width, height = self._table[index].tolist()
        if offset == NOT_HELD:
            return self._images[index]
        pixels = self._bytes[offset : offset + 3 * width * height]
        return Image.fromarray(pixels.reshape(height, width, 3)), self.targets[index]

    def __getstate__(self) -> dict:
        """For spawned workers, which map the memory by its path."""
        return {**self.__dict__, "_memory": None, "_bytes": None, "_table": None}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._map()


def _table_of(memory: np.ndarray, count: int) -> np.ndarray:
    return memory[: 24 * count].view(np.int64).reshape(count, 3)


# ------------------------------------------------------------------------------------------- decoding


def _decode_all(sets: list[EncodedImages | SubsetOf], skip_unreadable: bool) -> list[BinaryIO]:
    """Check that all sets fit into memory, then decode them; returns the open memory file of each."""
    sizes = [_sizes(images, skip_unreadable) for images in sets]
    _check_memory(sum(int(_ends(of_set)[-1]) for of_set in sizes))
    return [_decode(images, of_set, skip_unreadable) for images, of_set in zip(sets, sizes, strict=True)]


def _sizes(images: EncodedImages | SubsetOf, skip_unreadable: bool) -> np.ndarray:
    """Width and height in pixels, int64 ``(N, 2)``; 0 for an unreadable image."""
    sizes = np.zeros((len(images), 2), np.int64)
    for index, size in _for_each(images.size, len(images), "image sizes"):
        sizes[index] = _unless_unreadable(size, skip_unreadable) or (0, 0)
    return sizes


def _ends(sizes: np.ndarray) -> np.ndarray:
    """The end offset of each image in the memory file, ``(N,)``; the last one is the file's size in bytes."""
    return 24 * len(sizes) + 3 * sizes.prod(axis=1).cumsum()


def _decode(images: EncodedImages | SubsetOf, sizes: np.ndarray, skip_unreadable: bool) -> BinaryIO:
    """Decode the images of a set; returns the open memory file with table and pixels."""
    # 1. create the memory file and its table
    began = time.monotonic()
    ends = _ends(sizes)
    memory = open(os.memfd_create("decoded images"), "r+b")  # noqa: SIM115 - stays open for the lifetime of the set
    os.truncate(memory.fileno(), int(ends[-1]))
    shared = np.frombuffer(mmap.mmap(memory.fileno(), 0), np.uint8)
    table = _table_of(shared, len(images))
    table[:] = np.column_stack([np.full(len(images), NOT_HELD), sizes])
    starts = ends - 3 * sizes.prod(axis=1)

    # 2. decode all images in worker processes, which share the mapping
    def decode(index: int) -> None:
        image, _ = images[index]
        shared[starts[index] : ends[index]] = np.asarray(image).reshape(-1)
        table[index, 0] = starts[index]

    for _, error in _for_each(decode, len(images), "decoding images"):
        _unless_unreadable(error, skip_unreadable)
    seconds = time.monotonic() - began
    logger.info(
        f"{len(images):,} decoded images take {ends[-1] / GIB:.2f} GiB of memory; decoding took {seconds:.0f} s"
    )
    return memory


def _unless_unreadable(result: Any, skip_unreadable: bool) -> Any:
    if not isinstance(result, UnreadableImage):
        return result
    if not skip_unreadable:
        raise result
    return None


class _Results(Dataset):
    """Items ``(index, function(index))``; an ``UnreadableImage`` is returned, not raised, so that no worker stops."""

    def __init__(self, function: Callable[[int], Any], count: int):
        self.function = function
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[int, Any]:
        try:
            return index, self.function(index)
        except UnreadableImage as error:
            return index, error


def _for_each(function: Callable[[int], Any], count: int, what: str) -> Iterator[tuple[int, Any]]:
    """Yield ``(index, function(index))`` for all indices, computed by one forked process per core.

    (Threads would not run in parallel, because Pillow holds the GIL while it decodes.)
    """
    loader = DataLoader(
        _Results(function, count),
        batch_size=32,
        num_workers=len(os.sched_getaffinity(0)),
        collate_fn=list,
        multiprocessing_context="fork",
        generator=torch.Generator(),  # without it, the loader would advance the global generator
    )
    for batch in progress(loader, what):
        yield from batch


# --------------------------------------------------------------------------------- the machine's memory


def _check_memory(needed: int) -> None:
    available = available_memory()
    if needed > USABLE * available:
        raise UserError(
            f"--cache-images needs {needed / GIB:.1f} GiB for decoded images, but may take only {USABLE:.0%} of the "
            f"{available / GIB:.1f} GiB available here; leave it out, or use a machine with more memory"
        )


def available_memory(root: Path = Path("/")) -> int:
    """Memory in bytes that this process can still allocate, limited by the machine and its control groups (v1, v2).

    Args:
        root: the folder of proc/ and sys/.
    """
    lines = (root / "proc/meminfo").read_text().splitlines()
    meminfo = dict(line.split(":") for line in lines)
    room = [1024 * int(meminfo["MemAvailable"].split()[0])]
    for line in (root / "proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:  # version 2
            room += _group_room(root / "sys/fs/cgroup", path, "memory.max", "memory.current")
        elif "memory" in controllers.split(","):
            folder = root / "sys/fs/cgroup/memory"
            room += _group_room(folder, path, "memory.limit_in_bytes", "memory.usage_in_bytes")
    return min(room)


def _group_room(top: Path, path: str, limit: str, used: str) -> list[int]:
    """The memory left in this control group and its parents, in bytes: limit - usage + file cache (reclaimable)."""
    group = top / path.lstrip("/")
    room = []
    for folder in (group, *group.parents):
        try:
            stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            files = sum(int(stat.get(f"total_{name}", stat[name])) for name in ("inactive_file", "active_file"))
            room.append(int((folder / limit).read_text()) - int((folder / used).read_text()) + files)
        except (OSError, ValueError):  # not visible inside a container, or no limit ("max")
            pass
        if folder == top:
            break
    return room


# -------------------------------------------------------------------------------------- between processes


def _machine() -> str:
    """An id that is equal for exactly the processes that see each other in /proc."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot} {os.readlink('/proc/self/ns/pid')}"


def _gather(value: Any, processes: Processes) -> list:
    """Gather a value from all ranks; returns the list of values by rank."""
    values = [value]
    if processes.world_size > 1:
        values *= processes.world_size
        dist.all_gather_object(values, value)
    return values
