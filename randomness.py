"""The rule for random numbers: they have no state.

A random number depends on its purpose, the seed and the position (epoch, image or update), never on earlier ones. So a
checkpoint holds no random state, and results do not depend on loader workers or on interruptions.
"""

import random
import zlib
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def seed_sequence(purpose: str, *numbers: int) -> np.random.SeedSequence:
    """Seeds for one purpose, such as "order" or "augmentation", independent of those of other purposes.

    ``numbers`` are not negative. A purpose must always have the same number of them: numpy pads with zeros, so (1,)
    and (1, 0) are the same seed.
    """
    return np.random.SeedSequence([zlib.crc32(purpose.encode()), *numbers])


def seed_step(seed: int, rank: int, micro_step: int) -> None:
    """Seed the global generators, which dropout, stochastic depth and Mixup use, for one micro-batch.

    ``micro_step`` is the number of the micro-batch since the start of the run.
    """
    torch_seed, numpy_seed = seed_sequence("step", seed, rank, micro_step).generate_state(2)
    torch.manual_seed(int(torch_seed))
    np.random.seed(numpy_seed)  # noqa: NPY002 - timm's Mixup draws from numpy's global generator


@contextmanager
def isolated_rng(seeds: np.random.SeedSequence) -> Iterator[None]:
    """Seed the global generators of random, numpy and torch's CPU within the block, and restore them after it.

    CUDA's generators are not changed.
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
