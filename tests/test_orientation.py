"""Photographs that EXIF data turn: upright in a user's own sets, as stored wherever a protocol or labels need that."""

import shutil
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import detection, segmentation
from helpers.image_sets import picture, write_folder, write_tars
from PIL import Image, ImageOps

import datasets
from analysis import check, figures
from analysis.measures import CroppedImages
from augmentation import as_tensor
from datasets import AugmentedDataset, cache_splits, read_split
from readers import BOXED_SETS, DATASETS, MASKED_SETS
from readers.folders import read_folder
from readers.images import ImageFiles, decode, read_photograph
from readers.masks import MaskedImages
from utils import Processes

ORIENTATION = 0x0112
OWN = {"folder", "images", "tar"}


def save(path: Path, orientation: int, number: int = 7, **options) -> torch.Tensor:
    """A picture of 40 x 30 px with this orientation; returns its pixels as they are stored."""
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    picture(number).save(path, exif=exif, **options)
    with Image.open(path) as image:
        return as_tensor(image.convert("RGB"))


def upright(path: Path) -> torch.Tensor:
    """Pillow's own answer."""
    with Image.open(path) as image:
        return as_tensor(ImageOps.exif_transpose(image).convert("RGB"))


@pytest.fixture
def folder(tmp_path):
    """Two classes, all of whose images are turned by 90 degrees when they are shown."""
    root = write_folder(tmp_path / "set", ["a", "b"])
    for number, path in enumerate(sorted(root.glob("*/*/*"))):
        save(path, 6, number)
    return root


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".tif", ".webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_of_every_format_is_pillows(orientation, suffix, tmp_path):
    path = tmp_path / f"phone{suffix}"
    stored = save(path, orientation)
    data = path.read_bytes()
    assert torch.equal(decode(data, upright=True), upright(path))
    assert torch.equal(as_tensor(read_photograph(path)), upright(path))
    assert torch.equal(decode(data), stored)
    assert decode(data, upright=True).shape == ((3, 40, 30) if orientation > 4 else (3, 30, 40))


@pytest.mark.parametrize("suffix", [".jpg", ".png"])
def test_damaged_exif_data_leave_the_pixels_as_they_are(suffix, tmp_path):
    path = tmp_path / f"phone{suffix}"
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    for damaged in (b"Exif\0\0nothing", b"", exif.tobytes()[:12]):
        picture(3).save(path, exif=damaged)
        with Image.open(path) as image:
            stored = as_tensor(image.convert("RGB"))
        assert torch.equal(decode(path.read_bytes(), upright=True), stored)
        assert torch.equal(as_tensor(read_photograph(path)), stored)


def test_only_a_users_own_sets_without_masks_and_boxes_are_turned():
    assert {name for name, entry in DATASETS.items() if entry.upright} == OWN
    assert not any(entry.upright for sets in (MASKED_SETS, BOXED_SETS) for entry in sets.values())


def test_folders_tars_and_unlabelled_images_are_upright(folder, tmp_path):
    roots = {"folder": folder, "tar": write_tars(folder, tmp_path / "tars", "one"), "images": folder}
    assert roots.keys() == OWN
    for name, root in roots.items():
        images = read_split(name, "train", root)
        for index in range(len(images)):
            place = images.names[index]
            path = folder / (place if place.startswith("train/") or name == "images" else f"train/{place}")
            assert torch.equal(images[index][0], upright(path)), name


def test_a_published_set_of_the_same_layout_is_as_stored(folder, monkeypatch):
    entry = datasets.DATASETS["imagenet"]
    monkeypatch.setitem(DATASETS, "imagenet", type(entry)(read_folder, entry.about, entry.layout, num_classes=2))
    image, _ = read_split("imagenet", "val", folder)[0]
    assert image.shape == (3, 30, 40)


def test_masks_and_boxes_lie_on_the_stored_pixels(tmp_path):
    for kind, write, sets in (
        ("masks", segmentation.write_pairs, MASKED_SETS),
        ("boxes", detection.write_pictures, BOXED_SETS),
    ):
        root = write(tmp_path / kind)
        path = sorted((root / "train/images").iterdir())[0]
        with Image.open(path) as image:
            exif, pixels = image.getexif(), image.convert("RGB")
        exif[ORIENTATION] = 6
        pixels.save(path, exif=exif)
        images = read_split("folder", "train", root, sets)
        (index,) = [i for i, name in enumerate(images.names) if Path(name).name == path.name]
        assert images[index][0].shape[1:] == (pixels.height, pixels.width)


def test_the_jaccard_index_compares_stored_pixels(tmp_path):
    save(tmp_path / "image.jpg", 6)
    Image.new("L", (40, 30)).save(tmp_path / "mask.png")
    image = MaskedImages(["image"], [tmp_path / "image.jpg"], [tmp_path / "mask.png"], None).image(0)
    assert image.size == (40, 30)


def test_cached_images_are_upright(folder):
    cached, files = (AugmentedDataset(read_split("folder", "train", folder)) for _ in range(2))
    cache_splits([cached], Processes(0, 1, torch.device("cpu")))
    assert cached.base.in_memory
    for index in range(len(files)):
        assert torch.equal(cached.base[index][0], files.base[index][0])
        assert cached.base[index][0].shape == (3, 40, 30)


def test_the_analysis_of_a_folder_is_upright(folder):
    paths = sorted((folder / "val").glob("*/*"))
    samples = figures.folder_samples(Namespace(images=folder / "val", count=4))
    for path, sample in zip(paths, samples, strict=True):
        assert np.array_equal(np.asarray(sample.image), upright(path).permute(1, 2, 0).numpy())
    turned = paths[0].with_name("straight.png")
    Image.fromarray(upright(paths[0]).permute(1, 2, 0).numpy()).save(turned)
    cropped = CroppedImages([paths[0], turned], 16)
    assert torch.equal(cropped[0], cropped[1])


def test_the_check_says_what_training_does(folder, tmp_path, capsys):
    check.main(f"--data-set folder --data-path {folder} --num-workers 1".split())
    assert "(by EXIF, turned by 90°; training does so, too)" in capsys.readouterr().out
    masked = segmentation.write_pairs(tmp_path / "masks")
    path = sorted((masked / "train/images").iterdir())[0]
    with Image.open(path) as image:
        save_as, size = image.format, image.size
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    picture(1, size).save(path, save_as, exif=exif)
    check.main(f"--task segment --data-set folder --data-path {masked} --num-workers 1".split())
    assert "(by EXIF, turned by 90°; training does not)" in capsys.readouterr().out


def test_the_images_of_a_folder_are_read_as_before_without_exif(folder, tmp_path):
    plain = write_folder(tmp_path / "plain", ["a", "b"])
    images = read_split("folder", "train", plain)
    stored = ImageFiles(plain, list(images.names), images.targets, ["a", "b"])
    assert not stored.upright
    assert all(torch.equal(images[i][0], stored[i][0]) for i in range(len(images)))
    shutil.rmtree(plain)
