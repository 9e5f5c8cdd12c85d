"""The rule for random numbers: they have no state.

A random number depends on its purpose, the seed and the position (epoch, image or update), never on earlier ones. So a
checkpoint holds no random state, and results do not depend on loader workers or on interruptions.
"""

import hashlib
import random
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch.utils.data import get_worker_info


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
def isolated_rng(purpose: str, *numbers: int) -> Iterator[None]:
    """Seed the global generators of random, numpy and torch's CPU within the block, and restore them after it.

    The seeds are a hash of the purpose and the numbers, which takes microseconds. A loader's worker does not restore
    the generators, as nothing else in it uses them. CUDA's generators are not changed.
    """
    in_worker = get_worker_info() is not None
    saved = None if in_worker else _get_states()
    digest = hashlib.blake2b(repr((purpose, numbers)).encode(), digest_size=20).digest()
    for_random, for_torch, for_numpy = struct.unpack("=QQI", digest)
    random.seed(for_random)
    torch.default_generator.manual_seed(for_torch)  # torch.manual_seed would reseed CUDA, too
    np.random.seed(for_numpy)  # noqa: NPY002  timm draws from the global generator
    try:
        yield
    finally:
        if saved is not None:
            _set_states(*saved)


def _get_states() -> tuple:
    return random.getstate(), np.random.get_state(), torch.default_generator.get_state()  # noqa: NPY002


def _set_states(for_random, for_numpy, for_torch) -> None:
    random.setstate(for_random)
    np.random.set_state(for_numpy)  # noqa: NPY002
    torch.default_generator.set_state(for_torch)
