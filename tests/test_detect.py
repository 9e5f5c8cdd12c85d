"""Detection: its transforms, its evaluation, and whole runs."""

import argparse
import json
import signal
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import detection, runs
from helpers.checkpoints import make
from helpers.detection import (
    CLASSES,
    COLOURS,
    UPDATES,
    WORDS,
    write_image,
    write_instances,
    write_list,
    write_pictures,
)
from torch import nn

import build
import main
from arguments import parse_arguments
from readers import BOXED_SETS
from samplers import Draw
from tasks.boxes import BoxEvalTransform, BoxTrainTransform
from tasks.detect import Detection, VOCDetections, inclusive
from tasks.joint import PADDING, JointEvalTransform
from tasks.options import detect as options
from utils import Processes, UserError

ROOT = Path(__file__).parents[1]
ALONE = Processes(0, 1, torch.device("cpu"))


# ------------------------------------------------------------------------------------------------ the transforms


def rectangle(number=3):
    """An image of `helpers.detection`, and its objects with masks."""
    image, objects = detection.picture(number)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    boxes = torch.tensor([[x1 - 1, y1 - 1, x2, y2] for _, x1, y1, x2, y2 in objects]).float().reshape(-1, 4)
    masks = torch.stack([find(pixels, name) for name, *_ in objects]) if objects else torch.zeros(0, *pixels.shape[1:])
    labels = torch.tensor([CLASSES.index(name) for name, *_ in objects], dtype=torch.int64)
    return pixels, {"boxes": boxes, "labels": labels, "masks": masks.bool()}


def find(pixels, name):
    """Where an image has the colour of a class."""
    return (pixels.int() - torch.tensor(COLOURS[name])[:, None, None]).abs().sum(dim=0) < 90


def bounds(mask):
    rows, columns = mask.any(dim=1).nonzero(), mask.any(dim=0).nonzero()
    return torch.stack([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]).float()


@pytest.mark.parametrize(("scale", "hflip"), [(1.0, 0.0), (1.0, 1.0), (0.5, 0.5), (1.7, 0.5)])
def test_image_boxes_and_masks_stay_together(scale, hflip):
    transform, seen = BoxTrainTransform(64, (scale, scale), hflip), 0
    for seed in range(20):
        torch.manual_seed(seed)
        image, objects = transform(*rectangle())
        assert image.shape == (3, 64, 64)
        assert image.dtype == torch.uint8
        assert len(objects["boxes"]) == len(objects["labels"]) == len(objects["masks"])
        for box, label, mask in zip(*(objects[name] for name in ("boxes", "labels", "masks")), strict=True):
            assert box[0] >= 0 and box[1] >= 0 and (box[2:] <= 64).all() and (box[2:] - box[:2] >= 1).all()  # noqa: PT018
            if (box[2:] - box[:2]).min() > 4:
                torch.testing.assert_close(bounds(find(image, CLASSES[label])), box, rtol=0, atol=1.6)
                torch.testing.assert_close(bounds(mask), box, rtol=0, atol=1.6)
                seen += 1
    assert seen > 10


def test_an_object_outside_of_the_crop_is_dropped_and_an_image_without_objects_is_kept():
    transform, numbers = BoxTrainTransform(32, (2.0, 2.0), 0.5), set()
    for seed in range(30):
        torch.manual_seed(seed)
        _, objects = transform(*rectangle())
        numbers.add(len(objects["boxes"]))
        image, objects = transform(*rectangle(5))
        assert image.shape == (3, 32, 32)
        assert objects["boxes"].shape == (0, 4)
        assert objects["labels"].shape == (0,)
    assert min(numbers) == 0
    assert max(numbers) > 0


def test_evaluation_resizes_and_pads_as_training_does_and_segmentation_too():
    image, objects = rectangle()
    item = BoxEvalTransform(64)(image, objects)
    height, width = item["inside"]
    assert item["size"] == tuple(image.shape[1:])
    assert torch.equal(item["images"], JointEvalTransform(64, 64)(image, objects["masks"][0])["images"])
    torch.manual_seed(0)
    trained, _ = BoxTrainTransform(64, (1.0, 1.0), 0.0)(image, objects)
    inside = (trained != torch.tensor(PADDING, dtype=torch.uint8)[:, None, None]).any(dim=0)
    top = int(inside.any(dim=1).nonzero().min())
    assert torch.equal(trained[:, top : top + height, :width], item["images"][0, :, :height, :width])


def test_augmentation_depends_on_seed_epoch_and_position_alone(run):
    images = task_data(run, "train")
    again = task_data(run, "train")
    first = images[Draw(3, 1, 2)]
    for _ in range(2):
        torch.rand(5)
        item = again[Draw(3, 1, 2)]
        assert torch.equal(item["images"], first["images"])
        assert torch.equal(item["objects"]["boxes"], first["objects"]["boxes"])
    for draw in (Draw(3, 2, 2), Draw(3, 1, 3)):
        assert not torch.equal(images[draw]["images"], first["images"])


# ------------------------------------------------------------------------------------------------- evaluation


class Oracle(torch.nn.Module):
    """Detects every object of the given items, in the coordinates of the resized image."""

    def __init__(self, items):
        super().__init__()
        self.answers = [item["objects"] for item in items]
        self.sizes = [(*item["inside"][::-1], *item["size"][::-1]) for item in items]

    def forward(self, image, sizes, with_masks):
        objects, (*inside, width, height) = self.answers.pop(0), self.sizes.pop(0)
        factor = torch.tensor([inside[0] / width, inside[1] / height] * 2)
        scores = torch.linspace(0.9, 0.6, len(objects["boxes"]))
        return [{"boxes": objects["boxes"] * factor, "labels": objects["labels"], "scores": scores}]


def evaluation(run):
    dataset = task_data(run, "val")
    return dataset, [dataset[Draw(index, 0, index)] for index in range(len(dataset))]


def task_data(run, split, *words):
    return Detection.data(parse_arguments([*WORDS, "--data-path", str(run.data), *words]), split, ALONE)


def test_right_boxes_at_the_original_size_have_100_percent(run, tmp_path):
    dataset, items = evaluation(run)
    evaluator = VOCDetections(dataset.classes, str(tmp_path))
    evaluator.update(Oracle(items), items)
    results = evaluator.compute(ALONE)
    assert results["ap50_11point"] == results["ap50_area"] == results["ap50_11point/blue"] == 100
    assert results["ap50_95_11point"] > 95
    assert (results["images"], results["unreadable"], results["classes_without_objects"]) == (7, 0, 0)
    assert "AP50 100.00 (11 points)" in Detection.describe(results)
    assert "blue 100.0" in Detection.describe(results)


def test_an_unreadable_image_is_counted_and_left_out(run, tmp_path):
    dataset, items = evaluation(run)
    items[1]["replaced"] = 1
    evaluator = VOCDetections(dataset.classes, str(tmp_path))
    evaluator.update(Oracle([items[0], *items[2:]]), items)
    results = evaluator.compute(ALONE)
    assert (results["images"], results["unreadable"], results["ap50_11point"]) == (6, 1, 100)


def test_a_missed_difficult_object_costs_nothing(run, tmp_path):
    dataset, items = evaluation(run)
    oracle = Oracle(items)
    oracle.answers[1] = {name: part[:1] for name, part in oracle.answers[1].items()}
    evaluator = VOCDetections(dataset.classes, str(tmp_path))
    items[1]["objects"]["difficult"][1] = True
    evaluator.update(oracle, items)
    assert evaluator.compute(ALONE)["ap50_11point"] == 100


def test_detections_and_objects_are_kept_in_cocos_layout_with_the_classes_names(run, tmp_path):
    dataset, items = evaluation(run)
    evaluator = VOCDetections(dataset.classes, str(tmp_path / "new"))
    evaluator.update(Oracle(items), items)
    evaluator.compute(ALONE)
    detections, truth = (json.loads((tmp_path / f"new/{name}.json").read_text()) for name in ("detections", "objects"))
    assert [image["file_name"] for image in truth["images"]] == [f"{number}.png" for number in range(100, 107)]
    assert truth["categories"] == [{"id": 1, "name": "red"}, {"id": 2, "name": "blue"}]
    assert len(detections) == len(truth["annotations"]) == 10
    for found, annotation in zip(detections, truth["annotations"], strict=True):
        number = int(truth["images"][found["image_id"]]["file_name"].removesuffix(".png"))
        boxes = {name: box for name, *box in detection.picture(number)[1]}
        x1, y1, x2, y2 = boxes[found["category"]]
        assert found["bbox"] == pytest.approx([x1 - 1, y1 - 1, x2 - x1 + 1, y2 - y1 + 1], abs=2e-3)
        assert annotation["bbox"] == [x1 - 1, y1 - 1, x2 - x1 + 1, y2 - y1 + 1]
        assert (annotation["image_id"], annotation["category_id"]) == (found["image_id"], found["category_id"])
        assert (annotation["iscrowd"], annotation["difficult"]) == (0, 0)


def test_vocs_coordinates_come_back():
    boxes = np.array([[0.0, 0.0, 40.0, 30.0]], np.float32)
    assert inclusive({"boxes": boxes})["boxes"].tolist() == [[1, 1, 40, 30]]


# -------------------------------------------------------------------------------------------------- whole runs


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("detect")
    child = runs.Child(write_pictures(folder / "data"), folder / "text")
    child.words = WORDS
    return child


@pytest.fixture(scope="module")
def whole(run, tmp_path_factory):
    output = tmp_path_factory.mktemp("whole")
    assert run(output) == 0
    return output


def test_a_run_is_logged_with_its_terms_and_its_rates(run, whole):
    lines = runs.content(whole)["log.txt"]
    assert [line["test_images"] for line in lines] == [7, 7]
    last = lines[-1]
    assert last["metric"] == "ap50_11point"
    terms = ("proposal_score", "proposal_box", "region_class", "region_box")
    total = sum(last[f"train_{name}"] for name in terms) + 0.1 * last["train_spatial_entropy"]
    assert last["train_loss"] == pytest.approx(total)
    assert last["train_spatial_entropy"] > 0
    rates = [last[f"test_ap50_11point/{name}"] for name in CLASSES]
    assert last["test_ap50_11point"] == pytest.approx(sum(rates) / 2)
    text = run.text()
    assert "boxes; masks are not learned (--masks)" in text
    assert "0.001, not scaled with the batch; steps, after 3 updates of warm-up" in text


@pytest.mark.gpu
@pytest.mark.parametrize("options", ["--amp bf16", "--amp fp16", "--amp off", "--amp bf16 --compile"])
def test_a_gpu_trains_and_evaluates(run, options, tmp_path):
    words = runs.folders(WORDS, run.data, tmp_path, *options.split(), "--device", "cuda")
    assert main.main(words) == 0
    assert [line["test_images"] for line in runs.content(tmp_path)["log.txt"]] == [7, 7]


def test_killed_and_stopped_it_goes_on_bit_for_bit(run, whole, tmp_path):
    assert run(tmp_path, before=runs.killed_at_update(UPDATES + 2)) == -signal.SIGKILL
    assert run(tmp_path, before=runs.at_call("tasks.detect", "detect", 3, runs.send(signal.SIGTERM))) == 0
    assert run(tmp_path) == 0
    runs.assert_identical(runs.content(tmp_path), runs.content(whole))


def test_two_processes_evaluate_seven_images_exactly_as_one(run, whole, tmp_path):
    words = ["--eval", "--resume", str(whole / "checkpoint.pth")]
    assert run(tmp_path / "two", *words, ranks=2) == 0
    line = run.text().splitlines()[-1]
    last = runs.content(whole)["log.txt"][-1]
    assert line == Detection.describe({name.removeprefix("test_"): value for name, value in last.items()})
    for name in ("detections.json", "objects.json"):
        assert (tmp_path / "two" / name).read_bytes() == (whole / name).read_bytes()


def test_two_processes_train_and_every_parameter_has_a_gradient(run, tmp_path):
    """DistributedDataParallel fails in the second update if one has none; some images have no objects."""
    words = ["--batch-size", "1", "--epochs", "1", "--sar-weight", "0"]
    assert run(tmp_path, *words, ranks=2) == 0
    (line,) = runs.content(tmp_path)["log.txt"]
    assert line["test_images"] == 7
    assert "train_spatial_entropy" not in line


def build_task(run, *words):
    args = parse_arguments([*WORDS, "--data-path", str(run.data), *words])
    return Detection(args, Detection.data(args, "train", ALONE), torch.device("cpu"))


def test_a_run_starts_from_a_classifier(run, tmp_path):
    torch.manual_seed(0)
    model = make("vit_tiny_sar", patch_size=16)
    torch.save({"model": model.state_dict()}, tmp_path / "sar.pth")
    task = build_task(run, "--finetune", str(tmp_path / "sar.pth"))
    assert task.model.backbone.last_block == "sar"
    assert task.start_from(str(tmp_path / "sar.pth"), None)[0].startswith("left out: cls_token")
    assert torch.equal(task.model.backbone.pos_embed, model.pos_embed)


def test_a_run_starts_from_the_backbone_of_a_detector(run, whole):
    task = build_task(run, "--finetune", str(whole / "checkpoint.pth"))
    first, *_ = task.start_from(str(whole / "checkpoint.pth"), None)
    assert first == "left out: pyramid, rpn, roi_heads, which are new here"
    saved = torch.load(whole / "checkpoint.pth", weights_only=True)["model"]
    for name, value in task.model.state_dict().items():
        same = torch.equal(value, saved[name])
        assert same or not name.startswith("backbone.")
    assert not torch.equal(task.model.rpn.head.bbox_pred.weight, saved["rpn.head.bbox_pred.weight"])


def test_the_backbone_alone_is_compiled(run, monkeypatch):
    compiled = []
    monkeypatch.setattr(nn.Module, "compile", lambda module: compiled.append(module))
    task = build_task(run, "--compile")
    assert build.wrap(task, None, ALONE, compiled=True) is task
    assert compiled == [task.model.backbone]
    monkeypatch.undo()
    backbone, images = task.model.backbone.eval(), torch.randn(2, 3, 64, 64)
    in_one_graph = torch.compile(backbone, fullgraph=True, backend="eager")
    torch.testing.assert_close(in_one_graph(images, True), backbone(images, True))


def test_layer_decay_is_vitdets(run, golden):
    official = golden("layer_decay.pt")["models"][0]["lr_scale"]
    task = Detection(
        parse_arguments(["--task", "detect", "--data-path", "x", "--masks"]),
        type("Classes", (), {"classes": ["a"] * 20})(),
        torch.device("meta"),
    )
    names = {id(parameter): name.removeprefix("model.") for name, parameter in task.named_parameters()}
    groups = task.parameter_groups(parse_arguments(["--task", "detect", "--data-path", "x", "--masks"]))
    scales = {names[id(each)]: group["lr_scale"] for group in groups for each in group["params"]}
    assert len(scales) == len(official) == len(names)
    for name, scale in official.items():
        if name.startswith("backbone.net."):
            assert scales.pop(name.replace(".net", "")) == pytest.approx(scale, rel=1e-12)
    assert set(scales.values()) == {1.0}


def test_it_learns_boxes(run, tmp_path):
    words = (
        "--epochs 30 --lr 2e-3 --layer-decay 1 --drop 0 --drop-path 0 --sar-weight 0 --scale-range 1 1 --hflip 0 "
        "--eval-every 30 --save-every 30 --print-every 1000 --batch-size 10 --total-batch 10"
    ).split()
    assert main.main([*WORDS, "--data-path", str(run.data), "--output-dir", str(tmp_path), *words]) == 0
    first, *_, last = [json.loads(line) for line in (tmp_path / "log.txt").read_text().splitlines()]
    assert last["train_loss"] < 0.6 * first["train_loss"]


# ------------------------------------------------------------------------------------------------------ masks


def test_masks_are_read_and_learned_where_they_are_known(tmp_path):
    for name in ("a", "b"):
        write_image(tmp_path, 2007, name, [("cat", 5, 4, 20, 18)])
    write_list(tmp_path, 2007, "trainval", "a", "b")
    pixels = np.zeros((30, 40), np.uint8)
    pixels[3:18, 4:20] = 1
    write_instances(tmp_path / "VOC2007/SegmentationObject/a.png", pixels)
    words = [*WORDS, "--data-set", "voc2007", "--data-path", str(tmp_path), "--masks", "--scale-range", "1", "1"]
    args = parse_arguments(words)
    dataset = Detection.data(args, "train", ALONE)
    task = Detection(args, dataset, torch.device("cpu"))
    batch = dataset.collate([dataset[Draw(index, 0, index)] for index in range(2)])
    assert ["masks" in objects for objects in batch["objects"]] == [True, False]
    (mask,), (box,) = (batch["objects"][0][name] for name in ("masks", "boxes"))
    torch.testing.assert_close(bounds(mask), box, rtol=0, atol=1.6)
    batch["images"] = batch["images"].float() / 255
    terms = task.losses(task(batch), batch)
    assert terms["region_mask"] > 0
    terms["region_mask"].backward()
    assert task.model.roi_heads.mask_head[0][0].weight.grad.abs().sum() > 0


def test_masks_are_predicted_on_request_in_their_boxes(run):
    args = parse_arguments([*WORDS, "--data-set", "voc2007", "--data-path", str(run.data), "--masks"])
    task = Detection(args, SimpleNamespace(classes=CLASSES), torch.device("cpu"))
    item = BoxEvalTransform(64)(torch.zeros(3, 48, 60, dtype=torch.uint8))
    item["images"] = torch.rand(1, 3, 64, 64)
    task.model.roi_heads.score_thresh = 0.0
    with torch.no_grad():
        found = task.eval().predict(item)
        assert "masks" not in task.model(item["images"])[0]
    assert found["masks"].shape == (len(found["boxes"]), 48, 60)
    assert found["masks"].dtype == bool
    for mask, box in zip(found["masks"], found["boxes"], strict=True):
        rows, columns = np.nonzero(mask)
        if len(rows):
            assert columns.min() >= box[0] - 2
            assert rows.max() <= box[3] + 2


# ----------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--model swin_tiny", "--model swin_tiny: --task detect knows vit_base, vit_small, vit_tiny"),
        ("--model pvt_small --layer-decay 1", "--model pvt_small: --task detect has ViTDet's pyramid"),
        ("--sched constant", "--sched has no effect in --task detect; leave it out"),
        ("--scale-range 2 1", "--scale-range 2 1: the smaller number comes first"),
        ("--head-kwargs width=3", "--head-kwargs width: no such size; known are channels,"),
        ("--head-kwargs regions=many", "--head-kwargs regions=many: it must be a whole number"),
        ("--data-set folder --masks", "--masks: --data-set folder has boxes alone"),
        ("--patch-size 2", "--patch-size 2: --task detect needs a multiple of 4"),
    ],
)
def test_what_detection_cannot_do_is_one_line(words, message):
    with pytest.raises(UserError, match=f"^{message}"):
        parse_arguments(["--task", "detect", "--data-path", "x", *words.split()])


# ------------------------------------------------------------------------------------------- recipe and page

# Written out once more on purpose: the recipe is the only other place.
VOC = {
    "data_set": "voc0712",
    "input_size": 512,
    "patch_size": 16,
    "scale_range": [0.1, 2.0],
    "hflip": 0.5,
    "masks": False,
    "head_kwargs": {},
    "batch_size": 2,
    "total_batch": 8,
    "epochs": 25,
    "opt": "adamw",
    "opt_eps": 1e-8,
    "weight_decay": 0.1,
    "decay_all": False,
    "clip_grad": None,
    "lr": 1e-4,
    "lr_schedule": "steps",
    "warmup_updates": 250,
    "layer_decay": 0.7,
    "drop": 0.0,
    "drop_path": 0.1,
    "sar_weight": 0.0,
}


@pytest.mark.parametrize("words", [[f"@{ROOT}/recipes/detect_voc.args"], ["--task", "detect"]])
def test_recipe_and_defaults_are_table_5s_protocol(words):
    found = vars(parse_arguments([*words, "--data-path", "x"]))
    assert {key: found[key] for key in VOC} == VOC


def test_every_data_set_and_option_is_on_the_page():
    page = (ROOT / "docs/dense.md").read_text()
    assert not [name for name in BOXED_SETS if f"`{name}`" not in page]
    parser = argparse.ArgumentParser()
    options.add(parser)
    added = {action.option_strings[0] for action in parser._actions} - {"-h"}
    assert not [name for name in added if f"`{name}" not in page]
