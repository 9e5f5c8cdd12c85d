"""The log of a run, read: the metric of the reported weights after each epoch."""

import json
from dataclasses import dataclass
from pathlib import Path

ACCURACY = "acc1"
"""The metric's name in logs of earlier versions, which do not name it: top-1 accuracy (percent)."""


@dataclass(frozen=True)
class Epoch:
    """One line of log.txt; ``value`` is the metric of the reported weights, None if the epoch was not evaluated."""

    done: int
    metric: str
    value: float | None
    test_images: int | None
    train_images: int | None


def read_epoch(line: str) -> Epoch:
    """Read a line of main.py's log; raises ValueError, KeyError or TypeError for anything else."""
    record = json.loads(line)
    done, metric = int(record["epoch"]) + 1, record.get("metric", ACCURACY)
    averaged = f"test_{record['reported']}"  # averaged weights add their name; the model's own do not
    weights = averaged if f"{averaged}_{metric}" in record else "test"
    if f"{weights}_{metric}" not in record:
        return Epoch(done, metric, None, None, None)
    value, test_images = float(record[f"{weights}_{metric}"]), int(record[f"{weights}_images"])
    return Epoch(done, metric, value, test_images, record.get("train_images"))


def last_and_best(folder: Path) -> tuple[str, float, float] | None:
    """The metric of a run, and its values after the last evaluated and the best epoch; None without a readable one."""
    try:
        epochs = [read_epoch(line) for line in (folder / "log.txt").read_text().splitlines()]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    evaluated = [(epoch.metric, epoch.value) for epoch in epochs if epoch.value is not None]
    return (*evaluated[-1], max(value for _, value in evaluated)) if evaluated else None
