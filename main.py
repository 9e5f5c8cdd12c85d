"""Train or evaluate a classifier.

    python main.py --model vit_small_sar                                      # self-check on embedded digits
    python main.py --model vit_small_sar --data-path /data/imagenet           # one process, CPU or GPU
    torchrun --nproc_per_node=8 main.py --model vit_small_sar --data-path /data/imagenet

Where a run begins (``begin`` below), the first that applies:
1. ``checkpoint.pth`` in ``--output-dir``: the same run goes on, exactly where it was;
2. ``--resume FILE``: another folder's run goes on in this one;
3. ``--finetune FILE``: a new run from these weights;
4. from scratch.
"""

import math
import sys
import traceback
from pathlib import Path

from tqdm.contrib.logging import logging_redirect_tqdm

from arguments import parse_arguments
from build import banner, build_eval_loader, build_model, build_plan, build_run, build_split, choose_amp
from checkpoints import load_weights, read_checkpoint, restore, save
from engine import NonFiniteLoss, Run, evaluate, train_one_epoch
from records import Records, describe, epoch_record
from utils import (
    Processes,
    RunError,
    StopSignal,
    UserError,
    end_processes,
    logger,
    prepare_output_dir,
    start_logging,
    start_processes,
)


def main(argv: list[str] | None = None) -> int:
    """Do what the command line says; returns the exit code.

    0: done, or ended by SIGTERM or SIGUSR1 with everything saved. 1: the run failed. 2: the command cannot
    be carried out as it stands. 130: ended by Ctrl-C with everything saved.
    """
    try:
        args = parse_arguments(argv)
        processes = start_processes(args.device)
        start_logging(processes.rank)
        return evaluate_only(argv, args, processes) if args.eval else train(args, processes)
    except (UserError, RunError) as error:
        traceback.clear_frames(error.__traceback__)  # they hold the loader, whose workers would end one by one
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1
    finally:
        end_processes()


def begin(run: Run) -> None:
    """Own checkpoint > ``--resume`` > ``--finetune`` > scratch (see the top of this file)."""
    own = Path(run.args.output_dir, "checkpoint.pth")
    resume = own if own.exists() else Path(run.args.resume) if run.args.resume else None
    if resume is not None:
        restore(run, read_checkpoint(resume), resume)
        logger.info(f"going on from {resume}: epoch {run.epoch}, step {run.step}")
    elif run.args.finetune:
        for note in load_weights(run.model, run.args.finetune, run.args.checkpoint_key):
            logger.info(f"{run.args.finetune}: {note}")
        if run.ema is not None:
            run.ema.set(run.model)


def train(args, processes: Processes) -> int:
    """Train to the end, or to a signal; returns the exit code."""
    train_set, num_classes = build_split(args, "train")
    val_set, _ = build_split(args, "val")
    plan = build_plan(args, processes, len(train_set))
    if processes.is_main:
        prepare_output_dir(Path(args.output_dir))
    with StopSignal(processes) as stop, logging_redirect_tqdm([logger]):
        run = build_run(args, plan, processes, stop, train_set, num_classes)
        banner(run, len(train_set))
        begin(run)
        return train_epochs(run, build_eval_loader(args, processes, val_set))


def train_epochs(run: Run, val_loader) -> int:
    """Train from where the run stands to the end, or to a signal; returns the exit code."""
    plan, output = run.plan, Path(run.args.output_dir)
    if run.epoch == plan.epochs:
        logger.info(f"already trained for {plan.epochs} epochs; best: {run.best}")
        return 0
    records = Records(run)
    while run.epoch < plan.epochs:
        if not one_epoch(run, val_loader, records):
            save(run, "checkpoint.pth")
            logger.info(f"saved at epoch {run.epoch}, step {run.step}; the same command goes on from there")
            return run.stop.exit_code
    records.close()
    logger.info(f"done; best: {run.best} in {output / 'best.pth'}")
    return 0


def one_epoch(run: Run, val_loader, records: Records) -> bool:
    """Train what is left of the epoch, evaluate, and save; False where a signal ended it before that.

    Files are written in the order best.pth, log.txt, checkpoint.pth: a run killed between two of them does
    the epoch again from the older checkpoint and writes the same once more.
    """
    if not train_one_epoch(run, records.step):
        return False
    done = run.epoch + 1
    last = done == run.plan.epochs
    results = {}
    if last or done % run.args.eval_every == 0:
        results = evaluate_run(run, val_loader)
        if not results:
            return False
    improved = note_best(run, results)
    record = epoch_record(run, results)
    run.epoch, run.step, run.totals = done, 0, {}
    if improved:
        save(run, "best.pth")
    records.epoch(record)
    if last or done % run.args.save_every == 0:
        save(run, "checkpoint.pth")
    return True


def evaluate_run(run: Run, loader) -> dict:
    """Evaluate the model, and its average if there is one; empty where a signal interrupted.

    Raises:
        NonFiniteLoss: the weights give no finite loss, so they are not saved.
    """
    alone = run.processes.world_size == 1
    interrupted = (lambda: run.stop.received is not None) if alone else (lambda: False)
    results = {}
    models = {"test": run.model} | ({"test_ema": run.ema.module} if run.ema else {})
    for name, model in models.items():
        means = evaluate(model, loader, run.processes, run.plan.amp_dtype, interrupted)
        if means is None:
            return {}
        if not math.isfinite(means["loss"]):
            raise NonFiniteLoss(f"the {name} loss is {means['loss']} after epoch {run.epoch}; not saved")
        results |= {f"{name}_{metric}": value for metric, value in means.items()}
    return results


def note_best(run: Run, results: dict) -> bool:
    """Remember the best reported accuracy; whether this is it."""
    key = "test_ema_acc1" if run.args.report == "ema" else "test_acc1"
    if not results or results[key] <= run.best.get("acc1", -1.0):
        return False
    run.best = {"acc1": results[key], "epoch": run.epoch, "weights": run.args.report}
    return True


def evaluate_only(argv, args, processes: Processes) -> int:
    """Evaluate one file; what its run was told and is not given here (model, sizes) is taken from it."""
    own = Path(args.output_dir, "best.pth")
    path = Path(args.resume or args.finetune or own)
    if not path.exists():
        raise UserError(f"--eval: nothing to evaluate; give --resume FILE (there is no {own})")
    checkpoint = read_checkpoint(path)
    args = parse_arguments(argv, saved=checkpoint.get("args"))
    dataset, num_classes = build_split(args, "val")
    model = build_model(args, num_classes, processes.device)
    for note in load_weights(model, checkpoint, args.checkpoint_key, keep_head=True):
        logger.info(f"{path}: {note}")
    dtype, _ = choose_amp(args.amp, processes.device)
    means = evaluate(model, build_eval_loader(args, processes, dataset), processes, dtype)
    logger.info(describe(means))
    return 0


if __name__ == "__main__":
    sys.exit(main())
