"""The rule that random numbers have no state."""

import numpy as np
import torch

import randomness


def test_seeds_of_a_step_depend_on_seed_rank_and_step_alone():
    def draw(*numbers):
        randomness.seed_step(*numbers)
        return torch.rand(1).item(), np.random.rand()  # noqa: NPY002 - Mixup's generator

    draws = {numbers: draw(*numbers) for numbers in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1))}
    assert len(set(draws.values())) == 4
    for numbers in reversed(draws):
        assert draw(*numbers) == draws[numbers]
