"""A run that is killed or stopped anywhere, and given again, ends as if nothing had happened: bit for bit."""

import errno
import functools
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import runs

import datasets


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Train the small run into a folder, in a child process; returns its exit code."""
    folder = tmp_path_factory.mktemp("child")
    return runs.Child(runs.write_digits(folder / "digits"), folder / "text")


@pytest.fixture(scope="module")
def uninterrupted(run, tmp_path_factory):
    output = tmp_path_factory.mktemp("uninterrupted")
    assert run(output) == 0
    return runs.content(output)


def finish_and_compare(run, output, uninterrupted):
    assert run(output) == 0
    runs.assert_identical(runs.content(output), uninterrupted)


def test_two_runs_are_identical(run, tmp_path, uninterrupted):
    finish_and_compare(run, tmp_path, uninterrupted)


@pytest.mark.parametrize(
    "kill",
    [
        pytest.param(runs.killed_at_update(runs.UPDATES + 2), id="in training"),
        pytest.param(runs.killed_at_evaluation_batch(5), id="in evaluation"),
        # files of an epoch: best.pth, log.txt, checkpoint.pth; args.json and environment.json come first
        pytest.param(runs.killed_at_replace(8, after=True), id="between log.txt and checkpoint.pth"),
    ],
)
def test_killed(run, kill, tmp_path, uninterrupted):
    assert run(tmp_path, before=kill) == -signal.SIGKILL
    finish_and_compare(run, tmp_path, uninterrupted)


@pytest.mark.slow
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("number", range(1, 11))  # args.json, environment.json, and two or three files an epoch
def test_killed_on_both_sides_of_each_replacement(run, number, after, tmp_path, uninterrupted):
    kill = runs.killed_at_replace(number, after)
    assert run(tmp_path, before=kill) == -signal.SIGKILL
    finish_and_compare(run, tmp_path, uninterrupted)


@pytest.mark.parametrize(
    ("stop", "epoch", "step"),
    [
        pytest.param(runs.killed_at_update(runs.UPDATES + 2, by=signal.SIGTERM), 1, 2, id="SIGTERM in training"),
        pytest.param(
            runs.killed_at_update(2 * runs.UPDATES, by=signal.SIGUSR1),
            1,
            runs.UPDATES,
            id="at an epoch's end",
        ),
        pytest.param(runs.killed_at_evaluation_batch(1, by=signal.SIGUSR1), 0, runs.UPDATES, id="in evaluation"),
    ],
)
def test_signal_saves_within_the_epoch(run, stop, epoch, step, tmp_path, uninterrupted):
    assert run(tmp_path, before=stop) == 0
    saved = torch.load(tmp_path / "checkpoint.pth", weights_only=True)
    assert (saved["epoch"], saved["step"]) == (epoch, step)
    finish_and_compare(run, tmp_path, uninterrupted)


def time_is_up(signals: tuple[int, ...]) -> None:
    for number in signals:
        os.kill(os.getpid(), number)


@pytest.mark.parametrize("signals", [(signal.SIGUSR2,), (signal.SIGUSR2, signal.SIGTERM)])
def test_a_run_whose_time_is_up_asks_to_be_started_again(run, signals, tmp_path, uninterrupted):
    """Also where the cluster's last word comes while it still saves."""
    stop = runs.at_call("engine", "update_weights", 3, functools.partial(time_is_up, signals))
    assert run(tmp_path, before=stop) == os.EX_TEMPFAIL
    assert torch.load(tmp_path / "checkpoint.pth", weights_only=True)["step"] == 3
    finish_and_compare(run, tmp_path, uninterrupted)


def test_ctrl_c_saves_and_ends_the_script_around_it(run, tmp_path, uninterrupted):
    assert run(tmp_path, before=runs.killed_at_update(3, by=signal.SIGINT)) == 130
    assert torch.load(tmp_path / "checkpoint.pth", weights_only=True)["step"] == 3
    finish_and_compare(run, tmp_path, uninterrupted)


def test_many_stops_are_one_run(run, tmp_path, uninterrupted):
    for update in (4, 2, 5, 1):
        assert run(tmp_path, before=runs.killed_at_update(update, by=signal.SIGTERM)) == 0
    finish_and_compare(run, tmp_path, uninterrupted)


def test_a_finished_run_is_left_alone(run, tmp_path, uninterrupted):
    assert run(tmp_path) == 0
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert run(tmp_path) == 0
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before
    assert "already trained for 3 epochs" in run.text()


def test_save_every_and_eval_every_keep_one_line_an_epoch(run, tmp_path):
    options = ("--save-every", "2", "--eval-every", "2")
    assert run(tmp_path / "whole", *options) == 0
    kill = runs.killed_at_update(runs.UPDATES + 2)
    assert run(tmp_path / "killed", *options, before=kill) == -signal.SIGKILL
    assert not (tmp_path / "killed" / "checkpoint.pth").exists()
    assert run(tmp_path / "killed", *options) == 0
    whole, killed = runs.content(tmp_path / "whole"), runs.content(tmp_path / "killed")
    runs.assert_identical(killed, whole)
    assert [line["epoch"] for line in whole["log.txt"]] == [0, 1, 2]
    assert ["test_acc1" in line for line in whole["log.txt"]] == [False, True, True]


def note_positions(path: Path) -> None:
    """Write down the position of each image of epoch 1 that is decoded."""
    original = datasets.AugmentedDataset.__getitem__

    def noted(self, draw):
        if draw.epoch == 1:
            with open(path, "a") as log:
                print(draw.position, file=log)
        return original(self, draw)

    datasets.AugmentedDataset.__getitem__ = noted


def test_workers_change_nothing_and_resuming_decodes_nothing_twice(run, tmp_path, uninterrupted):
    """The sampler skips: after a stop at step 2 the loader hands out the remaining micro-batches only."""
    stop = runs.killed_at_update(runs.UPDATES + 2, by=signal.SIGTERM)
    assert run(tmp_path, "--num-workers", "2", before=stop) == 0

    note = functools.partial(note_positions, tmp_path / "drawn")
    assert run(tmp_path, "--num-workers", "0", before=note) == 0
    positions = [int(line) for line in (tmp_path / "drawn").read_text().split()]
    assert positions == list(range(2 * 48, runs.UPDATES * 48))
    runs.assert_identical(runs.content(tmp_path), uninterrupted)


def test_two_processes_stop_together_and_go_on(run, tmp_path):
    """Only one of them gets the signal; in training it stops both at the same step, in evaluation too."""
    options = ("--batch-size", "12")
    assert run(tmp_path / "whole", *options, ranks=2) == 0
    stops = (runs.killed_at_update(3, by=signal.SIGTERM), runs.killed_at_evaluation_batch(1, by=signal.SIGUSR1))
    for stop, step in zip(stops, (4, runs.UPDATES), strict=True):  # the flags are read one step later
        assert run(tmp_path / "stopped", *options, before=stop, ranks=2) == 0
        assert torch.load(tmp_path / "stopped" / "checkpoint.pth", weights_only=True)["step"] == step
    assert run(tmp_path / "stopped", *options, ranks=2) == 0
    runs.assert_identical(runs.content(tmp_path / "stopped"), runs.content(tmp_path / "whole"))


def infinite_loss(number: int) -> None:
    """Make the ``number``-th cross-entropy of this process infinite."""
    original, calls = torch.nn.CrossEntropyLoss.forward, [0]

    def forward(self, logits, targets):
        calls[0] += 1
        return original(self, logits, targets) * (float("inf") if calls[0] == number else 1)

    torch.nn.CrossEntropyLoss.forward = forward


def test_a_loss_that_is_not_finite_on_one_process_ends_all(run, tmp_path):
    bad = functools.partial(infinite_loss, 2 * runs.UPDATES + 3)  # two micro-steps an update: update 1 of epoch 1
    assert run(tmp_path, "--batch-size", "12", before=bad, ranks=2) == 1
    assert run.text().splitlines()[-1].startswith("error: the loss is not finite at epoch 1, update 1, rank 1")
    last_line = run.text(1).splitlines()[-1]  # older torch's gloo tells of its connections before
    assert last_line.startswith("[rank 1] error: the loss is not finite")
    assert torch.load(tmp_path / "checkpoint.pth", weights_only=True)["epoch"] == 1


@pytest.mark.slow
def test_twenty_random_sigkills_and_five_signals(run, tmp_path, uninterrupted):
    """From outside, at random moments, with loader workers: whatever the process happens to do."""
    chance = random.Random(0)
    command = [sys.executable, "main.py", *runs.command(run.data, tmp_path, "--num-workers", "1")]
    numbers = [signal.SIGKILL] * 20 + [signal.SIGTERM, signal.SIGUSR1] * 2 + [signal.SIGINT]
    chance.shuffle(numbers)
    hits = 0
    for number in numbers:
        process = subprocess.Popen(command, cwd=runs.ROOT, stdout=subprocess.PIPE, text=True)
        for line in process.stdout:  # begin to count when training does
            if line.startswith("        output"):
                break
        time.sleep(chance.uniform(0.0, 1.5))
        hits += process.poll() is None
        process.send_signal(number)
        process.stdout.read()
        process.wait(60)
        if process.returncode == 0 and (tmp_path / "log.txt").exists():
            done = len((tmp_path / "log.txt").read_text().splitlines()) == 3
            if done:  # it had ended by itself: begin anew, so that every signal has something to hit
                for path in tmp_path.iterdir():
                    path.unlink()
    assert hits >= 15, "too few signals found a living process for this test to mean anything"
    assert subprocess.run(command, cwd=runs.ROOT, stdout=subprocess.DEVNULL).returncode == 0
    runs.assert_identical(runs.content(tmp_path), uninterrupted)


def test_other_mathematics_are_refused_and_listed(run, tmp_path, uninterrupted):
    assert run(tmp_path, before=runs.killed_at_update(3, by=signal.SIGTERM)) == 0
    assert run(tmp_path, "--lr", "1e-3", "--sar-weight", "0.2") == 2
    error = run.text()
    assert "--lr: 0.004 in the checkpoint, 0.001 now" in error
    assert "--sar-weight: 0.1 in the checkpoint, 0.2 now" in error
    assert error.splitlines()[-1].startswith("error: ")


def test_resume_goes_on_in_another_folder_and_own_checkpoint_comes_first(run, tmp_path, uninterrupted):
    first, second = tmp_path / "first", tmp_path / "second"
    assert run(first, before=runs.killed_at_update(runs.UPDATES + 3, by=signal.SIGTERM)) == 0
    resume = ("--resume", str(first / "checkpoint.pth"))
    assert run(second, *resume, before=runs.killed_at_update(1, by=signal.SIGTERM)) == 0
    assert torch.load(second / "checkpoint.pth", weights_only=True)["step"] == 4
    assert run(second, *resume) == 0
    assert f"resuming from {second / 'checkpoint.pth'}" in run.text()
    content = runs.content(second)
    assert [line["epoch"] for line in content["log.txt"]] == [1, 2]  # epoch 0 is in the first folder's log
    weights = content["checkpoint.pth"]["model"]
    runs.assert_identical(weights, uninterrupted["checkpoint.pth"]["model"])


def disk_full():
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_keeps_the_last_good_checkpoint(run, tmp_path, uninterrupted):
    # fsyncs: args.json, environment.json, then best.pth, log.txt, checkpoint.pth of epoch 0, best.pth of epoch 1
    assert run(tmp_path, before=runs.at_call("os", "fsync", 7, disk_full)) == 1
    error = run.text()
    assert "No space left on device" in error
    assert "Traceback" not in error
    assert not list(tmp_path.glob(".*")), "the unfinished file was left behind"
    assert torch.load(tmp_path / "checkpoint.pth", weights_only=True)["epoch"] == 1
    finish_and_compare(run, tmp_path, uninterrupted)


def test_leftovers_of_a_killed_writer_are_cleared_away(run, tmp_path, uninterrupted):
    assert run(tmp_path, before=runs.killed_at_replace(5, after=False)) == -signal.SIGKILL
    assert list(tmp_path.glob(".*.pth.*.tmp")), "the test did not leave what it is about"
    finish_and_compare(run, tmp_path, uninterrupted)
    assert not list(tmp_path.glob(".*"))


def test_log_and_arguments_are_plain_json(run, tmp_path):
    assert run(tmp_path, "--epochs", "1", "--warmup-epochs", "0") == 0
    (line,) = (tmp_path / "log.txt").read_text().splitlines()
    record = json.loads(line)
    deit = {"epoch", "train_lr", "train_loss", "test_loss", "test_acc1", "test_acc5", "n_parameters"}
    assert deit <= record.keys()
    assert {"train_spatial_entropy", "test_spatial_entropy", "test_components", "step_time"} <= record.keys()
    assert json.loads((tmp_path / "args.json").read_text())["sar_weight"] == 0.1
    environment = json.loads((tmp_path / "environment.json").read_text())
    assert environment["torch"] == torch.__version__
