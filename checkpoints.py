"""Checkpoints of a run: save, restore, and start or resume.

A checkpoint holds tensors and plain values (no random state, see ``randomness.py``):

    model, ema                  weights, under the task's names for them (weight_names); ema is None without averaging
    localiser, ...              the task's other modules with a state, by name
    optimizer, scaler           their states
    epoch, step, best, totals   position (step: updates in this epoch), best result, sums of this epoch
                                (best: metric, epoch, weights, and all results of its evaluation)
    reported                    the weights whose result picks best.pth
    args, data, precision       what must be the same in a run that resumes from it
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from arguments import differences
from engine import NonFiniteLoss, Run
from fetch import input_notes
from tasks import Task, load_task
from utils import UserError, free_folder, logger, write_atomically
from weights import Misfit, is_own, read_checkpoint


class NoImages:
    """In the place of a data set, for a task that only builds its model."""

    def __init__(self, classes: Sequence[str]):
        self.classes = classes

    def __len__(self) -> int:
        return 0


LENGTH = ("epochs", "cooldown_epochs")
"""The options that make up the length of a run; ``--resume`` from another folder may change them."""


def saved_modules(task: Task) -> dict[str, nn.Module | None]:
    """The modules of a task that a checkpoint holds, by their keys; None for averaged weights that are off."""
    model, averaged = task.weight_names
    return {model: task.model, averaged: task.averaged, **task.other_modules()}


def snapshot(run: Run) -> dict[str, Any]:
    """The content of a checkpoint of the run."""
    states = {name: None if module is None else module.state_dict() for name, module in saved_modules(run.task).items()}
    rest = {
        "reported": run.task.reported,
        "optimizer": run.optimizer.state_dict(),
        "scaler": run.scaler.state_dict(),
        "epoch": run.epoch,
        "step": run.step,
        "best": run.best,
        "totals": run.totals,
        "args": run.arguments,
        "data": {"training images": run.plan.num_images, "classes": run.plan.classes},
        "precision": str(run.plan.amp_dtype or torch.float32),
    }
    if states.keys() & rest.keys():
        raise ValueError(
            f"{type(run.task).__name__}: a checkpoint uses {', '.join(states.keys() & rest.keys())} itself"
        )
    return states | rest


def save(run: Run, name: str) -> None:
    """Write a checkpoint of the run to a file in its output folder; ranks other than 0 do nothing.

    Raises:
        NonFiniteLoss: the weights are not finite; an existing file is not changed.
        RunError: see ``write_atomically``; or another run has taken the folder.
    """
    if not run.processes.is_main:
        return
    if run.owner is not None:
        run.owner.check()
    if not torch.nn.utils.get_total_norm(run.task.parameters()).isfinite():
        raise NonFiniteLoss(f"weights are not finite after epoch {run.epoch}, update {run.step}; not saved")
    write_atomically(run.plan.output_dir / name, lambda file: torch.save(snapshot(run), file))


def restore(run: Run, checkpoint: dict[str, Any], source: Path) -> None:
    """Set weights, optimiser and position of the run to those of a checkpoint.

    Raises:
        UserError: it is not a checkpoint of this program, or of a run with other mathematics or data.
    """
    _check_same_run(run, checkpoint, source)
    before, now = (run_length(args) for args in (checkpoint["args"], run.arguments))
    if before != now:
        logger.warning(f"{source} is of a run of {before} epochs: from here on schedules are those of {now} epochs")
    for name, module in saved_modules(run.task).items():
        if module is not None:
            module.load_state_dict(checkpoint[name])
    run.optimizer.load_state_dict(checkpoint["optimizer"])
    run.scaler.load_state_dict(checkpoint["scaler"])
    run.epoch, run.step = checkpoint["epoch"], checkpoint["step"]
    run.best, run.totals = checkpoint["best"], checkpoint["totals"]


def run_length(arguments: Mapping[str, Any]) -> int:
    """The number of epochs of a run with these arguments."""
    return sum(arguments.get(name, 0) for name in LENGTH)


def _check_same_run(run: Run, checkpoint: dict[str, Any], source: Path) -> None:
    """Refuse a checkpoint that this run cannot resume from; see `restore`."""
    # 1. every key is there
    own = snapshot(run)
    missing = [key for key in own if key not in checkpoint and key != "reported"]  # not in older ones
    if missing:
        raise UserError(
            f"{source} is not a checkpoint of this program (it has no {', '.join(missing)}); "
            "to start from its weights use --finetune"
        )
    # 2. arguments, data, precision and weights are the same
    saved, elsewhere = dict(checkpoint["args"]), source != run.plan.output_dir / "checkpoint.pth"
    if elsewhere and run.plan.epochs >= checkpoint["epoch"]:  # --resume may change the length of a run
        saved |= {name: run.arguments[name] for name in LENGTH}
    different = differences(run.arguments, saved)
    for name in ("training images", "classes"):
        if own["data"][name] != checkpoint["data"][name]:
            different.append(f"{name} differ from the checkpoint's")
    if own["precision"] != checkpoint["precision"]:
        different.append(f"{checkpoint['precision']} in the checkpoint, {own['precision']} now: see --amp")
    for name, module in saved_modules(run.task).items():
        if module is not None and checkpoint[name] and checkpoint[name].keys() != own[name].keys():
            different.append(f"weights of {name} have other names, as an older version wrote them")
    if different:
        free = f"--output-dir {free_folder(run.plan.output_dir)}"
        mend = f"to start a new run from its weights, --finetune {source}" if elsewhere else free
        if not elsewhere and all(line.startswith(("--epochs:", "--cooldown-epochs:")) for line in different):
            mend += f" and --resume {source}, to change the number of epochs"
        raise UserError(
            f"{source} is of a run with other arguments or data; give the same, or {mend} ({'; '.join(different)})"
        )


def start_or_resume(run: Run, resume: str = "", finetune: str = "", key: str | None = None) -> None:
    """Start or resume a run: from its own checkpoint, else ``resume``, else ``finetune``, else random weights.

    Args:
        resume: checkpoint of another run to resume from.
        finetune, key: initial weights, see `weights.load_weights`.

    Raises:
        UserError: a file cannot be used, or the processes would start at different positions.
    """
    own = run.plan.output_dir / "checkpoint.pth"
    source = own if own.exists() else Path(resume) if resume else None
    if source:
        restore(run, read_checkpoint(source), source)
        if source != own:
            run.best = {}  # its best.pth is in the other folder
        logger.info(f"resuming from {source}: epoch {run.epoch}, update {run.step}")
    elif finetune:
        with named(finetune, run.arguments):
            notes = [*input_notes(finetune), *run.task.start_from(finetune, key)]
        for note in notes:
            logger.info(f"{finetune}: {note}")
    positions = run.processes.gather(torch.tensor([run.epoch, run.step], device=run.processes.device))
    if (positions != positions[0]).any():
        raise UserError(f"--output-dir {own.parent}: not all processes see its checkpoint; name a shared folder")


@contextmanager
def named(path: str | Path, arguments: Mapping[str, Any] = MappingProxyType({})) -> Iterator[None]:
    """Begin the message of a UserError with the file that it is about.

    Weights that do not fit, because ``arguments`` describe another model than that of the file's run, are told so.
    """
    try:
        yield
    except UserError as error:
        text = (isinstance(error, Misfit) and other_sizes(arguments, read_checkpoint(path, lazily=True))) or str(error)
        raise UserError(text if text.startswith(str(path)) else f"{path}: {text}") from error


def other_sizes(arguments: Mapping[str, Any], checkpoint: Mapping) -> str:
    """In which options a model differs from that of a checkpoint's run, in words; empty if it does not.

    Sizes of images and patches are left out, as weights are resampled to them.
    """
    if not (is_own(checkpoint) and arguments):
        return ""
    model, own = (args["model"].removesuffix("_sar") for args in (checkpoint["args"], arguments))
    if own != model:
        return f"--model {own} does not fit the weights, which are of --model {model}; leave it out"
    ours, theirs = (
        {f"--model-kwargs {name}=": value for name, value in args["model_kwargs"].items() if name != "pretrain_size"}
        for args in (arguments, checkpoint["args"])
    )
    given = [f"{option}{value}" for option, value in ours.items() if theirs.get(option) != value]
    before = [f"{option}{value}" for option, value in theirs.items() if ours.get(option) != value]
    if not given:
        return ""
    of = f"are of {' '.join(before)}" if before else "are of a run without it"
    return f"{' '.join(given)} does not fit the weights, which {of}; leave it out"


def load_trained(args, dataset: Any, checkpoint: Mapping, path: str | Path, device: torch.device) -> Task:
    """The task that the arguments describe, with the weights of a checkpoint; adaptations of them are logged.

    Args:
        args: with the task, and ``checkpoint_key``.
        dataset: the images that are evaluated, or `NoImages`.
        checkpoint: the content of the file ``path``.

    Raises:
        UserError: see `Task.load`; the message names the file.
    """
    with named(path, vars(args)):
        task = load_task(args.task)(args, dataset, device)
        for note in [*input_notes(path), *task.load(checkpoint, args.checkpoint_key)]:
            logger.info(f"{path}: {note}")
    return task


def epochs_saved(folder: Path) -> int:
    """The number of finished epochs in the checkpoint of a run's folder; 0 without a checkpoint.

    Raises:
        UserError: the file is damaged.
    """
    path = folder / "checkpoint.pth"
    return read_checkpoint(path, lazily=True).get("epoch", 0) if path.exists() else 0
