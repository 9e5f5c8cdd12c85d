"""The order of images over updates, micro-batches and processes; exact evaluation; subsets of the training set.

The order is a pure function of (seed, epoch), so a sampler has no random state. A resumed run starts at the update
where it stopped, without reading the images before it.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from torch.utils.data import Sampler

from randomness import seed_sequence


class Draw(NamedTuple):
    """An item of a sampler: an image and its position in the epoch.

    ``index`` is the image's index in the data set. ``position`` is its place in the global order of ``epoch``, over all
    processes. Augmentation depends on ``epoch`` and ``position`` (:mod:`datasets`).
    """

    index: int  # type: ignore[assignment]  # tuple's method of that name is not used
    epoch: int
    position: int


class TrainSampler(Sampler[Draw]):
    """The draws of one process for one epoch, in the order of its micro-batches.

    The global order of an epoch is a permutation of all images that depends on ``(seed, epoch)`` alone. With
    the total batch ``T = batch_size * accumulation * world_size``, update ``u`` trains on the positions
    ``[u * T, (u + 1) * T)``. In each micro-batch the processes take the next ``batch_size * world_size`` of them in
    turn, one position each. So an update sees the same images at the same positions, however its total batch is split.
    The rest at the end of the permutation, less than one total batch, is left out in this epoch.

    With ``views`` = 3 (repeated augmentation, Hoffer et al., 2020, as in DeiT) each image has three consecutive
    positions. Consecutive processes get its differently augmented views. The number of updates stays the same, so an
    epoch sees a third of the images.

    Args:
        num_images: size of the training set.
        batch_size: images of one process in one micro-batch.
        accumulation: micro-batches per update.
        rank, world_size: rank of this process, and number of processes.
        seed: not negative.
        views: number of views of each image.

    Raises:
        ValueError: a size is below 1, or ``rank`` is not in ``0..world_size - 1``.
    """

    def __init__(
        self,
        num_images: int,
        batch_size: int,
        accumulation: int = 1,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        views: int = 1,
    ):
        if min(num_images, batch_size, accumulation, views) < 1:
            raise ValueError("num_images, batch_size, accumulation and views must be at least 1")
        _check_rank(rank, world_size)
        self.num_images = num_images
        self.batch_size = batch_size
        self.accumulation = accumulation
        self.rank = rank
        self.world_size = world_size
        self.seed = seed
        self.views = views
        self.updates_per_epoch = num_images // (batch_size * accumulation * world_size)
        self.set_epoch(0)

    def set_epoch(self, epoch: int, first_update: int = 0) -> None:
        """Set the epoch of the next iteration, and the update where it starts."""
        if not 0 <= first_update <= self.updates_per_epoch:
            raise ValueError(f"first_update {first_update} is not in 0..{self.updates_per_epoch}")
        self.epoch = epoch
        self.first_update = first_update

    def __iter__(self) -> Iterator[Draw]:
        epoch = self.epoch
        order = np.random.default_rng(seed_sequence("order", self.seed, epoch)).permutation(self.num_images)
        total_batch = self.batch_size * self.accumulation * self.world_size
        first, last = (update * total_batch for update in (self.first_update, self.updates_per_epoch))
        for position in range(first + self.rank, last, self.world_size):
            yield Draw(int(order[position // self.views]), epoch, position)

    def __len__(self) -> int:
        return (self.updates_per_epoch - self.first_update) * self.accumulation * self.batch_size


class EvalSampler(Sampler[Draw]):
    """The draws of one process for an evaluation that sees every image exactly once.

    Process ``rank`` takes the images ``rank, rank + world_size, ...``, so numbers of images differ by at most one.

    Raises:
        ValueError: ``rank`` is not in ``0..world_size - 1``.
    """

    def __init__(self, num_images: int, rank: int = 0, world_size: int = 1):
        _check_rank(rank, world_size)
        self.indices = range(rank, num_images, world_size)

    def __iter__(self) -> Iterator[Draw]:
        return (Draw(index, 0, index) for index in self.indices)

    def __len__(self) -> int:
        return len(self.indices)


def _check_rank(rank: int, world_size: int) -> None:
    if not 0 <= rank < world_size:
        raise ValueError(f"rank {rank} is not in 0..{world_size - 1}")


def class_subset(targets: Sequence[int] | np.ndarray, ratio: float, seed: int) -> list[int]:
    """Ascending indices of a random fraction of each class's images: the smaller training sets of Table 3.

    The images of a class are permuted by ``(seed, class)`` alone, and the first ``ratio`` of them are taken (rounded,
    at least one image). So a smaller subset is part of every larger one of the same seed. The paper only says "randomly
    selected" from all images; here the classes keep their proportions.

    Args:
        targets: the images' labels.
        ratio: in (0, 1].
        seed: not negative.

    Raises:
        ValueError: ratio outside (0, 1].
    """
    if not 0 < ratio <= 1:
        raise ValueError(f"ratio {ratio} is not in (0, 1]")
    labels, chosen = np.asarray(targets), []
    for label in np.unique(labels):
        images = np.flatnonzero(labels == label)
        order = np.random.default_rng(seed_sequence("subset", seed, int(label))).permutation(images)
        chosen.append(order[: max(1, round(ratio * len(images)))])
    return np.sort(np.concatenate(chosen)).tolist()
