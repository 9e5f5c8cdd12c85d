"""Decoded images: one copy a machine, shared by all ranks and their loader workers, forked or spawned.

The copy is a memory-mapped temporary file. The process with local rank 0 makes it, removes its name once every process
of the machine has it open, and then decodes. So the space is free again when the last of them ends, however that is.
"""

import os
import platform
import shutil
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from multiprocessing.pool import ThreadPool
from multiprocessing.reduction import DupFd
from typing import IO, Any

import numpy as np
import torch
import torch.distributed as dist
from einops import rearrange
from torch import Tensor

from readers.images import EncodedImages, LabelledImages, SubsetOf, UnreadableImage
from utils import Processes, UserError, logger, progress

GIB = 2**30
OnDisk = EncodedImages | SubsetOf


class CachedImages(LabelledImages):
    """``images`` with their pixels, uint8 ``(height, width, 3)`` each, taken from an open file where they are in it.

    ``table``: int64 ``(N, 3)``, offset in bytes, width and height in pixels; width 0 where an image is not in the file.
    """

    in_memory = True

    def __init__(self, images: LabelledImages, file: IO[bytes], table: np.ndarray):
        super().__init__(images.names, images.targets, images.classes)
        self._images, self._file, self._table = images, file, table
        self._bytes = np.asarray(np.memmap(file, np.uint8, "r"))

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        start, width, height = self._table[index].tolist()
        if not width:
            return self._images[index]
        pixels = self._bytes[start : start + 3 * width * height].copy()  # torch knows no memory that is read-only
        return rearrange(torch.from_numpy(pixels), "(h w c) -> c h w", h=height, c=3), int(self.targets[index])

    def __reduce__(self) -> tuple:
        """For workers that are not forked: they inherit the open file."""
        return _inherited, (self._images, DupFd(self._file.fileno()), self._table)


def _inherited(images: LabelledImages, file: Any, table: np.ndarray) -> CachedImages:
    return CachedImages(images, open(file.detach(), "rb"), table)


def cache_images(sets: list[OnDisk], processes: Processes, skip_unreadable: bool) -> list[CachedImages]:
    """Each set with its images decoded once a machine; called by all ranks.

    Args:
        skip_unreadable: leave out images that cannot be decoded, so that access raises as without a cache.

    Raises:
        UserError: no Linux, or not enough space; before any image is decoded.
        UnreadableImage: an image that cannot be decoded, without ``skip_unreadable``.
    """
    if not hasattr(os, "posix_fallocate"):
        raise UserError("--cache-images needs Linux; leave it out")
    bounds = [_bounds(images, skip_unreadable) if processes.local_rank == 0 else None for images in sets]
    # Not /dev/shm, which has 64 MB in Docker: pages of a file on a disk stay in memory, too, while there is room.
    folder = tempfile.gettempdir()
    needed, free = sum(each[-1] for each in bounds if each is not None), shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"--cache-images needs {needed / GIB:.1f} GiB for decoded images, and {folder} has {free / GIB:.1f} GiB; "
            "set TMPDIR to a folder with more space, or leave the option out"
        )
    return [_cache(images, each, processes, skip_unreadable) for images, each in zip(sets, bounds, strict=True)]


def _cache(images: OnDisk, bounds: np.ndarray | None, processes: Processes, skip_unreadable: bool) -> CachedImages:
    """One set. ``bounds``: see :func:`_bounds`; None where another process decodes."""
    own = table = None
    with ExitStack() as until_all_have_it:
        if bounds is not None:
            own = until_all_have_it.enter_context(tempfile.NamedTemporaryFile(prefix="sar-images-"))
            os.posix_fallocate(own.fileno(), 0, max(1, bounds[-1]))  # nobody else gets the space
            pixels = np.memmap(own, np.uint8, "r+")
        file = open(_from_decoder(own and own.name, processes), "rb")  # noqa: SIM115 - open as long as the set lives
        _from_decoder(own and "all have it", processes)
    if bounds is not None:
        table = _decode(images, bounds, pixels, skip_unreadable)
    return CachedImages(images, file, _from_decoder(table, processes))


def _from_decoder(value: Any, processes: Processes) -> Any:
    """The value of the process that decodes on this machine; the others give None. Waits for all ranks."""
    values = [(platform.node(), value)] * processes.world_size
    if processes.world_size > 1:
        dist.all_gather_object(values, values[0])
    return next(value for node, value in values if value is not None and node == platform.node())


def _bounds(images: OnDisk, skip_unreadable: bool) -> np.ndarray:
    """Where images begin and end in the file, in bytes: int64 ``(N + 1,)``, 0 first; an unreadable one takes none."""
    sizes = _sizes(images.size, len(images), "image sizes", skip_unreadable)
    return np.append(0, 3 * sizes.prod(axis=1).cumsum())


def _decode(images: OnDisk, bounds: np.ndarray, file: np.ndarray, skip_unreadable: bool) -> np.ndarray:
    """Fill the mapped file; returns the table of :class:`CachedImages`."""
    began = time.monotonic()

    def decode(index: int) -> tuple[int, int]:
        image, _ = images[index]
        file[bounds[index] : bounds[index + 1]] = rearrange(image, "c h w -> (h w c)").numpy()
        return image.shape[2], image.shape[1]

    sizes = _sizes(decode, len(images), "decoding images", skip_unreadable)
    seconds = time.monotonic() - began
    logger.info(f"{len(images):,} decoded images take {bounds[-1] / GIB:.2f} GiB; it took {seconds:.0f} s")
    return np.column_stack([bounds[:-1], sizes])


def _sizes(size_of: Callable[[int], tuple[int, int]], count: int, what: str, skip_unreadable: bool) -> np.ndarray:
    """``size_of(index)`` of all indices, int64 ``(N, 2)``, zeros of an unreadable image; a thread for each core."""
    sizes = np.zeros((count, 2), np.int64)
    with ThreadPool(len(os.sched_getaffinity(0))) as pool:  # Pillow lets other threads run while it decodes
        results = pool.imap(size_of, range(count))
        for index in progress(range(count), what):
            try:
                sizes[index] = next(results)
            except UnreadableImage as error:
                if not skip_unreadable:
                    raise error.or_skip() from error
    return sizes
