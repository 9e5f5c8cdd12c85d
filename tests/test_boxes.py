"""Images with boxes: PASCAL VOC's files, and the joint transforms."""

import pytest
import torch
from helpers.detection import write_image, write_instances, write_list

import utils
from datasets import read_split
from readers import BOXED_SETS
from readers.boxes import CLASSES, read_instances, read_objects

ALONE = utils.Processes(0, 1, torch.device("cpu"))


@pytest.fixture
def voc(tmp_path):
    """VOC of both years, with a few images."""
    root = tmp_path / "VOCdevkit"
    part = "<part><name>head</name><bndbox><xmin>2</xmin><ymin>2</ymin><xmax>3</xmax><ymax>3</ymax></bndbox></part>"
    difficult = "<difficult>1</difficult>"
    write_image(root, 2007, "000001", [("person", 1, 1, 40, 30, part), ("dog", 8, 12.5, 20, 21.25, difficult)])
    write_image(root, 2007, "000002", mode="L")
    write_image(root, 2012, "2008_000001", [("tvmonitor", 3, 4, 5, 6)])
    write_list(root, 2007, "trainval", "000001", "000002")
    write_list(root, 2007, "test", "000001")
    write_list(root, 2012, "trainval", "2008_000001")
    return tmp_path


def read(data_path, split="train", name="voc0712"):
    return read_split(name, split, data_path, BOXED_SETS)


# ------------------------------------------------------------------------------------------------ the files


@pytest.mark.parametrize("below", ["", "VOCdevkit"])
def test_both_years_are_trained_on_and_2007_is_evaluated(voc, below):
    images = read(voc / below)
    assert [name.rpartition("/")[2] for name in images.names] == ["000001.jpg", "000002.jpg", "2008_000001.jpg"]
    assert list(read(voc / below, "val").names) == ["VOC2007/JPEGImages/000001.jpg"]
    assert list(read(voc / "VOCdevkit", "val", "voc2007").names) == ["VOC2007/JPEGImages/000001.jpg"]


def test_boxes_count_from_0_and_parts_are_no_objects(voc):
    image, objects = read(voc)[0]
    assert image.shape == (3, 30, 40)
    assert objects["boxes"].tolist() == [[0, 0, 40, 30], [7, 11.5, 20, 21.25]]  # the first covers the image
    assert [CLASSES[label] for label in objects["labels"]] == ["person", "dog"]
    assert objects["difficult"].tolist() == [False, True]


def test_an_image_without_objects_is_kept(voc):
    image, objects = read(voc)[1]
    assert image.shape == (3, 30, 40)  # grey in the file
    assert objects["boxes"].shape == (0, 4)
    assert objects["labels"].shape == objects["difficult"].shape == (0,)
    assert objects["labels"].dtype == torch.int64


def test_the_classes_are_those_of_voc_in_the_order_of_the_alphabet():
    assert len(CLASSES) == 20
    assert sorted(CLASSES) == CLASSES
    assert {"aeroplane", "diningtable", "motorbike", "pottedplant", "tvmonitor"} < set(CLASSES)


@pytest.mark.parametrize(
    ("thing", "message"),
    [
        (("cat", 9, 9, 5, 20), r"2008_000001\.xml: object 1 \(cat\) has no box with an area \(xmin 9, .*xmax 5"),
        (("cat", "nan", 9, 5, 20), "no box with an area"),
        (("cat", "here", 9, 5, 20), r"object 1 \(cat\): could not convert string to float: 'here'"),
        (("cup", 1, 1, 5, 20), r"object 1 is of the class 'cup', which the set does not have: aeroplane,"),
    ],
)
def test_an_error_names_file_and_object(voc, thing, message):
    write_image(voc / "VOCdevkit", 2012, "2008_000001", [thing])
    with pytest.raises(utils.UserError, match=message):
        read(voc)


def test_a_box_of_one_pixel_is_a_box(tmp_path):
    write_image(tmp_path, 2007, "a", [("cat", 5, 5, 5, 5)])
    assert read_objects(tmp_path / "VOC2007/Annotations/a.xml", {"cat": 3}) == [(3, 0, 4, 4, 5, 5)]


def test_boxes_that_count_from_0_are_noticed(voc, caplog):
    assert read(voc)
    assert not caplog.records
    write_image(voc / "VOCdevkit", 2012, "2008_000001", [("cat", 0, 3, 5, 20)])
    with caplog.at_level("WARNING", utils.logger.name):
        read(voc)
    assert "1 of 3 boxes begin at 0" in caplog.text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda root: (root / "VOC2012/JPEGImages/2008_000001.jpg").unlink(), r"2008_000001\.jpg: no such file"),
        (lambda root: (root / "VOC2012/Annotations/2008_000001.xml").unlink(), r"2008_000001\.xml: no such file"),
        (lambda root: (root / "VOC2007/Annotations/000001.xml").write_text("<annotation>"), r"000001\.xml: cannot be"),
        (lambda root: (root / "VOC2007/ImageSets/Main/trainval.txt").unlink(), r"trainval\.txt: .*lists there: test"),
        (lambda root: write_list(root, 2012, "trainval", *2 * ["2008_000001"]), "or one twice"),
        (lambda root: (root / "VOC2012").rename(root / "2012"), "no VOC2007 and VOC2012 in it"),
    ],
)
def test_missing_files_are_named(voc, change, message):
    change(voc / "VOCdevkit")
    with pytest.raises(utils.UserError, match=message):
        read(voc)


def test_a_folder_of_ones_own(tmp_path):
    (tmp_path / "classes.txt").write_text("bolt\nnut\n")
    write_image(tmp_path, 2007, "a", [("nut", 1, 1, 9, 9)])
    (tmp_path / "VOC2007").rename(tmp_path / "train")
    (tmp_path / "train/JPEGImages").rename(tmp_path / "train/images")
    (tmp_path / "train/Annotations").rename(tmp_path / "train/annotations")
    images = read(tmp_path, name="folder")
    assert images.classes == ["bolt", "nut"]
    assert images[0][1]["labels"].tolist() == [1]
    (tmp_path / "train/annotations/a.xml").unlink()
    with pytest.raises(utils.UserError, match=r"annotations/a\.xml: cannot be read .*each image needs an annotation"):
        read(tmp_path, name="folder")


def test_the_kth_value_of_a_mask_is_the_kth_object(voc, tmp_path):
    path = voc / "VOCdevkit/VOC2007/SegmentationObject/000001.png"
    write_instances(path, [[0, 1, 255], [2, 2, 0]])
    (_, first), (_, second) = read(voc)[0], read(voc)[1]
    assert first["masks"] == str(path)
    assert second["masks"] == ""
    masks = read_instances(first["masks"], 3)
    assert masks.int().tolist() == [[[0, 1, 0], [0, 0, 0]], [[0, 0, 0], [1, 1, 0]], [[0, 0, 0], [0, 0, 0]]]
    with pytest.raises(utils.UserError, match="it has an object 2, but the annotation has 1"):
        read_instances(first["masks"], 1)
