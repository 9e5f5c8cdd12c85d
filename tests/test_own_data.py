"""A user's own images: defaults by their number, and how long a run takes."""

import argparse
import dataclasses
import itertools
import json
import re
from pathlib import Path

import pytest
import torch
from helpers import runs
from helpers.image_sets import write_folder, write_tars

import arguments
import main
from arguments import data_set_defaults, default_arguments, parse_arguments, undetermined
from engine import Plan
from readers import DATASETS
from records import Records, describe_length, spell_duration
from schedules import Position
from tasks import defaults_of_size
from utils import Processes, UserError

RULE = ("total_batch", "batch_size", "epochs", "warmup_epochs", "lr", "sched_on_updates", "model_ema")


def rule(images, processes=1, **given):
    return argparse.Namespace(**defaults_of_size("classify", images, given, processes))


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """240 training images, 60 of validation."""
    return runs.write_digits(tmp_path_factory.mktemp("digits"))


def parse(data, *words, **options):
    return parse_arguments(["--data-set", "folder", "--data-path", str(data), *words], **options)


# ----------------------------------------------------------------------------------------------- defaults


@pytest.mark.parametrize(
    ("images", "total", "epochs", "peak"),
    [
        (40, 16, 300, 5e-4),
        (240, 16, 300, 5e-4),
        (600, 32, 200, 5e-4),
        (1200, 64, 100, 5e-4),
        (9000, 512, 100, 5e-4),
        (20_000, 1024, 100, 1e-3),
        (1_281_167, 1024, 100, 1e-3),
    ],
)
def test_the_rule(images, total, epochs, peak):
    found = rule(images)
    assert (found.total_batch, found.epochs, found.warmup_epochs) == (total, epochs, 5)
    assert found.lr * total / 512 == pytest.approx(peak)
    assert (found.model_ema, found.sched_on_updates, found.batch_size) == (False, True, min(total, 128))


def test_an_epoch_has_many_updates_and_leaves_few_images_out():
    for images in range(256, 30_000, 7):
        total = rule(images).total_batch
        assert images // total >= 16
        assert images % total / images < 1 / 16
    for images in range(2, 256):
        assert 2 <= rule(images).total_batch <= images


def test_the_batch_fits_processes_and_what_is_given():
    for processes in (1, 2, 4, 8):
        found = rule(1200, processes)
        assert (found.total_batch, found.batch_size * processes) == (64, 64), "the mathematics do not depend on it"
    for images, processes in itertools.product((42, 300, 1200, 10_000), (3, 5, 6, 7, 32, 64)):
        found = rule(images, processes)
        assert found.batch_size % 2 == 0
        assert found.total_batch % (found.batch_size * processes) == 0
    assert rule(100_000, 2).batch_size == 128
    assert {rule(1200, batch_size=size).total_batch for size in (8, 50, 128)} == {64}, "no part of the mathematics"
    found = rule(1200, total_batch=300)
    assert (found.batch_size, found.lr * 300 / 512) == (100, pytest.approx(5e-4))
    assert rule(1200, unscale_lr=True).lr == 5e-4
    assert [rule(1200, epochs=n).warmup_epochs for n in (1, 2, 10, 30, 300)] == [0, 1, 1, 3, 5]


def test_a_folder_and_its_tars_bring_the_same_defaults(digits, tmp_path):
    expected = vars(rule(240))
    tars = write_tars(digits, tmp_path / "tars", "one")
    for args in (parse(digits), parse_arguments(["--data-set", "tar", "--data-path", str(tars)])):
        assert {name: getattr(args, name) for name in RULE} == expected
    assert parse(digits, "--sampling-ratio", "0.15").total_batch == rule(36).total_batch
    single = parse(digits / "train", "--val-split", "0.5", "--batch-size", "8")
    assert (single.epochs, single.total_batch) == (300, 16)


def test_a_given_option_is_never_changed_and_argument_files_give(digits, tmp_path):
    recipe = tmp_path / "mine.args"
    recipe.write_text("--epochs 300 --total-batch 120\n")
    args = parse(digits, "--model-ema", "--lr", "5e-4")
    assert (args.model_ema, args.lr, args.total_batch) == (True, 5e-4, 16)
    args = parse_arguments([f"@{recipe}", "--data-set", "folder", "--data-path", str(digits)])
    assert (args.epochs, args.total_batch, args.batch_size) == (300, 120, 120)
    protocol = parse_arguments(["@recipes/deit_in1k.args", "--data-set", "folder", "--data-path", str(digits)])
    published = parse_arguments(["@recipes/deit_in1k.args", "--data-path", "somewhere"])
    for name in (*RULE, "warmup_lr", "min_lr"):
        assert getattr(protocol, name) == getattr(published, name)


def test_other_sets_and_tasks_keep_their_defaults(digits, tmp_path):
    defaults = default_arguments("classify")
    for words in (["--data-path", str(digits)], ["--data-set", "imagenet100", "--data-path", str(digits)]):
        args = parse_arguments(words)
        assert all(getattr(args, name) == defaults[name] for name in RULE)
    weights = tmp_path / "weights.pth"
    torch.save({"weight": torch.zeros(1)}, weights)
    for task in ("dino", "linear"):
        words = ["--finetune", str(weights)] if task == "linear" else []
        args, defaults = parse(digits, "--task", task, *words), default_arguments(task)
        assert all(getattr(args, name) == defaults[name] for name in RULE if name in defaults)
    absent = parse(tmp_path / "nothing")  # its reader says what is wrong
    assert absent.total_batch == 1024


def test_averaged_weights_are_asked_for_with_their_warm_up(digits):
    with pytest.raises(UserError, match="--model-ema-warmup needs --model-ema"):
        parse(digits, "--model-ema-warmup")
    assert parse(digits, "--model-ema-warmup", "--model-ema").model_ema


def test_images_are_counted_once_and_only_for_tasks_to_which_they_matter(digits, monkeypatch):
    arguments._count_training.cache_clear()
    counted = []
    count = DATASETS["folder"].count
    entry = dataclasses.replace(DATASETS["folder"], count=lambda *args: counted.append(args) or count(*args))
    monkeypatch.setitem(DATASETS, "folder", entry)
    parse(digits, "--task", "dino")
    assert not counted
    parse(digits)
    parse(digits, "--seed", "1")
    assert len(counted) == 1
    arguments._count_training.cache_clear()


def test_what_the_banner_calls_a_default_was_not_given(digits):
    args = parse(digits, "--total-batch", "20", "--epochs", "7")
    assert data_set_defaults(args, 240, 1).keys() == {"--sched-on-updates", "--model-ema"}


def test_images_that_only_the_nodes_have_need_every_option_that_follows_from_them(tmp_path):
    words = ["--data-set", "folder", "--data-path", str(tmp_path / "there")]
    given = "--total-batch 64 --batch-size 16 --epochs 5 --warmup-epochs 1 --sched-on-updates --lr 1e-3".split()
    assert undetermined(parse_arguments(words), words)[:2] == ["--total-batch", "--batch-size"]
    assert undetermined(parse_arguments(words), words + given) == ["--model-ema"]
    assert not undetermined(parse_arguments(words), [*words, *given, "--no-model-ema"])


def test_the_launcher_knows_the_processes_before_they_run(digits, monkeypatch):
    assert parse(digits, processes=4).batch_size == 4
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    assert parse(digits).batch_size == 8


SMALL = (
    "--model vit_tiny_sar --input-size 8 --patch-size 2 --num-workers 0 "
    "--model-kwargs embed_dim=24 depth=1 num_heads=3 --aa none --device cpu"
).split()


def test_the_same_command_goes_on_and_the_banner_names_the_defaults(digits, tmp_path, capsys):
    command = [*SMALL, "--data-set", "folder", "--data-path", str(digits), "--output-dir", str(tmp_path)]
    assert main.main([*command, "--epochs", "2"]) == 0
    out = capsys.readouterr().out
    assert "defaults  of folder of 240 images: --total-batch 16, --batch-size 16" in out
    assert "--model-ema False" in out
    saved = json.loads((tmp_path / "args.json").read_text())
    assert (saved["total_batch"], saved["warmup_epochs"], saved["model_ema"]) == (16, 1, False)
    assert main.main([*command, "--epochs", "2"]) == 0
    assert "already trained" in capsys.readouterr().out
    assert main.main(["--eval", "--resume", str(tmp_path / "best.pth")]) == 0
    assert "(60 images)" in capsys.readouterr().out


def test_the_recipe_for_a_laptop_leaves_the_length_to_the_number_of_images(digits):
    args = parse_arguments(["@recipes/laptop.args", "--data-path", str(digits)])
    assert {name: getattr(args, name) for name in RULE} == vars(rule(240))
    assert (args.input_size, args.patch_size, args.eval_every) == (64, 8, 5)


def test_few_images_count_as_they_are_found(tmp_path):
    root = write_folder(tmp_path / "set", ["a", "b"], per_class=9)
    (root / "train/a/notes.txt").write_text("no image")
    (root / "train/beside.jpg").write_bytes(b"")
    assert parse(root).total_batch == rule(18).total_batch == 16


# ------------------------------------------------------------------------------------- how long a run takes


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.2, "1 s"),
        (59.5, "60 s"),
        (60, "1 min"),
        (40 * 60, "40 min"),
        (11_400, "3 h 10 min"),
        (50 * 3600, "2 days 2 h"),
        (25 * 3600, "1 day 1 h"),
    ],
)
def test_durations_are_spelt(seconds, text):
    assert spell_duration(seconds) == text


def plan(**changed) -> Plan:
    values = {"total_batch": 10, "eval_every": 4} | changed
    return argparse.Namespace(**values)


def test_the_length_of_a_run_is_that_of_its_updates_and_evaluations():
    text = describe_length(plan(), Position(0, 0, 100, 10), 1.0, 60.0)
    assert text == "the whole run takes about 20 min (1,000 updates of 1 s, 3 evaluations of about 60 s)"
    text = describe_length(plan(), Position(8, 50, 100, 10), 1.0, 60.0)
    assert text == "the rest of the run takes about 4 min (150 updates of 1 s, 1 evaluations of about 60 s)"
    text = describe_length(plan(), Position(0, 0, 100, 10), 0.5, 0.0)
    assert text == "the whole run takes about 8 min (1,000 updates of 0.5 s)"


class FakeRun:
    """A run whose updates take a second each, by a clock of its own."""

    def __init__(self, monkeypatch, output, updates_per_epoch=100):
        self.plan = plan(output_dir=output)
        self.processes = Processes(0, 1, torch.device("cpu"))
        self.task = argparse.Namespace(evaluated=lambda: {"test": None}, schedule=lambda position: {"lr": 1.0})
        self.arguments, self.epoch, self.step, self.updates_per_epoch, self.now = {}, 0, 0, updates_per_epoch, 0.0
        monkeypatch.setattr("records.time.monotonic", lambda: self.now)

    @property
    def position(self):
        return Position(self.epoch, self.step, self.updates_per_epoch, 10)

    def train(self, records, updates, seconds=1.0):
        for _ in range(updates):
            self.step, self.now = self.step + 1, self.now + seconds
            records.update()


def told(capsys_text: str) -> list[str]:
    return re.findall(r"the (?:whole|rest of the) run takes about .*", capsys_text)


@pytest.mark.parametrize(("seconds", "updates"), [(1.0, 21), (4.0, 9), (0.01, 21)])
def test_it_is_told_once_after_some_updates_or_seconds(seconds, updates, tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO", "sar")
    run = FakeRun(monkeypatch, tmp_path)
    with Records(run, val_images=30) as records:
        run.now += 60  # the first update starts the workers
        run.train(records, updates - 1, seconds)
        assert not told(caplog.text)
        run.train(records, 30, seconds)
    (text,) = told(caplog.text)
    assert text.endswith(f"(1,000 updates of {seconds:.2g} s, 3 evaluations of about {seconds:.2g} s)")


def test_an_evaluation_is_not_taken_for_an_update(tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO", "sar")
    run = FakeRun(monkeypatch, tmp_path, updates_per_epoch=1)
    with Records(run) as records:
        run.train(records, 1)
        records.epoch({"epoch": 0}, {})
        run.epoch, run.step, run.now = 1, 0, run.now + 500
        run.train(records, 1)
    assert not told(caplog.text), "a single update an epoch is never timed alone"


def test_a_run_says_how_long_it_takes(digits, tmp_path, capsys):
    assert main.main(runs.command(digits, tmp_path)) == 0
    (text,) = told(capsys.readouterr().out)
    assert re.fullmatch(r"the whole run takes about \d+ s \(15 updates of \S+ s, 3 evaluations of about \S+ s\)", text)
    assert "takes about" not in (Path(tmp_path) / "log.txt").read_text(), "it is not stored"
