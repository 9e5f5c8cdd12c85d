"""Tasks: how one is found, and a toy one that is trained, killed, resumed, swept and reported on the same loop."""

import json
import signal

import pytest
import torch
from helpers import runs

import engine
import main
import run_with_submitit
from arguments import parse_arguments
from launch import runs as launch_runs
from paper import report
from schedules import Position
from tasks import TASKS, Task, load_task
from tasks.classify import Classification
from utils import UserError
from weights import read_checkpoint, select_weights

# ------------------------------------------------------------------------------------------- how a task is found


def test_every_task_of_the_program_is_found_and_says_what_picks_the_best():
    for name in TASKS:
        task = load_task(name)
        assert issubclass(task, Task)
        assert isinstance(task.metric, str)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("clasify", "--task clasify: no such task; did you mean classify?"),
        ("x", "--task x: no such task; known are classify"),
        ("no_such_module:Task", "--task no_such_module:Task: No module named 'no_such_module'"),
        ("toy_task:Nothing", "--task toy_task:Nothing: module 'toy_task' has no attribute 'Nothing'"),
        ("toy_task:Right", "--task toy_task:Right: Right is not derived from tasks.Task"),
    ],
)
def test_a_task_that_is_none_is_one_line(name, message, capsys):
    assert main.main(["--task", name]) == 2
    assert capsys.readouterr().err.startswith(f"error: {message}")


def test_help_shows_the_options_of_one_task(capsys):
    shown = {}
    for task in ("classify", "toy_task:Rotation"):
        with pytest.raises(SystemExit):
            parse_arguments(["--help", "--task", task])
        shown[task] = capsys.readouterr().out
    assert "--mixup " in shown["classify"]
    assert "--directions " not in shown["classify"]
    assert "--directions " in shown["toy_task:Rotation"]
    assert "--mixup " not in shown["toy_task:Rotation"]
    with pytest.raises(UserError, match="no option --mixup"):
        parse_arguments(["--task", "toy_task:Rotation", "--mixup", "0.5"])


def test_a_task_may_be_named_in_an_argument_file(tmp_path):
    (tmp_path / "toy.args").write_text("--task toy_task:Rotation\n--directions 2\n")
    args = parse_arguments([f"@{tmp_path / 'toy.args'}"])
    assert (args.task, args.directions) == ("toy_task:Rotation", 2)
    assert parse_arguments([f"@{tmp_path / 'toy.args'}", "--task", "classify", "--no-model-ema"][1:]).task == "classify"


# -------------------------------------------------------------------------------------------------- the toy task

TOY = (
    "--task toy_task:Rotation --directions 2 --data-set folder --model vit_tiny_sar --input-size 8 --patch-size 2 "
    "--model-kwargs embed_dim=24 depth=2 num_heads=3 --num-workers 0 --batch-size 24 --total-batch 48 --epochs 3 "
    "--warmup-epochs 1 --lr 2e-2 --drop 0.1 --drop-path 0.2 --sar-weight 0.1 --drloc-weight 0 --print-every 3"
).split()


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """Trains the toy task in processes of its own; see ``runs.Child``."""
    folder = tmp_path_factory.mktemp("toy")
    child = runs.Child(runs.write_digits(folder / "digits", val=7), folder / "text")
    child.words = TOY
    return child


class Taught(Classification):
    """Every member that the classification leaves at its default: a teacher, groups, schedules, hooks."""

    weight_names = ("student", "teacher")
    metric = "acc5"

    def __init__(self, args, dataset, device):
        super().__init__(args, dataset, device)
        self.reported, self.calls = "teacher", []

    @classmethod
    def add_options(cls, parser):
        super().add_options(parser)
        parser.set_defaults(lr=3e-3, sar_weight=0.3, model_ema_decay=0.5)

    @classmethod
    def peak_learning_rate(cls, args):
        return args.lr

    def parameter_groups(self, args):
        without, decayed = super().parameter_groups(args)
        return [without | {"lr_scale": 0.5}, decayed | {"decays": True}]

    def schedule(self, position):
        return super().schedule(position) | {"weight_decay": 0.1 * position.update}

    def begin_update(self, schedule):
        self.calls.append("begin")

    def finish_gradients(self, schedule):
        self.calls.append("finish")

    def end_update(self, schedule):
        super().end_update(schedule)
        self.calls.append("end")


TAUGHT = (
    "--task test_tasks:Taught --model-ema --model vit_tiny_sar --input-size 8 --patch-size 2 "
    "--total-batch 32 --batch-size 16 "
    "--model-kwargs embed_dim=12 depth=1 num_heads=1 --warmup-epochs 0 --epochs 1 --sampling-ratio 0.07"
)


def test_hooks_groups_and_schedules_of_a_task_reach_the_optimiser():
    run = runs.build(TAUGHT)
    engine.train_one_epoch(run)
    updates = run.plan.updates_per_epoch
    assert updates == 3
    assert run.task.calls == ["begin", "finish", "end"] * updates, "once an update, not once a micro-batch"
    without, decayed = run.optimizer.param_groups
    schedule = run.task.schedule(Position(0, updates - 1, updates, 1))
    assert (without["lr"], decayed["lr"]) == (0.5 * schedule["lr"], schedule["lr"])
    assert (without["weight_decay"], decayed["weight_decay"]) == (0, pytest.approx(0.2)), "also after a 0"


def test_a_tasks_defaults_of_shared_options_win_over_the_data_sets_and_the_models():
    args = parse_arguments(TAUGHT.split())
    assert (args.lr, args.sar_weight) == (3e-3, 0.3)
    assert args.warmup_epochs == 0, "what the user says wins over all"
    assert args.hflip == 0.0, "digits are not mirrored"


def test_the_reported_weights_of_a_task_are_what_is_evaluated_and_fine_tuned_from(tmp_path, capsys):
    assert main.main([*TAUGHT.split(), "--output-dir", str(tmp_path)]) == 0
    record, checkpoint = json.loads((tmp_path / "log.txt").read_text()), read_checkpoint(tmp_path / "best.pth")
    best = checkpoint["best"]
    assert (best["acc5"], best["epoch"], best["weights"]) == (record["test_teacher_acc5"], 0, "teacher")
    assert best["results"] == {name: record[f"test_teacher_{name}"] for name in best["results"]}
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("epoch 0, teacher weights: * Acc@1") for line in lines)
    assert main.main(["--eval", "--resume", str(tmp_path / "best.pth"), "--num-workers", "0"]) == 0
    assert f"Acc@5 {record['test_teacher_acc5']:.3f} " in capsys.readouterr().out.splitlines()[-1]
    state, key = select_weights(checkpoint)
    assert (key, state.keys()) == ("teacher", checkpoint["student"].keys())


def test_eval_takes_options_of_the_checkpoints_task(toy, tmp_path, capsys):
    assert toy(tmp_path, "--epochs", "1", "--warmup-epochs", "0") == 0
    words = ["--eval", "--resume", str(tmp_path / "best.pth"), "--num-workers", "0"]
    assert main.main([*words, "--directions", "2"]) == 0
    assert main.main([*words, "--direction", "2"]) == 2
    assert "no option --direction; did you mean --directions" in capsys.readouterr().err


@pytest.fixture(scope="module")
def whole(toy, tmp_path_factory):
    output = tmp_path_factory.mktemp("whole")
    assert toy(output) == 0
    return runs.content(output)


def test_it_learns_and_its_terms_are_logged_beside_the_spatial_entropy(whole):
    first, *_, last = whole["log.txt"]
    assert last["train_rotation"] < first["train_rotation"]
    assert last["train_loss"] == pytest.approx(last["train_rotation"] + 0.1 * last["train_spatial_entropy"])
    assert last["test_images"] == 70
    assert last["metric"] == "right"
    best = whole["best.pth"]["best"]
    assert best["right"] == max(line["test_right"] for line in whole["log.txt"])


def test_killed_it_goes_on_bit_for_bit(toy, whole, tmp_path):
    assert toy(tmp_path, before=runs.killed_at_update(runs.UPDATES + 2)) == -signal.SIGKILL
    assert toy(tmp_path, before=runs.killed_at_update(2, by=signal.SIGTERM)) == 0
    assert torch.load(tmp_path / "checkpoint.pth", weights_only=True)["step"] == 2
    assert toy(tmp_path) == 0
    runs.assert_identical(runs.content(tmp_path), whole)


def test_two_processes_train_and_evaluate_it(toy, whole, tmp_path):
    assert toy(tmp_path, "--drop", "0", "--drop-path", "0", ranks=2) == 0
    line = runs.content(tmp_path)["log.txt"][-1]
    assert line["test_images"] == 70
    assert line["train_rotation"] == pytest.approx(whole["log.txt"][-1]["train_rotation"], abs=0.1)


def test_it_is_evaluated_from_its_checkpoint_alone(toy, tmp_path, capsys):
    assert toy(tmp_path, "--epochs", "1", "--warmup-epochs", "0") == 0
    record = json.loads((tmp_path / "log.txt").read_text())
    assert main.main(["--eval", "--resume", str(tmp_path / "best.pth"), "--num-workers", "0"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"* right {record['test_right']:.4g} images 70"


def test_it_is_swept_and_reported(toy, tmp_path, monkeypatch, capsys):
    """A row of a table whose runs are a sweep's."""
    monkeypatch.setattr(launch_runs, "run_command", lambda command: main.main(command[2:]))
    sweep = ["--job-dir", str(tmp_path / "toy/A"), "--local", "--ngpus", "0", "--sweep", "seed=0,1"]
    short = ["--epochs", "1", "--warmup-epochs", "0", "--data-path", str(toy.data)]
    assert run_with_submitit.main([*sweep, *TOY, *short]) == 0
    folders = [tmp_path / f"toy/A/seed={seed}" for seed in (0, 1)]
    for seed, folder in enumerate(folders):
        folder.rename(tmp_path / f"toy/A/seed{seed}")
    (tmp_path / "toy/A/protocol.json").write_text((tmp_path / "toy/A/seed0/args.json").read_text())
    row = {"name": "toy", "value": None, "conditions": {}}
    table = {"title": "A toy", "source": "nobody", "metric": "right (%)", "rows": {"A": row}}
    monkeypatch.setitem(report.PAPER, "toy", table)
    values = [json.loads((tmp_path / f"toy/A/seed{seed}/log.txt").read_text())["test_right"] for seed in (0, 1)]
    assert f"{sum(values) / 2:.2f} ± " in report.write_report(tmp_path / "toy")
