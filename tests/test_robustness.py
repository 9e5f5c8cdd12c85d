"""Robustness: what counts as ImageNet-A and mCE, what does not, the files, and going on after a kill."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from helpers.checkpoints import OWN_SIDE as SIDE
from helpers.checkpoints import write_checkpoint
from helpers.image_sets import truncate
from PIL import Image
from sklearn.datasets import load_digits
from timm.data import ImageNetInfo

import models_sar  # noqa: F401 - registers the models
from analysis import robustness
from analysis.attention import measure_maps, similarity_maps
from analysis.models import load_model
from analysis.robustness import CORRUPTIONS, IMAGES, MCE_CORRUPTIONS, SEVERITIES, list_classes
from augmentation import as_tensor, eval_transform, normalise


def write_images(folder: Path, classes: list[str], per_class: int = 2, side: int = SIDE) -> None:
    """So many scanned digits in a folder for each class."""
    images = iter(load_digits().images)
    for name in classes:
        (folder / name).mkdir(parents=True)
        for number in range(per_class):
            image = Image.fromarray((next(images) * 255 / 16).astype(np.uint8)).resize((side, side))
            image.save(folder / name / f"{number}.png")


def run(data_set: str, checkpoint: Path, data: Path, out: Path, *more: str) -> int:
    words = ["--data-set", data_set, "--checkpoint", checkpoint, "--data-path", data, "--out", out]
    return robustness.main([str(word) for word in [*words, "--num-workers", "0", "--device", "cpu", *more]])


def results(out: Path) -> dict:
    return json.loads((out / "results.json").read_text())


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    """A model of ten classes."""
    return write_checkpoint(tmp_path / "model.pth", [str(digit) for digit in range(10)])


@pytest.fixture
def corrupted(tmp_path) -> Path:
    """Two corruptions at two severities, one extra."""
    for place in ("snow/1", "snow/4", "fog/1", "fog/2", "spatter/1"):
        write_images(tmp_path / "c" / place, ["0", "3", "7"])
    return tmp_path / "c"


# -------------------------------------------------------------------------------------------------- the facts


def test_the_sets():
    assert len(list_classes("imagenet-a")) == len(set(list_classes("imagenet-a"))) == 200
    assert len(list_classes("imagenet-c")) == 1000
    assert set(list_classes("imagenet-a")) < set(list_classes("imagenet-c"))
    for data_set in IMAGES:
        assert list_classes(data_set) == sorted(list_classes(data_set))
    assert (len(CORRUPTIONS), len(MCE_CORRUPTIONS), SEVERITIES) == (19, 15, [1, 2, 3, 4, 5])
    groups = [corruption["group"] for corruption in CORRUPTIONS.values()]
    assert [groups.count(name) for name in ("noise", "blur", "weather", "digital", "extra")] == [3, 4, 4, 4, 4]
    assert {name for name in CORRUPTIONS if CORRUPTIONS[name]["group"] == "extra"} == set(CORRUPTIONS) - set(
        MCE_CORRUPTIONS
    )


# --------------------------------------------------------------------------------- CE, mCE, and what is neither


def record(corruption: str, severity: int, error: float, **changes) -> dict:
    counts = {"classes": 1000, "missing_classes": 0, "images": 50_000}
    return {"corruption": corruption, "severity": severity, "error": error} | counts | changes


def whole_set(error=lambda name, severity: 50.0) -> list[dict]:
    return [record(name, severity, error(name, severity)) for name in MCE_CORRUPTIONS for severity in SEVERITIES]


def test_ce_by_hand():
    """Gaussian noise: (80 + 85 + 90 + 95 + 100) / (5 x 88.6428) = 450 / 443.214."""
    errors = robustness.corruption_errors(record("gaussian_noise", s, 75 + 5 * s) for s in SEVERITIES)
    assert errors == {"gaussian_noise": {"error": 90, "ce": pytest.approx(101.5311, abs=1e-4)}}


def test_mce_by_hand():
    """AlexNet's own mCE is 100; half its errors on five corruptions and all on ten is (5 x 50 + 10 x 100) / 15."""
    assert robustness.compute_score("imagenet-c", whole_set(alexnet)) == {"mce": pytest.approx(100)}
    mixed = whole_set(lambda name, severity: alexnet(name, severity) / (2 if name in MCE_CORRUPTIONS[:5] else 1))
    assert robustness.compute_score("imagenet-c", mixed) == {"mce": pytest.approx(83.3333, abs=1e-4)}


def alexnet(name: str, severity: int) -> float:
    """Errors whose mean over the severities is AlexNet's."""
    return 100 * CORRUPTIONS[name]["alexnet_error"] + (severity - 3)


def test_extra_corruptions_do_not_count():
    extra = [record("spatter", severity, 0.0) for severity in SEVERITIES]
    assert robustness.compute_score("imagenet-c", whole_set(alexnet) + extra) == {"mce": pytest.approx(100)}
    assert robustness.corruption_errors(extra) == {"spatter": {"error": 0, "ce": None}}
    assert robustness.compute_score("imagenet-c", extra) == {
        "instead": "no mean error: none of the 15 corruptions of mCE"
    }


@pytest.mark.parametrize(
    ("drop", "changes", "covered"),
    [
        (1, {}, "15 of 15 corruptions, 74 of 75 severities, 1,000 classes and 3,700,000 images"),
        (5, {}, "14 of 15 corruptions, 70 of 75 severities, 1,000 classes and 3,500,000 images"),
        (0, {"images": 49_999}, "15 of 15 corruptions, 75 of 75 severities, 1,000 classes and 3,749,999 images"),
        (0, {"classes": 999, "missing_classes": 1}, "15 of 15 corruptions, 75 of 75 severities, 1,000 classes and"),
        (0, {"missing_classes": 1}, "15 of 15 corruptions, 75 of 75 severities, 1,000 classes and 3,750,000 images"),
    ],
)
def test_less_than_all_is_no_mce(drop, changes, covered):
    records = whole_set()[drop:]
    records[-1] |= changes
    ((name, words),) = robustness.compute_score("imagenet-c", records).items()
    assert name == "instead"
    assert words.startswith(f"mean error 50.00 % over {covered}")
    last = robustness.corruption_errors(records)[MCE_CORRUPTIONS[-1]]
    assert (last["ce"] is None) == bool(changes)


@pytest.mark.parametrize("changes", [{"images": 7_499}, {"classes": 199}, {"missing_classes": 1}, {"classes": 1000}])
def test_less_than_all_is_not_imagenet_a(changes):
    whole = {"corruption": "", "severity": 0, "error": 77.61, "classes": 200, "missing_classes": 0, "images": 7_500}
    assert robustness.compute_score("imagenet-a", [whole]) == {"imagenet_a_accuracy": pytest.approx(22.39)}
    ((name, words),) = robustness.compute_score("imagenet-a", [whole | changes]).items()
    assert name == "instead"
    assert words.startswith("accuracy 22.39 % over ")


# -------------------------------------------------------------------------------------- measured image by image


def slowly(checkpoint: Path, folder: Path, transform, columns: list[int], names: list[str]) -> float:
    """Errors (percent) of one image after the other, among the logits ``columns``, which are the classes ``names``."""
    model, wrong = load_model(checkpoint).model, []
    for path in sorted(folder.glob("*/*.png")):
        with torch.inference_mode():
            logits = model(normalise(transform(as_tensor(Image.open(path).convert("RGB"))))[None])[0]
        wrong.append(names[logits[columns].argmax()] != path.parent.name)
    return 100 * float(np.mean(wrong))


def test_imagenet_a_is_measured_over_its_classes_alone(tmp_path):
    classes = list_classes("imagenet-c")[:40]
    checkpoint = write_checkpoint(tmp_path / "model.pth", classes)
    names = [name for name in classes if name in list_classes("imagenet-a")]
    write_images(tmp_path / "a", names, per_class=8, side=13)
    assert run("imagenet-a", checkpoint, tmp_path / "a", tmp_path / "out", "--batch-size", "7") == 0
    (measured,) = results(tmp_path / "out")["records"]
    columns = [classes.index(name) for name in names]
    among = slowly(checkpoint, tmp_path / "a", eval_transform(SIDE), columns, names)
    assert measured["error"] == pytest.approx(among)
    over_all = slowly(checkpoint, tmp_path / "a", eval_transform(SIDE), list(range(40)), classes)
    assert among < over_all, "or nothing is told"
    assert (measured["classes"], measured["missing_classes"]) == (len(names), 200 - len(names))


def test_imagenet_c_is_measured_over_all_classes_and_not_resized(checkpoint, corrupted, tmp_path):
    assert run("imagenet-c", checkpoint, corrupted, tmp_path / "out") == 0
    classes = [str(digit) for digit in range(10)]
    for measured in results(tmp_path / "out")["records"]:
        folder = corrupted / measured["corruption"] / str(measured["severity"])
        assert measured["error"] == pytest.approx(
            slowly(checkpoint, folder, eval_transform(8, 1.0), list(range(10)), classes)
        )


def test_a_head_of_another_program_has_the_wnids_in_order(tmp_path):
    model = timm.create_model(
        "vit_small", img_size=8, patch_size=2, embed_dim=24, depth=2, num_heads=3, num_classes=1000
    )
    with torch.no_grad():
        model.head.weight.normal_(std=1.0)
    torch.save({"model": model.state_dict()}, tmp_path / "other.pth")
    wnids = ImageNetInfo("imagenet-1k").label_names()
    write_images(tmp_path / "c/snow/1", wnids[500:503])
    image = Image.open(tmp_path / "c/snow/1" / wnids[501] / "0.png").convert("RGB")
    with torch.no_grad():  # it takes the first image of class 501 for what it is
        images = normalise(eval_transform(8)(as_tensor(image)))[None]
        features = model.forward_head(model.eval().forward_features(images), pre_logits=True)
        model.head.weight[501] = 100 * features[0]
    torch.save({"model": model.state_dict()}, tmp_path / "other.pth")
    assert run("imagenet-c", tmp_path / "other.pth", tmp_path / "c", tmp_path / "out", "--num-heads", "3") == 0
    (measured,) = results(tmp_path / "out")["records"]
    assert measured["error"] < 100


def test_how_blob_like_the_maps_are(checkpoint, corrupted, tmp_path):
    assert run("imagenet-c", checkpoint, corrupted, tmp_path / "out", "--batch-size", "4") == 0
    model = load_model(checkpoint).model
    for measured in results(tmp_path / "out")["records"]:
        files = (corrupted / measured["corruption"] / str(measured["severity"])).glob("*/*.png")
        transform = eval_transform(8, 1.0)
        maps = [
            measure_maps(similarity_maps(model, normalise(transform(as_tensor(Image.open(path).convert("RGB"))))[None]))
            for path in files
        ]
        for name, key in (("spatial_entropy", "entropy"), ("components", "components")):
            mean = torch.cat([one[key] for one in maps]).double().mean().item()
            assert measured[name] == pytest.approx(mean, rel=1e-5)
            assert mean > 0


# ---------------------------------------------------------------------------------------------- what it leaves


def test_what_is_left(checkpoint, corrupted, tmp_path, capsys):
    assert run("imagenet-c", checkpoint, corrupted, tmp_path / "out") == 0
    found, text = results(tmp_path / "out"), (tmp_path / "out/results.md").read_text()
    assert "mce" not in found
    assert found["instead"].endswith(
        "over 2 of 15 corruptions, 4 of 75 severities, 3 classes and 24 images (ImageNet-C: 1,000 and 200,000)"
    )
    assert f"This is not mCE: {found['instead']}." in text
    assert capsys.readouterr().out.endswith(text + "\n")
    with open(tmp_path / "out/results.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["corruption"], row["severity"], row["images"]) for row in rows] == [
        *(("snow", "1", "6"), ("snow", "4", "6"), ("fog", "1", "6"), ("fog", "2", "6"), ("spatter", "1", "6"))
    ]
    errors = {(row["corruption"], int(row["severity"])): float(row["error"]) for row in rows}
    mean = (errors["snow", 1] + errors["snow", 4]) / 2
    assert f"| snow | {errors['snow', 1]:.2f} | – | – | {errors['snow', 4]:.2f} | – | {mean:.2f} | – |" in text
    assert "| spatter (not in mCE) |" in text
    assert found["environment"]["torch"] == torch.__version__


def test_whole_sets_have_their_names(checkpoint, tmp_path, monkeypatch, capsys):
    """Sets of three classes, as if they had no more."""
    names = ["1", "4", "8"]
    monkeypatch.setattr(robustness, "list_classes", lambda data_set: names)
    monkeypatch.setattr(robustness, "IMAGES", {"imagenet-a": 6, "imagenet-c": 3})
    write_images(tmp_path / "a", names)
    assert run("imagenet-a", checkpoint, tmp_path / "a", tmp_path / "out_a") == 0
    found = results(tmp_path / "out_a")
    assert f"Top-1 accuracy over 200 classes: {found['imagenet_a_accuracy']:.2f} %." in capsys.readouterr().out
    write_images(tmp_path / "first", names, per_class=1)
    for name in MCE_CORRUPTIONS:
        for severity in SEVERITIES:
            shutil.copytree(tmp_path / "first", tmp_path / "c" / CORRUPTIONS[name]["group"] / name / str(severity))
    assert run("imagenet-c", checkpoint, tmp_path / "c", tmp_path / "out_c") == 0
    found, text = results(tmp_path / "out_c"), (tmp_path / "out_c/results.md").read_text()
    inverse = np.mean([1 / CORRUPTIONS[name]["alexnet_error"] for name in MCE_CORRUPTIONS])
    assert found["mce"] == pytest.approx(found["records"][0]["error"] * inverse), "all corruptions are the same images"
    assert found["gaps"] == []
    assert f"\nmCE (lower is better): {found['mce']:.2f} %.\n" in text


def test_grouped_corruptions_are_the_same(checkpoint, corrupted, tmp_path):
    for name in ("snow", "fog", "spatter"):
        place = tmp_path / "grouped" / CORRUPTIONS[name]["group"]
        place.mkdir(parents=True, exist_ok=True)
        shutil.copytree(corrupted / name, place / name)
    for data, out in ((corrupted, "out"), (tmp_path / "grouped", "out_grouped")):
        assert run("imagenet-c", checkpoint, data, tmp_path / out) == 0
    assert results(tmp_path / "out")["records"] == results(tmp_path / "out_grouped")["records"]


def test_what_is_missing_is_said_first(checkpoint, corrupted, tmp_path, capsys, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(robustness, "evaluate", stop)
    write_images(corrupted / "fog/5", ["0", "3", "n01440764", "11"])
    assert run("imagenet-c", checkpoint, corrupted, tmp_path / "out") == 130
    all_but_first = "n01443537, n01484850, n01491361, n01494475, n01496331"
    assert capsys.readouterr().out.splitlines() == [
        "imagenet-c: no folders for the corruptions gaussian_noise, shot_noise, impulse_noise, defocus_blur, "
        "glass_blur and 8 more",
        "imagenet-c: snow: no folders for the severities 2, 3, 5",
        "imagenet-c: fog: no folders for the severities 3, 4",
        "imagenet-c: spatter: no folders for the severities 2, 3, 4, 5",
        "imagenet-c: no folders for 1,000 classes: n01440764, n01443537, n01484850, n01491361, n01494475 and 995 more "
        "(in snow, severity 1, snow, severity 4, fog, severity 1, fog, severity 2, spatter, severity 1)",
        f"imagenet-c: no folders for 999 classes: {all_but_first} and 994 more (in fog, severity 5)",
        "imagenet-c: ignored, as they are not classes of the model, 2 classes: 11, n01440764 (in fog, severity 5)",
        "imagenet-c: measured, but not part of the set, 3 classes: 0, 3, 7 "
        "(in snow, severity 1, snow, severity 4, fog, severity 1, fog, severity 2, spatter, severity 1)",
        "imagenet-c: measured, but not part of the set, 2 classes: 0, 3 (in fog, severity 5)",
    ]


# -------------------------------------------------------------------------------------------------- going on


def interrupted_after(number: int, evaluate):
    calls = []

    def wrapped(*args):
        if len(calls) == number:
            raise KeyboardInterrupt
        calls.append(args)
        return evaluate(*args)

    return wrapped


def test_an_interrupted_command_goes_on(checkpoint, corrupted, tmp_path, capsys, monkeypatch):
    assert run("imagenet-c", checkpoint, corrupted, tmp_path / "whole") == 0
    with monkeypatch.context() as patch:
        patch.setattr(robustness, "evaluate", interrupted_after(2, robustness.evaluate))
        assert run("imagenet-c", checkpoint, corrupted, tmp_path / "out") == 130
    assert not (tmp_path / "out/results.json").exists()
    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(robustness, "evaluate", interrupted_after(3, robustness.evaluate))
        assert run("imagenet-c", checkpoint, corrupted, tmp_path / "out") == 0
    assert capsys.readouterr().out.count(", already measured\n") == 2
    assert results(tmp_path / "out")["records"] == results(tmp_path / "whole")["records"]


def test_what_goes_on_leaves_what_one_go_does(checkpoint, corrupted, tmp_path, monkeypatch):
    assert run("imagenet-c", checkpoint, corrupted, tmp_path / "whole") == 0
    with monkeypatch.context() as patch:
        patch.setattr(robustness, "evaluate", interrupted_after(2, robustness.evaluate))
        assert run("imagenet-c", checkpoint, corrupted, tmp_path / "out") == 130
    assert run("imagenet-c", checkpoint, corrupted, tmp_path / "out") == 0
    for name in ("results.csv", "results.md", "results.json"):
        assert (tmp_path / "out" / name).read_text() == (tmp_path / "whole" / name).read_text()


def test_killed_again_before_where_it_was_nothing_is_lost(checkpoint, corrupted, tmp_path, capsys, monkeypatch):
    assert run("imagenet-c", checkpoint, corrupted, tmp_path / "out") == 0
    with monkeypatch.context() as patch:
        patch.setattr(robustness, "read_part", interrupted_after(1, robustness.read_part))
        assert run("imagenet-c", checkpoint, corrupted, tmp_path / "out") == 130
    capsys.readouterr()
    assert run("imagenet-c", checkpoint, corrupted, tmp_path / "out") == 0
    assert capsys.readouterr().out.count(", already measured\n") == 5


def test_changed_files_are_measured_again(checkpoint, corrupted, tmp_path, capsys):
    assert run("imagenet-c", checkpoint, corrupted, tmp_path / "out") == 0
    write_images(corrupted / "fog/2", ["5"])
    capsys.readouterr()
    assert run("imagenet-c", checkpoint, corrupted, tmp_path / "out") == 0
    assert capsys.readouterr().out.count(", already measured\n") == 4
    assert [record["images"] for record in results(tmp_path / "out")["records"]] == [6, 6, 6, 8, 6]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: write_checkpoint(folder / "model.pth", [str(digit) for digit in range(10)], seed=1), "sha256"),
        (
            lambda folder: shutil.copytree(folder / "c", folder / "moved") and ["--data-path", folder / "moved"],
            "data_path",
        ),
        (lambda folder: ["--skip-unreadable"], "skip_unreadable False there, True now"),
        (lambda folder: (folder / "out/progress.json").write_text("{"), "progress.json cannot be read; remove it"),
    ],
)
def test_results_of_something_else_are_never_mixed(change, message, checkpoint, corrupted, tmp_path, capsys):
    assert run("imagenet-c", checkpoint, corrupted, tmp_path / "out") == 0
    before = (tmp_path / "out/results.json").read_text()
    more = change(tmp_path)
    assert run("imagenet-c", checkpoint, corrupted, tmp_path / "out", *(more if isinstance(more, list) else [])) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert (tmp_path / "out/results.json").read_text() == before


def other_program(path: Path, key: str) -> Path:
    """A ViT of a thousand classes, in a file that has its weights under ``key``, too, and does not tell its heads."""
    model = timm.create_model("vit_small", img_size=8, patch_size=2, embed_dim=24, depth=1, num_heads=3)
    torch.save({"model": model.state_dict(), key: model.state_dict()}, path)
    return path


@pytest.mark.parametrize(
    ("first", "then", "message"),
    [
        ([], ["--checkpoint-key", "model_ema"], "checkpoint_key None there, model_ema now"),
        (["--num-heads", "3"], ["--num-heads", "2"], "num_heads 3 there, 2 now"),
    ],
)
def test_results_of_other_weights_or_heads_of_a_file_are_not_mixed(first, then, message, tmp_path, capsys):
    checkpoint = other_program(tmp_path / "model.pth", "model_ema")
    write_images(tmp_path / "c/snow/1", list_classes("imagenet-c")[:2])
    heads = [] if "--num-heads" in first else ["--num-heads", "3"]
    assert run("imagenet-c", checkpoint, tmp_path / "c", tmp_path / "out", *heads, *first) == 0
    assert run("imagenet-c", checkpoint, tmp_path / "c", tmp_path / "out", *heads, *then) == 2
    assert message in capsys.readouterr().err


def test_results_of_another_precision_are_not_mixed(checkpoint, corrupted, tmp_path, capsys, monkeypatch):
    assert run("imagenet-c", checkpoint, corrupted, tmp_path / "out") == 0
    monkeypatch.setattr(robustness, "choose_amp", lambda *_: (torch.bfloat16, None))
    assert run("imagenet-c", checkpoint, corrupted, tmp_path / "out") == 2
    assert "precision float32 there, bfloat16 now" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------- errors


def nothing(folder):
    return folder / "nothing"


def no_classes(folder):
    (folder / "empty/snow/9").mkdir(parents=True)
    return folder / "empty"


def empty_classes(folder):
    (folder / "empty/snow/1/3").mkdir(parents=True)
    return folder / "empty"


def other_classes(folder):
    write_images(folder / "other/snow/1", ["cat", "dog"])
    return folder / "other"


def twice(folder):
    write_images(folder / "twice/snow/1", ["1"])
    write_images(folder / "twice/weather/snow/1", ["1"])
    return folder / "twice"


def other_size(folder):
    write_images(folder / "large/snow/1", ["1"], side=9)
    return folder / "large"


def damaged(folder):
    write_images(folder / "damaged/snow/1", ["1"])
    truncate(folder / "damaged/snow/1/1/1.png")
    return folder / "damaged"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (nothing, "nothing: no such folder; imagenet-c is a folder with <corruption>/<severity>/<wnid>/*"),
        (no_classes, "no class folders in it; imagenet-c is a folder with <corruption>/"),
        (empty_classes, "snow/1: no images in its class folders"),
        (
            other_classes,
            "no class folder is a class of the model: folders cat, dog; the model's classes 0, 1, 2, 3, 4 and 5",
        ),
        (twice, "snow is found twice"),
        (other_size, "0.png: 9 x 9 px, where the model takes 8 x 8 and corrupted images are not resized"),
        (damaged, "1.png"),
    ],
)
def test_what_cannot_be_measured_is_one_line(make, message, checkpoint, tmp_path, capsys):
    assert run("imagenet-c", checkpoint, make(tmp_path), tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out/results.json").exists()


def test_unreadable_images_can_be_left_out_and_are_not_counted(checkpoint, tmp_path):
    assert run("imagenet-c", checkpoint, damaged(tmp_path), tmp_path / "out", "--skip-unreadable") == 0
    (measured,) = results(tmp_path / "out")["records"]
    assert (measured["files"], measured["images"]) == (2, 1)


def test_larger_images_need_the_model_at_their_size(checkpoint, tmp_path):
    write_images(tmp_path / "c/snow/1", ["1", "2"], side=12)
    assert run("imagenet-c", checkpoint, tmp_path / "c", tmp_path / "out", "--input-size", "12") == 0
    assert results(tmp_path / "out")["input_size"] == 12


def test_a_model_without_names_of_its_classes(corrupted, tmp_path, capsys):
    model = timm.create_model("vit_small", img_size=8, patch_size=2, embed_dim=24, depth=2, num_heads=3, num_classes=10)
    torch.save({"model": model.state_dict()}, tmp_path / "other.pth")
    assert run("imagenet-c", tmp_path / "other.pth", corrupted, tmp_path / "out", "--num-heads", "3") == 2
    assert "other.pth: the names of its 10 classes" in capsys.readouterr().err


def test_the_results_lie_in_output_if_nothing_is_said(checkpoint, corrupted, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = f"--data-set imagenet-c --checkpoint {checkpoint} --data-path {corrupted} --num-workers 0 --device cpu"
    assert robustness.main(words.split()) == 0
    assert (tmp_path / "output/imagenet-c/model/results.json").exists()
