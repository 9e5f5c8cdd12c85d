"""analysis.check: what it finds in a data set, what it prints and writes, and its exit codes."""

import csv
import os
import signal
import threading
import time

import numpy as np
import pytest
from helpers.image_sets import picture, truncate, write_folder, write_tars
from PIL import Image

from analysis import check
from readers.images import EncodedImages, ImageFiles


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path / "set", ["a", "b", "c"], per_class=6)


def run(folder, out=None, *words, name="folder"):
    """The exit code, and the rows of the CSV that are no counts."""
    out = out or folder.parent / "check.csv"
    code = check.main([*f"--data-set {name} --data-path {folder} --out {out} --num-workers 2".split(), *words])
    with out.open(encoding="utf-8") as file:
        return code, [tuple(row.values()) for row in csv.DictReader(file)]


def findings(rows):
    return [row for row in rows if row[1] != "images"]


def empty(path):
    path.write_bytes(b"")


def remove_all(path):
    for each in path.parent.iterdir():
        each.unlink()


def keep_two(path):
    for each in sorted(path.parent.iterdir())[2:]:
        each.unlink()


def deep(path):
    Image.fromarray(np.arange(1600, dtype=np.uint16).reshape(40, 40)).save(path)


def turn(path):
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(77).save(path, exif=exif)


def hide(path):
    path.parent.mkdir(exist_ok=True)
    picture(78).save(path)


TROUBLES = {
    "unreadable": (truncate, "train/a/0.jpg", "unreadable", "a", 1),
    "empty file": (empty, "val/b/5.jpg", "unreadable", "b", 1),
    "empty class": (remove_all, "val/c/0.jpg", "empty class", "c", 1),
    "tiny class": (keep_two, "train/b/0.jpg", "tiny class", "b", 0),
    "deep": (deep, "train/a/scan.png", "deep", "a", 0),
    "huge": (lambda path: Image.new("L", (5100, 5000)).save(path), "val/a/poster.png", "huge", "a", 0),
    "thin": (lambda path: picture(79, (1, 500)).save(path), "train/c/line.png", "thin", "c", 0),
    "rotated": (turn, "train/c/phone.jpg", "rotated", "c", 0),
    "linked": (lambda path: path.symlink_to("0.jpg"), "train/a/9.jpg", "duplicate", "a", 0),
    "hidden": (hide, "train/a/._0.jpg", "hidden", "", 0),
    "hidden folder": (hide, "val/.ipynb_checkpoints/0.jpg", "hidden", "", 0),
    "link": (lambda path: path.symlink_to("."), "train/a/again", "link", "", 0),
    "suffix": (empty, "val/a/1.heic", "suffix", "", 0),
    "beside": (hide, "train/0.jpg", "beside", "", 0),
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return run(write_folder(tmp_path_factory.mktemp("plain") / "set", ["a", "b", "c"], per_class=6))


def test_in_a_good_set_nothing_is_found_but_the_same_pictures_in_both_splits(plain):
    code, rows = plain
    assert code == 0
    assert [row for row in rows if row[1] == "images"][:2] == [
        ("train", "images", "a", "", "6"),
        ("train", "images", "b", "", "6"),
    ]
    assert {(row[0], row[1]) for row in findings(rows)} == {("val", "duplicate")}  # `write_folder` makes them so
    assert "the same bytes as train/a/0.jpg (train, a)" in {row[4] for row in rows}


@pytest.mark.parametrize("trouble", TROUBLES)
def test_each_trouble_is_found_named_and_counts_as_it_should(folder, plain, trouble, capsys):
    make, place, kind, label, code = TROUBLES[trouble]
    make(folder / place)
    found_code, rows = run(folder)
    (row,) = [row for row in findings(rows) if row[1] == kind and (kind != "duplicate" or row[0] == "train")]
    split, _, of_class, file, detail = row
    assert (found_code, split, of_class) == (code, place.partition("/")[0], label)
    if kind not in ("empty class", "tiny class"):
        assert place == file or file in place
    printed = capsys.readouterr().out
    assert f"  {kind:<12}" in printed
    assert ("nothing is wrong" in printed) == (code == 0)
    if trouble == "empty file":
        assert detail == "an empty file"
    if trouble == "linked":
        assert detail == "linked with train/a/0.jpg (train, a)"


def test_a_set_that_its_reader_refuses_is_decoded_anyway(folder, capsys):
    (folder / "val/c").rename(folder / "val/C")
    truncate(folder / "val/C/3.jpg")
    code, rows = run(folder)
    kinds = [(row[0], row[1], row[3]) for row in findings(rows) if row[1] != "duplicate"]
    assert code == 1
    assert kinds == [("train", "refused", ""), ("val", "refused", ""), ("val", "unreadable", "val/C/3.jpg")]
    assert "only in val/: C" in capsys.readouterr().out


def test_tars_and_images_without_classes_are_checked(folder, tmp_path):
    truncate(folder / "train/b/1.jpg")
    code, rows = run(write_tars(folder, tmp_path / "tars", "classes"), name="tar")
    assert (code, [row[3] for row in rows if row[1] == "unreadable"]) == (1, ["b.tar/1.jpg"])
    code, rows = run(folder / "train", tmp_path / "images.csv", name="images")
    assert (code, [row[:4] for row in rows]) == (1, [("train", "unreadable", "", "b/1.jpg")])


def test_masks_and_boxes_are_checked(tmp_path):
    (tmp_path / "classes.txt").write_text("one\ntwo\n")
    for split in ("train", "val"):
        for kind in ("images", "masks", "annotations"):
            (tmp_path / split / kind).mkdir(parents=True)
        for number in range(3):
            picture(number).save(tmp_path / split / f"images/{number}.jpg")
            Image.new("L", (40, 30), 5 * (number == 1)).save(tmp_path / split / f"masks/{number}.png")
            box = "<bndbox><xmin>1</xmin><ymin>1</ymin><xmax>9</xmax><ymax>9</ymax></bndbox>"
            xml = f"<annotation><object><name>one</name>{box}</object></annotation>"
            (tmp_path / split / f"annotations/{number}.xml").write_text(xml)
    code, rows = run(tmp_path, tmp_path / "masks.csv", "--task", "segment")
    assert (code, [row[:4] for row in rows if row[1] == "wrong mask"]) == (
        1,
        [("train", "wrong mask", "", "1.jpg"), ("val", "wrong mask", "", "1.jpg")],
    )
    assert run(tmp_path, tmp_path / "boxes.csv", "--task", "detect")[0] == 0


def test_a_set_in_memory_has_its_classes_counted(tmp_path, capsys):
    assert check.main(["--data-set", "digits"]) == 0
    assert "train: 1,437 images in 10 classes of" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--data-set folder --data-path nothing", "--data-path nothing: no such folder"),
        ("--data-set folders --data-path .", "did you mean folder"),
        ("--data-set folder", "folder needs --data-path"),
        ("--data-set folder --data-path . --task knn", "--task"),
    ],
)
def test_what_cannot_be_checked_is_one_line(words, message, capsys):
    assert check.main(words.split()) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_help_states_the_exit_codes(capsys):
    with pytest.raises(SystemExit):
        check.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "exit code is 0 if nothing is wrong (remarks alone do not count), 1 if something is wrong" in text
    assert all(f"{kind} " in text for kind in (*check.WRONG, *check.REMARKABLE))


def test_ctrl_c_ends_it_even_in_a_read_that_never_returns(folder):
    os.mkfifo(folder / "train/a/stuck.jpg")
    timer = threading.Timer(1, os.kill, (os.getpid(), signal.SIGINT))
    began = time.monotonic()
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        timer.start()
        assert check.main(["--data-set", "folder", "--data-path", str(folder), "--num-workers", "2"]) == 130
    finally:
        signal.signal(signal.SIGINT, handler)
    assert time.monotonic() - began < 8
    with open(folder / "train/a/stuck.jpg", "wb"):  # lets the thread go
        pass


def test_images_are_decoded_at_the_same_time(folder, monkeypatch):
    """Two threads meet inside the decoder."""
    both, original = threading.Barrier(2, timeout=20), ImageFiles.__getitem__

    def wait(self, index):
        if index in (0, 8):  # of two chunks
            both.wait()
        return original(self, index)

    monkeypatch.setattr(EncodedImages, "__getitem__", wait)
    check.main(f"--data-set folder --data-path {folder} --num-workers 2".split())
    assert not both.broken
