"""``--val-split``: validation images out of a single folder of classes, kept with the run."""

import json
import shutil

import numpy as np
import pytest
import torch
from helpers import runs
from helpers.image_sets import log_messages, write_folder

import main
from analysis import check, figures
from arguments import parse_arguments
from datasets import SplitSettings, read_images, read_split
from holdout import SPLIT_FILE, Holdout, choose, keep, read_part
from readers.folders import read_class_folders
from tasks.settings import holdout
from utils import Processes, UserError

ALONE = Processes(0, 1, torch.device("cpu"))
ONE_EPOCH = ("--epochs", "1", "--warmup-epochs", "0", "--total-batch", "24")


def write_classes(root, **counts):
    """A single folder of classes with so many images each; returns ``root``."""
    whole = write_folder(root.with_name(f"{root.name}_whole"), list(counts), max(counts.values()), ("train",), ".png")
    root.mkdir()
    for name, count in counts.items():
        (root / name).mkdir()
        for path in sorted((whole / "train" / name).iterdir())[:count]:
            shutil.move(path, root / name / path.name)
    shutil.rmtree(whole)
    return root


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """A single folder of ten classes of six scanned digits."""
    return runs.write_digits(tmp_path_factory.mktemp("digits"), 6, 0) / "train"


@pytest.fixture
def copied(digits, tmp_path):
    """A copy of ``digits`` to change."""
    return shutil.copytree(digits, tmp_path / "mine")


def parts(root, holdout):
    return {split: read_part(root, split, holdout) for split in ("train", "val")}


def train(data, output, *more):
    return main.main(runs.command(data, output, *ONE_EPOCH, "--val-split", "0.3", *more))


def test_each_class_gives_its_share_and_keeps_an_image_for_training(tmp_path):
    counts = {"a": 1, "b": 2, "c": 3, "d": 10, "e": 20}
    root = write_classes(tmp_path / "mine", **counts)
    for share, expected in ((0.1, [0, 1, 1, 1, 2]), (0.25, [0, 1, 1, 2, 5]), (0.5, [0, 1, 2, 5, 10])):
        both = parts(root, Holdout(share, 0))
        found = np.bincount(both["val"].targets, minlength=5)
        assert found.tolist() == expected
        assert (np.bincount(both["train"].targets, minlength=5) + found).tolist() == list(counts.values())
        assert not set(both["train"].names) & set(both["val"].names)
        assert both["train"].classes == both["val"].classes == list(counts)


def test_the_choice_depends_on_names_and_seed_alone(tmp_path):
    root = write_classes(tmp_path / "mine", a=12, b=12)
    first, again, other = (list(read_part(root, "val", Holdout(0.25, seed)).names) for seed in (0, 0, 1))
    assert first == again != other
    moved = root.rename(tmp_path / "moved")
    assert list(read_part(moved, "val", Holdout(0.25, 0)).names) == first
    (tmp_path / "set").mkdir()
    moved.rename(tmp_path / "set/train")
    inside = read_part(tmp_path / "set", "val", Holdout(0.25, 0))
    assert list(inside.names) == first, "train/ without val/ is a single folder, too"
    assert inside[0][0].shape == (3, 30, 40)


def test_without_a_share_all_images_are_trained_on(tmp_path, capsys):
    root = write_classes(tmp_path / "mine", a=24, b=24)
    images = read_part(root, "train", Holdout(0.0, 0))
    assert len(images) == 48
    words = [*ONE_EPOCH, "--val-split", "0", "--print-every", "50"]
    assert main.main(runs.command(root, tmp_path / "run", *words)) == 0
    out = capsys.readouterr().out
    assert out.count("no validation images, so nothing is evaluated, and there is no best.pth") == 1
    assert not (tmp_path / "run/best.pth").exists()
    assert main.main(["--eval", "--resume", str(tmp_path / "run/checkpoint.pth")]) == 2
    assert "the run had no validation images" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda root: (root / "val/a").mkdir(parents=True) or (root / "train").mkdir(), "has a folder val/ of its own"),
        (lambda root: [shutil.rmtree(path) for path in root.iterdir()], "no class folders; --val-split needs"),
        (lambda root: (root / "empty").mkdir(), "no images in the class folders empty"),
        (lambda root: [p.unlink() for p in root.glob("*/*") if p.stem != "0"], "as no class has two"),
    ],
)
def test_what_cannot_be_divided_is_one_line(prepare, message, tmp_path):
    root = write_classes(tmp_path / "mine", a=2, b=3)
    prepare(root)
    with pytest.raises(UserError, match=message) as error:
        read_part(root, "val", Holdout(0.1, 0))
    assert "\n" not in str(error.value)


def test_the_option_is_for_a_folder_of_classes(tmp_path, capsys):
    write_classes(tmp_path / "mine", a=2, b=3)
    with pytest.raises(UserError, match="--val-split needs --data-set folder"):
        read_split("tar", "train", tmp_path / "mine", holdout=Holdout(0.1, 0))
    assert main.main(["--val-split", "0.6"]) == 2
    assert "at most 0.5" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"no folder train/; .*--data-set folder --val-split 0\.1 holds a tenth"):
        read_split("folder", "train", tmp_path / "mine")


def test_a_run_keeps_its_choice_and_goes_on_with_it(digits, tmp_path):
    assert train(digits, tmp_path / "whole", "--epochs", "2") == 0
    kept = json.loads((tmp_path / "whole" / SPLIT_FILE).read_text())
    assert (len(kept["train"]), len(kept["val"]), kept["val_split"]) == (40, 20, 0.3)
    record = json.loads((tmp_path / "whole/log.txt").read_text().splitlines()[-1])
    assert (record["train_images"], record["test_images"]) == (40, 20)
    # another run of the same folder has the same choice, and one that resumes it reads it there
    words = ["--epochs", "1", "--resume", str(tmp_path / "whole/checkpoint.pth")]
    assert train(digits, tmp_path / "longer", *words[:2]) == 0
    assert json.loads((tmp_path / "longer" / SPLIT_FILE).read_text()) == kept


def test_a_run_that_ended_before_it_was_saved_chooses_anew(copied, tmp_path, capsys):
    (copied / "0/broken.png").write_bytes(b"no image")
    assert train(copied, tmp_path / "run") != 0
    assert (tmp_path / "run" / SPLIT_FILE).exists()
    (copied / "0/broken.png").unlink()
    assert train(copied, tmp_path / "run") == 0, capsys.readouterr().err
    kept = json.loads((tmp_path / "run" / SPLIT_FILE).read_text())
    assert "0/broken.png" not in kept["train"] + kept["val"]


def test_a_changed_folder_is_not_trained_on_further(copied, tmp_path, capsys):
    assert train(copied, tmp_path / "run") == 0
    (copied / "3/0.png").rename(copied / "3/new.png")  # as many images as before
    for words in ((), ("--output-dir", str(tmp_path / "other"), "--resume", str(tmp_path / "run/checkpoint.pth"))):
        assert train(copied, tmp_path / "run", *words) == 2
        error = capsys.readouterr().err
        assert "1 new (3/new.png), 1 gone (3/0.png)" in error
        assert len(error.splitlines()) == 1


def test_eval_reads_the_images_that_the_run_held_out(copied, tmp_path, capsys):
    assert train(copied, tmp_path / "run") == 0
    before = capsys.readouterr().out.splitlines()
    (accuracy,) = [line.partition("* ")[2] for line in before if line.startswith("epoch 0: *")]
    evaluate = ["--eval", "--resume", str(tmp_path / "run/best.pth")]
    assert main.main(evaluate) == 0
    assert f"* {accuracy}" in capsys.readouterr().out
    # more images and another class: they are not evaluated
    for number in range(5):
        shutil.copy(copied / "3/0.png", copied / f"3/more{number}.png")
    shutil.copytree(copied / "3", copied / "0_new")
    assert main.main(evaluate) == 0
    assert f"* {accuracy}" in capsys.readouterr().out
    # an image that was held out is gone
    kept = json.loads((tmp_path / "run" / SPLIT_FILE).read_text())
    (copied / kept["val"][0]).unlink()
    assert main.main(evaluate) == 2
    assert f"1 images of {tmp_path / 'run' / SPLIT_FILE} are gone ({kept['val'][0]})" in capsys.readouterr().err
    # other images, in a folder with val/
    other = runs.write_digits(tmp_path / "other", 1, 2)
    assert main.main([*evaluate, "--data-path", str(other)]) == 0
    assert "(20 images)" in capsys.readouterr().out


def test_eval_keeps_to_the_held_out_images_where_val_was_added_since(copied, tmp_path):
    settings = Holdout(0.3, 0)
    keep(copied, settings, tmp_path)
    held_out = list(read_part(copied, "val", settings).names)
    shutil.copytree(copied / "0", copied / "val/0")
    of_run = Holdout(0.3, 0, (tmp_path,), evaluating=True)
    assert list(read_part(copied, "val", of_run).names) == held_out
    other = write_folder(tmp_path / "other", ["0", "1"], 2, suffix=".png")
    assert len(read_part(other, "val", of_run)) == 4, "another folder has validation images of its own"


def test_eval_takes_no_other_runs_choice_and_knows_other_sets(digits, tmp_path):
    words = ["--eval", "--val-split", "0.3", "--data-path", str(digits), "--output-dir", str(tmp_path / "out")]
    args = parse_arguments([*words, "--data-set", "folder", "--resume", str(tmp_path / "copy/best.pth")], saved={})
    assert holdout(args).runs == (tmp_path / "copy",)
    args = parse_arguments([*words, "--data-set", "tar", "--resume", str(tmp_path / "copy/best.pth")], saved={})
    assert holdout(args) is None


def test_a_damaged_or_missing_choice(digits, tmp_path):
    keep(digits, Holdout(0.3, 0), tmp_path)
    first = list(read_part(digits, "val", Holdout(0.3, 0, (tmp_path,))).names)
    with pytest.raises(UserError, match="divided otherwise"):
        read_part(digits, "val", Holdout(0.3, 1, (tmp_path,)))
    (tmp_path / SPLIT_FILE).write_text("{}")
    with pytest.raises(UserError, match="damaged"):
        read_part(digits, "val", Holdout(0.3, 0, (tmp_path,)))
    with log_messages() as messages:
        chosen = read_part(digits, "val", Holdout(0.3, 0, (tmp_path / "nowhere",), evaluating=True))
    assert list(chosen.names) == first
    assert "no split.json beside the checkpoint" in messages[0]


def test_a_share_of_the_images_is_taken_from_the_training_images(digits, tmp_path):
    assert train(digits, tmp_path, "--sampling-ratio", "0.7", "--total-batch", "24") == 0
    kept = json.loads((tmp_path / SPLIT_FILE).read_text())
    subset = json.loads((tmp_path / "subset.json").read_text())["images"]
    assert set(subset) < set(kept["train"])
    assert len(kept["val"]) == 20


def test_classes_with_a_single_image_are_told(tmp_path):
    root = write_classes(tmp_path / "mine", a=1, b=1, c=6)
    settings = SplitSettings("folder", root, holdout=Holdout(0.3, 0))
    with log_messages() as messages:
        for split in ("train", "val"):
            read_images(settings, split, ALONE)
    (message,) = messages
    assert message.startswith("WARNING: folder train: 2 classes have a single image")
    assert message.endswith("from which little is learnt: a, b")


def test_one_image_a_class_in_the_usual_layout_is_told(tmp_path):
    root = write_folder(tmp_path / "set", ["a", "b"], per_class=2)
    (root / "train/a/0.jpg").unlink()
    with log_messages() as messages:
        read_images(SplitSettings("folder", root), "train", ALONE)
    (message,) = messages
    assert message == "WARNING: folder train: 1 class has a single image, from which little is learnt: a"


def test_the_figures_of_a_run_show_what_it_held_out(digits, tmp_path):
    assert train(digits, tmp_path) == 0
    options = figures.build_parser().parse_args(f"--checkpoint {tmp_path / 'best.pth'} --out {tmp_path}".split())
    assert len(figures.validation_samples(options)) == 10


def test_the_check_knows_a_single_folder(tmp_path, capsys):
    root = write_classes(tmp_path / "mine", a=6, b=7, c=2)
    assert check.main(f"--data-set folder --data-path {root} --num-workers 1".split()) == 0
    out = capsys.readouterr().out
    assert "main.py needs --val-split" in out
    assert "all: 15 images in 3 classes of 2 (c) to 7 (b)" in out
    assert "all: c (2 images)" in out


def test_the_choice_names_every_image_once(digits):
    images = read_class_folders(digits)
    chosen = choose(images, Holdout(0.3, 0))
    assert sorted(chosen["train"] + chosen["val"]) == sorted(images.names)
