"""What a run writes, and where it begins."""

from pathlib import Path

import torch

from arguments import differences
from engine import NonFiniteLoss, Run
from utils import UserError, logger, write_atomically
from weights import load_weights, read_checkpoint


def snapshot(run: Run) -> dict:
    """Everything a run needs to go on, as tensors and plain values (no random state: there is none)."""
    beside = {name: localiser.state_dict() for name, localiser in localisers(run).items()}
    return {
        "model": run.model.state_dict(),
        "ema": run.ema.module.model.state_dict() if run.ema else None,
        **({"localiser": beside} if beside else {}),
        "optimizer": run.optimizer.state_dict(),
        "scheduler": run.scheduler.state_dict(),
        "scaler": run.scaler.state_dict(),
        "epoch": run.epoch,
        "step": run.step,
        "best": run.best,
        "totals": run.totals,
        "args": vars(run.args),
        "data": {"training images": run.plan.num_images, "classes": run.plan.classes},
        "precision": str(run.plan.amp_dtype or torch.float32),
    }


def localisers(run: Run) -> dict[str, torch.nn.Module]:
    """DRLoc's MLP beside the model and beside its average; empty without DRLoc."""
    trainees = {"model": run.trainee} | ({"ema": run.ema.module} if run.ema else {})
    return {name: trainee.localiser for name, trainee in trainees.items() if trainee.localiser is not None}


def save(run: Run, name: str) -> None:
    """Write the run to this file of its output folder.

    Raises:
        NonFiniteLoss: the weights are not finite; the file is left as it is.
        RunError: see ``write_atomically``.
    """
    if not run.processes.is_main:
        return
    if not torch.nn.utils.get_total_norm(run.trainee.parameters()).isfinite():
        raise NonFiniteLoss(f"weights are not finite after epoch {run.epoch}, step {run.step}; not saved")
    write_atomically(Path(run.args.output_dir, name), lambda file: torch.save(snapshot(run), file))


def restore(run: Run, checkpoint: dict, source: Path) -> None:
    """Set the run to where the checkpoint was written.

    Raises:
        UserError: the checkpoint belongs to a run with other mathematics or data, or to none of this program.
    """
    own = snapshot(run)
    missing = [key for key in own if key not in checkpoint]
    if missing:
        raise UserError(
            f"{source} has no {', '.join(missing)}: not a checkpoint of this program; "
            "to start from its weights use --finetune"
        )
    different = differences(run.args, checkpoint["args"])
    for name in ("training images", "classes"):
        if own["data"][name] != checkpoint["data"][name]:
            different.append(f"{name} are others than the checkpoint's")
    if own["precision"] != checkpoint["precision"]:
        different.append(f"{checkpoint['precision']} in the checkpoint, {own['precision']} now: see --amp")
    if different:
        raise UserError(
            f"{source} was written with other arguments or data; give those, or another --output-dir ("
            + "; ".join(different)
            + ")"
        )
    run.model.load_state_dict(checkpoint["model"])
    if run.ema is not None:
        run.ema.module.model.load_state_dict(checkpoint["ema"])
    for name, localiser in localisers(run).items():
        localiser.load_state_dict(checkpoint["localiser"][name])
    run.optimizer.load_state_dict(checkpoint["optimizer"])
    run.scheduler.load_state_dict(checkpoint["scheduler"])
    run.scaler.load_state_dict(checkpoint["scaler"])
    run.epoch, run.step = checkpoint["epoch"], checkpoint["step"]
    run.best, run.totals = checkpoint["best"], checkpoint["totals"]


def start_or_resume(run: Run) -> None:
    """Own checkpoint > ``--resume`` > ``--finetune`` > scratch (see the top of this file).

    Raises:
        UserError: a file that cannot be used, or processes that would begin at different places.
    """
    own = Path(run.args.output_dir, "checkpoint.pth")
    if own.exists():
        restore(run, read_checkpoint(own), own)
        logger.info(f"going on from {own}: epoch {run.epoch}, step {run.step}")
    elif run.args.resume:
        restore(run, read_checkpoint(run.args.resume), run.args.resume)
        run.best = {}  # best.pth stayed in the other folder
        logger.info(f"going on from {run.args.resume}: epoch {run.epoch}, step {run.step}")
    elif run.args.finetune:
        for note in load_weights(run.model, run.args.finetune, run.args.checkpoint_key):
            logger.info(f"{run.args.finetune}: {note}")
        if run.ema is not None:
            run.ema.set(run.trainee)
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
