"""The order of training and evaluation over updates, micro-batches, processes and resumed runs."""

import itertools

import numpy as np
import pytest
from torch.utils.data import BatchSampler

from randomness import seed_sequence
from samplers import EvalSampler, TrainSampler, class_subset

TOTAL_BATCH = 8
SPLITS = [
    (8, 1, 1),
    (4, 2, 1),
    (4, 1, 2),
    (2, 2, 2),
    (1, 2, 4),
    (2, 1, 4),
]  # batch size, accumulation, processes


def draws_of_updates(batch_size, accumulation, world_size, num_images=50, epoch=3, seed=5, views=1):
    """Per update the set of draws that all processes make in it."""
    per_rank = []
    for rank in range(world_size):
        sampler = TrainSampler(num_images, batch_size, accumulation, rank, world_size, seed, views)
        sampler.set_epoch(epoch)
        per_rank.append(list(BatchSampler(sampler, batch_size * accumulation, drop_last=False)))
    return [set().union(*update) for update in zip(*per_rank, strict=True)]


def test_one_process_takes_the_positions_in_turn():
    sampler = TrainSampler(20, batch_size=4, seed=1)
    draws = list(sampler)
    assert [draw.position for draw in draws] == list(range(20))
    assert sorted(draw.index for draw in draws) == list(range(20))
    assert {draw.epoch for draw in draws} == {0}
    assert all(type(number) is int for draw in draws for number in draw)


@pytest.mark.parametrize("split", SPLITS)
def test_a_total_batch_holds_the_same_draws_however_it_is_split(split):
    updates = draws_of_updates(*split)
    assert len(updates) == 50 // TOTAL_BATCH
    assert updates == draws_of_updates(TOTAL_BATCH, 1, 1)


def test_processes_take_the_positions_in_turn():
    sampler = TrainSampler(48, batch_size=2, accumulation=3, rank=1, world_size=4)  # total batch 24
    positions = [draw.position for draw in sampler]
    assert positions == [1, 5, 9, 13, 17, 21, 25, 29, 33, 37, 41, 45]


@pytest.mark.parametrize("split", SPLITS)
def test_a_total_batch_holds_the_same_views_however_it_is_split(split):
    updates = draws_of_updates(*split, views=3)
    assert len(updates) == 50 // TOTAL_BATCH
    assert updates == draws_of_updates(TOTAL_BATCH, 1, 1, views=3)


def test_the_three_views_of_an_image_go_to_consecutive_processes():
    ranks = [list(TrainSampler(50, 4, rank=rank, world_size=4, views=3)) for rank in range(4)]
    in_turn = [draw for step in zip(*ranks, strict=True) for draw in step]  # rank 0's first, rank 1's first, ...
    assert [draw.position for draw in in_turn] == list(range(48))  # of 50: only the incomplete total batch is cut
    images = [draw.index for draw in in_turn]
    for first in range(0, 48, 3):
        assert len(set(images[first : first + 3])) == 1
    assert len(set(images)) == 48 // 3  # a third of an epoch's images


def test_repeated_augmentation_sees_other_images_in_every_epoch_and_with_every_seed():
    """timm's sampler shuffles by the epoch alone. A set of fewer than 256 images, too, has an epoch."""
    thirds = set()
    for seed in range(3):
        sampler = TrainSampler(60, 10, seed=seed, views=3)
        for epoch in range(3):
            sampler.set_epoch(epoch)
            thirds.add(frozenset(draw.index for draw in sampler))
    assert len(thirds) == 9
    assert all(len(third) == 20 for third in thirds)


def test_an_incomplete_total_batch_is_left_out_and_differs_by_epoch():
    sampler = TrainSampler(30, batch_size=8)
    left_out = []
    for epoch in range(4):
        sampler.set_epoch(epoch)
        drawn = {draw.index for draw in sampler}
        assert len(drawn) == 24
        left_out.append(frozenset(range(30)) - drawn)
    assert sampler.updates_per_epoch == 3
    assert len(set(left_out)) == 4


def test_the_order_depends_on_seed_and_epoch_alone():
    def order(seed, epoch):
        sampler = TrainSampler(100, batch_size=10, seed=seed)
        sampler.set_epoch(epoch)
        return [draw.index for draw in sampler]

    assert order(0, 1) == order(0, 1)
    assert len({tuple(order(seed, epoch)) for seed in range(3) for epoch in range(3)}) == 9
    assert order(0, 0) != list(range(100))


@pytest.mark.parametrize("first_update", [0, 1, 4, 6])
def test_a_resumed_epoch_is_the_rest_of_the_whole_one(first_update):
    sampler = TrainSampler(50, batch_size=2, accumulation=2, rank=1, world_size=2)
    sampler.set_epoch(2)
    whole = list(sampler)
    sampler.set_epoch(2, first_update)
    assert list(sampler) == whole[first_update * 4 :]
    assert len(sampler) == len(whole) - first_update * 4
    sampler.set_epoch(3)
    assert len(list(sampler)) == len(whole)


def test_fewer_images_than_a_total_batch_make_no_update():
    sampler = TrainSampler(7, batch_size=4, accumulation=2)
    assert sampler.updates_per_epoch == 0
    assert list(sampler) == []


@pytest.mark.parametrize(
    "arguments", [{"rank": 2, "world_size": 2}, {"rank": -1}, {"batch_size": 0}, {"accumulation": 0}]
)
def test_impossible_sizes_are_refused(arguments):
    with pytest.raises(ValueError, match=r"rank|at least 1"):
        TrainSampler(**{"num_images": 10, "batch_size": 2, **arguments})


@pytest.mark.parametrize("first_update", [-1, 6])
def test_an_update_outside_the_epoch_is_refused(first_update):
    with pytest.raises(ValueError, match="first_update"):
        TrainSampler(10, batch_size=2).set_epoch(0, first_update)


@pytest.mark.parametrize("world_size", [1, 2, 3, 7, 12])
def test_evaluation_draws_every_image_once_at_any_world_size(world_size):
    samplers = [EvalSampler(10, rank, world_size) for rank in range(world_size)]
    draws = [list(sampler) for sampler in samplers]
    assert sorted(draw.index for rank in draws for draw in rank) == list(range(10))
    assert all(draw.position == draw.index and draw.epoch == 0 for rank in draws for draw in rank)
    assert [len(sampler) for sampler in samplers] == [len(rank) for rank in draws]
    assert max(map(len, draws)) - min(map(len, draws)) <= 1


def test_evaluation_refuses_a_rank_outside_the_world():
    with pytest.raises(ValueError, match="rank 3"):
        EvalSampler(10, rank=3, world_size=3)


def test_purposes_and_numbers_have_seeds_of_their_own():
    seeds = [
        seed_sequence(*key)
        for key in [("order", 1, 2), ("order", 2, 1), ("augmentation", 1, 2, 0), ("augmentation", 1, 2, 1)]
    ]
    assert len({tuple(seed.generate_state(4)) for seed in seeds}) == 4


# Classes of 1, 5, 40 and 101 images in a mixed order.
TARGETS = np.random.default_rng(0).permutation(np.repeat([0, 1, 2, 7], [1, 5, 40, 101])).tolist()


@pytest.mark.parametrize("ratio", [1e-6, 0.25, 0.5, 0.75, 1.0])
def test_a_subset_holds_its_share_of_every_class(ratio):
    subset = class_subset(TARGETS, ratio, seed=0)
    counts = np.bincount(np.array(TARGETS)[subset])
    assert counts[[0, 1, 2, 7]].tolist() == [max(1, round(ratio * size)) for size in (1, 5, 40, 101)]
    assert subset == sorted(set(subset))
    assert all(type(index) is int for index in subset)


def test_smaller_subsets_lie_inside_larger_ones():
    subsets = [set(class_subset(TARGETS, ratio, seed=4)) for ratio in np.linspace(0.05, 1, 20)]
    assert all(small <= large for small, large in itertools.pairwise(subsets))
    assert subsets[-1] == set(range(len(TARGETS)))


def test_a_subset_depends_on_its_seed_and_is_random_within_a_class():
    quarters = [class_subset(TARGETS, 0.25, seed) for seed in (0, 0, 1)]
    assert quarters[0] == quarters[1] != quarters[2]
    times_chosen = sum(
        np.isin(np.arange(len(TARGETS)), class_subset(TARGETS, 0.5, seed)).astype(int) for seed in range(200)
    )
    times_chosen = times_chosen[np.array(TARGETS) == 7]
    assert times_chosen.min() > 60
    assert times_chosen.max() < 140


@pytest.mark.parametrize("ratio", [0, -0.1, 1.1])
def test_a_share_that_is_none_is_refused(ratio):
    with pytest.raises(ValueError, match="ratio"):
        class_subset(TARGETS, ratio, seed=0)
