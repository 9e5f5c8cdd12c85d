"""Where a run tells how it goes: ``log.txt``, TensorBoard and the terminal."""

import json
from pathlib import Path

import torch
from torch.utils.tensorboard import SummaryWriter

from analysis.attention import similarity_maps
from analysis.images import choose_samples
from datasets import AugmentedDataset
from engine import Run
from utils import UserError, environment, logger, write_atomically, write_json

PANEL_IMAGES = 4  # in a panel of attention maps
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
        output = Path(run.args.output_dir)
        self.log = EpochLog(output / "log.txt", run.epoch)
        write_json(output / "args.json", vars(run.args))
        write_json(output / "environment.json", environment())
        self.board = SummaryWriter(str(output), purge_step=self._global_step() + 1)

    def _global_step(self) -> int:
        return self.run.epoch * self.run.plan.updates_per_epoch + self.run.step

    def step(self, means: dict) -> None:
        """Tell the means since the last logging step."""
        if not self.run.processes.is_main:
            return
        for name, value in means.items():
            self.board.add_scalar(f"train/{name}", value, self._global_step())
        position = f"epoch {self.run.epoch} [{self.run.step}/{self.run.plan.updates_per_epoch}]"
        words = [f"{SHORT.get(name, name)} {value:.4g}" for name, value in means.items()]
        logger.info("  ".join([position, *words]))

    def epoch(self, record: dict) -> None:
        """Tell an epoch's results."""
        if not self.run.processes.is_main:
            return
        for name, value in record.items():
            if name.startswith("test"):
                self.board.add_scalar(name.replace("_", "/", 1), value, self._global_step())
        self.board.flush()
        self.log.write(record)
        logger.info(f"epoch {record['epoch']}: " + describe(record, "test_"))
        if "test_ema_acc1" in record:
            logger.info(f"epoch {record['epoch']}, averaged weights: " + describe(record, "test_ema_"))

    def attention(self, dataset: AugmentedDataset) -> None:
        """Draw each head's attention on a few images, always the same, of different classes."""
        if not self.run.processes.is_main:
            return
        from analysis.panels import attention_panel  # Matplotlib takes a second to import, and most runs never draw

        samples = choose_samples(dataset, PANEL_IMAGES)
        images = torch.stack([image for image, _ in samples])
        similarity = similarity_maps(self.run.model.eval(), images.to(self.run.processes.device))
        titles = [dataset.classes[label] for _, label in samples]
        self.board.add_figure("attention", attention_panel(images, similarity, titles=titles), self._global_step())

    def __enter__(self):
        return self

    def __exit__(self, *error):
        if self.board is not None:
            self.board.close()


def epoch_record(run: Run, results: dict) -> dict:
    """The epoch's line of log.txt, under DeiT's names where DeiT has the value."""
    totals = dict(run.totals)
    updates, seconds, data_time = (totals.pop(name) for name in ("updates", "seconds", "data_time"))
    unreadable = totals.pop("unreadable")
    return {
        "epoch": run.epoch,
        **{f"train_{name}": total / updates for name, total in totals.items()},
        "train_unreadable": unreadable,
        **results,
        "reported": run.args.report,
        "train_images": run.plan.num_images,
        "n_parameters": sum(p.numel() for p in run.model.parameters() if p.requires_grad),
        "images_per_second": run.plan.total_batch * updates / seconds,
        "data_time": data_time / updates,
        "step_time": seconds / updates,
    }


def describe(results: dict, prefix: str = "") -> str:
    """One line of an evaluation's results."""
    if f"{prefix}acc1" not in results:
        return "not evaluated (--eval-every)"
    value = {name.removeprefix(prefix): number for name, number in results.items()}
    return (
        f"* Acc@1 {value['acc1']:.3f} Acc@5 {value['acc5']:.3f} loss {value['loss']:.4f} "
        f"spatial entropy {value['spatial_entropy']:.3f} components {value['components']:.2f} "
        f"({value['images']} images)"
    )
