"""Readers of images with a class for each pixel, and what they say of files that are not as they should be."""

import dataclasses

import numpy as np
import pytest
import torch
from helpers.image_sets import photograph
from helpers.masks import save_mask, write_voc
from helpers.segmentation import CLASSES, pair, write_pairs
from PIL import Image
from scipy.io import savemat
from torch.utils.data import DataLoader

import datasets
from arguments import parse_arguments
from readers import DATASETS, MASKED_SETS, sets_of
from readers.masks import VOID
from readers.segmentation import WrongMask
from utils import Processes, UserError

ALONE = Processes(0, 1, torch.device("cpu"))


def read(name, path, split="train"):
    return datasets.read_split(name, split, path, MASKED_SETS)


# -------------------------------------------------------------------------------------------------- the registry


def test_a_task_has_data_sets_of_its_own(capsys):
    assert sets_of("segment") is MASKED_SETS
    assert sets_of("classify") is sets_of("module:Class") is DATASETS
    with pytest.raises(SystemExit):
        parse_arguments(["--task", "segment", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert ", ".join(MASKED_SETS) in shown
    assert "imagenet100" not in shown
    with pytest.raises(UserError, match="unknown data set 'imagenet': known are voc2012, "):
        parse_arguments(["--task", "segment", "--data-set", "imagenet", "--data-path", "x"])
    with pytest.raises(UserError, match="did you mean voc2012"):
        parse_arguments(["--task", "segment", "--data-set", "voc", "--data-path", "x"])
    assert parse_arguments(["--task", "segment", "--data-path", "x"]).data_set == "voc2012"


# ------------------------------------------------------------------------------------------------- PASCAL VOC


@pytest.fixture
def voc(tmp_path):
    write_voc(tmp_path, kinds=((15,), (3, 12), ()), split="train")
    return write_voc(tmp_path, kinds=((15,),), split="val")


def test_masks_are_the_palettes_indices_and_keep_void(voc):
    for place in (voc, voc / "VOCdevkit", voc / "VOCdevkit/VOC2012"):
        images = read("voc2012", place)
        assert len(images) == 3
        assert (images.classes[0], images.classes[15], len(images.classes)) == ("background", "person", 21)
        image, mask = images[1]
        assert (image.dtype, mask.dtype) == (torch.uint8, torch.uint8)
        assert image.shape == (3, *mask.shape)
        assert set(mask.unique().tolist()) == {0, 3, 12, VOID}
        stored = np.array(Image.open(voc / "VOCdevkit/VOC2012/SegmentationClass/a 1.png"))
        assert torch.equal(mask, torch.from_numpy(stored))


def test_the_lists_of_a_set_and_the_number_of_images_that_differs(voc, caplog):
    (voc / "VOCdevkit/VOC2012/ImageSets/Segmentation/trainval.txt").write_text("a 0\na 2\n")
    assert list(read("voc2012_trainval", voc).names) == ["a 0.jpg", "a 2.jpg"]
    settings = datasets.SplitSettings("voc2012", voc, task="segment")
    assert len(datasets.read_images(settings, "train", ALONE)) == 3
    assert "voc2012 train: 3 images instead of 1,464" in caplog.text
    half = datasets.read_images(dataclasses.replace(settings, sampling_ratio=0.34), "train", ALONE)
    assert len(half) == 1
    assert half[0][0].shape[1:] == half[0][1].shape


def test_train_aug_is_train_and_sbd_without_val(voc):
    sbd, root = voc / "benchmark_RELEASE/dataset", voc / "VOCdevkit/VOC2012"
    (sbd / "cls").mkdir(parents=True)
    (root / "ImageSets/Segmentation/val.txt").write_text("b 1\n")
    names = ["a 1", "b 0", "b 1"]
    for number, name in enumerate(["b 0", "b 1"]):
        photograph(number).save(root / f"JPEGImages/{name}.jpg")
        save_mask(np.zeros(photograph(number).size[::-1], np.uint8), root / f"SegmentationClass/{name}.png")
    for name in names:
        size = Image.open(root / f"JPEGImages/{name}.jpg").size[::-1]
        savemat(sbd / f"cls/{name}.mat", {"GTcls": {"Segmentation": np.full(size, 7, np.uint8)}})
    (sbd / "train.txt").write_text("a 1\nb 1\n")
    (sbd / "val.txt").write_text("b 0\n")
    images = read("voc2012_aug", voc)
    assert list(images.names) == ["a 0.jpg", "a 1.jpg", "a 2.jpg", "b 0.jpg"]
    assert VOID in images[1][1], "VOC's own mask, where there is one"
    assert images[3][1].unique().tolist() == [7]
    (sbd / "cls/b 0.mat").write_bytes(b"broken")
    with pytest.raises(UserError, match=r"b 0\.mat: cannot be read"):
        read("voc2012_aug", voc)[3]
    (sbd / "cls/b 0.mat").unlink()
    with pytest.raises(UserError, match=r"b 0\.mat: no such file, but SBD's lists name it \(1 are missing\)"):
        read("voc2012_aug", voc)
    (sbd / "cls").rename(sbd / "other")
    with pytest.raises(UserError, match=r"benchmark_RELEASE/dataset: no such folder"):
        read("voc2012_aug", voc)


def test_vocs_test_images_have_no_labels(voc):
    root = voc / "VOCdevkit/VOC2012"
    (root / "ImageSets/Segmentation/test.txt").write_text("a 2\n")
    (root / "SegmentationClass/a 2.png").unlink()
    image, mask = read("voc2012_test", voc, "val")[0]
    assert mask.shape == image.shape[1:]
    assert (mask == VOID).all()
    with pytest.raises(UserError, match="no labels to train on; train on voc2012_trainval"):
        read("voc2012_test", voc)


# ------------------------------------------------------------------------------------- ADE20K and a user's own


def test_ade20ks_zero_becomes_void_once(tmp_path):
    root = tmp_path / "ADEChallengeData2016"
    for split in ("training", "validation"):
        for kind in ("images", "annotations"):
            (root / kind / split).mkdir(parents=True)
        photograph(0).save(root / f"images/{split}/ADE_1.jpg")
        mask = np.zeros(photograph(0).size[::-1], np.uint8)
        mask[3:8], mask[8:20] = 1, 150
        Image.fromarray(mask).save(root / f"annotations/{split}/ADE_1.png")
    rows = [f"{number}\t0.1\t10\t1\tclass {number}, synonym" for number in range(1, 151)]
    (root / "objectInfo150.txt").write_text("\n".join(["Idx\tRatio\tTrain\tVal\tName", *rows]) + "\n")
    for split in ("train", "val"):
        images = read("ade20k", tmp_path, split)
        assert (images.classes[0], images.classes[149], len(images.classes)) == ("class 1", "class 150", 150)
        _, labels = images[0]
        assert (labels[0, 0], labels[4, 0], labels[9, 0]) == (VOID, 0, 149)
    Image.fromarray(mask - 1).save(root / "annotations/training/ADE_1.png")  # reduced already
    with pytest.raises(WrongMask, match=r"255 is no class; the numbers are 1 to 150, and 0 for void"):
        read("ade20k", tmp_path)[0]
    (root / "objectInfo150.txt").write_text("\n".join(rows[:100]))
    with pytest.raises(UserError, match="99 classes instead of the 150 of ade20k"):
        read("ade20k", tmp_path)


def test_a_users_own_images(tmp_path):
    images = read("folder", write_pairs(tmp_path), "val")
    assert (len(images), images.classes) == (7, CLASSES)
    picture, stored = pair(100)
    image, mask = images[0]
    assert np.array_equal(mask, stored)
    assert np.array_equal(image.permute(1, 2, 0), np.array(picture))
    (tmp_path / "val/masks/101.png").unlink()
    with pytest.raises(UserError, match=r"val/images/101\.png has no mask .*val/masks/101\.\* \(1 have none\)"):
        read("folder", tmp_path, "val")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("one\n", "1 classes; it needs 2 to 255 names"),
        ("a\nb\na\n", "the names a are there twice"),
        (None, "cannot be"),
    ],
)
def test_the_list_of_classes_is_checked(text, message, tmp_path):
    write_pairs(tmp_path, train=1, val=1)
    (tmp_path / "classes.txt").unlink()
    if text is not None:
        (tmp_path / "classes.txt").write_text(text)
    with pytest.raises(UserError, match=message):
        read("folder", tmp_path)


# -------------------------------------------------------------------------------------------------- wrong masks


def spoil(path, how):
    """Save a mask as users do: its palette as colours or as grey, with a class too many, or of another size."""
    mask = Image.open(path)
    numbers = np.array(mask)
    if how in ("RGB", "L"):
        mask = mask.convert(how)
    elif how == "class":
        numbers[0, 0] = len(CLASSES)
        mask = Image.fromarray(numbers)
    else:
        mask = Image.fromarray(numbers[1:])
    mask.save(path)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("RGB", r"100\.png: RGB pixels instead of class numbers; this is the palette saved as colours"),
        ("L", r"100\.png: \d+ is no class; the numbers are 0 to 2, and 255 for void.*saved as grey"),
        ("class", r"100\.png: 3 is no class; the numbers are 0 to 2"),
        ("size", r"val/images/100\.png and .*masks/100\.png differ in size: 19 x 14 and 19 x 13 px"),
    ],
)
def test_a_wrong_mask_is_one_line_also_from_a_worker(how, message, tmp_path):
    images = read("folder", write_pairs(tmp_path, train=1, val=1), "val")
    spoil(tmp_path / "val/masks/100.png", how)
    with pytest.raises(WrongMask, match=message):
        images[0]
    if how == "class":
        loader = DataLoader(images, num_workers=1, multiprocessing_context="fork")
        with pytest.raises(WrongMask, match=r"^[^\n]*100\.png: 3 is no class[^\n]*$"):
            next(iter(loader))


def test_a_mask_that_cannot_be_read_can_be_skipped_and_a_wrong_one_cannot(tmp_path):
    write_pairs(tmp_path, train=3, val=1)
    (tmp_path / "train/masks/0.png").write_bytes(b"broken")
    images = read("folder", tmp_path)
    dataset = datasets.AugmentedDataset(images, skip_unreadable=True)
    assert dataset._read(0)[2] == 1
    spoil(tmp_path / "train/masks/1.png", "class")
    with pytest.raises(WrongMask):
        dataset._read(1)
