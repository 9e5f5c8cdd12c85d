"""The rule for random numbers: nothing has a state.

Whatever is random depends on what it is for, the seed and a place (epoch, position or update), never on what was drawn
before: a checkpoint stores no random state, and nothing depends on loader workers or on where a run was stopped.
"""

import random
import zlib
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def seed_sequence(purpose: str, *numbers: int) -> np.random.SeedSequence:
    """Seeds for one purpose ("order", "augmentation"), independent of every other purpose's at equal numbers.

    ``numbers`` are not negative, and always equally many for one purpose: numpy pads with zeros, so that
    (1,) and (1, 0) are the same seed.
    """
    return np.random.SeedSequence([zlib.crc32(purpose.encode()), *numbers])


def seed_step(seed: int, rank: int, micro_step: int) -> None:
    """Reseed what the model (dropout, drop-path) and Mixup draw from, from (seed, rank, step) alone.

    Nothing depends on what was drawn before, so a checkpoint needs no random state.
    """
    torch_seed, numpy_seed = seed_sequence("step", seed, rank, micro_step).generate_state(2)
    torch.manual_seed(int(torch_seed))
    np.random.seed(numpy_seed)  # noqa: NPY002 - timm's Mixup draws from numpy's global generator


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
