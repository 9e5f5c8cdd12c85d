"""Table 11's measure: the released code's numbers, a slow loop's numbers, and the command on both layouts of masks."""

import json
import multiprocessing
import re
import shutil

import numpy as np
import pytest
import torch
from helpers.image_sets import photograph, picture, truncate
from helpers.masks import random_labels, rows_of, save_mask, write_foregrounds, write_voc
from PIL import Image
from torchvision.transforms import InterpolationMode

from analysis import jaccard
from analysis.attention import attention_of, keep_mass, similarity_maps
from analysis.jaccard import (
    BestHead,
    SquashedImages,
    best_heads,
    image_mean,
    mean_over_classes,
    mean_over_images,
    random_maps,
)
from analysis.models import load_model
from benchmarks import jaccard as benchmark_jaccard
from benchmarks.jaccard import score_image
from readers.masks import VOID, count_labels, read_masked_images


def ours(attention, labels, void_counts, mass=0.6):
    """The batched measure, from attention (B, H, h, w) and labels (B, height, width)."""
    return best_heads(keep_mass(attention, mass), *count_labels(labels, *attention.shape[-2:]), void_counts)


# -------------------------------------------------------------------------------------------- the measure


@pytest.mark.parametrize(("void_counts", "key"), [(True, "jaccard_code"), (False, "jaccard_void_excluded")])
def test_the_released_codes_numbers(golden, void_counts, key):
    """Exactly, but for the case of equal patches, whose order the released code leaves to chance."""
    content = golden("sar_segmentation_jaccard.pt")
    threshold, ties = content["meta"]["threshold"], 0
    for case in content["cases"]:
        grid = case["grid"]
        attention = case["attn_cls"][None, :, 1:].unflatten(-1, (grid, grid))
        kept = keep_mass(attention, threshold)
        (image,) = ours(attention, case["mask_target"], void_counts, threshold)
        if case["has_ties"]:
            ties += 1
            assert torch.equal(kept.sum((-2, -1))[0], case["threshold_mask"].sum((-2, -1)))
            assert image_mean(image) == pytest.approx(case[key], abs=0.1)
        else:
            assert torch.equal(kept[0], case["threshold_mask"].bool())
            assert image_mean(image) == pytest.approx(case[key], rel=0, abs=1e-12)
    assert (len(content["cases"]), ties) == (16, 1)


@pytest.mark.parametrize("void_counts", [True, False])
@pytest.mark.parametrize("seed", range(4))
def test_a_batch_has_the_numbers_of_a_loop(seed, void_counts):
    """Several classes, one, none, only void; an oblong grid; equal patches, and a constant map."""
    generator = torch.Generator().manual_seed(seed)
    size, grid = (40, 60), (5, 6)
    kinds = ([5], [1, 15, 20], [254, 2], [], [VOID], [7, 7], [3, 9, 11, 4])
    labels = torch.stack([random_labels(generator, size, classes) for classes in kinds])
    attention = torch.rand(len(labels), 3, *grid, generator=generator)
    attention[1] = (4 * attention[1]).ceil()  # many equal patches
    attention[2, 1] = 0.125
    attention = attention / attention.sum((-2, -1), keepdim=True)
    expected = [score_image(*image, 0.6, void_counts) for image in zip(attention, labels, strict=True)]
    assert ours(attention, labels, void_counts) == expected
    assert [len(image) for image in expected][3:5] == [0, 0]
    assert expected[1].keys() <= {1, 15, 20}
    parts = ours(attention[:2], labels[:2], void_counts) + ours(attention[2:], labels[2:], void_counts)
    assert parts == expected, "the classes of the others of a batch do not matter"


@pytest.mark.gpu
def test_a_gpu_has_the_same_numbers():
    generator = torch.Generator().manual_seed(0)
    labels = torch.stack([random_labels(generator, (64, 64), [number, 20]) for number in range(1, 9)])
    attention = torch.rand(8, 6, 8, 8, generator=generator)
    assert ours(attention.cuda(), labels.cuda(), False) == ours(attention, labels, False)


def test_void_by_hand():
    """A patch of object, one of void, two of background; the mask holds the first two."""
    labels = torch.tensor([[5, VOID], [0, 0]], dtype=torch.uint8).repeat_interleave(4, 0).repeat_interleave(4, 1)
    masks = torch.tensor([[True, True], [False, False]])[None, None]
    counted = count_labels(labels[None], 2, 2)
    assert best_heads(masks, *counted, void_counts=True) == [{5: (0.5, 0)}]
    assert best_heads(masks, *counted, void_counts=False) == [{5: (1.0, 0)}]


def test_of_equal_heads_the_first_is_the_best():
    labels = torch.tensor([[1, 1], [0, 0]], dtype=torch.uint8)[None]
    heads = torch.tensor([[[0, 0], [1, 1]], [[1, 0], [0, 0]], [[0, 1], [0, 0]]]).bool()[None]
    assert best_heads(heads, *count_labels(labels, 2, 2), void_counts=False) == [{1: (0.5, 1)}]


def test_random_maps_depend_on_the_image_alone():
    maps = random_maps([3, 0, 8], (2, 5, 5))
    assert torch.equal(random_maps([8], (2, 5, 5))[0], maps[2])
    assert not torch.equal(maps[0], maps[1])
    assert 0 <= maps.min() < 0.1 < 0.9 < maps.max() < 1


# ------------------------------------------------------------------------------------- folders to measure


@pytest.fixture(scope="module")
def voc(tmp_path_factory):
    return write_voc(tmp_path_factory.mktemp("voc"))


def command(checkpoint, data, *more):
    words = ["--checkpoint", str(checkpoint), "--data-path", str(data), "--input-size", "48", "--num-heads", "3"]
    return jaccard.main([*words, "--num-workers", "0", *more])


def slow_scores(checkpoint, data, positions, interpolation, void_counts):
    """The measure of a folder at 48 px, image by image."""
    model = load_model(checkpoint, num_heads=3, input_size=48, positions=positions).model
    images = SquashedImages(read_masked_images(data), 48, interpolation)
    return [
        score_image(attention_of(similarity_maps(model, image[None]))[0], labels, 0.6, void_counts)
        for image, labels, _ in (images[index] for index in range(len(images)))
    ]


@pytest.mark.parametrize(
    ("protocol", "how"),
    [
        ("void-excluded", ("timm", InterpolationMode.BICUBIC, False)),
        ("paper-code", ("released", InterpolationMode.BILINEAR, True)),
    ],
)
def test_the_command_measures_what_the_loop_does(checkpoint, voc, tmp_path, capsys, protocol, how):
    assert command(checkpoint, voc, "--protocol", protocol, "--out", str(tmp_path / "out"), "--batch-size", "2") == 0
    scores = slow_scores(checkpoint, voc, *how)
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert results["jaccard"] == pytest.approx(100 * mean_over_images(scores), abs=1e-9)
    given = {"protocol": protocol, "mass": 0.6, "input_size": 48, "data_path": str(voc), "split": "val"}
    assert results.items() >= (given | {"images": 3, "skipped": 2, "heads": 3, "grid": [6, 6]}).items()
    assert results["checkpoint"] == str(checkpoint)
    rows = rows_of(tmp_path / "out/images.csv")
    assert [(row["image"], row["class"]) for row in rows] == [
        ("a 0", "person"),
        ("a 1", "bird"),
        ("a 1", "dog"),
        ("a 2", ""),
        ("a 3", "26"),
        ("a 4", ""),
    ]
    for row in rows:
        if row["class"]:
            best = scores[int(row["image"][2:])][int(row["label"])]
            assert (float(row["jaccard"]), int(row["head"])) == (pytest.approx(100 * best.jaccard), best.head + 1)
    classes = rows_of(tmp_path / "out/jaccard.csv")
    assert [(row["class"], row["images"]) for row in classes] == [(n, "1") for n in ("bird", "dog", "person", "26")]
    assert results["mean_over_classes"] == pytest.approx(np.mean([float(row["jaccard"]) for row in classes]))
    printed = capsys.readouterr().out
    assert f"| vit | {results['jaccard']:.2f} | {results['mean_over_classes']:.2f} | 3 | 2 |" in printed
    assert f"| random maps, 3 of 6 x 6 | {results['random_maps']:.2f} |" in printed
    assert f"| the whole image | {results['whole_image']:.2f} |" in printed


def test_the_protocols_differ(checkpoint, voc, tmp_path):
    found = {}
    for protocol in jaccard.PROTOCOLS:
        assert command(checkpoint, voc, "--protocol", protocol, "--out", str(tmp_path / protocol)) == 0
        found[protocol] = json.loads((tmp_path / protocol / "results.json").read_text())
    assert found["paper-code"]["whole_image"] < found["void-excluded"]["whole_image"], "void counts against it"


def test_the_whole_image_is_worth_the_share_of_the_class(checkpoint, tmp_path):
    data = write_foregrounds(tmp_path / "data")
    assert command(checkpoint, data, "--out", str(tmp_path)) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["whole_image"] == pytest.approx(100 / 3)
    assert (results["split"], results["images"], results["skipped"]) == (None, 3, 0)
    assert [row["class"] for row in rows_of(tmp_path / "jaccard.csv")] == ["foreground"]
    assert [row["image"] for row in rows_of(tmp_path / "images.csv")] == ["sub/0", "sub/1", "sub/2"]


def test_batches_workers_and_mass(checkpoint, voc, tmp_path):
    """Neither batches nor workers change a number; the mass does, and all of it is the whole image."""
    ways = {
        "one": ("--batch-size", "1"),
        "many": ("--batch-size", "4", "--num-workers", "2"),
        "all": ("--mass", "1"),
    }
    for name, words in ways.items():
        assert command(checkpoint, voc, *words, "--out", str(tmp_path / name)) == 0
    content = {name: (tmp_path / name / "images.csv").read_text() for name in ways}
    assert content["one"] == content["many"] != content["all"]
    for row in rows_of(tmp_path / "all/images.csv"):
        assert row["jaccard"] == row["whole_image"] == row["random_maps"]


def test_several_checkpoints_in_one_table(checkpoint, voc, tmp_path, capsys):
    other = tmp_path / "other.pth"
    shutil.copy(checkpoint, other)
    assert command(checkpoint, voc, "--checkpoint", str(other), "--out", str(tmp_path / "out")) == 0
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")][2:]
    names = [line.split("|")[1].strip() for line in table]
    assert len(names) == 4, "the baselines of models of equal shape stand there once"
    assert names[2:] == ["random maps, 3 of 6 x 6", "the whole image"]
    folders = [tmp_path / "out" / name.replace("/", "_") for name in names[:2]]
    assert folders[0] != folders[1]
    results = [json.loads((folder / "results.json").read_text()) for folder in folders]
    assert [result["checkpoint"] for result in results] == [str(checkpoint), str(other)]
    assert results[0]["jaccard"] == results[1]["jaccard"]


def test_models_have_the_names_that_they_are_given(checkpoint, voc, tmp_path, capsys):
    same_stem = shutil.copy(checkpoint, checkpoint.with_suffix(".pt"))
    more = ("--checkpoint", str(same_stem))
    assert command(checkpoint, voc, *more) == 0
    assert re.findall(r"^\| (\S+) \|", capsys.readouterr().out, re.M)[:2] == [checkpoint.name, same_stem.name]
    assert command(checkpoint, voc, *more, "--name", "the whole image", "--name", "a|b", "--out", str(tmp_path)) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert [row.split(" | ")[0] for row in rows[2:]] == [
        "| the whole image",
        "| a\\|b",
        "| random maps, 3 of 6 x 6",
        "| the whole image",
    ]
    assert {path.name for path in tmp_path.iterdir()} >= {"the_whole_image", "a_b"}
    for names, message in {
        ("one",): "1 --name for 2 --checkpoint; name all of them or none",
        ("one", "one "): "need distinct names, not 'one', 'one'",
        ("one", ""): "need distinct names, not 'one', ''",
    }.items():
        words = [word for name in names for word in ("--name", name)]
        assert command(checkpoint, voc, *more, *words) == 2
        assert message in capsys.readouterr().err
    assert command(checkpoint, voc, "--checkpoint", str(checkpoint)) == 2
    assert "a checkpoint is given twice" in capsys.readouterr().err


def test_a_rare_class_weighs_as_much_as_a_common_one():
    scores = [{1: BestHead(0.2, 0)}, {1: BestHead(0.4, 0)}, {1: BestHead(0.6, 0), 7: BestHead(1.0, 0)}]
    assert mean_over_classes(scores) == pytest.approx((0.4 + 1.0) / 2)


# ------------------------------------------------------------------------------------ what is in the folders


@pytest.mark.parametrize("place", [".", "VOCdevkit", "VOCdevkit/VOC2012"])
def test_vocs_folder_may_be_named_at_any_level(voc, place):
    data = read_masked_images(voc / place)
    assert data.names == [f"a {number}" for number in range(5)]
    assert data.labels(1, 48).unique().tolist() == [0, 3, 12, VOID]
    assert [data.class_name(label) for label in (1, 20, 21, 254)] == ["aeroplane", "tvmonitor", "21", "254"]


def test_a_split_is_a_list(tmp_path):
    write_voc(tmp_path)
    write_voc(tmp_path, kinds=[(5,)], split="val_voc")
    assert len(read_masked_images(tmp_path)) == 5
    assert len(read_masked_images(tmp_path, "val_voc")) == 1


def test_masks_are_squashed_to_the_nearest_pixel(tmp_path):
    write_voc(tmp_path, kinds=[(5,)])
    pixels = np.arange(254, dtype=np.uint8)[:48, None].repeat(60, 1)
    photograph(0).resize((60, 48)).save(tmp_path / "VOCdevkit/VOC2012/JPEGImages/a 0.jpg")
    save_mask(pixels, tmp_path / "VOCdevkit/VOC2012/SegmentationClass/a 0.png")
    labels = read_masked_images(tmp_path).labels(0, 24)
    assert labels.shape == (24, 24)
    assert labels[:, 0].tolist() == list(range(1, 48, 2))


def voc_file(root, name):
    return root / "VOCdevkit/VOC2012" / name


BROKEN = {
    "no folder": (write_voc, shutil.rmtree, "no such folder"),
    "no layout": (write_voc, lambda root: shutil.rmtree(root / "VOCdevkit"), "no images with masks; expected"),
    "no list": (
        write_voc,
        lambda root: voc_file(root, "ImageSets/Segmentation/val.txt").rename(
            voc_file(root, "ImageSets/Segmentation/all.txt")
        ),
        "val.txt: no such list; --split can be all",
    ),
    "empty list": (
        write_voc,
        lambda root: voc_file(root, "ImageSets/Segmentation/val.txt").write_text("\n"),
        "names no image",
    ),
    "no image": (
        write_voc,
        lambda root: voc_file(root, "JPEGImages/a 3.jpg").unlink(),
        "a 3.jpg: no such image, but val.txt names it (1 of 5 are missing)",
    ),
    "no mask": (
        write_voc,
        lambda root: voc_file(root, "SegmentationClass/a 0.png").unlink(),
        "a 0.png: no such mask",
    ),
    "another size": (
        write_voc,
        lambda root: picture(size=(40, 30)).save(voc_file(root, "JPEGImages/a 1.jpg")),
        "differ in size: 40 x 30 and 61 x 46 px",
    ),
    "colours": (
        write_voc,
        lambda root: (
            Image.open(voc_file(root, "SegmentationClass/a 1.png"))
            .convert("RGB")
            .save(voc_file(root, "SegmentationClass/a 1.png"))
        ),
        "RGB pixels instead of class numbers; this is the palette saved as colours: take the original",
    ),
    "no PNG": (
        write_voc,
        lambda root: voc_file(root, "SegmentationClass/a 1.png").write_text("nothing"),
        "a 1.png: cannot be read",
    ),
    "image alone": (
        write_foregrounds,
        lambda root: (root / "masks/sub/1.png").unlink(),
        "images/sub/1.jpg has no mask",
    ),
    "mask alone": (
        write_foregrounds,
        lambda root: (root / "images/sub/2.jpg").unlink(),
        "masks/sub/2.png has no image",
    ),
    "two images of a name": (
        write_foregrounds,
        lambda root: picture(size=(60, 48)).save(root / "images/sub/1.png"),
        "images/sub/1.png: two files of the same name",
    ),
    "a list that names one twice": (
        write_voc,
        lambda root: voc_file(root, "ImageSets/Segmentation/val.txt").open("a").write("\na 1\n"),
        "names a 1 twice",
    ),
    "a list in another encoding": (
        write_voc,
        lambda root: voc_file(root, "ImageSets/Segmentation/val.txt").write_bytes(b"\xff\xfea"),
        "is not text in UTF-8",
    ),
    "JPEG mask": (
        write_foregrounds,
        lambda root: picture(size=(60, 48)).save((root / "masks/sub/2.png").rename(root / "masks/sub/2.jpg")),
        "masks must be PNG files",
    ),
    "transparent mask": (
        write_foregrounds,
        lambda root: picture(size=(60, 48), mode="RGBA").save(root / "masks/sub/2.png"),
        "RGBA pixels; save the mask as black and white",
    ),
}


@pytest.mark.parametrize(("write", "break_it", "message"), BROKEN.values(), ids=BROKEN.keys())
def test_what_cannot_be_measured_is_said_before_a_model_runs(
    checkpoint, tmp_path, capsys, monkeypatch, write, break_it, message
):
    monkeypatch.setattr(jaccard, "similarity_maps", None)
    break_it(write(tmp_path / "data"))
    assert command(checkpoint, tmp_path / "data") == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert message in captured.err
    assert captured.out == ""


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--split", "val"), "images/ and masks/ without lists; leave --split out"),
        (("--input-size", "50"), "not divisible by the patch size 8; use 48"),
        (("--checkpoint", "gone.pth"), "gone.pth"),
        (("--out", "{file}/out"), "--out"),
        (("--mass", "0"), "above 0 and at most 1"),
        (("--protocol", "code"), "invalid choice: 'code'"),
    ],
)
def test_options_that_make_no_sense(checkpoint, tmp_path, capsys, monkeypatch, words, message):
    monkeypatch.setattr(jaccard, "similarity_maps", None)
    data = write_foregrounds(tmp_path / "data")
    words = [word.format(file=data / "images/sub/0.jpg") for word in words]
    assert command(checkpoint, data, *words) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("workers", ["0", "1"])
def test_a_truncated_mask_ends_the_run_with_its_name(checkpoint, tmp_path, capsys, workers):
    data = write_foregrounds(tmp_path / "data")
    noise = np.random.default_rng(0).integers(0, 256, (48, 60), dtype=np.uint8)
    Image.fromarray(noise).save(data / "masks/sub/1.png")
    truncate(data / "masks/sub/1.png")
    assert command(checkpoint, data, "--num-workers", workers) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {data / 'masks/sub/1.png'}: cannot be read (")
    assert error.count("\n") == 1
    assert multiprocessing.active_children() == [], "or the command would never end"


def test_masks_without_any_class(checkpoint, tmp_path, capsys):
    """As when foreground masks of 0 and 255 lie in VOC's layout: all object would be void."""
    assert command(checkpoint, write_voc(tmp_path / "data", kinds=[(VOID,), ()])) == 2
    assert "no image has a class" in capsys.readouterr().err


def test_the_benchmark_prints_its_table(checkpoint, voc, capsys):
    words = "--input-size 48 --num-heads 3 --num-workers 0 --threads 1 --repeats 1".split()
    benchmark_jaccard.main(["--checkpoint", str(checkpoint), "--data-path", str(voc), *words])
    lines = capsys.readouterr().out.splitlines()
    for name, line in zip(("measure", "command"), lines[-2:], strict=True):
        assert re.fullmatch(rf"\| {name} \| [\d.]+ \| [\d.]+ \| [\d.]+ \| 0 \|", line), "the ways agree"
