"""The views of DINO and MoCo-v3: their order and parameters, number by number, against torchvision's own transforms."""

import random

import pytest
import torch
from helpers import image_sets
from PIL import ImageFilter, ImageOps
from torchvision import transforms
from torchvision.transforms.functional import pil_to_tensor, to_pil_image

from crops import random_box, resize_crops
from randomness import isolated_rng, seed_sequence
from tasks.views import dino_views, moco_views

IMAGE = pil_to_tensor(image_sets.picture(3, size=(90, 70)))
DINO = dino_views(64, 24, 3, scale=[0.4, 1.0], local_scale=[0.05, 0.4])
MOCO = moco_views(64)


def seeded(number):
    return isolated_rng(seed_sequence("test", number))


def test_views_are_bytes_in_groups_of_one_size_and_depend_on_the_seed_alone():
    with seeded(0):
        first = DINO(IMAGE)
    assert {name: (views.dtype, tuple(views.shape)) for name, views in first.items()} == {
        "global_views": (torch.uint8, (2, 3, 64, 64)),
        "local_views": (torch.uint8, (3, 3, 24, 24)),
    }
    with seeded(0):
        again = DINO(IMAGE)
    with seeded(1):
        other = DINO(IMAGE)
    for name, views in first.items():
        assert torch.equal(views, again[name])
        assert not torch.equal(views, other[name])
        assert not torch.equal(views[0], views[1])
    assert dino_views(64, 24, 0, [0.4, 1], [0.05, 0.4]).groups.keys() == {"global_views"}
    assert {name: tuple(views.shape) for name, views in MOCO(IMAGE).items()} == {"views": (2, 3, 64, 64)}


def describe(view):
    """What follows the crop, as (name, probability) in order."""
    steps = view.change.transforms
    return [
        (type(step.transforms[0]).__name__ if hasattr(step, "transforms") else type(step).__name__, step.p)
        for step in steps
    ]


FLIP, JITTER, GREY = ("RandomHorizontalFlip", 0.5), ("ColorJitter", 0.8), ("RandomGrayscale", 0.2)
SOLARISE = ("RandomSolarize", 0.2)


def blur(p):
    return ("GaussianBlur", p)


def test_dinos_steps():
    (first, second), local = DINO.groups["global_views"], DINO.groups["local_views"]
    assert describe(first) == [FLIP, JITTER, GREY, blur(1.0)]
    assert describe(second) == [FLIP, JITTER, GREY, blur(0.1), SOLARISE]
    assert [describe(view) for view in local] == [[FLIP, JITTER, GREY, blur(0.5)]] * 3
    assert {(view.size, view.scale, view.interpolation) for view in (first, second)} == {(64, (0.4, 1.0), "bicubic")}
    assert {(view.size, view.scale, view.interpolation) for view in local} == {(24, (0.05, 0.4), "bicubic")}


def test_mocos_steps_flip_last():
    first, second = MOCO.groups["views"]
    assert describe(first) == [JITTER, GREY, blur(1.0), FLIP]
    assert describe(second) == [JITTER, GREY, blur(0.1), SOLARISE, FLIP]
    assert {(view.size, view.scale, view.interpolation) for view in (first, second)} == {(64, (0.08, 1.0), "bilinear")}


def radius_blur(low, high):
    return lambda picture: picture.filter(ImageFilter.GaussianBlur(radius=random.uniform(low, high)))


def official_colours(blur_p, solarise_p, flip_first):
    """What follows the crop of a view, as the official programs compose it of torchvision's classes."""
    flip = [transforms.RandomHorizontalFlip(p=0.5)]
    jitter = transforms.ColorJitter(brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1)
    colours = [
        transforms.RandomApply([jitter], p=0.8),
        transforms.RandomGrayscale(p=0.2),
        transforms.RandomApply([radius_blur(0.1, 2.0)], p=blur_p),
        *[transforms.RandomApply([ImageOps.solarize], p=solarise_p)] * (solarise_p > 0),
    ]
    return transforms.Compose(flip + colours if flip_first else colours + flip)


@pytest.mark.parametrize(
    ("views", "name", "number", "steps"),
    [
        (DINO, "global_views", 0, (1.0, 0.0, True)),
        (DINO, "global_views", 1, (0.1, 0.2, True)),
        (DINO, "local_views", 0, (0.5, 0.0, True)),
        (MOCO, "views", 0, (1.0, 0.0, False)),
        (MOCO, "views", 1, (0.1, 0.2, False)),
    ],
)
def test_a_view_is_torchvisions_for_the_same_random_numbers(views, name, number, steps):
    """All but the crop to the bit; the crop's own test is elsewhere."""
    view = views.groups[name][number]
    for seed in range(25):
        with seeded(seed):
            found = views._group(IMAGE, [view])[0]
        with seeded(seed):
            box = random_box(*IMAGE.shape[1:], view.scale, (3 / 4, 4 / 3))
            crop = resize_crops(IMAGE, [box], view.size, view.interpolation)[0]
            expected = pil_to_tensor(official_colours(*steps)(to_pil_image(crop)))
        assert torch.equal(found, expected), seed
