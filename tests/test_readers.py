"""Every reader on a small copy of its set in the published layout, and on broken ones."""

import contextlib
import gzip
import io
import os
import pickle
import re
import shutil
import tarfile
from collections import Counter
from unittest import mock

import numpy as np
import pytest
import torch
from helpers.image_sets import (
    BREEDS,
    log_messages,
    picture,
    truncate,
    write_cars,
    write_cars_annotations,
    write_cifar10,
    write_cifar100,
    write_domainnet,
    write_flowers,
    write_flowers_labels,
    write_folder,
    write_pets,
    write_tar,
    write_tars,
)
from PIL import Image
from torch.utils.data import DataLoader

from arguments import parse_arguments
from augmentation import as_tensor
from datasets import AugmentedDataset, read_split, relabel
from readers import tars
from readers.folders import CLASS_LISTS
from readers.images import ImageFiles, SubsetOf, UnreadableImage, decode
from readers.names import Names
from samplers import Draw
from utils import UserError

IMAGENET100 = sorted(
    line for line in (CLASS_LISTS / "imagenet100.txt").read_text().splitlines() if line and not line.startswith("#")
)


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path / "animals", ["ant", "bee", "cat"])


def refusal(name, split, root):
    """The one line that a broken set is answered with."""
    with pytest.raises(UserError) as error:
        read_split(name, split, root)
    assert "\n" not in str(error.value)
    return str(error.value)


# --------------------------------------------------------------------------------------------- digits


def test_digits_are_sklearns_and_every_fifth_is_val():
    from sklearn.datasets import load_digits

    scans = load_digits()
    train, val = (read_split("digits", split, None) for split in ("train", "val"))
    assert (len(train), len(val), len(train.classes)) == (1437, 360, 10)
    for number, (images, index) in {0: (val, 0), 1: (train, 0), 4: (train, 3), 5: (val, 1)}.items():
        image, target = images[index]
        assert (image.shape, image.dtype, target) == ((3, 8, 8), torch.uint8, scans.target[number])
        np.testing.assert_allclose(image[0], scans.images[number] * 255 / 16, atol=0.5)
        assert (image == image[:1]).all()


# -------------------------------------------------------------------------------------------- folders


def test_a_folder_is_read_by_sorted_class_names(folder):
    images = read_split("folder", "train", str(folder))
    assert (len(images), images.classes, images.targets.tolist()) == (6, ["ant", "bee", "cat"], [0, 0, 1, 1, 2, 2])
    assert images.names[2:5] == ["train/bee/0.jpg", "train/bee/1.jpg", "train/cat/0.jpg"]
    image, target = images[4]
    assert (image.shape, image.dtype, target) == ((3, 30, 40), torch.uint8, 2)
    assert images.size(4) == (40, 30)


@pytest.mark.parametrize("path", [".", "./animals/../animals", "animals/"])
def test_names_are_the_paths_below_the_data_path_however_that_is_written(folder, monkeypatch, path):
    monkeypatch.chdir(folder if path == "." else folder.parent)
    images = read_split("folder", "val", path)
    assert images.names[0] == "val/ant/0.jpg"
    assert images[0][0].shape == (3, 30, 40)


def test_a_home_folder_is_found(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder.parent))
    assert len(read_split("folder", "val", "~/animals")) == 6


def test_val_alone_can_be_evaluated(folder):
    shutil.rmtree(folder / "train")
    assert len(read_split("folder", "val", folder).classes) == 3


def break_missing(root):
    shutil.rmtree(root)


def break_val(root):
    shutil.rmtree(root / "val")


def break_class(root):
    for path in (root / "val" / "bee").iterdir():
        path.rename(path.with_suffix(".txt"))


def break_same(root):
    (root / "val" / "bee").rename(root / "val" / "bear")


def break_more(root):
    shutil.copytree(root / "train" / "ant", root / "train" / "ape")


def break_flat(root):
    for path in list((root / "val").glob("*/*")):
        path.rename(root / "val" / f"{path.parent.name}_{path.name}")
    for path in list((root / "val").iterdir()):
        if path.is_dir():
            path.rmdir()


def break_empty(root):
    shutil.rmtree(root / "val")
    (root / "val").mkdir()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (break_missing, r"--data-path .*animals: no such folder.*train/<class>"),
        (break_val, r"no folder val/; expected train/<class>/\* and val/<class>/\*"),
        (break_class, r"val: no images in the class folders bee;.*\.jpg"),
        (break_same, r"same class folders; only in val/: bear; only in train/: bee"),
        (break_more, r"same class folders; only in train/: ape"),
        (break_flat, r"val: images lie directly in it;.*extract_ILSVRC.sh"),
        (break_empty, r"val: no images"),
    ],
)
def test_what_is_wrong_with_a_folder_is_one_line(folder, damage, message):
    damage(folder)
    assert re.search(message, refusal("folder", "val", folder))


def test_classes_that_differ_stop_the_training_split_too(folder):
    break_same(folder)
    assert "only in train/: bee" in refusal("folder", "train", folder)


def test_a_set_of_files_needs_a_path():
    assert "imagenet needs --data-path, a folder with train/<class>" in refusal("IMNET", "train", None)


def test_images_without_classes_are_all_that_lie_in_a_folder(folder):
    images = read_split("images", "train", folder)
    assert images.names == sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.jpg"))
    assert (images.classes, set(images.targets)) == ([], {0})
    for task in ("classify", "knn", "linear"):
        with pytest.raises(UserError, match=f"--data-set images has no classes, which --task {task} needs; use folder"):
            parse_arguments(["--task", task, "--data-set", "images", "--data-path", str(folder)], saved={})


def test_imagenet_has_a_thousand_classes(folder, tmp_path):
    assert re.search(r"3 classes instead of the 1000.*--data-set folder", refusal("imagenet", "val", folder))
    picture().save(tmp_path / "image.jpg")
    for split in ("train", "val"):
        for number in range(1000):
            (tmp_path / split / f"n{number:08}").mkdir(parents=True)
            os.link(tmp_path / "image.jpg", tmp_path / split / f"n{number:08}" / "0.JPEG")
    images = read_split("imagenet", "train", tmp_path)
    assert (len(images), len(images.classes)) == (1000, 1000)


def test_the_published_list_has_a_hundred_wnids():
    assert len(set(IMAGENET100)) == 100
    assert all(name[0] == "n" and name[1:].isdigit() and len(name) == 9 for name in IMAGENET100)


def test_imagenet100_is_filtered_from_imagenet_or_ready(tmp_path):
    ready = write_folder(tmp_path / "ready", IMAGENET100, per_class=1)
    whole = shutil.copytree(ready, tmp_path / "whole")
    write_folder(whole, ["n00000001", "n99999999"], per_class=1)
    for root in (ready, whole):
        images = read_split("imagenet100", "val", root)
        assert (len(images), images.classes) == (100, IMAGENET100)
        assert [images[index][1] for index in (0, 57, 99)] == [0, 57, 99]
    for name in IMAGENET100[10:17]:
        shutil.rmtree(ready / "train" / name)
    message = refusal("imagenet100", "train", ready)
    assert re.search(rf"no folders for the classes {IMAGENET100[10]}, .* and 2 more;", message)


# -------------------------------------------------------------------------------------------- tar files


@pytest.mark.parametrize("layout", ["one", "shards", "classes", "nested"])
def test_tars_hold_what_the_folder_holds(folder, tmp_path, layout):
    expected = read_split("folder", "train", folder)
    images = read_split("tar", "train", write_tars(folder, tmp_path / "tars", layout))
    assert (images.classes, images.targets.tolist()) == (expected.classes, expected.targets.tolist())
    if layout != "shards":  # there, each shard is in order
        assert [name.split("/")[-1] for name in images.names] == [name.split("/")[-1] for name in expected.names]
    ours, theirs = (Counter((image.numpy().tobytes(), target) for image, target in each) for each in (images, expected))
    assert ours == theirs
    assert [images.size(index) for index in range(6)] == [(40, 30)] * 6


def test_labels_are_in_the_order_of_an_image_folder(tmp_path):
    folder = write_folder(tmp_path / "numbers", ["9", "10", "a1"])
    images = read_split("tar", "val", write_tars(folder, tmp_path / "tars", "one"))
    assert images.classes == read_split("folder", "val", folder).classes == ["10", "9", "a1"]
    assert torch.equal(images[2][0], read_split("folder", "val", folder)[2][0])


class Pixels:
    """A set's images as bytes, which workers can hand over."""

    def __init__(self, images):
        self.images = images

    def __getitem__(self, index):
        return self.images[index][0].numpy().tobytes()


def test_workers_read_one_tar_at_the_same_time(folder, tmp_path):
    images = read_split("tar", "train", write_tars(folder, tmp_path / "tars", "one"))
    expected = [Pixels(images)[index] for index in range(6)]  # opened in this process, too
    loader = DataLoader(Pixels(images), batch_size=None, sampler=[*range(6)] * 20, num_workers=2)
    assert list(loader) == expected * 20
    sent = pickle.loads(pickle.dumps(images))  # as to workers that are not forked
    assert [Pixels(sent)[index] for index in range(6)] == expected


def test_a_data_folder_of_tars_is_left_as_it_was_and_an_index_is_read(folder, tmp_path, monkeypatch):
    root = write_tars(folder, tmp_path / "tars", "one")
    before = read_split("tar", "val", root)
    monkeypatch.setattr(tars, "LARGE_TARS", 0)
    with log_messages() as messages:
        tars._scan_tars.cache_clear()
        read_split("tar", "val", root)
    assert sorted(os.listdir(root)) == ["train.tar", "val.tar"]
    (message,) = messages
    assert f"python -m readers.tars {root / 'val.tar'}" in message
    tars.main([str(root / "val.tar")])
    tars._scan_tars.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(tarfile, "open", None)  # with the index, no tar is looked through
        indexed = read_split("tar", "val", root)
    assert (indexed.names, indexed.targets.tolist()) == (before.names, before.targets.tolist())
    assert torch.equal(indexed[3][0], before[3][0])


@pytest.mark.parametrize(("words", "code"), [(["--help"], 0), ([], 2)])
def test_the_command_of_the_index_explains_itself(words, code, capsys):
    with pytest.raises(SystemExit) as end:
        tars.main(words)
    assert end.value.code == code
    assert "usage: python -m readers.tars [-h] TAR [TAR ...]" in "".join(capsys.readouterr())


@pytest.mark.parametrize("layout", ["one", "classes"])
def test_an_index_older_than_a_tar_is_not_used_and_can_be_renewed(folder, tmp_path, layout):
    root = write_tars(folder, tmp_path / "tars", layout)
    split, tar = (root / "val.tar",) * 2 if layout == "one" else (root / "val", root / "val" / "bee.tar")

    def names_and_messages():
        tars._scan_tars.cache_clear()
        with log_messages() as messages:
            return read_split("tar", "val", root).names, messages

    tars.write_tar_index(str(split))
    before, messages = names_and_messages()
    assert (len(before), messages) == (6, [])
    image = (folder / "val" / "bee" / "0.jpg").read_bytes()
    write_tar(tar, {"bee/new.jpg": image})
    os.utime(tars._index_path(split), (1e9, 1e9))
    after, (message,) = names_and_messages()
    assert [name for name in after if "bee/" in name] == [name for name in after if "new" in name] != []
    assert f"_val_images.npz: not used, because it is older than {split}" in message
    assert f"update it with: python -m readers.tars {split}" in message
    tars.write_tar_index(str(split))
    assert names_and_messages() == (after, [])


def break_index(folder):
    truncate(folder / "_val_images.npz")


def break_index_content(folder):
    (folder / "_val_images.npz").write_bytes(pickle.dumps(os.system))  # not run, not even imported


def break_index_number(folder):
    (folder / "bee.tar").unlink()


@pytest.mark.parametrize("damage", [break_index, break_index_content, break_index_number])
def test_a_wrong_index_is_one_line(folder, tmp_path, damage):
    root = write_tars(folder, tmp_path / "tars", "classes")
    tars.write_tar_index(str(root / "val"))
    damage(root / "val")
    assert re.search(r"_val_images.npz: damaged, or of other tars \(.+\); remove it", refusal("tar", "val", root))


def test_what_is_wrong_with_tars_is_one_line(folder, tmp_path):
    assert "neither val.tar nor val/*.tar; expected train.tar" in refusal("tar", "val", folder)
    flat = tmp_path / "flat"
    flat.mkdir()
    write_tar(flat / "val.tar", {"0.jpg": b"image"})
    assert "val.tar: images lie directly in it" in refusal("tar", "val", flat)
    empty = tmp_path / "empty"
    empty.mkdir()
    write_tar(empty / "val.tar", {"ant/0.txt": b"text"})
    assert "val.tar: damaged, or without images" in refusal("tar", "val", empty)


@pytest.mark.parametrize("keep", [0, 0.02, 0.2, 0.3])
def test_a_truncated_tar_is_noticed(folder, tmp_path, keep):
    root = write_tars(folder, tmp_path / "tars", "classes")
    truncate(root / "val" / "cat.tar", keep)
    assert "val/cat.tar: truncated" in refusal("tar", "val", root)


def test_a_compressed_tar_is_told_how_to_be_unpacked(folder, tmp_path):
    tar = write_tars(folder, tmp_path / "tars", "one") / "val.tar"
    tar.write_bytes(gzip.compress(tar.read_bytes()))
    message = refusal("tar", "val", tar.parent)
    assert f"{tar}: compressed" in message
    assert message.endswith(f"decompress it: mv {tar} {tar}.gz && gunzip {tar}.gz")


def test_tars_of_other_classes_are_refused_before_training(folder, tmp_path):
    root = write_tars(folder, tmp_path / "tars", "classes")
    (root / "val" / "bee.tar").rename(root / "val" / "bear.tar")
    assert "only in train/: bee; only in val/: bear" in refusal("tar", "train", root)


def test_a_damaged_image_in_a_tar_is_named(folder, tmp_path):
    truncate(folder / "train" / "bee" / "1.jpg")
    images = read_split("tar", "train", write_tars(folder, tmp_path / "tars", "one"))
    with pytest.raises(UnreadableImage, match=r"train.tar: bee/1.jpg'.*repair or remove the file$"):
        images[3]


# ------------------------------------------------------------------------------------------------- Cars


def test_cars_are_read_as_published(tmp_path):
    root = write_cars(tmp_path)
    train, val = (read_split("cars", split, root) for split in ("train", "val"))
    assert (len(train), len(val), len(train.classes)) == (197, 196, 196)
    assert train.classes[195] == "Make Model 195 2012"
    assert (train.targets[0], train.targets[195], train.targets[196]) == (0, 195, 2)
    assert train.names[196] == "stanford_cars/cars_train/00197.jpg"
    assert val.names[0] == "stanford_cars/cars_test/00001.jpg"
    image, target = train[4]
    assert (image.shape, target) == ((3, *reversed(train.size(4))), 4)
    assert torch.equal(image, as_tensor(Image.open(root / train.names[4])))


def break_car_annotations(cars):
    (cars / "devkit" / "cars_train_annos.mat").unlink()


def break_car_meta(cars):
    (cars / "devkit" / "cars_meta.mat").unlink()


def break_car_mat(cars):
    truncate(cars / "devkit" / "cars_train_annos.mat")


def break_car_image(cars):
    (cars / "cars_train" / "00031.jpg").unlink()
    (cars / "cars_train" / "00032.jpg").unlink()


def break_car_label(cars):
    write_cars_annotations(cars / "devkit" / "cars_train_annos.mat", ["00001.jpg", "00002.jpg"], [7, 197])


def break_car_label_zero(cars):
    write_cars_annotations(cars / "devkit" / "cars_train_annos.mat", ["00001.jpg", "00002.jpg"], [7, 0])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (break_missing, r"files missing or damaged; expected stanford_cars/ with devkit/cars_meta.mat"),
        (break_car_annotations, r"files missing or damaged; expected stanford_cars/"),
        (break_car_meta, r"cars_meta.mat.*expected stanford_cars/"),
        (break_car_mat, r"expected stanford_cars/"),
        (break_car_image, r"cars_train_annos.mat names 2 files that are not in .*cars_train/00031.jpg first"),
        (break_car_label, r"cars_train_annos.mat: label 196 is not in 0..195"),
        (break_car_label_zero, r"cars_train_annos.mat: label (255|-1) is not in 0..195"),
    ],
)
@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # torchvision counts in uint8
def test_what_is_wrong_with_cars_is_one_line(tmp_path, damage, message):
    damage(write_cars(tmp_path) / "stanford_cars")
    assert re.search(message, refusal("cars", "train", tmp_path))


# ---------------------------------------------------------------------------------------------- Flowers


def test_flowers_are_trained_on_with_their_validation_images(tmp_path, monkeypatch):
    root = write_flowers(monkeypatch, tmp_path)
    train, val = (read_split("flowers", split, root) for split in ("train", "val"))
    assert [name[-9:] for name in train.names] == ["00002.jpg", "00005.jpg", "00001.jpg", "00006.jpg"]
    assert (train.targets.tolist(), val.targets.tolist()) == ([0, 4, 76, 8], [101, 4])
    assert (len(train.classes), train.classes[76]) == (102, "passion flower")
    assert torch.equal(val[0][0], as_tensor(Image.open(root / "flowers-102/jpg/image_00003.jpg")))


def test_what_is_wrong_with_flowers_is_one_line(tmp_path, monkeypatch):
    folder = write_flowers(monkeypatch, tmp_path) / "flowers-102"
    write_flowers_labels(monkeypatch, folder, [77, 1, 103, 5, 5, 9])
    assert "label 102 is not in 0..101" in refusal("flowers", "val", tmp_path)
    write_flowers_labels(monkeypatch, folder, [77, 1])
    assert "expected flowers-102/ with jpg/*.jpg" in refusal("flowers", "val", tmp_path)
    write_flowers_labels(monkeypatch, folder, [77, 1, 102, 5, 5, 9])
    (folder / "jpg" / "image_00004.jpg").unlink()
    assert "names 1 files that are not in" in refusal("flowers", "val", tmp_path)
    truncate(folder / "setid.mat")
    assert "files missing or damaged; expected flowers-102/" in refusal("flowers", "train", tmp_path)


# ------------------------------------------------------------------------------------------------- Pets


def test_pets_are_read_as_published(tmp_path):
    root = write_pets(tmp_path)
    train, val = (read_split("pets", split, root) for split in ("train", "val"))
    assert (len(train), len(val), len(train.classes)) == (74, 37, 37)
    assert (train.targets[:4].tolist(), val.targets[:3].tolist()) == ([0, 0, 1, 1], [0, 1, 2])
    assert train.names[3] == f"oxford-iiit-pet/images/{BREEDS[1]}_2.jpg"
    assert torch.equal(train[3][0], as_tensor(Image.open(root / train.names[3])))


def break_pet_list(pets):
    (pets / "annotations" / "trainval.txt").unlink()


def break_pet_line(pets):
    (pets / "annotations" / "trainval.txt").write_text("Cat_breed_1_1 1\n")


def break_pet_image(pets):
    (pets / "images" / f"{BREEDS[7]}_1.jpg").unlink()


def break_pet_label(pets):
    with open(pets / "annotations" / "trainval.txt", "a") as file:
        file.write(f"{BREEDS[0]}_1 99 1 1\n")


def break_pet_breeds(pets):
    lines = (pets / "annotations" / "trainval.txt").read_text().splitlines()
    (pets / "annotations" / "trainval.txt").write_text("\n".join(lines[:40]))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (break_missing, r"files missing or damaged; expected oxford-iiit-pet/ with images"),
        (break_pet_list, r"trainval.txt.*expected oxford-iiit-pet/"),
        (break_pet_line, r"expected oxford-iiit-pet/"),
        (break_pet_image, r"trainval.txt names 1 files that are not in .*_1.jpg first"),
        (break_pet_label, r"trainval.txt: label 98 is not in 0..37"),
        (break_pet_breeds, r"20 classes instead of the 37 of pets"),
    ],
)
def test_what_is_wrong_with_pets_is_one_line(tmp_path, damage, message):
    damage(write_pets(tmp_path) / "oxford-iiit-pet")
    assert re.search(message, refusal("pets", "train", tmp_path))


# ---------------------------------------------------------------------------------------------- DomainNet


@pytest.mark.parametrize("domain", ["clipart", "painting", "sketch"])
def test_a_domain_is_read_by_its_lists(tmp_path, domain):
    root = write_domainnet(tmp_path, domain)
    train, val = (read_split(domain, split, root) for split in ("train", "val"))
    assert (len(train), len(val), len(train.classes)) == (690, 345, 345)
    assert (train.targets[3], val.targets[344], train.classes[344]) == (1, 344, "class_344")
    assert train.names[3] == f"{domain}/class_001/{domain}_001_000001.jpg"
    assert torch.equal(train[3][0], as_tensor(Image.open(root / train.names[3])))


def edit_list(root, part, edit):
    path = root / f"clipart_{part}.txt"
    path.write_text("\n".join(edit(path.read_text().splitlines())) + "\n")


def break_list(root):
    (root / "clipart_test.txt").unlink()


def break_listed_image(root):
    (root / "clipart" / "class_002" / "clipart_002_000001.jpg").unlink()


def break_class_folder(root):
    shutil.rmtree(root / "clipart" / "class_007")


def break_label(root):
    edit_list(root, "train", lambda lines: [*lines, "clipart/class_345/a.jpg 345"])


def break_line(root):
    edit_list(root, "train", lambda lines: [lines[0], "clipart/class_001/a.jpg", *lines[1:]])


def break_line_path(root):
    edit_list(root, "train", lambda lines: [lines[0], "class_001/a.jpg 1", *lines[1:]])


def break_names(root):
    edit_list(root, "test", lambda lines: [*lines, "clipart/class_005/clipart_005_000000.jpg 6"])


def break_list_empty(root):
    (root / "clipart_test.txt").write_text("")


def break_list_bytes(root):
    with open(root / "clipart_test.txt", "ab") as file:
        file.write("clipart/class_004/café.jpg 4\n".encode("latin-1"))


def break_classes(root):
    for part in ("train", "test"):
        edit_list(root, part, lambda lines: [line for line in lines if not line.endswith((" 7", " 9"))])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            break_list,
            r"clipart_test.txt: no such list; expected clipart_train.txt, .* and clipart/<class>",
        ),
        (break_list_empty, r"clipart_test.txt: an empty list; fetch it again"),
        (break_list_bytes, r"clipart_test.txt: no UTF-8 text \(.*0xe9.*\); fetch the list again"),
        (break_listed_image, r"clipart_train.txt names 1 files that are not in .*clipart_002_000001.jpg first"),
        (break_class_folder, r"clipart_train.txt names 2 files that are not in"),
        (break_label, r"clipart_train.txt, line 691: label 345 is not in 0..344"),
        (break_line, r"clipart_train.txt, line 2: 'clipart/class_001/a.jpg' is not 'clipart/<class>/<file> <label>'"),
        (break_line_path, r"clipart_train.txt, line 2: 'class_001/a.jpg 1' is not"),
        (break_names, r"clipart_test.txt: label 6 is class_005 here and class_006 before"),
        (break_classes, r"no images of the labels 7, 9; the published lists have 345 classes"),
    ],
)
def test_what_is_wrong_with_a_domain_is_one_line(tmp_path, damage, message):
    damage(write_domainnet(tmp_path))
    assert re.search(message, refusal("clipart", "train", tmp_path))


def test_files_are_checked_by_one_listing_a_folder(tmp_path, monkeypatch):
    root = write_domainnet(tmp_path)
    calls = Counter()
    for name in ("stat", "listdir"):
        original = getattr(os, name)

        def counted(*args, name=name, original=original, **kwargs):
            calls[name] += 1
            return original(*args, **kwargs)

        monkeypatch.setattr(os, name, counted)
    read_split("clipart", "train", root)
    monkeypatch.undo()
    assert calls["listdir"] == 345
    assert calls["stat"] < 345 + 10


# --------------------------------------------------------------------------------------------- CIFAR


def test_cifar10_is_read_from_its_batches(monkeypatch, tmp_path):
    write_cifar10(monkeypatch, tmp_path)
    train, val = (read_split("cifar10", split, tmp_path) for split in ("train", "val"))
    assert (len(train), len(val), len(train.classes)) == (20, 4, 10)
    image, target = train[5]
    assert (image.shape, image.dtype, target) == ((3, 32, 32), torch.uint8, 1)
    batch = pickle.loads((tmp_path / "cifar-10-batches-py" / "data_batch_2").read_bytes())["data"]
    assert np.array_equal(image, batch[1].reshape(3, 32, 32))


def test_cifar100_takes_the_fine_labels(monkeypatch, tmp_path):
    write_cifar100(monkeypatch, tmp_path)
    val = read_split("CIFAR", "val", tmp_path)
    assert (len(val), len(val.classes), val[2][1]) == (4, 100, 2)


def test_missing_or_damaged_cifar_files_are_named(monkeypatch, tmp_path):
    message = refusal("cifar100", "train", tmp_path)
    assert re.search(r"cifar-100-python: files missing or damaged;.* extract cifar-100-python.tar.gz", message)
    write_cifar10(monkeypatch, tmp_path)
    truncate(tmp_path / "cifar-10-batches-py" / "data_batch_3")
    assert "cifar-10-batches-py: files missing or damaged" in refusal("cifar10", "train", tmp_path)


# --------------------------------------------------------------------------------- unreadable images


def test_a_lack_of_memory_is_not_the_images(tmp_path, monkeypatch):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")

    def fails(*_):
        raise MemoryError

    monkeypatch.setattr("readers.images.decode", fails)
    with pytest.raises(MemoryError):
        ImageFiles(tmp_path, ["a.png"], [0], ["a"])[0]


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".bmp", ".ppm", ".tif", ".webp"])
@pytest.mark.parametrize("keep", [0, 0.3, 0.95])
def test_a_truncated_image_is_noticed_and_named(tmp_path, suffix, keep):
    path = tmp_path / f"broken{suffix}"
    picture(size=(200, 150)).save(path)
    images = ImageFiles(tmp_path, [path.name], [0], ["a"])
    assert images[0][0].shape == (3, 150, 200)
    truncate(path, keep)
    with pytest.raises(UnreadableImage, match=rf"broken\{suffix}.*repair or remove the file$") as error:
        images[0]
    assert "\n" not in str(error.value)


JPEGS = {
    "baseline": {},
    "progressive": {"progressive": True},
    "without subsampling": {"subsampling": 0, "quality": 95},
    "stored as RGB": {"keep_rgb": True},
    "with restart markers": {"restart_marker_rows": 1},
}


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("kind", JPEGS)
def test_a_jpeg_has_pillows_pixels(tmp_path, mode, kind):
    path = tmp_path / "image.jpg"
    picture(size=(77, 50), mode=mode).save(path, **JPEGS[kind])
    with mock.patch("readers.images.Image.open", side_effect=AssertionError("by Pillow")):
        decoded = decode(path.read_bytes())
    assert torch.equal(decoded, as_tensor(Image.open(path).convert("RGB")))


def test_what_torchvision_refuses_or_reads_otherwise_is_left_to_pillow(tmp_path):
    """A file cut anywhere, or with wrong bytes, gives Pillow's pixels or Pillow's error; so does CMYK."""
    picture(size=(64, 48)).save(tmp_path / "whole.jpg")
    picture(size=(64, 48), mode="CMYK").save(tmp_path / "cmyk.jpg")
    whole, generator = (tmp_path / "whole.jpg").read_bytes(), np.random.default_rng(0)
    broken = [whole[:end] for end in range(20, len(whole), len(whole) // 20)] + [whole + b"more", whole[:-2]]
    for _ in range(200):  # half of them in the header
        changed = bytearray(whole)
        changed[generator.integers(len(whole) if len(broken) % 2 else 600)] = generator.integers(256)
        broken.append(bytes(changed))
    for data in [*broken, (tmp_path / "cmyk.jpg").read_bytes()]:
        (tmp_path / "image.jpg").write_bytes(data)
        ours = theirs = None
        with contextlib.suppress(UnreadableImage):
            ours = ImageFiles(tmp_path, ["image.jpg"], [0], ["a"])[0][0]
        with contextlib.suppress(OSError, SyntaxError):
            theirs = as_tensor(Image.open(io.BytesIO(data)).convert("RGB"))
        assert (ours is None) == (theirs is None)
        assert ours is None or torch.equal(ours, theirs)


def test_a_file_that_is_no_image_or_is_gone_is_named(tmp_path):
    (tmp_path / "text.jpg").write_text("no image")
    for name in ("text.jpg", "gone.jpg"):
        images = ImageFiles(tmp_path, [name], [0], ["a"])
        for access in (images.size, images.__getitem__):
            with pytest.raises(UnreadableImage, match=name):
                access(0)


# ---------------------------------------------------------------------------------------------------- names


def test_names_are_a_sequence_of_any_file_names():
    given = ["a/1.jpg", "", "Ä/猫.png", os.fsdecode(b"\xff\xfe.jpg")]
    names = Names(given)
    assert (len(names), list(names), names[1:3], names[-1]) == (4, given, given[1:3], given[-1])
    assert names == given
    assert names != given[:3]
    with pytest.raises(IndexError):
        names[4]


# -------------------------------------------------------------------------------------------------- subsets


def test_a_subset_is_the_images_at_its_indices(folder):
    images = read_split("folder", "train", folder)
    part = SubsetOf(images, [1, 4])
    assert part.names == [images.names[1], images.names[4]]
    assert (part.targets.tolist(), part.classes) == ([0, 2], images.classes)
    assert len(part) == 2
    assert torch.equal(part[1][0], images[4][0])
    assert part[1][1] == 2
    assert part.size(1) == (40, 30)


def test_classes_of_a_subset_can_be_numbered_anew(folder):
    """As `datasets.relabel` does it for the classes of a checkpoint; the images of the whole set keep their numbers."""
    images = read_split("folder", "train", folder)
    dataset = AugmentedDataset(SubsetOf(images, [1, 4]))
    relabel(dataset, ["cow", "cat", "bee", "ant"])
    assert [dataset[Draw(index, 0, 0)]["targets"] for index in (0, 1)] == [3, 1]
    assert (images[1][1], images[4][1]) == (0, 2)
