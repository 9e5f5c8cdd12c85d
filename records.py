"""The records of a run: ``log.txt``, TensorBoard and the terminal."""

import json
import math
import os
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.tensorboard import SummaryWriter

from engine import Plan, Run
from schedules import Position
from utils import UserError, environment, free_folder, logger, write_atomically, write_json

SHORT_NAMES = {
    "images_per_second": "images/s",
    "data_share": "waiting for data %",
    "step_time": "step s",
    "sar_weight": "lambda",
    "drloc_weight": "DRLoc weight",
    "teacher_entropy": "teacher entropy",
    "kl": "KL",
    "feature_deviation": "feature deviation",
    "centre_norm": "centre norm",
    "weight_decay": "weight decay",
    "teacher_momentum": "momentum",
    "teacher_temp": "temperature",
    "last_layer_frozen": "frozen",
    "peak_memory": "peak GiB",
}
"""Names of values in the terminal's lines, where they differ from TensorBoard's."""
ABOUT_TIME = ("images_per_second", "data_share", "step_time", "peak_memory")
"""Values of a logging step that TensorBoard shows under time/; all others are under train/."""
FIRST_UPDATES, FIRST_SECONDS = 20, 30.0
"""The time of the whole run is estimated from so many updates, or from those of so many seconds."""
EVALUATION_SHARE = 1 / 3
"""Time of an image in evaluation, without a backward pass, as a fraction of that in training; a rule of thumb."""
LARGEST_WAIT = 10.0
"""Percent of an epoch's time spent waiting for the loader, above which the log calls it the bottleneck."""


def step_line(position: Position, means: Mapping[str, float], seconds_left: float) -> str:
    """The terminal's line of a logging step, as ``epoch 1 [2/5] 40%  loss 2.31  images/s 148  remaining 3 h 41 min``.

    Args:
        position: after the last update of the step's window.
        means: values to print, by name.
        seconds_left: estimated time to the end of the run.
    """
    done = position.step / position.updates_per_epoch
    place = f"epoch {position.epoch} [{position.step}/{position.updates_per_epoch}] {done:.0%}"
    values = [f"{SHORT_NAMES.get(name, name)} {value:.4g}" for name, value in means.items()]
    return "  ".join([place, *values, f"remaining {spell_duration(seconds_left)}"])


def spell_duration(seconds: float) -> str:
    """A time to be read in a sentence: ``40 s``, ``12 min``, ``3 h 10 min``, ``2 days 5 h``."""
    if seconds < 60:
        return f"{math.ceil(seconds)} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    if minutes < 24 * 60:
        return f"{minutes // 60} h {minutes % 60} min"
    days, hours = divmod(round(minutes / 60), 24)
    return f"{days} day{'s' * (days > 1)} {hours} h"


def describe_length(plan: Plan, position: Position, step_time: float, evaluation_time: float) -> str:
    """The estimated time of a run, or of the rest of one that is resumed.

    Args:
        position: where this process began to train.
        step_time: seconds an update.
        evaluation_time: seconds an evaluation; 0 if nothing is evaluated.
    """
    updates = position.epochs * position.updates_per_epoch - position.update
    ends = range(position.epoch + 1, position.epochs + 1)
    evaluations = sum(end % plan.eval_every == 0 or end == position.epochs for end in ends) if evaluation_time else 0
    seconds = updates * step_time + evaluations * evaluation_time
    what = "the rest of the run" if position.update else "the whole run"
    rest = f", {evaluations:,} evaluations of about {evaluation_time:.2g} s" if evaluations else ""
    return f"{what} takes about {spell_duration(seconds)} ({updates:,} updates of {step_time:.2g} s{rest})"


def describe_bottleneck(share: float, images_per_second: float, num_workers: int) -> str:
    """A warning that the loader is slower than the steps.

    Args:
        share: percent of the time spent waiting for the loader.
        images_per_second: what was trained, on all processes.
        num_workers: loader workers of a process.
    """
    possible = images_per_second / max(1 - share / 100, 0.01)
    return (
        f"the loader is the bottleneck: {share:.0f} % of the time is spent waiting for it. It gives "
        f"{images_per_second:,.0f} images/s, and the steps could take {possible:,.0f}. More --num-workers "
        f"({num_workers} per process, on {os.cpu_count()} cores), --cache-images, or tars on a shared disk "
        "(--data-set tar) help"
    )


def constant_values(schedule: Callable[[Position], dict[str, float]], position: Position) -> set[str]:
    """The names of the scheduled values that are the same in all epochs of a run; its arguments tell them.

    Args:
        schedule: of the task.
        position: any of the run.
    """
    middle = position.updates_per_epoch // 2
    places = [replace(position, epoch=epoch, step=step) for epoch in range(position.epochs) for step in (0, middle)]
    rows = [schedule(place) for place in places]
    return {name for name in rows[0] if len({row[name] for row in rows}) == 1}


def as_table(arguments: Mapping[str, Any]) -> str:
    """The arguments as a table in Markdown, which TensorBoard shows as one."""
    rows = (f"| {name} | {str(value).replace('|', chr(92) + '|')} |" for name, value in sorted(arguments.items()))
    return "\n".join(["| argument | value |", "|---|---|", *rows])


class EpochLog:
    """``log.txt``: one JSON object per line and exactly one line per epoch, however often the run was killed."""

    def __init__(self, path: Path, first_epoch: int):
        """Keep the lines of epochs before ``first_epoch``; the run repeats the later ones."""
        self.path = Path(path)
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        try:
            self.lines = [line for line in lines if json.loads(line)["epoch"] < first_epoch]
        except (ValueError, KeyError, TypeError):
            free = free_folder(self.path.parent)
            raise UserError(f"{path} is not a log of this program; give --output-dir {free}") from None

    def write(self, record: dict) -> None:
        """Add the record of one epoch."""
        self.lines.append(json.dumps(record))
        write_atomically(self.path, lambda file: file.write(("\n".join(self.lines) + "\n").encode()))


class Records:
    """Writes log.txt, TensorBoard's events and the terminal's lines; does nothing on ranks other than 0."""

    def __init__(self, run: Run, val_images: int = 0):
        """``val_images``: number of images of an evaluation."""
        self.run, self.log, self.board = run, None, None
        self.begin, self.val_images = run.position, val_images
        self.timed_from: tuple[float, int] | None = None
        self.told_length = False
        self.start_time, self.first_update = time.monotonic(), run.position.update
        self.warming_up, self.waits, self.rates = True, [], []  # of this epoch's windows, without the very first
        self.warned_of_loader = False
        if not run.processes.is_main:
            return
        output = run.plan.output_dir
        self.log = EpochLog(output / "log.txt", run.epoch)
        write_json(output / "args.json", run.arguments)
        write_json(output / "environment.json", environment())
        self.board = SummaryWriter(str(output), purge_step=self._global_step() + 1)
        self.board.add_text("arguments", as_table(run.arguments), self._global_step())
        self.constants = constant_values(run.task.schedule, run.position)

    def _global_step(self) -> int:
        return self.run.position.update

    def step(self, means: dict) -> None:
        """Record the means since the last logging step."""
        if not self.run.processes.is_main:
            return
        if not self.warming_up:  # at first workers start, and kernels are loaded or compiled
            self.waits.append(means["data_share"])
            self.rates.append(means["images_per_second"])
        self.warming_up = False
        device = self.run.processes.device
        if device.type == "cuda":  # the allocator's own count: no synchronisation with the device
            means = means | {"peak_memory": torch.cuda.max_memory_allocated(device) / 2**30}
        for name, value in means.items():
            if name not in self.constants:
                self.board.add_scalar(f"{'time' if name in ABOUT_TIME else 'train'}/{name}", value, self._global_step())
        logger.info(step_line(self.run.position, means, self._seconds_left()))
        if warning := self.run.task.warning(means):
            logger.warning(warning)

    def update(self) -> None:
        """Once, after the first updates, log how long the whole run takes. The device is not waited for."""
        # the first update of an epoch is not timed: workers start, kernels are loaded, an epoch was evaluated
        run, position = self.run, self.run.position
        if self.told_length or not run.processes.is_main:
            return
        if self.timed_from is None:
            self.timed_from = time.monotonic(), position.update
            return
        seconds, updates = time.monotonic() - self.timed_from[0], position.update - self.timed_from[1]
        if updates < FIRST_UPDATES and seconds < FIRST_SECONDS and position.step < position.updates_per_epoch:
            return
        self.told_length, step_time = True, seconds / updates
        images = self.val_images * len(run.task.evaluated())
        evaluation_time = EVALUATION_SHARE * step_time / run.plan.total_batch * images
        logger.info(describe_length(run.plan, self.begin, step_time, evaluation_time))

    def _seconds_left(self) -> float:
        """Time to the end of the run at this process's mean time per update, evaluation and saving included."""
        position = self.run.position
        done = position.update - self.first_update
        left = position.epochs * position.updates_per_epoch - position.update
        return (time.monotonic() - self.start_time) / done * left

    def epoch(self, record: dict, results: dict[str, dict]) -> None:
        """Record the end of an epoch.

        Args:
            record: its line of log.txt, from `epoch_record`.
            results: of each evaluated model, by name; empty if the epoch was not evaluated.
        """
        self.timed_from = None
        if not self.run.processes.is_main:
            return
        for models, measured in results.items():
            for name, value in measured.items():
                if not isinstance(value, int):  # a count of the data, the same after every epoch
                    self.board.add_scalar(f"{models}/{name}", value, self._global_step())
        self.board.flush()
        self.log.write(record)
        task, epoch = self.run.task, f"epoch {record['epoch']}"
        if not results and self.val_images:
            logger.info(f"{epoch}: not evaluated (--eval-every)")
        if self.waits and statistics.mean(self.waits) > LARGEST_WAIT and not self.warned_of_loader:
            self.warned_of_loader = True
            workers = self.run.arguments["num_workers"]
            logger.warning(describe_bottleneck(statistics.mean(self.waits), statistics.mean(self.rates), workers))
        self.waits, self.rates = [], []
        for name, measured in results.items():
            which = "" if name == "test" else f", {name.removeprefix('test_')} weights"
            logger.info(f"{epoch}{which}: {task.describe(measured)}")

    def figure(self, name: str, figure) -> None:
        """Write a Matplotlib figure to TensorBoard."""
        self.board.add_figure(name, figure, self._global_step())

    def picture(self, name: str, image) -> None:
        """Write an RGB image of Pillow to TensorBoard."""
        self.board.add_image(name, np.asarray(image), self._global_step(), dataformats="HWC")

    def __enter__(self):
        return self

    def __exit__(self, *error):
        if self.board is not None:
            self.board.close()


def epoch_record(run: Run, results: dict[str, dict]) -> dict:
    """The epoch's line of log.txt; the keys are DeiT's where DeiT logs the value."""
    totals = dict(run.totals)
    updates, seconds, data_time = (totals.pop(name) for name in ("updates", "seconds", "data_time"))
    unreadable = totals.pop("unreadable")
    return {
        "epoch": run.epoch,
        **{f"train_{name}": total / updates for name, total in totals.items()},
        "train_unreadable": unreadable,
        **{f"{name}_{key}": value for name, measured in results.items() for key, value in measured.items()},
        "reported": run.task.reported,
        "metric": run.task.metric,
        "train_images": run.plan.num_images,
        "n_parameters": sum(p.numel() for p in run.task.model.parameters() if p.requires_grad),
        "images_per_second": run.plan.total_batch * updates / seconds,
        "data_time": data_time / updates,
        "step_time": seconds / updates,
    }
