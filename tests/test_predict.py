"""Predictions on a user's photographs are those of the evaluation; what is drawn and written is what was predicted."""

import csv
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import detection, runs, segmentation
from PIL import Image

import main
import training
from analysis import pictures, predict
from batches import prepare
from build import build_eval_loader
from checkpoints import snapshot
from engine import evaluate
from readers.images import UnreadableImage, read_photograph
from samplers import Draw
from tasks import load_task
from utils import start_processes

CPU = torch.device("cpu")
LINEAR = (
    "--task linear --finetune {trunk} --probe-blocks 1 2 --lr-factors 1 3 --epochs 1 --batch-size 24 --total-batch 48 "
    "--lr 1e-2"
)


def save(words: list[str], path: Path) -> SimpleNamespace:
    """A small run of these words that has not begun, and its checkpoint in ``path``; its weights are random."""
    run = runs.build(" ".join(words))
    torch.save(snapshot(run), path)
    return SimpleNamespace(run=run, path=path, photographs=Path(run.arguments["data_path"]) / "val")


@pytest.fixture(scope="module")
def detector(tmp_path_factory):
    root = tmp_path_factory.mktemp("detect")
    data = detection.write_pictures(root / "data")
    return save(runs.folders(detection.WORDS, data, root / "run"), root / "detector.pth")


@pytest.fixture(scope="module")
def segmenter(tmp_path_factory):
    root = tmp_path_factory.mktemp("segment")
    data = segmentation.write_pairs(root / "data")
    return save(runs.folders(segmentation.WORDS, data, root / "run"), root / "segmenter.pth")


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    return runs.write_digits(tmp_path_factory.mktemp("digits"), val=2)


@pytest.fixture(scope="module")
def classifier(digits, tmp_path_factory):
    """A classifier whose outputs are far from equal, with other averaged weights."""
    path = tmp_path_factory.mktemp("classify") / "classifier.pth"
    saved = save(runs.folders(runs.SMALL, digits, path.parent), path)
    with torch.no_grad():
        saved.run.task.model.head.weight.normal_()
    torch.save(snapshot(saved.run), path)
    return saved


def run(checkpoint: Path, images: Path, out: Path, *more: str) -> int:
    words = ["--checkpoint", str(checkpoint), "--images", str(images), "--out", str(out), "--device", "cpu"]
    return predict.main([*words, *more])


def val_items(saved) -> list[dict]:
    """The evaluation's own items of a run's validation images."""
    args = SimpleNamespace(**saved.run.arguments)
    dataset = load_task(args.task).data(args, "val", start_processes("cpu"))
    return [dataset[Draw(index, 0, index)] | {"file": dataset.base.names[index]} for index in range(len(dataset))]


def by_image(rows: list[dict], key: str = "file_name") -> dict[str, list[dict]]:
    return {name: [row for row in rows if row[key] == name] for name in {row[key] for row in rows}}


# ----------------------------------------------------------------------------------------------- the same numbers


def test_the_boxes_are_those_of_the_evaluation(detector, tmp_path):
    """Those of the run's detections.json, in COCO's layout, for images of several sizes."""
    assert run(detector.path, detector.photographs / "images", tmp_path / "out", "--min-score", "0.05") == 0
    args, processes = SimpleNamespace(**detector.run.arguments), start_processes("cpu")
    dataset = load_task("detect").data(args, "val", processes)
    loader = build_eval_loader(args, processes, dataset)
    evaluate(detector.run.task.evaluator(), detector.run.task.model, loader, processes)
    folder = Path(args.output_dir)
    truth, expected = (json.loads((folder / f"{name}.json").read_text()) for name in ("objects", "detections"))
    names = {image["id"]: Path(image["file_name"]).name for image in truth["images"]}
    found = json.loads((tmp_path / "out/detections.json").read_text())
    images = json.loads((tmp_path / "out/images.json").read_text())
    assert len(found) == len(expected) > 0
    assert {image["id"]: image["file_name"] for image in images["images"]} == {
        box["image_id"]: box["file_name"] for box in found
    }
    assert images["categories"] == truth["categories"]
    theirs = by_image([box | {"file_name": names[box.pop("image_id")]} for box in expected])
    ours = by_image([{name: value for name, value in box.items() if name != "image_id"} for box in found])
    assert ours == theirs


def test_the_classes_of_pixels_are_those_of_the_evaluation(segmenter, tmp_path):
    assert run(segmenter.path, segmenter.photographs / "images", tmp_path / "out") == 0
    rows = {row["image"]: row for row in json.loads((tmp_path / "out/predictions.json").read_text())}
    task = segmenter.run.task.eval()
    for item in val_items(segmenter):
        with torch.inference_mode():
            expected = task.predict(prepare(item, CPU))["classes"]
        row = rows[Path(item["file"]).name]
        with Image.open(tmp_path / "out" / row["classes"]) as image:
            assert image.mode == "P"
            np.testing.assert_array_equal(np.asarray(image), expected)
        labels, counts = np.unique(expected, return_counts=True)
        assert row["shares"] == {
            segmentation.CLASSES[label]: count / expected.size for label, count in zip(labels, counts, strict=True)
        }


def test_the_classes_are_those_of_the_evaluation(classifier, tmp_path):
    assert run(classifier.path, classifier.photographs, tmp_path / "out") == 0
    with open(tmp_path / "out/predictions.csv") as file:
        rows = by_image(list(csv.DictReader(file)), "image")
    assert len(rows) == 20
    task = classifier.run.task.eval()
    for item in val_items(classifier):
        with torch.inference_mode():
            logits = task.model(prepare(item["images"][None], CPU))[0]
        best, found = logits.softmax(dim=0).topk(5), rows[item["file"].partition("/")[2]]
        assert [row["rank"] for row in found] == list("12345")
        assert [row["class"] for row in found] == [str(label) for label in best.indices.tolist()]
        assert [float(row["probability"]) for row in found] == pytest.approx(best.values.tolist(), rel=1e-5)


def test_a_photograph_alone_has_the_same_result(detector, classifier, tmp_path):
    for saved, file, key in ((detector, "detections.json", "file_name"), (classifier, "predictions.json", "image")):
        one = sorted(saved.photographs.rglob("*.png"))[3]
        (tmp_path / "one" / saved.path.stem).mkdir(parents=True)
        Image.open(one).save(tmp_path / "one" / saved.path.stem / "one.png")
        assert run(saved.path, saved.photographs, tmp_path / "all", *THRESHOLD[saved.path.stem]) == 0
        assert run(saved.path, tmp_path / "one" / saved.path.stem, tmp_path / "alone", *THRESHOLD[saved.path.stem]) == 0
        among, alone = (json.loads((tmp_path / place / file).read_text()) for place in ("all", "alone"))
        place = one.relative_to(saved.photographs).as_posix()
        strip = ({key, "image_id"}, [row for row in among if row[key] == place], alone)
        rows = [[{k: v for k, v in row.items() if k not in strip[0]} for row in part] for part in strip[1:]]
        assert rows[0] == rows[1] != []


THRESHOLD = {"detector": ["--min-score", "0.05"], "classifier": []}


def test_other_weights_of_the_file_can_be_chosen(classifier, tmp_path):
    assert run(classifier.path, classifier.photographs, tmp_path / "model") == 0
    assert run(classifier.path, classifier.photographs, tmp_path / "ema", "--checkpoint-key", "ema") == 0
    model, ema = (json.loads((tmp_path / name / "predictions.json").read_text()) for name in ("model", "ema"))
    assert model != ema, "the averaged head has its first weights"


def test_of_the_classifiers_of_a_probe_the_best_predicts(classifier, digits, tmp_path):
    """The one of the best evaluation; a checkpoint without an evaluation of several classifiers is refused."""
    words = [*"--data-set folder --num-workers 0 --device cpu".split(), *LINEAR.format(trunk=classifier.path).split()]
    assert main.main(runs.folders(words, digits, tmp_path / "probe")) == 0
    checkpoint = torch.load(tmp_path / "probe/best.pth", weights_only=True)
    rates = {name: rate for name, rate in checkpoint["best"]["results"].items() if name.startswith("acc1_")}
    assert len(rates) == 4
    for chosen, name in enumerate(rates):  # whichever is the best
        checkpoint["best"]["results"] |= {each: float(each == name) for each in rates}
        torch.save(checkpoint, tmp_path / "probe.pth")
        args = predict.parse_args(["--checkpoint", str(tmp_path / "probe.pth"), "--images", ".", "--out", "x"])
        task, transform, _ = predict.load_predictor(args, CPU)
        item = predict.item_of(transform(torch.randint(0, 256, (3, 9, 11), dtype=torch.uint8)), CPU)
        with torch.inference_mode():
            expected = task.model(item["images"])[chosen, 0].softmax(dim=0)
            np.testing.assert_allclose(task.predict(item)["probabilities"], expected.numpy(), rtol=1e-5)
    checkpoint["best"] = {}
    torch.save(checkpoint, tmp_path / "probe.pth")
    assert run(tmp_path / "probe.pth", digits / "val", tmp_path / "out") == 2


# ------------------------------------------------------------------------------------------------ the photographs


@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
def test_photographs_of_every_size_and_mode_are_predicted(detector, segmenter, classifier, tmp_path):
    photos = tmp_path / "photos"
    (photos / "below").mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (40, 70, 4), np.uint8)
    for mode in ("1", "L", "LA", "P", "RGBA", "CMYK", "I;16"):
        kind = "tif" if mode in ("CMYK", "I;16") else "png"
        grey = Image.fromarray(pixels[..., 0].astype(np.uint16) * 257)
        image = grey if mode == "I;16" else Image.fromarray(pixels).convert(mode)
        image.save(photos / f"below/{mode.replace(';', '')}.{kind}")
    for width, height in ((1, 1), (2, 90), (300, 4), (1700, 900)):
        Image.new("RGB", (width, height), "green").save(photos / f"{width}.jpg")
    Image.new("RGB", (30, 20)).save(photos / "300.png")  # beside 300.jpg
    for saved, kind in ((detector, "pictures/*.jpg"), (segmenter, "pictures/*.jpg"), (segmenter, "classes/*.png")):
        out = tmp_path / saved.path.stem
        assert run(saved.path, photos, out) == 0
        assert len(list(out.rglob(Path(kind).name))) >= 12
        for path in out.glob(kind):
            with Image.open(path) as image:
                assert image.size[0] >= 1
    assert {path.name for path in (tmp_path / "segmenter/classes").glob("300*")} == {"300_jpg.png", "300_png.png"}
    assert run(classifier.path, photos, tmp_path / "names") == 0
    assert [path.name for path in (tmp_path / "names").glob("*.png")] == ["sheet-1.png"]


def test_photographs_are_turned_upright(segmenter, tmp_path):
    upright = segmentation.pair(3)[0]
    exif = Image.Exif()
    exif[0x0112] = 6  # turn it clockwise
    (tmp_path / "photos").mkdir()
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "photos/turned.png", exif=exif)
    upright.save(tmp_path / "photos/upright.png")
    assert np.array_equal(read_photograph(tmp_path / "photos/turned.png"), np.asarray(upright.convert("RGB")))
    assert run(segmenter.path, tmp_path / "photos", tmp_path / "out") == 0
    turned, straight = (np.asarray(Image.open(tmp_path / f"out/classes/{name}.png")) for name in ("turned", "upright"))
    np.testing.assert_array_equal(turned, straight)


def test_16_bits_of_grey_become_8(tmp_path):
    values = np.array([[0, 256, 32_768, 65_535]], np.uint16)
    Image.fromarray(values).save(tmp_path / "grey.png")
    assert np.asarray(read_photograph(tmp_path / "grey.png"))[0, :, 0].tolist() == [0, 1, 128, 255]


def test_an_unreadable_photograph_is_named_and_skipped(classifier, tmp_path, capsys):
    photos = tmp_path / "photos"
    photos.mkdir()
    Image.new("RGB", (9, 9)).save(photos / "good.png")
    (photos / "bad.jpg").write_bytes(b"\xff\xd8\xff nothing")
    assert run(classifier.path, photos, tmp_path / "out") == 0
    said = capsys.readouterr().out
    assert f"{photos / 'bad.jpg'}: cannot be read" in said
    assert "(photographs: 1; unreadable and skipped: 1)" in said
    assert {row["image"] for row in json.loads((tmp_path / "out/predictions.json").read_text())} == {"good.png"}
    (photos / "good.png").unlink()
    assert run(classifier.path, photos, tmp_path / "none") == 2
    with pytest.raises(UnreadableImage):
        read_photograph(photos / "bad.jpg")


def test_sheets_of_an_earlier_call_are_removed(classifier, digits, tmp_path):
    assert run(classifier.path, digits / "val", tmp_path) == 0
    assert {path.name for path in tmp_path.glob("*.png")} == {"sheet-1.png", "sheet-2.png"}, "16 and 4 images"
    assert run(classifier.path, digits / "val/3", tmp_path) == 0
    assert {path.name for path in tmp_path.glob("*.png")} == {"sheet-1.png"}


# -------------------------------------------------------------------------------------------------------- errors


def test_what_cannot_work_is_one_line(classifier, detector, digits, tmp_path, capsys):
    def said(*words) -> str:
        assert run(*words) == 2
        return capsys.readouterr().err

    assert "--min-score is for detectors" in said(classifier.path, digits / "val", tmp_path, "--min-score", "0.3")
    assert "is in --images" in said(classifier.path, digits, digits / "val/out")
    assert not (digits / "val/out").exists()
    assert "no such folder" in said(classifier.path, tmp_path / "missing", tmp_path / "out")
    assert f"{classifier.path}: the checkpoint has no weights under 'teacher'" in said(
        classifier.path, digits / "val", tmp_path / "out", "--checkpoint-key", "teacher"
    )
    torch.save({"model": classifier.run.task.model.state_dict()}, tmp_path / "foreign.pth")
    assert "not written by main.py" in said(tmp_path / "foreign.pth", digits / "val", tmp_path / "out")


@pytest.mark.parametrize("task", ["dino", "moco"])
def test_self_supervised_checkpoints_say_what_to_do(task, classifier, digits, tmp_path, capsys):
    checkpoint = torch.load(classifier.path, weights_only=True)
    checkpoint["args"] |= {"task": task, "model": "vit_tiny"}
    torch.save(checkpoint, tmp_path / "features.pth")
    assert run(tmp_path / "features.pth", digits / "val", tmp_path / "out") == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    for way in ("--task linear", "--task knn", "analysis.figures"):
        assert way in said


# ------------------------------------------------------------------------------------------------ what is drawn


def test_boxes_lie_where_they_were_found():
    """In the class's colour, inside a dark line, at the picture's scale; the photograph stays as it is elsewhere."""
    grey = Image.new("RGB", (200, 100), (90, 90, 90))
    found = {"boxes": np.array([[10.0, 30, 40, 45]]), "labels": np.array([2]), "scores": np.array([0.9])}
    drawn = np.asarray(pictures.draw_boxes(grey, found, (50, 100), ["a", "b", "c"]))
    changed = np.argwhere((drawn != 90).any(axis=2))
    assert changed[:, 0].max() == 90 + 1
    assert changed[:, 1].min() == 20 - 1
    assert tuple(drawn[90, 50]) == pictures.colour_of(2)
    assert tuple(drawn[70, 20]) == pictures.colour_of(2)
    assert (drawn[66:86, 26:74] == 90).all(), "the inside"
    assert np.asarray(grey).max() == 90, "the photograph itself is not changed"


@pytest.mark.parametrize("box", [[0, 0, 5, 5], [95, 0, 100, 5], [0, 45, 4, 50], [97, 47, 100, 50], [-3, -3, 130, 80]])
def test_labels_lie_inside_the_picture(box):
    taken = []
    for _ in range(3):
        left, top, right, bottom = pictures._place_label((40, 12), box, (100, 50), taken)
        assert left >= 0 <= top
        assert right < 100
        assert bottom < 50
        taken.append((left, top, right, bottom))
    assert len(set(taken)) > 1, "labels avoid each other"


def test_a_label_longer_than_the_picture_is_cut():
    face = pictures.font(14)
    text = pictures.fit_text("a very long name of a class of objects", face, 100)
    assert face.getlength(text) <= 100
    assert text.startswith("a very")
    assert text.endswith("ects")
    assert pictures.fit_text("cat", face, 100) == "cat"
    assert pictures.fit_text("cat", face, 1) == "…"
    assert pictures.fit_text("two\nlines", face, 100) == "two lines"


def test_pixels_have_their_classes_colours_and_void_has_none():
    labels = np.zeros((40, 60), np.int64)
    labels[:, 20:40], labels[:, 40:] = 1, 255
    drawn = np.asarray(pictures.draw_pixels(Image.new("RGB", (60, 40), (100, 100, 100)), labels, ["ground", "red"]))
    assert drawn.shape[0] > 40, "the legend"
    share = pictures.OPACITY
    assert (drawn[:40, :19] == round((1 - share) * 100)).all(), "VOC's first colour is black"
    assert tuple(drawn[5, 30]) == (round((1 - share) * 100 + share * 128), *[round((1 - share) * 100)] * 2)
    assert (drawn[:40, 41:] == 100).all()
    assert (drawn[:40, 19] == 255).all(), "an edge"
    assert pictures.shares_of(labels, 2) == {0: pytest.approx(1 / 3), 1: pytest.approx(1 / 3)}


def test_pictures_are_neither_tiny_nor_huge():
    for size, expected in (
        ((32, 16), (480, 240)),
        ((3200, 800), (1600, 400)),
        ((700, 500), (700, 500)),
        ((1, 1), (480, 480)),
    ):
        assert pictures.resized(Image.new("RGB", size)).size == expected


def test_a_sheet_has_a_place_for_every_cell():
    cells = [pictures.draw_names(Image.new("RGB", (30, 90), "red"), "a", ["b", "c"], [0.75, 0.25]) for _ in range(5)]
    sheet = pictures.draw_sheet(cells)
    width, height = cells[0].size
    assert sheet.size == (4 * (width + 18) + 18, 2 * (height + 18) + 18)
    bars = (np.asarray(cells[0]) != 255).any(axis=2)[-2 * 22 + 1 :: 22]  # of each name, above its letters
    np.testing.assert_allclose(bars.sum(axis=1) / width, [0.75, 0.25], atol=0.01)


# ---------------------------------------------------------------------------------------------------- TensorBoard


def shown(folder: Path) -> dict[str, list]:
    """The images of TensorBoard by their names, each with its step."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"images": 0})
    events.Reload()
    return {name: events.Images(name) for name in events.Tags()["images"]}


def test_tensorboard_shows_boxes_and_the_training_is_the_same(tmp_path, monkeypatch):
    """Of four validation images, true and predicted, at each evaluation; weights equal those of a run without, bit for
    bit."""
    data = detection.write_pictures(tmp_path / "data")
    assert main.main(runs.folders(detection.WORDS, data, tmp_path / "with", "--device", "cpu")) == 0
    panels = shown(tmp_path / "with")
    assert list(panels) == [f"predictions/{number}" for number in (1, 2, 3, 4)]
    for each in panels.values():
        assert [image.step for image in each] == [detection.UPDATES, 2 * detection.UPDATES]
        assert each[0].width <= 2 * pictures.PANEL + 8, "two small pictures side by side"
    monkeypatch.setattr(training, "draw_predictions", lambda run, dataset: [])
    assert main.main(runs.folders(detection.WORDS, data, tmp_path / "without", "--device", "cpu")) == 0
    assert not shown(tmp_path / "without")
    runs.assert_identical(runs.content(tmp_path / "with"), runs.content(tmp_path / "without"))


def test_tensorboard_shows_the_classes_of_pixels(tmp_path):
    data = segmentation.write_pairs(tmp_path / "data")
    more = ["--epochs", "3", "--eval-every", "2", "--device", "cpu"]
    assert main.main(runs.folders(segmentation.WORDS, data, tmp_path / "run", *more)) == 0
    panels = shown(tmp_path / "run")
    assert len(panels) == 4
    for each in panels.values():
        assert [image.step for image in each] == [2 * segmentation.UPDATES, 3 * segmentation.UPDATES], "evaluations"


def test_a_panel_has_the_truth_beside_the_prediction(segmenter):
    item = val_items(segmenter)[0]
    truth = segmenter.run.task.truth(item)["classes"]
    np.testing.assert_array_equal(truth, segmentation.pair(100)[1])
    founds = {"truth": {"classes": truth}, "predicted": {"classes": 0 * truth}}
    swapped = dict(reversed(founds.items()))
    one, other = (np.asarray(pictures.draw_panel(item, each, ["a", "b", "c"])) for each in (founds, swapped))
    half = (one.shape[1] - 8) // 2
    np.testing.assert_array_equal(one[:, :half], other[:, half + 8 :])
    assert (one[:, :half] != one[:, half + 8 :]).any()


def test_a_classifier_gets_no_such_pictures(classifier):
    assert training.draw_predictions(classifier.run, dataset=None) == [], "no image is decoded for it"


def test_many_classes_of_a_large_photograph_are_compared_in_parts(monkeypatch):
    """The same classes as from all logits at once, which would be gigabytes."""
    from tasks import segment

    logits = torch.randn(1, 7, 5, 6, generator=torch.Generator().manual_seed(0))
    whole = segment.predict(lambda image: logits, torch.zeros(1, 3, 5, 6), (5, 6), (23, 31))
    for pixels in (1, 2 * 23 * 31, 3 * 23 * 31 + 5):
        monkeypatch.setattr(segment, "PIXELS", pixels)
        assert torch.equal(segment.predict(lambda image: logits, torch.zeros(1, 3, 5, 6), (5, 6), (23, 31)), whole)
