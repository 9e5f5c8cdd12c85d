"""Decoded images in memory: one copy a machine, shared by all ranks and their loader workers.

A small set that is trained on for thousands of epochs is decoded once. The pixels lie in a memory file
(memfd_create) that the lowest rank of the machine fills; the other ranks map the same pages through that
rank's /proc entry. Nothing has a name on any disk or in /dev/shm, so its size limit (64 MB in Docker) does not
matter, and nothing is left behind however the processes end.
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
USABLE = 0.9  # share of the available memory that images may take; training needs some, too
NOT_HELD = -1  # offset of an image that is not in memory


def cache_images(
    sets: list[EncodedImages | SubsetOf], processes: Processes, skip_unreadable: bool
) -> list["CachedImages"]:
    """Decode the images of all sets into memory that every process of the run on this machine shares.

    Called by all ranks; the lowest of each machine decodes, with as many workers as it has cores, when it has found
    that all sets fit.

    Args:
        skip_unreadable: leave images that cannot be decoded on disk, so that access raises as without a cache.

    Raises:
        UserError: no Linux, or more images than memory; before any is decoded.
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
        dist.barrier()  # nobody leaves, and takes the memory with it, before all hold it
    return cached


class CachedImages(LabelledImages):
    """``images`` with their pixels taken from shared memory where they are in it.

    The memory begins with a table, int64 ``(N, 3)``: offset (or ``NOT_HELD``), width, height in pixels; an
    image is uint8 ``(height, width, 3)`` from its offset on.

    Args:
        path: the memory file, as any process of this machine can open it.
        memory: the file itself in the process that made it; it keeps the path valid.
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
        """For workers that are not forked: they map the memory by its path."""
        return {**self.__dict__, "_memory": None, "_bytes": None, "_table": None}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._map()


def _table_of(memory: np.ndarray, count: int) -> np.ndarray:
    return memory[: 24 * count].view(np.int64).reshape(count, 3)


# ------------------------------------------------------------------------------------------- decoding


def _decode_all(sets: list[EncodedImages | SubsetOf], skip_unreadable: bool) -> list[BinaryIO]:
    """The open memory file of each set."""
    sizes = [_sizes(images, skip_unreadable) for images in sets]
    _check_memory(sum(int(_ends(of_set)[-1]) for of_set in sizes))
    return [_decode(images, of_set, skip_unreadable) for images, of_set in zip(sets, sizes, strict=True)]


def _sizes(images: EncodedImages | SubsetOf, skip_unreadable: bool) -> np.ndarray:
    """Width and height in pixels, int64 ``(N, 2)``; of an unreadable image 0."""
    sizes = np.zeros((len(images), 2), np.int64)
    for index, size in _for_each(images.size, len(images), "image sizes"):
        sizes[index] = _unless_unreadable(size, skip_unreadable) or (0, 0)
    return sizes


def _ends(sizes: np.ndarray) -> np.ndarray:
    """Offset after each image in the memory file, ``(N,)``; the last is the file's bytes."""
    return 24 * len(sizes) + 3 * sizes.prod(axis=1).cumsum()


def _decode(images: EncodedImages | SubsetOf, sizes: np.ndarray, skip_unreadable: bool) -> BinaryIO:
    """The open memory file with table and pixels of all images."""
    began = time.monotonic()
    ends = _ends(sizes)
    memory = open(os.memfd_create("decoded images"), "r+b")  # noqa: SIM115 - open as long as the set lives
    os.truncate(memory.fileno(), int(ends[-1]))
    shared = np.frombuffer(mmap.mmap(memory.fileno(), 0), np.uint8)
    table = _table_of(shared, len(images))
    table[:] = np.column_stack([np.full(len(images), NOT_HELD), sizes])
    starts = ends - 3 * sizes.prod(axis=1)

    def decode(index: int) -> None:
        image, _ = images[index]
        shared[starts[index] : ends[index]] = np.asarray(image).reshape(-1)
        table[index, 0] = starts[index]

    for _, error in _for_each(decode, len(images), "decoding images"):
        _unless_unreadable(error, skip_unreadable)
    seconds = time.monotonic() - began
    logger.info(f"{len(images):,} decoded images take {ends[-1] / GIB:.2f} GiB of memory; it took {seconds:.0f} s")
    return memory


def _unless_unreadable(result: Any, skip_unreadable: bool) -> Any:
    if not isinstance(result, UnreadableImage):
        return result
    if not skip_unreadable:
        raise result
    return None


class _Results(Dataset):
    """``(index, function(index))``; an ``UnreadableImage`` is a result, too, so that it stops no worker."""

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
    """``(index, function(index))`` of all indices, from as many forked processes as there are cores.

    (Pillow holds the interpreter's lock while it decodes: threads would take turns.)
    """
    loader = DataLoader(
        _Results(function, count),
        batch_size=32,
        num_workers=len(os.sched_getaffinity(0)),
        collate_fn=list,
        multiprocessing_context="fork",
        generator=torch.Generator(),  # without one, it takes a number from the global generator
    )
    for batch in progress(loader, what):
        yield from batch


# --------------------------------------------------------------------------------- the machine's memory


def _check_memory(needed: int) -> None:
    available = available_memory()
    if needed > USABLE * available:
        raise UserError(
            f"--cache-images needs {needed / GIB:.1f} GiB for decoded images, and of the {available / GIB:.1f} GiB "
            f"available here they may take {USABLE:.0%}; leave it out, or use a machine with more memory"
        )


def available_memory(root: Path = Path("/")) -> int:
    """Bytes that this process can still take: what the machine has, or its control groups (v1, v2) leave.

    Args:
        root: where proc/ and sys/ are.
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
    """What this group and those above it leave: limit - use + cached files, which give way."""
    group = top / path.lstrip("/")
    room = []
    for folder in (group, *group.parents):
        try:
            stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            files = sum(int(stat.get(f"total_{name}", stat[name])) for name in ("inactive_file", "active_file"))
            room.append(int((folder / limit).read_text()) - int((folder / used).read_text()) + files)
        except (OSError, ValueError):  # not visible from in here, or no limit ("max")
            pass
        if folder == top:
            break
    return room


# -------------------------------------------------------------------------------------- between processes


def _machine() -> str:
    """The same for processes that see each other in /proc, and for no others."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot} {os.readlink('/proc/self/ns/pid')}"


def _gather(value: Any, processes: Processes) -> list:
    """The values of all ranks, by rank."""
    values = [value]
    if processes.world_size > 1:
        values *= processes.world_size
        dist.all_gather_object(values, value)
    return values
