"""Where a run tells how it goes: ``log.txt``, TensorBoard and the terminal."""

import json
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from engine import Run
from utils import UserError, environment, logger, write_atomically, write_json

SHORT = {
    "images_per_second": "images/s",
    "data_time": "data s",
    "step_time": "step s",
    "sar_weight": "lambda",
    "drloc_weight": "DRLoc weight",
}


class EpochLog:
    """``log.txt``: one JSON object an epoch, one line an epoch after any number of kills."""

    def __init__(self, path: Path, first_epoch: int):
        """Keep the lines of epochs before ``first_epoch``: later ones are about to be done again."""
        self.path = Path(path)
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        try:
            self.lines = [line for line in lines if json.loads(line)["epoch"] < first_epoch]
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{path} is not a log of this program; name another --output-dir") from None

    def write(self, record: dict) -> None:
        """Add the record of one epoch."""
        self.lines.append(json.dumps(record))
        write_atomically(self.path, lambda file: file.write(("\n".join(self.lines) + "\n").encode()))


class Records:
    """Where a run tells how it goes: log.txt, TensorBoard, and the terminal. Silent on ranks other than 0."""

    def __init__(self, run: Run):
        self.run, self.log, self.board = run, None, None
        if not run.processes.is_main:
            return
        output = run.plan.output_dir
        self.log = EpochLog(output / "log.txt", run.epoch)
        write_json(output / "args.json", run.arguments)
        write_json(output / "environment.json", environment())
        self.board = SummaryWriter(str(output), purge_step=self._global_step() + 1)

    def _global_step(self) -> int:
        return self.run.position.update

    def step(self, means: dict) -> None:
        """Tell the means since the last logging step."""
        if not self.run.processes.is_main:
            return
        for name, value in means.items():
            self.board.add_scalar(f"train/{name}", value, self._global_step())
        position = f"epoch {self.run.epoch} [{self.run.step}/{self.run.plan.updates_per_epoch}]"
        words = [f"{SHORT.get(name, name)} {value:.4g}" for name, value in means.items()]
        logger.info("  ".join([position, *words]))

    def epoch(self, record: dict, results: dict[str, dict]) -> None:
        """Tell an epoch's results: its line for log.txt, and those of each evaluated model."""
        if not self.run.processes.is_main:
            return
        for name, value in record.items():
            if name.startswith("test"):
                self.board.add_scalar(name.replace("_", "/", 1), value, self._global_step())
        self.board.flush()
        self.log.write(record)
        task, place = self.run.task, f"epoch {record['epoch']}"
        if not results:
            logger.info(f"{place}: not evaluated (--eval-every)")
        for name, measured in results.items():
            which = "" if name == "test" else f", {name.removeprefix('test_')} weights"
            logger.info(f"{place}{which}: {task.describe(measured)}")

    def figure(self, name: str, figure) -> None:
        """Keep a Matplotlib figure in TensorBoard."""
        self.board.add_figure(name, figure, self._global_step())

    def __enter__(self):
        return self

    def __exit__(self, *error):
        if self.board is not None:
            self.board.close()


def epoch_record(run: Run, results: dict[str, dict]) -> dict:
    """The epoch's line of log.txt, under DeiT's names where DeiT has the value."""
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
