"""The line of a logging step: position, remaining time of the run, peak memory on a GPU."""

from types import SimpleNamespace

import pytest
import torch
from helpers.image_sets import log_messages

import records
from schedules import Position
from utils import start_logging


def test_a_step_line_begins_with_the_position_and_ends_with_the_remaining_time():
    means = {"loss": 2.257, "images_per_second": 148.3, "sar_weight": 0.01}
    line = records.step_line(Position(epoch=1, step=2, updates_per_epoch=5, epochs=4), means, seconds_left=13_250)
    assert line == "epoch 1 [2/5] 40%  loss 2.257  images/s 148.3  lambda 0.01  remaining 3 h 41 min"


def schedule(position: Position) -> dict[str, float]:
    """One value that changes over the epochs, one within an epoch, and one that stays."""
    return {"lr": 1.0 - position.exact_epoch, "momentum": position.step + 0.5, "sar_weight": 0.01}


@pytest.fixture
def start_records(tmp_path, monkeypatch):
    """Records of a run of 4 epochs of 5 updates that was resumed after 7, on a device; its clock is at 100 s."""

    def start(device: str) -> records.Records:
        monkeypatch.setattr(records.time, "monotonic", lambda: 100.0)
        processes = SimpleNamespace(is_main=True, device=torch.device(device))
        plan, task = SimpleNamespace(output_dir=tmp_path), SimpleNamespace(warning=lambda means: "", schedule=schedule)
        position = Position(epoch=1, step=2, updates_per_epoch=5, epochs=4)
        return records.Records(
            SimpleNamespace(processes=processes, plan=plan, task=task, epoch=1, arguments={}, position=position)
        )

    return start


def test_the_remaining_time_follows_from_the_updates_of_this_process(start_records, monkeypatch, capsys):
    with start_records("cpu") as kept:
        start_logging(0)
        kept.run.position = Position(epoch=1, step=4, updates_per_epoch=5, epochs=4)  # 2 updates done, 11 left
        monkeypatch.setattr(records.time, "monotonic", lambda: 100.0 + 2 * 3600)
        kept.step({"loss": 1.0})
    assert capsys.readouterr().out == "epoch 1 [4/5] 80%  loss 1  remaining 11 h 0 min\n"


def test_peak_memory_is_recorded_on_a_gpu(start_records, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3 * 2**29)
    with start_records("cuda") as kept:
        start_logging(0)
        scalars = {}
        monkeypatch.setattr(kept.board, "add_scalar", lambda name, value, step: scalars.update({name: value}))
        kept.run.position = Position(epoch=1, step=3, updates_per_epoch=5, epochs=4)
        kept.step({"loss": 1.0, "lr": 0.5, "sar_weight": 0.01, "step_time": 2.0})
    assert scalars == {"train/loss": 1.0, "train/lr": 0.5, "time/step_time": 2.0, "time/peak_memory": 1.5}
    assert "  peak GiB 1.5  " in capsys.readouterr().out


@pytest.mark.parametrize("epochs", [1, 4])
def test_what_never_changes_has_no_curve(epochs):
    assert records.constant_values(schedule, Position(0, 0, 5, epochs)) == {"sar_weight"}
    assert "lr" not in records.constant_values(schedule, Position(0, 0, 1, 2)), "one update an epoch"


def test_arguments_are_a_table():
    text = records.as_table({"lr": 0.5, "aa": "a|b"})
    assert text == "| argument | value |\n|---|---|\n| aa | a\\|b |\n| lr | 0.5 |"


def test_the_log_says_that_the_loader_is_the_bottleneck():
    text = records.describe_bottleneck(38.0, 1240.0, 8)
    assert "38 % of the time is spent waiting for it. It gives 1,240 images/s, and the steps could take 2,000" in text
    assert "--num-workers (8 per process" in text
    assert "100 % of the time" in records.describe_bottleneck(100.0, 1240.0, 8), "whatever was measured"


@pytest.mark.parametrize(("share", "said"), [(9.0, 0), (11.0, 1)])
def test_a_starved_run_is_told_once_without_its_first_window(tmp_path, share, said):
    task = SimpleNamespace(describe=lambda results: "", warning=lambda means: "", schedule=schedule)
    plan = SimpleNamespace(output_dir=tmp_path)
    position = Position(epoch=0, step=1, updates_per_epoch=4, epochs=2)
    processes = SimpleNamespace(is_main=True, device=torch.device("cpu"))
    arguments = {"num_workers": 3}
    run = SimpleNamespace(plan=plan, processes=processes, position=position, task=task, epoch=0, arguments=arguments)
    with records.Records(run) as each, log_messages() as messages:
        each.first_update = 0
        for epoch in range(2):
            for wait in ([100.0] if epoch == 0 else []) + [share] * 2:
                each.step({"data_share": wait, "images_per_second": 100.0})
            each.epoch({"epoch": epoch}, {})
    assert len([message for message in messages if "the loader is the bottleneck" in message]) == said
