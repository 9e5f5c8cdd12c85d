"""What a loader gives reaches the device as it is, its images normalised."""

from typing import NamedTuple

import pytest
import torch

from augmentation import normalise
from batches import device_batches, prepare


class Pair(NamedTuple):
    one: torch.Tensor
    other: list


def test_a_tree_of_tensors_is_brought_to_a_device_as_it_is():
    batch = {"images": torch.ones(2), "boxes": [torch.ones(1), torch.ones(3)], "pair": Pair(torch.ones(1), [1]), "n": 3}
    moved = prepare(batch, torch.device("meta"))
    assert moved["images"].is_meta
    assert [box.is_meta for box in moved["boxes"]] == [True, True]
    assert isinstance(moved["pair"], Pair)
    assert moved["pair"].one.is_meta
    assert (moved["pair"].other, moved["n"]) == ([1], 3)


def test_images_are_normalised_and_nothing_else_is():
    images = torch.randint(256, (2, 3, 4, 5), dtype=torch.uint8)
    views, masks = torch.stack([images, images], dim=1), images[:, 0]
    batch = prepare({"images": images, "views": views, "masks": masks, "targets": torch.arange(2)}, torch.device("cpu"))
    assert torch.equal(batch["images"], normalise(images))
    assert torch.equal(batch["views"][:, 1], normalise(images))
    assert torch.equal(batch["masks"], masks)
    assert batch["targets"].tolist() == [0, 1]


@pytest.mark.gpu
def test_a_gpu_gets_the_batches_in_order_while_it_works():
    batches = [torch.full((4, 3, 64, 64), number, dtype=torch.uint8).pin_memory() for number in range(8)]
    device, sums = torch.device("cuda"), []
    for images in device_batches(batches, device):
        torch.cuda._sleep(10_000_000)  # the next copy begins meanwhile
        sums.append(images.sum())
    expected = [normalise(batch).sum() for batch in batches]
    torch.testing.assert_close(torch.stack(sums).cpu(), torch.stack(expected))


@pytest.mark.gpu
def test_a_copy_to_a_gpu_does_not_wait():
    batches = [torch.zeros(4, 3, 64, 64, dtype=torch.uint8).pin_memory() for _ in range(3)]
    list(device_batches(batches, torch.device("cuda")))  # constants are copied once
    torch.cuda.set_sync_debug_mode("error")
    try:
        assert len(list(device_batches(batches, torch.device("cuda")))) == 3
    finally:
        torch.cuda.set_sync_debug_mode("default")
