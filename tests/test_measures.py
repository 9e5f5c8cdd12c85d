"""Measures of maps over a folder of images, and of ground-truth masks on the patch grid."""

import json

import numpy as np
import pytest
import torch
from helpers.image_sets import photograph
from helpers.masks import rows_of, save_mask, write_foregrounds, write_voc
from PIL import Image

from analysis import measures
from analysis.attention import measure_maps, similarity_maps
from analysis.measures import foreground, head_rows, measure_images, summarise_masks
from analysis.models import TrainedModel, load_model
from augmentation import as_tensor, eval_transform, normalise
from readers.masks import VOID

# ------------------------------------------------------------------------------------------------- of maps


def test_measures_by_hand(monkeypatch):
    """One blob of 2 x 2; two single patches and one of 2; a constant map, which has no component."""
    maps = torch.zeros(3, 2, 4, 4)
    maps[0, 0, :2, :2] = 1
    maps[0, 1, 0, 0] = maps[0, 1, 3, 0] = maps[0, 1, 0, 3] = maps[0, 1, 1, 3] = 1
    maps[1, 0, 1, 1] = 1
    monkeypatch.setattr(measures, "similarity_maps", lambda model, images: images)
    nobody = TrainedModel("", torch.nn.Identity(), 4, 1, None)
    measured = measure_images(nobody, [maps[:1], maps[1:]], torch.device("cpu"))
    assert measured["components"].tolist() == [[1, 3], [1, 0], [0, 0]]
    assert measured["largest"].tolist() == [[4, 2], [1, 0], [0, 0]]
    assert measured["kept"].tolist() == [[4, 4], [1, 0], [0, 0]]
    assert measured["share"].tolist() == [[1, 0.5], [1, 0], [0, 0]]
    shares = torch.tensor([0.25, 0.25, 0.5])
    assert measured["entropy"][0, 1].item() == pytest.approx(-(shares * shares.log()).sum().item())
    first, second, mean = head_rows(measured)
    assert (first["head"], second["head"], mean["head"]) == (1, 2, "mean")
    assert (first["components"], second["components"], mean["components"]) == pytest.approx((2 / 3, 1, 5 / 6))
    assert mean["share"] == pytest.approx((2 + 0.5) / 6)


def test_the_command_measures_a_folder_of_images(checkpoint, tmp_path, capsys):
    names = [f"sub/{number}.png" for number in range(5)]
    (tmp_path / "photographs/sub").mkdir(parents=True)
    for number, name in enumerate(names):
        photograph(number).save(tmp_path / "photographs" / name)
    words = f"--checkpoint {checkpoint} --num-heads 3 --input-size 64 --batch-size 2 --num-workers 0".split()
    folder = str(tmp_path / "photographs")
    assert measures.main([*words, "--images", folder, "--out", str(tmp_path / "out")]) == 0
    model = load_model(checkpoint, num_heads=3, input_size=64).model
    images = [normalise(eval_transform(64)(as_tensor(photograph(number)))) for number in range(5)]
    one_by_one = [measure_maps(similarity_maps(model, image[None])) for image in images]
    rows = rows_of(tmp_path / "out/images.csv")
    assert [(row["image"], row["head"]) for row in rows] == [(name, str(head)) for name in names for head in (1, 2, 3)]
    for index, row in enumerate(rows):
        expected = {name: value[0, index % 3].item() for name, value in one_by_one[index // 3].items()}
        assert float(row["entropy"]) == pytest.approx(expected["entropy"], abs=1e-4)
        assert [int(row[name]) for name in ("components", "largest", "kept")] == [
            expected[name] for name in ("components", "largest", "kept")
        ]
        assert float(row["share"]) == pytest.approx(expected["largest"] / expected["kept"])
    heads = rows_of(tmp_path / "out/heads.csv")
    assert [row["head"] for row in heads] == ["1", "2", "3", "mean"]
    assert float(heads[1]["entropy"]) == pytest.approx(np.mean([float(row["entropy"]) for row in rows[1::3]]))
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert results.items() >= {"images": 5, "input_size": 64, "checkpoint": str(checkpoint)}.items()
    assert results["mean"]["components"] == pytest.approx(float(heads[3]["components"]))
    assert f"| vit | mean | {results['mean']['entropy']:.3f} |" in capsys.readouterr().out


def test_several_checkpoints_have_a_folder_each(checkpoint, tmp_path):
    (tmp_path / "images").mkdir()
    photograph().save(tmp_path / "images/a.png")
    other = tmp_path / "other.pth"
    other.write_bytes(checkpoint.read_bytes())
    words = f"--checkpoint {checkpoint} --checkpoint {other} --num-heads 3 --num-workers 0".split()
    assert measures.main([*words, "--images", str(tmp_path / "images"), "--out", str(tmp_path / "out")]) == 0
    found = [json.loads(path.read_text())["checkpoint"] for path in (tmp_path / "out").rglob("results.json")]
    assert sorted(found) == sorted(map(str, (checkpoint, other)))


# ------------------------------------------------------------------------------------------------ of masks


def drawing(*lines, pixels=4):
    """A mask of patches of 4 x 4 pixels: ``.`` background, ``#`` object of class 7, ``o`` of class 9, ``-`` void."""
    values = {".": 0, "#": 7, "o": 9, "-": VOID}
    mask = torch.tensor([[values[sign] for sign in line] for line in lines], dtype=torch.uint8)
    return mask.repeat_interleave(pixels, 0).repeat_interleave(pixels, 1)


def test_a_patch_is_foreground_where_objects_are_more_than_half_of_it():
    labels = drawing("#.", "-o")
    labels[:2, 4:] = 7  # half of the second patch
    labels[4:6, :4] = 9  # half of the third, the rest of it void
    cells, has_object = foreground(labels[None], 2)
    assert cells.tolist() == [[[True, False], [True, True]]]
    labels[2, 4] = 7  # one pixel more than half
    assert foreground(labels[None], 2)[0].all()
    assert has_object.tolist() == [True]


def count(*masks, grid):
    return measures.measure_masks([torch.stack(masks)], grid)


def test_components_of_masks_by_hand():
    """All classes are one foreground, corners touch, an object may be too thin for the grid, void is no object."""
    thin = drawing("...", "...", "...")
    thin[:, 5] = 7
    masks = [
        drawing("#..", ".o.", "..#"),
        drawing("#.#", "#.#", "..."),
        drawing("#.o", "...", "o.#"),
        thin,
        drawing("...", ".-.", "..."),
    ]
    components, patches = count(*masks, grid=3)
    assert components.tolist() == [1, 2, 4, 0, -1]
    assert patches.tolist() == [3, 4, 4, 0, -1]
    summary = summarise_masks(components)
    assert summary == {
        "components": 7 / 4,
        "exactly_one": 25.0,
        "images_by_components": [1, 1, 1, 0, 1],
        "images": 4,
        "skipped": 1,
    }


def test_the_command_measures_the_masks_of_a_folder(tmp_path, capsys):
    """At the mask's own size and at twice it, on grids of 3 and 14."""
    data = write_voc(tmp_path, kinds=[(1,), (1,), ()])
    voc = data / "VOCdevkit/VOC2012"
    masks = [drawing("#.#", "...", "..o", pixels=16), drawing("##.", ".#.", "...", pixels=32), drawing("...", "...")]
    for number, mask in enumerate(masks):
        save_mask(mask.numpy(), voc / f"SegmentationClass/a {number}.png")
        Image.new("RGB", tuple(mask.shape[::-1])).save(voc / f"JPEGImages/a {number}.jpg")
    words = ["--masks", str(data), "--num-workers", "0", "--batch-size", "2"]
    assert measures.main([*words, "--grid", "3", "--out", str(tmp_path / "out")]) == 0
    rows = [list(row.values()) for row in rows_of(tmp_path / "out/images.csv")]
    assert rows == [["a 0", "3", "3"], ["a 1", "1", "3"], ["a 2", "", ""]]
    results = json.loads((tmp_path / "out/results.json").read_text())
    given = {"grid": 3, "split": "val", "data_path": str(data), "images": 2, "skipped": 1}
    assert results.items() >= (given | {"components": 2.0, "exactly_one": 50.0}).items()
    printed = capsys.readouterr().out
    assert "| 1 | 1 | 50.0% |" in printed
    assert "2.00 components on average, exactly one in 50.0 % of 2 images; 1 without object skipped" in printed
    assert measures.main(words) == 0
    assert "on 14 x 14 patches" in capsys.readouterr().out


def test_one_foreground_mask_an_image(tmp_path, capsys):
    assert measures.main(["--masks", str(write_foregrounds(tmp_path)), "--num-workers", "0"]) == 0
    assert "1.00 components on average, exactly one in 100.0 % of 3 images" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "one of the arguments --images --masks is required"),
        ("--images {data} --masks {data}", "not allowed with argument"),
        ("--images {data}", "--images needs --checkpoint"),
        ("--images {data} --checkpoint a.pth --grid 14", "--grid has no effect with --images; leave it out"),
        ("--masks {data} --input-size 64", "--input-size has no effect with --masks; leave it out"),
        ("--images {data}/empty --checkpoint a.pth", "no image in it"),
        ("--images {data}/images --checkpoint a.pth", "a.pth"),
        ("--masks {data} --split val", "leave --split out"),
        ("--masks {data}/empty", "no images with masks; expected"),
        ("--masks {data} --out {data}/masks/sub/0.png", "--out"),
    ],
)
def test_what_cannot_be_measured_is_one_line(tmp_path, capsys, words, message):
    (write_foregrounds(tmp_path) / "empty").mkdir()
    assert measures.main(words.format(data=tmp_path).split()) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_masks_without_objects(tmp_path, capsys):
    assert measures.main(["--masks", str(write_voc(tmp_path, kinds=[(), ()])), "--num-workers", "0"]) == 2
    assert "no mask has an object" in capsys.readouterr().err
