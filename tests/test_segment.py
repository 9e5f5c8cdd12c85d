"""Segmentation: its loss and mean IoU against mmsegmentation's, its transforms, and whole runs."""

import argparse
import colorsys
import json
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import runs, segmentation
from helpers.checkpoints import make
from helpers.masks import write_voc
from helpers.segmentation import CLASSES, COLOURS, UPDATES, WORDS, write_pairs
from PIL import Image
from torch import nn

import main
from arguments import parse_arguments
from models.fpn import Segmenter, enlarge
from models.pvt import DensePVT
from models.vitdet import ViTDet
from readers import MASKED_SETS
from readers.masks import VOID
from samplers import Draw
from tasks.joint import (
    PADDING,
    JointEvalTransform,
    JointTrainTransform,
    distort_colours,
    fitting_size,
    saturate,
    share_of_one_class,
)
from tasks.options import segment as options
from tasks.segment import (
    MaskedDataset,
    MeanIoU,
    Segmentation,
    confusion_of,
    pixel_loss,
    predict,
    rates_of,
    voc_palette,
    write_prediction,
)
from utils import Processes, UserError

ROOT = Path(__file__).parents[1]
ALONE = Processes(0, 1, torch.device("cpu"))
TIGHT = {"rtol": 0, "atol": 1e-10}

# ------------------------------------------------------------------------------------------------------ the loss


def test_the_loss_is_divided_as_torch_or_as_mmsegmentation_does(golden):
    for case in golden("semantic_fpn.pt")["cases"].values():
        logits = enlarge(case["train_logits_f64"], case["label"].shape[1:])
        assert (case["label"] == VOID).any()
        torch.testing.assert_close(pixel_loss(logits, case["label"], "valid"), case["loss_valid_pixels_f64"], **TIGHT)
        torch.testing.assert_close(pixel_loss(logits, case["label"], "all"), case["loss_all_pixels_f64"], **TIGHT)


@pytest.mark.parametrize("pixels", ["valid", "all"])
def test_a_crop_of_void_alone_has_no_loss_and_no_gradient(pixels):
    logits = torch.randn(2, 3, 4, 4, requires_grad=True)
    loss = pixel_loss(logits, torch.full((2, 4, 4), VOID, dtype=torch.uint8), pixels)
    loss.backward()
    assert loss == 0
    assert not logits.grad.any()


# ----------------------------------------------------------------------------------------------------- mean IoU


def test_mean_iou_is_mmsegmentations(golden):
    """One confusion matrix over images of different sizes, and not a mean over images."""
    for case in golden("miou.pt")["cases"]:
        names, confusion = [str(label) for label in range(case["num_classes"])], 0
        for predicted, label in zip(case["predictions"], case["labels"], strict=True):
            if case["reduce_zero_label"]:
                label = torch.where((label == 0) | (label == VOID), VOID, label - 1).to(torch.uint8)
            confusion = confusion + confusion_of(predicted, label, case["num_classes"])
        assert torch.equal(confusion, case["confusion"].long())
        found = rates_of(confusion, names)
        assert found["miou"] == pytest.approx(100 * case["mIoU"], abs=1e-10)
        assert found["pixel_accuracy"] == pytest.approx(100 * case["aAcc"], abs=1e-10)
        assert found["class_accuracy"] == pytest.approx(100 * case["mAcc"], abs=1e-10)
        iou = {
            f"iou_{name}": 100 * rate for name, rate in zip(names, case["iou"].tolist(), strict=True) if rate == rate
        }
        assert {name: rate for name, rate in found.items() if name.startswith("iou_")} == pytest.approx(iou, abs=1e-10)
        if case["name"] != "all_void_image":
            assert found["miou"] != pytest.approx(100 * case["mIoU_mean_over_images"], abs=1e-3)


def test_without_any_label_the_rates_are_finite():
    found = rates_of(torch.zeros(3, 3, dtype=torch.int64), CLASSES)
    assert found == {"miou": 0, "pixel_accuracy": 0, "class_accuracy": 0, "labelled_pixels": 0}
    assert "no labels" in Segmentation.describe(found | {"images": 2})


class Constant(nn.Module):
    """Logits of one place, which are the image's first channels."""

    def forward(self, images):
        return images[:, :3]


def test_an_image_is_cut_from_its_padding_and_enlarged_before_its_classes_are_chosen():
    image = torch.zeros(1, 3, 8, 8)
    image[:, 1, :4, :6], image[:, 0, 4:], image[:, 0, :, 6:] = 1, 9, 9  # the padding is of another class
    assert (predict(Constant(), image, (4, 6), (11, 17)) == 1).all()
    image[:, 2, :4, :3] = 2
    expected = F.interpolate(image[..., :4, :6], size=(11, 17), mode="bilinear").argmax(dim=1)[0]
    assert torch.equal(predict(Constant(), image, (4, 6), (11, 17)), expected)
    assert expected.unique().tolist() == [1, 2]


def test_the_results_do_not_depend_on_batches():
    generator = torch.Generator().manual_seed(0)
    items = [
        {
            "images": torch.randn(1, 3, 8, 8, generator=generator),
            "masks": torch.randint(0, 3, (height, 9), generator=generator, dtype=torch.uint8),
            "inside": (8, 8),
            "replaced": int(height == 12),
        }
        for height in (5, 9, 12, 7)
    ]
    results = []
    for batches in ([items], [items[:1], items[1:]]):
        evaluator = MeanIoU(CLASSES)
        for batch in batches:
            evaluator.update(Constant(), batch)
        results.append(evaluator.compute(ALONE))
    assert results[0] == results[1]
    assert (results[0]["images"], results[0]["unreadable"], results[0]["labelled_pixels"]) == (3, 1, 9 * 21)


# --------------------------------------------------------------------------------------------------- predictions


def test_predictions_are_indices_with_vocs_palette(tmp_path):
    classes = np.array([[0, 1, 15], [20, 2, 0]])
    write_prediction(classes, tmp_path / "Segmentation/comp6_test_cls/2008_000006.jpg")
    image = Image.open(tmp_path / "Segmentation/comp6_test_cls/2008_000006.png")
    assert image.mode == "P"
    assert np.array_equal(np.array(image), classes)
    colours = {
        0: (0, 0, 0),
        1: (128, 0, 0),
        2: (0, 128, 0),
        15: (192, 128, 128),
        20: (0, 64, 128),
        VOID: (224, 224, 192),
    }
    assert {number: tuple(voc_palette()[number].tolist()) for number in colours} == colours  # as the devkit has them


# --------------------------------------------------------------------------------------------------- transforms


def coloured(mask: torch.Tensor) -> torch.Tensor:
    """An image whose colours tell the classes; that of void is the padding's."""
    table = torch.full((256, 3), 0, dtype=torch.uint8)
    table[: len(COLOURS)] = torch.from_numpy(COLOURS)
    table[VOID] = torch.tensor(PADDING)
    return table[mask.long()].permute(2, 0, 1)


def test_sizes_keep_proportions():
    assert fitting_size(500, 333, 512, 512) == (512, 341)
    assert fitting_size(375, 500, 512, 512, scale=0.5) == (192, 256)
    assert fitting_size(683, 512, 512, 2048) == (683, 512)
    assert fitting_size(512, 4096, 512, 2048) == (256, 2048)
    assert fitting_size(1, 1000, 32, 32) == (1, 32)


@pytest.mark.parametrize("scale", [(0.4, 0.6), (1.0, 1.0), (1.8, 2.0)])
def test_image_and_mask_stay_together_and_the_padding_is_void(scale):
    """Of large areas each pixel's colour tells its class, but at their edges, where colours mix."""
    mask = torch.zeros(60, 80, dtype=torch.uint8)
    mask[10:50, 5:30], mask[5:40, 40:75] = 1, 2
    seen = set()
    for seed in range(8):
        torch.manual_seed(seed)
        item = JointTrainTransform(64, 64, scale, 1.0, 0.5, photometric=False)(coloured(mask), mask)
        images, masks = item["images"], item["masks"]
        assert (images.shape, masks.shape, images.dtype, masks.dtype) == (
            (3, 64, 64),
            (64, 64),
            torch.uint8,
            torch.uint8,
        )
        right = (images.float() - coloured(masks).float()).abs().amax(dim=0) < 30
        assert right.float().mean() > 0.85
        seen.add((masks == VOID).float().mean().item())
        assert set(masks.unique().tolist()) <= {0, 1, 2, VOID}
    assert (max(seen) > 0) == (scale[0] < 1.8)
    assert len(seen) > 1 or scale != (0.4, 0.6), "the size is random"


def test_a_flip_is_of_both():
    mask = torch.zeros(64, 64, dtype=torch.uint8)
    mask[:, :20] = 1
    for hflip, side in ((0.0, 0), (1.0, 63)):
        item = JointTrainTransform(64, 64, (1, 1), 1.0, hflip, photometric=False)(coloured(mask), mask)
        assert item["masks"][0, side] == 1
        assert torch.equal(item["images"], coloured(item["masks"]))


def test_a_crop_of_one_class_is_drawn_again():
    mask = torch.zeros(64, 64, dtype=torch.uint8)
    mask[28:36, 28:36], mask[0, 0] = 1, VOID
    assert share_of_one_class(mask) == pytest.approx(1 - 64 / 4095)
    assert share_of_one_class(torch.full((4, 4), VOID, dtype=torch.uint8)) == 1
    shares = {}
    for most in (1.0, 0.75):
        transform, shares[most] = JointTrainTransform(16, 64, (4, 4), most, 0, photometric=False), []
        for seed in range(24):
            torch.manual_seed(seed)
            shares[most].append(share_of_one_class(transform(coloured(mask), mask)["masks"]))
    assert np.mean(shares[0.75]) < np.mean(shares[1.0])
    assert max(shares[0.75]) == 1, "after ten attempts it is taken as it is"


def test_evaluation_pads_to_the_square_of_training_or_rounds_up():
    image = torch.full((3, 50, 80), 200, dtype=torch.uint8)
    mask = torch.ones(50, 80, dtype=torch.uint8)
    item = JointEvalTransform(64, 64)(image, mask)
    assert (item["images"].shape, item["inside"]) == ((1, 3, 64, 64), (40, 64))
    assert item["masks"] is mask
    assert (item["images"][..., :40, :] == 200).all()
    assert item["images"][0, :, 40:].flatten(1).unique(dim=1).flatten().tolist() == PADDING
    item = JointEvalTransform(64, 256)(image, mask)
    assert (item["images"].shape, item["inside"]) == ((1, 3, 64, 128), (64, 128))  # of 64 x 102


def test_saturation_is_that_of_hsv():
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (3, 6, 7), generator=generator, dtype=torch.uint8)
    for factor in (0.5, 1.4):
        changed = saturate(image, factor)
        for row, column in ((0, 0), (2, 3), (5, 6)):
            hue, saturation, value = colorsys.rgb_to_hsv(*(image[:, row, column] / 255).tolist())
            expected = colorsys.hsv_to_rgb(hue, min(1, saturation * factor), value)
            assert changed[:, row, column].tolist() == pytest.approx([255 * c for c in expected], abs=1)
    assert not saturate(torch.zeros(3, 2, 2, dtype=torch.uint8), 1.5).any(), "black stays black"


def test_colours_are_distorted_and_the_padding_is_not():
    mask = torch.zeros(64, 40, dtype=torch.uint8)
    image = torch.randint(0, 256, (3, 64, 40), dtype=torch.uint8)
    changed = set()
    for seed in range(8):
        torch.manual_seed(seed)
        item = JointTrainTransform(64, 64, (1, 1), 1.0, 0, photometric=True)(image, mask)
        outside = item["masks"] == VOID
        assert outside.sum() == 64 * 24
        assert item["images"][:, outside].unique(dim=1).flatten().tolist() == PADDING
        changed.add(item["images"].float().mean().item())
    assert len(changed) > 4
    means = []
    for seed in range(40):
        torch.manual_seed(seed)
        means.append(distort_colours(torch.full((3, 4, 4), 100, dtype=torch.uint8)).float().mean().item())
    assert min(means) >= (100 - 32) * 0.5 - 2
    assert max(means) <= (100 + 32) * 1.5
    assert np.std(means) > 10


def test_augmentation_depends_on_seed_epoch_and_position_alone(tmp_path):
    args = parse_arguments([*WORDS, "--data-path", str(write_pairs(tmp_path)), "--photometric"])
    dataset = Segmentation.data(args, "train", ALONE)
    first = dataset[Draw(3, 1, 5)]
    dataset[Draw(0, 0, 0)]
    again = dataset[Draw(3, 1, 5)]
    assert torch.equal(first["images"], again["images"])
    assert torch.equal(first["masks"], again["masks"])
    others = [dataset[Draw(3, 2, 5)], dataset[Draw(3, 1, 6)]]
    assert not any(torch.equal(first["images"], other["images"]) for other in others)


# ---------------------------------------------------------------------------------------------------- the model


def segmenters() -> dict[str, Segmenter]:
    torch.manual_seed(0)
    vit = ViTDet(48, 8, 32, embed_dim=24, depth=2, num_heads=3, window_size=2, global_blocks=(1,))
    pvt = DensePVT(img_size=64, embed_dims=(8, 16, 24, 32), num_heads=(1, 2, 3, 4), depths=(1, 1, 1, 1))
    return {"vit": Segmenter(vit, 5), "pvt": Segmenter(pvt, 5, "batch")}


def test_logits_have_the_images_size_and_every_parameter_a_gradient():
    for name, model in segmenters().items():
        logits, similarity = model(torch.randn(2, 3, 50, 70), return_similarity=True)
        assert logits.shape == (2, 5, 50, 70)
        assert similarity.shape == ((2, 3, 7, 9) if name == "vit" else (2, 4, 2, 3))
        logits.square().mean().backward()
        assert not [name for name, parameter in model.named_parameters() if parameter.grad is None]


def test_logits_are_those_of_the_image_padded_to_whole_patches():
    for model in segmenters().values():
        model.eval()
        images, patch = torch.randn(1, 3, 50, 70), model.backbone.reduction
        padded = F.pad(images, (0, -70 % patch, 0, -50 % patch))
        assert torch.equal(model(images), model(padded)[..., :50, :70])
        small = model.head(model.pyramid(model.backbone(padded))[:4]) if patch == 8 else None
        if small is not None:  # each pixel of the finest map is 2 px of patches of 8 px
            torch.testing.assert_close(model(padded), F.interpolate(small, scale_factor=2.0, mode="bilinear"))


# ---------------------------------------------------------------------------------------------------- whole runs


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("segment")
    child = runs.Child(write_pairs(folder / "data"), folder / "text")
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
    assert last["metric"] == "miou"
    assert last["train_loss"] == pytest.approx(last["train_cross_entropy"] + 0.1 * last["train_spatial_entropy"])
    assert last["train_spatial_entropy"] > 0
    rates = [rate for name, rate in last.items() if name.startswith("test_iou_")]
    assert last["test_miou"] == pytest.approx(sum(rates) / len(rates))
    text = run.text()
    assert "lr  0.001, not scaled with the batch; steps, after 3 updates of warm-up" in text
    assert "a micro-batch's loss is a mean over the pixels that are not void" in text
    assert "* mIoU " in text


@pytest.mark.gpu
@pytest.mark.parametrize("options", ["--amp bf16", "--amp fp16", "--amp off", "--amp bf16 --compile"])
def test_a_gpu_trains_and_evaluates(run, options, tmp_path):
    words = runs.folders(WORDS, run.data, tmp_path, *options.split(), "--device", "cuda")
    assert main.main(words) == 0
    assert [line["test_images"] for line in runs.content(tmp_path)["log.txt"]] == [7, 7]


def test_killed_and_stopped_it_goes_on_bit_for_bit(run, whole, tmp_path):
    assert run(tmp_path, before=runs.killed_at_update(UPDATES + 2)) == -signal.SIGKILL
    assert run(tmp_path, before=runs.at_call("tasks.segment", "confusion_of", 3, runs.send(signal.SIGTERM))) == 0
    assert torch.load(tmp_path / "checkpoint.pth", weights_only=True)["step"] == UPDATES
    assert run(tmp_path) == 0
    runs.assert_identical(runs.content(tmp_path), runs.content(whole))


def test_two_processes_evaluate_seven_images_exactly_as_one(run, whole, tmp_path):
    words = ["--eval", "--resume", str(whole / "best.pth")]
    assert run(tmp_path / "two", *words, ranks=2) == 0
    line = run.text().splitlines()[-1]
    best = max(runs.content(whole)["log.txt"], key=lambda line: line["test_miou"])
    assert line == Segmentation.describe({name.removeprefix("test_"): value for name, value in best.items()})


def test_two_processes_train_and_every_parameter_has_a_gradient(run, tmp_path):
    """DistributedDataParallel fails in the second update if one has none."""
    words = ["--batch-size", "1", "--epochs", "1", "--sar-weight", "0"]
    assert run(tmp_path, *words, ranks=2) == 0
    (line,) = runs.content(tmp_path)["log.txt"]
    assert line["test_images"] == 7
    assert "train_spatial_entropy" not in line


def test_a_run_is_evaluated_and_its_predictions_are_written(run, whole, tmp_path, capsys):
    words = ["--eval", "--resume", str(whole / "best.pth"), "--num-workers", "0", "--batch-size", "1"]
    assert main.main([*words, "--write-predictions", str(tmp_path / "out")]) == 0
    best = max(runs.content(whole)["log.txt"], key=lambda line: line["test_miou"])
    line = capsys.readouterr().out.splitlines()[-1]
    assert line == Segmentation.describe({name.removeprefix("test_"): value for name, value in best.items()})
    confusion = 0
    for number in range(100, 107):
        written = Image.open(tmp_path / f"out/{number}.png")
        _, mask = segmentation.pair(number)
        assert (written.mode, written.size) == ("P", mask.shape[::-1])
        confusion = confusion + confusion_of(torch.from_numpy(np.array(written)), torch.from_numpy(mask), 3)
    assert rates_of(confusion, CLASSES)["miou"] == pytest.approx(best["test_miou"])


def test_test_images_without_labels_are_predicted(run, tmp_path, capsys):
    write_voc(tmp_path, kinds=((1,), ()), split="test")
    words = [*WORDS, "--data-set", "voc2012", "--data-path", str(tmp_path)]
    args = parse_arguments(words)
    task = Segmentation(args, MaskedDataset(type("Images", (), {"classes": ["a"] * 21})()), torch.device("cpu"))
    saved = {"model": task.model.state_dict(), "args": vars(args), "data": {}}
    torch.save(saved, tmp_path / "vit.pth")
    words = ["--eval", "--resume", str(tmp_path / "vit.pth"), "--data-set", "voc2012_test"]
    assert main.main([*words, "--write-predictions", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "* no labels to compare with (2 images)"
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a 0.png", "a 1.png"]


def test_a_run_starts_from_a_classifier(run, tmp_path, capsys):
    torch.manual_seed(0)
    model = make("vit_tiny_sar", img_size=16)
    torch.save({"model": model.state_dict()}, tmp_path / "sar.pth")
    words = [*WORDS, "--data-path", str(run.data), "--finetune", str(tmp_path / "sar.pth")]
    args = parse_arguments(words)
    assert (args.last_block, args.sar_query) == ("sar", "mean")
    task = Segmentation(args, Segmentation.data(args, "train", ALONE), torch.device("cpu"))
    assert task.start_from(args.finetune, None)[0].startswith("left out: cls_token")
    assert torch.equal(task.model.backbone.pos_embed, model.pos_embed)
    assert main.main([*words, "--epochs", "1", "--output-dir", str(tmp_path / "out")]) == 0
    assert "sar.pth: relative positions start at 0 (4 tables)" in capsys.readouterr().out


def test_it_learns(run, tmp_path):
    words = (
        "--epochs 8 --lr 2e-3 --layer-decay 1 --drop 0 --drop-path 0 --sar-weight 0 --scale-range 1 1 --hflip 0 "
        "--eval-every 8"
    ).split()
    assert main.main([*WORDS, "--data-path", str(run.data), "--output-dir", str(tmp_path), *words]) == 0
    first, *_, last = [json.loads(line) for line in (tmp_path / "log.txt").read_text().splitlines()]
    assert last["train_cross_entropy"] < 0.5 * first["train_cross_entropy"]
    assert last["test_miou"] > 50


def test_batch_norm_is_an_option_of_the_head(run):
    args = parse_arguments([*WORDS, "--data-path", str(run.data), "--head-norm", "batch"])
    task = Segmentation(args, Segmentation.data(args, "train", ALONE), torch.device("cpu"))
    assert any(isinstance(module, nn.BatchNorm2d) for module in task.modules())
    assert not any(isinstance(module, nn.SyncBatchNorm) for module in task.modules()), "one process has no group"
    assert task.notes()["norm"].startswith("BatchNorm over 2 images")


# ----------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--model swin_tiny", "--model swin_tiny: --task segment knows vit_base, vit_small, vit_tiny, pvt_small"),
        ("--model pvt_small", "--layer-decay 0.7 is for ViTs; give --layer-decay 1 with --model pvt_small"),
        ("--sched constant", "--sched has no effect in --task segment; leave it out"),
        ("--warmup-epochs 3", "--warmup-epochs has no effect"),
        ("--sar-query cls", "--sar-query has no effect"),
        ("--drloc-weight 0.1", "--drloc-weight has no effect"),
        ("--cache-images", "--cache-images has no effect"),
        ("--log-attention 1", "--log-attention has no effect"),
        ("--scale-range 2 1", "--scale-range 2 1: the smaller number comes first"),
        ("--longer-side 100", "--longer-side 100 is less than --input-size 512"),
        ("--write-predictions out", "--write-predictions needs --eval"),
        ("--mixup 0.5", "no option --mixup"),
    ],
)
def test_what_segmentation_cannot_do_is_one_line(words, message):
    with pytest.raises(UserError, match=f"^{message}"):
        parse_arguments(["--task", "segment", "--data-path", "x", *words.split()])


def test_sizes_that_give_no_model_are_one_line(run):
    args = parse_arguments([*WORDS, "--data-path", str(run.data), "--model-kwargs", "embed_dim=25"])
    with pytest.raises(UserError, match=r"--model vit_tiny with \{.*'embed_dim': 25"):
        Segmentation(args, Segmentation.data(args, "train", ALONE), torch.device("cpu"))


# ------------------------------------------------------------------------------------------- recipes and pages

# Written out once more on purpose: the recipes are the only other place.
VOC = {
    "data_set": "voc2012",
    "input_size": 512,
    "patch_size": 16,
    "longer_side": None,
    "scale_range": [0.5, 2.0],
    "hflip": 0.5,
    "most_of_one_class": 1.0,
    "photometric": False,
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
    "head_norm": "group",
    "loss_pixels": "valid",
    "sar_weight": 0.0,
    "sar_query": "mean",
}
ADE20K = VOC | {
    "model": "pvt_small",
    "data_set": "ade20k",
    "patch_size": 4,
    "longer_side": 2048,
    "most_of_one_class": 0.75,
    "photometric": True,
    "batch_size": 4,
    "total_batch": 16,
    "epochs": 63,
    "weight_decay": 1e-4,
    "decay_all": True,
    "lr_schedule": "poly",
    "warmup_updates": 0,
    "layer_decay": 1.0,
    "head_norm": "batch",
    "loss_pixels": "all",
}


@pytest.mark.parametrize(("name", "protocol"), [("segment_voc", VOC), ("segment_ade20k", ADE20K)])
def test_a_recipe_is_its_protocol(name, protocol):
    found = vars(parse_arguments([f"@{ROOT}/recipes/{name}.args", "--data-path", "x"]))
    assert {key: found[key] for key in protocol} == protocol
    assert found["opt_betas"] == [0.9, 0.999]
    text = (ROOT / f"recipes/{name}.args").read_text()
    assert "Source:" in text
    assert f"Total batch {protocol['total_batch']}. Hardware" in text


def test_the_defaults_are_those_of_table_6():
    found = vars(parse_arguments(["--task", "segment", "--data-path", "x"]))
    assert {key: found[key] for key in VOC} == VOC


def test_ade20ks_length_is_the_papers():
    assert abs(63 * (MASKED_SETS["ade20k"].images["train"] // 16) - 80_000) < 1263 / 2


def test_every_data_set_and_option_is_on_the_page():
    page = (ROOT / "docs/dense.md").read_text()
    assert not [name for name in MASKED_SETS if f"`{name}`" not in page]
    parser = argparse.ArgumentParser()
    options.add(parser)
    added = {action.option_strings[0] for action in parser._actions} - {"-h"}
    assert not [name for name in added if f"`{name}" not in page]
