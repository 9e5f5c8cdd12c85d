"""What a run writes, and where it begins.

A checkpoint holds, as tensors and plain values (there is no random state to keep: ``randomness.py``):

    model, ema              weights, under the task's names for them (weight_names); ema is None without an average
    localiser, ...          whatever else of the task has a state, under its name
    optimizer, scaler       their states
    epoch, step, best, totals   where the run stands
    args, data, precision   what it must have in common with a run that goes on from it
"""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from arguments import differences
from engine import NonFiniteLoss, Run
from tasks import Task
from utils import UserError, logger, write_atomically
from weights import load_weights, read_checkpoint


def parts(task: Task) -> dict[str, nn.Module | None]:
    """Every module of a task that has a state, under its name in a checkpoint; None: an average that is off."""
    model, averaged = task.weight_names
    return {model: task.model, averaged: task.averaged, **task.beside()}


def snapshot(run: Run) -> dict[str, Any]:
    """Everything a run needs to go on."""
    states = {name: None if module is None else module.state_dict() for name, module in parts(run.task).items()}
    rest = {
        "weight_names": list(run.task.weight_names),
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
        raise ValueError(f"{type(run.task).__name__} cannot call a part of it {', '.join(states.keys() & rest.keys())}")
    return states | rest


def save(run: Run, name: str) -> None:
    """Write the run to this file of its output folder.

    Raises:
        NonFiniteLoss: the weights are not finite; the file is left as it is.
        RunError: see ``write_atomically``.
    """
    if not run.processes.is_main:
        return
    if not torch.nn.utils.get_total_norm(run.task.parameters()).isfinite():
        raise NonFiniteLoss(f"weights are not finite after epoch {run.epoch}, step {run.step}; not saved")
    write_atomically(run.plan.output_dir / name, lambda file: torch.save(snapshot(run), file))


def restore(run: Run, checkpoint: dict[str, Any], source: Path) -> None:
    """Set the run to where the checkpoint was written.

    Raises:
        UserError: the checkpoint belongs to a run with other mathematics or data, or to none of this program.
    """
    _check_same_run(run, checkpoint, source)
    for name, module in parts(run.task).items():
        if module is not None:
            module.load_state_dict(checkpoint[name])
    run.optimizer.load_state_dict(checkpoint["optimizer"])
    run.scaler.load_state_dict(checkpoint["scaler"])
    run.epoch, run.step = checkpoint["epoch"], checkpoint["step"]
    run.best, run.totals = checkpoint["best"], checkpoint["totals"]


def _check_same_run(run: Run, checkpoint: dict[str, Any], source: Path) -> None:
    """Refuse a checkpoint that this run cannot go on from; see `restore`."""
    own = snapshot(run)
    missing = [key for key in own if key not in checkpoint and key != "weight_names"]  # older ones have no such entry
    if missing:
        raise UserError(
            f"{source} has no {', '.join(missing)}: not a checkpoint of this program; "
            "to start from its weights use --finetune"
        )
    different = differences(run.arguments, checkpoint["args"])
    for name in ("training images", "classes"):
        if own["data"][name] != checkpoint["data"][name]:
            different.append(f"{name} are others than the checkpoint's")
    if own["precision"] != checkpoint["precision"]:
        different.append(f"{checkpoint['precision']} in the checkpoint, {own['precision']} now: see --amp")
    for name, module in parts(run.task).items():
        if module is not None and checkpoint[name] and checkpoint[name].keys() != own[name].keys():
            different.append(f"its {name} has other weights, as an older version wrote them")
    if different:
        raise UserError(
            f"{source} was written with other arguments or data; give those, or another --output-dir ("
            + "; ".join(different)
            + ")"
        )


def start_or_resume(run: Run, resume: str = "", finetune: str = "", key: str | None = None) -> None:
    """Own checkpoint > ``--resume`` > ``--finetune`` > scratch.

    Args:
        resume: another run's checkpoint to go on from.
        finetune, key: weights to begin with, see ``weights.load_weights``.

    Raises:
        UserError: a file that cannot be used, or processes that would begin at different places.
    """
    own = run.plan.output_dir / "checkpoint.pth"
    source = own if own.exists() else Path(resume) if resume else None
    if source:
        restore(run, read_checkpoint(source), source)
        if source != own:
            run.best = {}  # best.pth stayed in the other folder
        logger.info(f"going on from {source}: epoch {run.epoch}, step {run.step}")
    elif finetune:
        for note in load_weights(run.task.model, finetune, key):
            logger.info(f"{finetune}: {note}")
        run.task.reset_averaged()
    places = run.processes.gather(torch.tensor([run.epoch, run.step], device=run.processes.device))
    if (places != places[0]).any():
        raise UserError(f"--output-dir {own.parent}: not every process sees its checkpoint; name a shared folder")


def epochs_saved(folder: Path) -> int:
    """Finished epochs of whatever run the folder holds; 0 where there is none yet.

    Raises:
        UserError: a damaged file.
    """
    path = folder / "checkpoint.pth"
    return read_checkpoint(path, lazily=True).get("epoch", 0) if path.exists() else 0
