"""The images of training and evaluation: Pillow's and timm's pictures up to rounding, erased by timm's rule."""

import random

import numpy as np
import pytest
import torch
from helpers.image_sets import picture
from PIL import Image
from timm.data import create_transform
from timm.data.auto_augment import NAME_TO_OP
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import RandomResizedCropAndInterpolation
from torchvision import transforms

import affine
from augmentation import TrainTransform, as_pillow, as_tensor, erase, eval_transform, normalise, random_erasing
from crops import random_box, resize_crops
from randomness import isolated_rng
from readers.images import ImageFiles
from utils import UserError

ROUNDING = 2  # of 255, to Pillow's results


def difference(ours, theirs):
    """The largest one of two uint8 images."""
    return int((ours.short() - theirs.short()).abs().max())


# ---------------------------------------------------------------------------------------------- transforms


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "CMYK", "1", "LA"])
@pytest.mark.parametrize("size", [(90, 31), (20, 80)])
@pytest.mark.parametrize("input_size", [32, 48])
def test_any_kind_of_image_becomes_a_square(tmp_path, mode, size, input_size):
    path = tmp_path / {"CMYK": "image.jpg"}.get(mode, "image.png")
    picture(size=size, mode=mode).save(path)
    image, _ = ImageFiles(tmp_path, [path.name], [0], ["a"])[0]
    assert (image.shape, image.dtype) == ((3, size[1], size[0]), torch.uint8)
    for result in (TrainTransform(input_size)(image)["images"], eval_transform(input_size)(image)):
        assert (result.shape, result.dtype) == ((3, input_size, input_size), torch.uint8)


def test_evaluation_resizes_256_to_224_and_crops_the_centre():
    image = picture(size=(512, 300))
    expected = image.resize((436, 256), Image.Resampling.BICUBIC).crop((106, 16, 330, 240))
    assert difference(eval_transform(224)(as_tensor(image)), as_tensor(expected)) <= ROUNDING


def test_crop_pct_is_the_share_that_evaluation_keeps():
    image = as_tensor(picture(size=(64, 64)))
    assert torch.equal(eval_transform(64, crop_pct=1.0)(image), image)


def test_small_images_are_evaluated_whole():
    image = as_tensor(picture(size=(32, 32)))
    assert torch.equal(eval_transform(32)(image), image)


def bare(size=48, **changed):
    """The training transform with nothing but the crop, and what is given."""
    return TrainTransform(size, **{"color_jitter": 0.0, "aa": "none", "reprob": 0.0, "hflip": 0.0} | changed)


def test_small_images_are_shifted_by_up_to_four_pixels_in_training():
    image = as_tensor(picture(size=(32, 32)))
    padded = torch.nn.functional.pad(image, (4, 4, 4, 4))
    transform, shifts = bare(32), set()
    for _ in range(40):
        result = transform(image)["images"]
        windows = {place: padded[:, place[0] : place[0] + 32, place[1] : place[1] + 32] for place in np.ndindex(9, 9)}
        shifts.add(next(place for place, window in windows.items() if torch.equal(result, window)))
    assert len(shifts) > 10


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_the_random_crop_is_timms(interpolation):
    image = picture(size=(90, 70))
    theirs = RandomResizedCropAndInterpolation(48, (0.08, 1.0), interpolation=interpolation)
    for number in range(20):
        with isolated_rng("test", number):
            ours = bare(interpolation=interpolation)(as_tensor(image))["images"]
        with isolated_rng("test", number):
            assert difference(ours, as_tensor(theirs(image))) <= ROUNDING


def test_crops_of_one_image_are_what_pillow_cuts_out():
    image = picture(size=(90, 70))
    boxes = [random_box(70, 90, (0.05, 0.4)) for _ in range(6)]
    crops = resize_crops(as_tensor(image), boxes, 24)
    for crop, (top, left, height, width) in zip(crops, boxes, strict=True):
        cut = image.crop((left, top, left + width, top + height)).resize((24, 24), Image.Resampling.BICUBIC)
        assert difference(crop, as_tensor(cut)) <= ROUNDING


def difference_from_bare(**changed):
    """How many of 30 draws an option changes, with the same random crop."""
    image = as_tensor(picture(size=(60, 60)))
    plain, other = bare(), bare(**changed)
    different = 0
    for number in range(30):
        results = []
        for transform in (plain, other):
            with isolated_rng("test", number):
                results.append(transform(image))
        erased = "erased" in results[1] and bool(results[1]["erased"].any())
        different += erased or not torch.equal(results[0]["images"], results[1]["images"])
    return different


@pytest.mark.parametrize(
    ("option", "least", "most"),
    [
        ({"hflip": 0.5}, 5, 25),
        ({"color_jitter": 0.4}, 29, 30),
        ({"aa": "rand-m9-mstd0.5-inc1"}, 20, 30),
        ({"reprob": 1.0}, 29, 30),
        ({"reprob": 1.0, "recount": 3}, 29, 30),
        ({"interpolation": "bilinear"}, 29, 30),
        ({"scale": (0.9, 1.0)}, 29, 30),
        ({}, 0, 0),
    ],
)
def test_every_augmentation_option_reaches_the_images(option, least, most):
    assert least <= difference_from_bare(**option) <= most


@pytest.mark.parametrize("policy", ["foo", "rand-m9-qq1", "rand-n1.5"])
def test_an_unknown_policy_is_one_line(policy):
    with pytest.raises(UserError, match=rf"--aa {policy}.*rand-m9-mstd0.5-inc1"):
        TrainTransform(48, aa=policy)


@pytest.mark.parametrize("resample", [Image.Resampling.BILINEAR, Image.Resampling.BICUBIC])
@pytest.mark.parametrize("amount", [0.31, -0.17, 0.004, 1.5])
@pytest.mark.parametrize("name", affine.FUNCTIONS)
def test_shear_and_translation_are_pillows(name, amount, resample):
    image = picture(size=(50, 40))
    settings = {"fillcolor": (124, 116, 104), "resample": resample}
    ours, theirs = (function(image, amount, **settings) for function in (affine.FUNCTIONS[name], NAME_TO_OP[name]))
    assert difference(as_tensor(ours), as_tensor(theirs)) <= 1


def test_randaugment_uses_the_fast_functions_with_timms_choices():
    """The same draws give timm's picture, up to rounding that later operations may enlarge."""
    image = picture(size=(48, 48))
    _, timms, _ = create_transform(
        48, is_training=True, auto_augment="rand-m9-mstd0.5-inc1", interpolation="bicubic", separate=True
    )
    ours = TrainTransform(48).colours
    for number in range(60):
        results = []
        for transform in (ours, timms):
            with isolated_rng("test", number):
                results.append(as_tensor(transform(image)))
        assert (results[0].short() - results[1].short()).abs().float().mean() < 1
    assert {operation.aug_fn for operation in ours.transforms[0].ops} >= set(affine.FUNCTIONS.values())


# ------------------------------------------------------------------------------------------- on the device


def test_normalisation_is_torchvisions():
    image = picture(size=(20, 30))
    theirs = transforms.Compose(
        [transforms.ToTensor(), transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])]
    )
    torch.testing.assert_close(normalise(as_tensor(image)), theirs(image), atol=1e-6, rtol=0)


def test_an_image_goes_to_pillow_and_back():
    image = torch.randint(256, (3, 5, 7), dtype=torch.uint8)
    assert torch.equal(as_tensor(as_pillow(image)), image)


@pytest.mark.parametrize("most", [1, 3])
def test_areas_are_erased_where_timm_erases(most):
    timms = RandomErasing(0.6, mode="const", max_count=most, device="cpu")
    # timm draws nothing but the places from Python's generator; ours one number more an area, the last one of all
    for seed in range(60):
        random.seed(seed)
        theirs = timms(torch.ones(1, 3, 40, 40))[0]
        random.seed(seed)
        areas = random_erasing(40, 0.6, most)
        ours = erase(torch.ones(1, 3, 40, 40), areas[None], "const")[0]
        if most == 1:
            assert torch.equal(ours, theirs)
        else:  # the first area; later ones are drawn after a number that timm does not draw
            top, left, height, width, _ = areas[0].tolist()
            assert (theirs[:, top : top + height, left : left + width] == 0).all()
        assert areas.shape == (most, 5)


def test_half_of_the_images_have_areas_and_their_number_varies():
    counts = [int((random_erasing(40, 0.5, 3)[:, 2] > 0).sum()) for _ in range(300)]
    assert 90 < counts.count(0) < 210
    assert min(counts.count(number) for number in (1, 2, 3)) > 20


@pytest.mark.parametrize("mode", ["const", "rand", "pixel"])
def test_an_area_is_filled_as_its_mode_says(mode):
    images = torch.full((2, 3, 200, 200), 9.0)
    areas = torch.tensor([[[10, 20, 150, 160, 77]], [[0, 0, 0, 0, 0]]])
    erased = erase(images, areas, mode)
    inside = erased[0, :, 10:160, 20:180]
    assert torch.equal(erased[1], images[1])
    assert int((erased[0] != 9).sum()) == inside.numel()
    if mode == "const":
        assert (inside == 0).all()
    elif mode == "rand":
        assert torch.equal(inside, inside[:, :1, :1].expand_as(inside))
        assert len(inside[:, 0, 0].unique()) == 3
    else:
        assert abs(float(inside.mean())) < 0.02
        assert abs(float(inside.std()) - 1) < 0.02


def test_the_noise_of_an_area_depends_on_its_number_alone():
    images = torch.randn(4, 3, 16, 16)
    areas = torch.tensor([[2, 2, 8, 8, 5], [2, 2, 8, 8, 6], [2, 2, 8, 8, 5], [0, 0, 8, 8, 5]])[:, None]
    a, b, c, d = erase(images, areas, "pixel")[:, :, 2:8, 2:8]
    assert torch.equal(a, c)
    assert torch.equal(a, d)
    assert not torch.equal(a, b)
    assert torch.equal(erase(images[1:2], areas[1:2], "pixel")[0, :, 2:8, 2:8], b), "whatever else is in the batch"


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["const", "rand", "pixel"])
def test_a_gpu_erases_as_a_cpu_does(mode):
    images, areas = torch.randn(8, 3, 32, 32), torch.stack([random_erasing(32, 1.0, 2) for _ in range(8)])
    assert torch.equal(erase(images.cuda(), areas.cuda(), mode).cpu(), erase(images, areas, mode))
