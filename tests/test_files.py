"""What other people's folders, archives and pictures hold: nothing is trained on, or left out, in silence."""

import io
import json
import os
import subprocess
import tarfile
import zipfile

import numpy as np
import pytest
import torch
from helpers.image_sets import log_messages, picture, write_folder, write_tars
from PIL import Image, features

import readers.images
from analysis import figures
from analysis.measures import image_rows
from arguments import parse_arguments
from augmentation import THINNEST, TrainTransform, cut_thin, eval_transform
from cli import expand_arguments, report_error
from datasets import SplitSettings, read_images, read_split
from readers import tars
from readers.boxes import read_boxes_folder
from readers.files import EXTENSIONS, find_images, list_images
from readers.images import ImageFiles, UnreadableImage, read_image
from readers.segmentation import WrongMask, read_mask, read_masks_folder
from readers.tars import _checked_size
from utils import Processes, UserError, logger, readable, start_logging, write_csv

ALONE = Processes(0, 1, torch.device("cpu"))
LATIN = os.fsdecode(b"\xe9t\xe9")


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path / "set", ["a", "b", "c"], per_class=3)


@pytest.fixture
def own_log(monkeypatch):
    """The program's logger, whose handlers and level are what they were after the test."""
    for name in ("handlers", "level", "propagate"):
        monkeypatch.setattr(logger, name, getattr(logger, name))
    return logger


def read(folder, split="train", name="folder"):
    """The split, and what was logged about it."""
    with log_messages() as messages:
        images = read_images(SplitSettings(name, folder), split, ALONE)
    return images, "\n".join(messages)


# ------------------------------------------------------------------------------------------ which are images


def link(path, target):
    path.symlink_to(target)


def hide(path, _):
    path.parent.mkdir(exist_ok=True)
    picture().save(path)


LEFTOVERS = {
    "AppleDouble": ("a/._0.jpg", hide, None, "1 hidden (train/a/._0.jpg)"),
    "a notebook's copies": (".ipynb_checkpoints/0-checkpoint.jpg", hide, None, "1 hidden (train/.ipynb_checkpoints)"),
    "a notebook's copies in a class": ("a/.ipynb_checkpoints/0.jpg", hide, None, "1 hidden (train/a/.ipynb_check"),
    "thumbnails of a file server": ("a/@eaDir/0.jpg", hide, None, "1 hidden (train/a/@eaDir)"),
    "a zip from macOS": ("__MACOSX/0.jpg", hide, None, "1 hidden (train/__MACOSX)"),
    "a hidden class": (".hidden/0.png", hide, None, "1 hidden (train/.hidden)"),
    "a circle of links": ("a/again", link, ".", "1 repeated by links, or links that lead nowhere (train/a/again)"),
    "a link to another class": ("a/again", link, "../b", "1 repeated by links"),
    "a link to all of it": ("a/again", link, "../..", "1 repeated by links"),
    "a class by another name": ("d", link, "a", "1 repeated by links, or links that lead nowhere (train/d)"),
    "an image beside the classes": ("0.jpg", hide, None, "1 images beside the class folders (train/0.jpg)"),
}


@pytest.mark.parametrize("case", LEFTOVERS)
def test_what_is_no_image_of_a_class_is_left_out_and_said(folder, case):
    expected = read_split("folder", "train", folder)
    name, make, target, said = LEFTOVERS[case]
    make(folder / "train" / name, target)
    images, messages = read(folder)
    assert (images.classes, images.names) == (expected.classes, expected.names)
    assert said in messages
    assert "folder train: left out" in messages
    assert "python -m analysis.check" in messages
    without, _ = read(folder, name="images")  # the same walk
    assert len(without) == 2 * len(images) + (name == "0.jpg")


def test_an_ordinary_folder_needs_no_word(folder):
    assert read(folder)[1] == ""


def test_links_to_other_places_are_followed_once(folder, tmp_path):
    elsewhere = write_folder(tmp_path / "elsewhere", ["d"], per_class=2, splits=("x",)) / "x"
    (folder / "train/d").symlink_to(elsewhere / "d")
    (folder / "train/a/more").symlink_to(elsewhere)  # which holds d, too
    (elsewhere / "round").symlink_to(elsewhere)
    (folder / "train/b/linked.jpg").symlink_to("0.jpg")
    found, left_out = find_images(folder / "train")
    assert len(found) == 3 * 3 + 1 + 2
    assert sorted(left_out.links) == ["a/more/d", "a/more/round"] or "d" in left_out.links


READ = [".jfif", ".JPE", ".gif", ".jp2", ".tga", ".webp", ".tif", ".pbm", *[".avif"] * features.check("avif")]


@pytest.mark.parametrize("suffix", READ)
def test_what_pillow_reads_is_read(folder, suffix):
    form = {".jfif": "JPEG", ".JPE": "JPEG"}.get(suffix)
    picture(mode="1" if suffix == ".pbm" else "RGB").save(folder / f"train/a/more{suffix}", form)
    images, messages = read(folder)
    assert len(images) == 10
    assert messages == ""
    assert images[images.names[:].index(f"train/a/more{suffix}")][0].shape == (3, 30, 40)
    assert suffix.lower() in EXTENSIONS


def test_other_suffixes_are_counted(folder):
    for name in ("a/1.heic", "a/2.HEIC", "b/notes.txt", "b/none"):
        (folder / "train" / name).write_bytes(b"")
    said = read(folder)[1]
    assert "left out 4 files whose suffix is not read (.heic 2, .txt 1, none 1)" in said
    for path in (folder / "train/c").iterdir():
        path.rename(path.with_suffix(".heic"))
    with pytest.raises(UserError, match=r"no images in the class folders c;.*left out: .*\.heic 5"):
        read(folder)
    with pytest.raises(UserError, match=r"no image in it or below; known are \.jpg, .*; left out: 3 files .*\.heic 3"):
        list_images(folder / "train/c")


@pytest.mark.parametrize("inside", ["images", "photos/all"])
def test_classes_one_folder_too_deep_are_refused_with_the_mend(folder, inside):
    for split in ("train", "val"):
        (folder / split).rename(folder / "old")
        (folder / split / inside).parent.mkdir(parents=True)
        (folder / "old").rename(folder / split / inside)
    top = inside.partition("/")[0]
    with pytest.raises(
        UserError, match=rf"only class folder is {top}/, .* folders a, b, c; .* from .*/train/{inside} to .*/train\."
    ):
        read(folder)


def test_a_data_path_one_folder_too_high_is_told(folder):
    with pytest.raises(UserError, match=rf"no folder train/; .*; did you mean --data-path {folder}\?"):
        read(folder.parent)


def test_one_class_is_said(tmp_path):
    root = write_folder(tmp_path / "one", ["only"])
    (root / "train/only/deeper").mkdir()
    picture().save(root / "train/only/deeper/3.jpg")
    images, messages = read(root)
    assert len(images) == 3
    assert "one class only, only; a classifier learns nothing" in messages


def test_other_case_in_the_other_split_is_refused(folder):
    (folder / "val/b").rename(folder / "val/B")
    with pytest.raises(UserError, match="only in train/: b; only in val/: B"):
        read(folder)


def test_boxes_and_masks_have_no_hidden_images(tmp_path):
    (tmp_path / "classes.txt").write_text("one\ntwo\n", encoding="utf-8-sig")  # as Windows' Notepad saves it
    for kind in ("images", "masks", "annotations"):
        (tmp_path / "train" / kind / ".hidden").mkdir(parents=True)
    for name in ("a", "._a", ".hidden/b"):
        picture().save(tmp_path / f"train/images/{name}.jpg")
        Image.new("L", (40, 30)).save(tmp_path / f"train/masks/{name}.png")
    box = "<bndbox><xmin>1</xmin><ymin>1</ymin><xmax>9</xmax><ymax>9</ymax></bndbox>"
    xml = f"<annotation><object><name>one</name>{box}</object></annotation>"
    (tmp_path / "train/annotations/a.xml").write_text(xml, encoding="utf-8-sig")
    boxes, masks = read_boxes_folder(tmp_path, "train"), read_masks_folder(tmp_path, "train")
    for images in (boxes, masks):
        assert (images.names, images.classes) == (["a.jpg"], ["one", "two"])
    assert boxes[0][1]["labels"].tolist() == [0]


# ---------------------------------------------------------------------------------------------------- tars


def tar_of(folder, path):
    with tarfile.open(path, "w") as file:
        for each in sorted(os.listdir(folder)):
            file.add(folder / each, each)


def test_links_in_a_tar_are_images(folder, tmp_path):
    train = folder / "train"
    os.link(train / "a/0.jpg", train / "a/hard.jpg")
    (train / "a/soft.jpg").symlink_to("1.jpg")
    (train / "b/twice.jpg").symlink_to("../a/soft.jpg")
    (train / "b/nowhere.jpg").symlink_to("gone.jpg")
    (train / "b/round.jpg").symlink_to("round.jpg")
    (train / "a/._0.jpg").write_bytes(b"")
    (train / "a/notes.txt").write_bytes(b"")
    tar_of(train, tmp_path / "train.tar")
    images, messages = read(tmp_path, name="tar")
    assert [name for name in images.names if not name[2].isdigit()] == ["a/hard.jpg", "a/soft.jpg", "b/twice.jpg"]
    index = {name: number for number, name in enumerate(images.names)}
    for name, same in (("a/hard.jpg", "a/0.jpg"), ("b/twice.jpg", "a/1.jpg")):
        assert torch.equal(images[index[name]][0], images[index[same]][0])
    for said in ("1 hidden (a/._0.jpg)", "2 repeated by links, or links that lead nowhere (b/nowhere", ".txt 1"):
        assert said in messages
    tars.write_tar_index(str(tmp_path / "train.tar"))
    tars._scan_tars.cache_clear()
    indexed, again = read(tmp_path, name="tar")
    assert (indexed.names, again) == (images.names, messages)


OTHER_FILES = {
    "gzip": (b"\x1f\x8b", "compressed by gzip, .* decompress it: mv .*gunzip"),
    "xz": (b"\xfd7zXZ\x00", "compressed by xz, .* decompress it: mv .*unxz"),
    "bzip2": (b"BZh91AY", "compressed by bzip2, .*bunzip2"),
    "zstd": (b"\x28\xb5\x2f\xfd", "compressed by zstd, .*unzstd"),
    "zip": (b"PK\x03\x04", "a zip archive, not a tar; unpack it, and read the files with --data-set folder"),
    "a page of the server": (b"<!DOCTYPE html>", "not a tar; it begins with b'<!DOCTYPE html>"),
}


@pytest.mark.parametrize("kind", OTHER_FILES)
def test_a_file_that_is_no_tar_is_told_what_it_is(tmp_path, kind):
    start, message = OTHER_FILES[kind]
    path = tmp_path / "train.tar"
    path.write_bytes(start + b"x" * 5000)
    with pytest.raises(UserError, match=message) as error:
        _checked_size(path)
    assert "copy it again" not in str(error.value)


def test_a_real_zip_and_a_tar_of_another_program_are_told_apart(folder, tmp_path):
    with zipfile.ZipFile(tmp_path / "val.tar", "w") as file:
        file.write(folder / "val/a/0.jpg", "a/0.jpg")
    with pytest.raises(UserError, match="a zip archive"):
        read(tmp_path, "val", name="tar")
    subprocess.run(["tar", "-C", folder / "train", "--format=v7", "-cf", tmp_path / "train.tar", "a", "b"], check=True)
    (tmp_path / "val.tar").unlink()
    assert len(read(tmp_path, name="tar")[0]) == 6


def test_joined_tars_are_refused(folder, tmp_path):
    parts = []
    for name in "ab":
        with tarfile.open(tmp_path / f"{name}.tar", "w") as file:
            file.add(folder / "train" / name, name)
        parts.append((tmp_path / f"{name}.tar").read_bytes())
    (tmp_path / "train.tar").write_bytes(b"".join(parts))
    with pytest.raises(UserError, match=r"train.tar: another tar behind its end, .*extract it with --ignore-zeros"):
        read(tmp_path, name="tar")
    (tmp_path / "train.tar").write_bytes(parts[0] + bytes(2**21))  # padded, as for a tape
    tars._scan_tars.cache_clear()
    assert len(read(tmp_path, name="tar")[0]) == 3


# ------------------------------------------------------------------------------------------------- pictures

RAMP = np.tile(np.linspace(0, 1, 64), (8, 1))
DEEP = {
    "16 bits": (RAMP * 65535).astype(np.uint16),
    "12 of 16 bits": (RAMP * 4095).astype(np.uint16),
    "int32": (RAMP * 1e6 - 1e5).astype(np.int32),
    "float": RAMP.astype(np.float32),
    "float with holes": np.where(RAMP < 0.1, np.nan, RAMP * 300).astype(np.float32),
}


@pytest.mark.parametrize(
    ("kind", "suffix"), [*((kind, ".tif") for kind in DEEP), *((kind, ".png") for kind in [*DEEP][:2])]
)
def test_deep_grey_is_scaled_by_the_files_own_range(tmp_path, kind, suffix, monkeypatch):
    monkeypatch.setattr(readers.images, "TOLD_OF_DEEP", bytearray(1))
    path = tmp_path / f"ramp{suffix}"
    Image.fromarray(DEEP[kind]).save(path)
    with log_messages() as messages:
        images = ImageFiles(tmp_path, [path.name] * 2, [0, 0], ["a"])
        pixels, again = images[0][0], images[1][0]
        read_image(path)
    finite = np.isfinite(DEEP[kind])
    assert torch.equal(pixels, again)
    assert torch.equal(pixels, torch.from_numpy(np.array(read_image(path))).permute(2, 0, 1))
    low, high = DEEP[kind][finite].min(), DEEP[kind][finite].max()
    expected = (DEEP[kind][finite].astype(float) - low) / (high - low) * 255
    np.testing.assert_allclose(pixels[0].numpy()[finite], expected, atol=0.51)
    assert (pixels[0].numpy()[~finite] == 0).all()
    assert len(messages) == 1, "it is said once"
    assert "ramp" in messages[0]
    assert "scaled from their own range to 0..255" in messages[0]


@pytest.mark.parametrize("value", [0, 7, np.nan])
def test_a_deep_picture_without_a_range_is_black(tmp_path, value):
    Image.fromarray(np.full((4, 4), value, np.float32)).save(tmp_path / "flat.tif")
    assert ImageFiles(tmp_path, ["flat.tif"], [0], ["a"])[0][0].max() == 0


def test_pictures_of_eight_bits_stay_as_pillow_converts_them(tmp_path):
    for mode in ("1", "L", "P", "LA", "RGBA", "CMYK"):
        path = tmp_path / f"{mode}.tif"
        picture(mode=mode).save(path)
        expected = np.array(Image.open(path).convert("RGB"))
        assert np.array_equal(ImageFiles(tmp_path, [path.name], [0], ["a"])[0][0].permute(1, 2, 0), expected)


@pytest.mark.parametrize("content", [b"<!DOCTYPE html><html>", b"\0\0\0\x1cftypheic\0\0"])
def test_a_file_of_another_kind_tells_how_it_begins(tmp_path, content):
    (tmp_path / "a.jpg").write_bytes(content)
    with pytest.raises(UnreadableImage) as error:
        ImageFiles(tmp_path, ["a.jpg"], [0], ["a"])[0]
    assert f"no image that Pillow knows; it begins with {content[:12]!r}" in str(error.value)


def test_a_mask_may_have_more_bits_or_fewer(tmp_path):
    numbers = np.arange(12, dtype=np.uint16).reshape(3, 4)
    for values in (numbers, numbers.astype(np.int32), numbers.astype(np.float32), numbers > 5):
        Image.fromarray(values).save(tmp_path / "mask.tif")
        assert np.array_equal(read_mask(str(tmp_path / "mask.tif")), values)
    for values in (numbers * 100, numbers.astype(np.float32) / 2):
        Image.fromarray(values).save(tmp_path / "mask.tif")
        with pytest.raises(WrongMask, match=r"mask.tif: values from 0.* to .*; a mask's are whole, and at most 255"):
            read_mask(str(tmp_path / "mask.tif"))


@pytest.mark.parametrize("size", [(1, 8000), (8000, 1), (3, 9001)])
def test_a_thin_picture_takes_little_memory(size):
    """Resized whole, its shorter side of 256 px would make the longer one 2 million px long."""
    image = torch.zeros(3, *size, dtype=torch.uint8)
    image[:, size[0] // 2, size[1] // 2] = 255  # the middle stays the middle
    assert max(cut_thin(image).shape) == THINNEST * min(size)
    for transform in (eval_transform(224), eval_transform(32, 1.0)):
        assert transform(image).shape[1:] == transform(image).shape[:0:-1]
    assert eval_transform(224)(image)[:, 112, 112].max() > 100
    assert TrainTransform(32)(image)["images"].shape == (3, 32, 32)
    assert TrainTransform(64)(image)["images"].shape == (3, 64, 64)


def test_ordinary_pictures_are_not_cut():
    for size in ((30, 40), (20, 20 * THINNEST)):
        image = torch.zeros(3, *size, dtype=torch.uint8)
        assert cut_thin(image) is image


# ------------------------------------------------------------------------------------------ names and lists


def test_a_name_that_is_no_utf8_is_readable_everywhere(folder, tmp_path, capsys, own_log):
    for split in ("train", "val"):
        os.rename(folder / split / "b", folder / split / LATIN)
    images, _ = read(folder)
    assert images.classes == ["a", "c", r"\xe9t\xe9"]
    assert images[6][0].shape == (3, 30, 40)
    json.dumps(images.classes, ensure_ascii=False).encode()
    start_logging(0)
    own_log.warning(LATIN)
    assert r"\xe9t\xe9" in capsys.readouterr().out
    print(f"{folder / 'train' / LATIN}")  # on a standard output that takes what it can
    assert report_error(UserError(f"{LATIN}: no class")) == 2
    assert r"error: \xe9t\xe9: no class" in capsys.readouterr().err
    write_csv(tmp_path / "rows.csv", [{"image": f"{LATIN}/0.jpg", "value": 1}])
    assert (tmp_path / "rows.csv").read_text(encoding="utf-8") == "image,value\n\\xe9t\\xe9/0.jpg,1\n"
    os.rename(folder / "val" / LATIN, folder / "val/b")
    with pytest.raises(UserError, match=r"only in train/: \\xe9t\\xe9; only in val/: b"):
        read(folder)


def test_an_output_folder_that_tensorboard_cannot_write_is_refused_at_once():
    with pytest.raises(
        UserError, match=r"--output-dir .*: the name is no UTF-8, which TensorBoard needs; name another"
    ):
        parse_arguments(["--output-dir", f"runs/{LATIN}"])


@pytest.mark.parametrize("name", ["plain", "Ä猫", "two words"])
def test_a_name_in_utf8_stays_as_it_is(name):
    assert readable(name) == name


def test_figures_and_measures_take_such_a_file(tmp_path):
    picture().save(tmp_path / f"{LATIN}.png")
    args = figures.build_parser().parse_args(
        ["--images", str(tmp_path), "--checkpoint", "x", "--out", str(tmp_path / "out")]
    )
    (sample,) = figures.folder_samples(args)
    assert sample.title == r"\xe9t\xe9.png"
    ones = dict.fromkeys(("entropy", "components", "largest", "kept", "share"), torch.ones(1, 1))
    write_csv(tmp_path / "images.csv", image_rows(ones, [f"{LATIN}.png"]))


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
def test_an_argument_file_may_have_a_byte_order_mark(tmp_path, ending):
    text = ending.join(["--lr 1e-3", "--seed 3", ""])
    for name in ("outer", "inner"):
        (tmp_path / f"{name}.args").write_bytes(b"\xef\xbb\xbf" + text.encode())
    with (tmp_path / "outer.args").open("wb") as file:
        file.write(b"\xef\xbb\xbf" + f"@inner.args{ending}--opt sgd".encode())
    assert expand_arguments([f"@{tmp_path / 'outer.args'}"]) == ["--lr", "1e-3", "--seed", "3", "--opt", "sgd"]
    assert parse_arguments([f"@{tmp_path / 'inner.args'}"]).seed == 3
    (tmp_path / "inner.args").write_text(text, encoding="utf-16")
    with pytest.raises(UserError, match=r"inner.args: not UTF-8 text; save it as UTF-8"):
        parse_arguments([f"@{tmp_path / 'inner.args'}"])


def test_a_file_like_object_is_enough_for_the_log(monkeypatch, own_log):
    monkeypatch.setattr("sys.stdout", io.StringIO())
    start_logging(0)


def test_tars_and_folders_agree_on_what_is_hidden(folder, tmp_path):
    for name in ("a/._0.jpg", "a/.ipynb_checkpoints/0.jpg"):
        hide(folder / "train" / name, None)
    for name in ("__MACOSX/a", ".hidden"):
        (folder / "train" / name).mkdir(parents=True)
        picture().save(folder / "train" / name / "0.jpg")
    (folder / "val/a/Thumbs.db").write_bytes(b"")
    images, messages = read(write_tars(folder, tmp_path / "tars", "one"), name="tar")
    assert images.classes == ["a", "b", "c"]
    assert len(images) == 9
    assert "left out 4 hidden" in messages
