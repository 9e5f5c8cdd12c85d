"""Train or evaluate a classifier.

    python main.py --model vit_small_sar                                      # self-check on embedded digits
    python main.py --model vit_small_sar --data-path /data/imagenet           # one process, CPU or GPU
    torchrun --nproc_per_node=8 main.py --model vit_small_sar --data-path /data/imagenet

Where a run begins (``checkpoints.start_or_resume``), the first that applies:
1. ``checkpoint.pth`` in ``--output-dir``: the same run goes on, exactly where it was;
2. ``--resume FILE``: another folder's run goes on in this one;
3. ``--finetune FILE``: a new run from these weights;
4. from scratch.
"""

import math
import os
import signal
import sys
import textwrap
import time
import traceback
from pathlib import Path

import torch
from timm.utils import distribute_bn
from tqdm.contrib.logging import logging_redirect_tqdm

from arguments import parse_arguments
from build import banner, build_eval_loader, build_model, build_plan, build_run, choose_amp
from checkpoints import save, start_or_resume
from datasets import build_split, cache_splits, save_subset
from engine import NonFiniteLoss, Run, evaluate, train_one_epoch
from records import Records, describe, epoch_record
from utils import (
    Processes,
    RunError,
    StopSignal,
    UserError,
    end_processes,
    logger,
    lost_another,
    prepare_output_dir,
    processes_here,
    start_logging,
    start_processes,
)
from weights import load_weights, read_checkpoint


def main(argv: list[str] | None = None) -> int:
    """Do what the command line says; returns the exit code.

    0: done, or ended by SIGTERM or SIGUSR1 with everything saved. 1: the run failed. 2: the command cannot
    be carried out as it stands. 75: ended by SIGUSR2 with everything saved, to be started again. 130: ended by
    Ctrl-C (training has saved everything).
    """
    processes = None
    try:
        args = parse_arguments(argv)
        processes = start_processes(args.device)
        start_logging(processes.rank)
        code = evaluate_only(argv, args, processes) if args.eval else train(args, processes)
    except KeyboardInterrupt:
        code = 130
    except Exception as error:
        code = tell(error, processes)
        traceback.clear_frames(error.__traceback__)  # they hold the loader, whose workers would end one by one
    end_processes()
    return code


def tell(error: Exception, processes: Processes | None) -> int:
    """Say on standard error what ended this process, and where; returns the exit code.

    One among several leaves its last words for the others and ends at once: they wait for it, and a clean farewell
    would wait for them.
    """
    place = "".join(f" {note}" for note in getattr(error, "__notes__", ()))
    if processes is not None and lost_another(error):
        if processes.is_main:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun's, for all that are left: the word first
        error = RunError(f"lost {processes.missing()}{place}; the same command goes on from the last checkpoint")
    elif processes is not None:
        processes.say(f"{type(error).__name__}: {str(error).partition(chr(10))[0]}{place}")
    expected = isinstance(error, UserError | RunError | OSError)
    if not expected and not torch.distributed.is_initialized():
        raise error
    rank, _, _ = processes_here()
    if expected and rank > 0:
        time.sleep(2)  # rank 0 has mostly the same to say, and what started the processes then ends this one
    text = f"error: {error}\n" if expected else "".join(traceback.format_exception(error))
    mark = f"[rank {rank}] " if rank > 0 else ""
    print(textwrap.indent(text, mark), end="", file=sys.stderr, flush=True)
    code = 2 if isinstance(error, UserError) else 1
    if torch.distributed.is_initialized():
        os._exit(code)
    return code


# ------------------------------------------------------------------------------------------------- the run


def train(args, processes: Processes) -> int:
    """Train to the end, or to a signal; returns the exit code."""
    train_set, _ = build_split(args, "train", processes)
    val_set, _ = build_split(args, "val", processes)
    plan = build_plan(args, processes, train_set)
    if processes.is_main:
        prepare_output_dir(Path(args.output_dir))
    with StopSignal(processes) as stop, logging_redirect_tqdm([logger]):
        run = build_run(args, plan, processes, stop, train_set)
        banner(run)
        start_or_resume(run)
        if processes.is_main:
            save_subset(train_set, args, Path(args.output_dir, "subset.json"))
        if args.cache_images and run.epoch < plan.epochs:
            cache_splits([train_set, val_set], processes)
        code = train_epochs(run, build_eval_loader(args, processes, val_set))
        processes.leave_together()
        return code


def train_epochs(run: Run, val_loader) -> int:
    """Train from where the run stands to the end, or to a signal; returns the exit code."""
    plan = run.plan
    if run.epoch == plan.epochs:
        logger.info(f"already trained for {plan.epochs} epochs; {best_so_far(run)}")
        return 0
    with Records(run) as records:
        while run.epoch < plan.epochs:
            try:
                finished = one_epoch(run, val_loader, records)
            except Exception as error:
                error.add_note(f"at epoch {run.epoch}, step {run.step}")
                raise
            if not finished:
                save(run, "checkpoint.pth")
                logger.info(f"saved at epoch {run.epoch}, step {run.step}; the same command goes on from there")
                return run.stop.exit_code
    logger.info(f"done; {best_so_far(run)}")
    return 0


def best_so_far(run: Run) -> str:
    """The best evaluation in words."""
    if not run.best:
        return "nothing was evaluated"
    place = f"epoch {run.best['epoch']}, weights: {run.best['weights']}"
    return f"best Acc@1 {run.best['acc1']:.3f} ({place}) in {Path(run.args.output_dir, 'best.pth')}"


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
    if run.args.log_attention and (last or done % run.args.log_attention == 0):
        records.attention(val_loader.dataset)
    return True


def evaluate_run(run: Run, loader) -> dict:
    """Evaluate the model, and its average if there is one; empty where a signal interrupted.

    Raises:
        NonFiniteLoss: the weights give no finite loss, so they are not saved.
    """
    results = {}
    models = {"test": run.model} | ({"test_ema": run.ema.module.model} if run.ema else {})
    for name, model in models.items():
        if run.processes.world_size > 1:
            distribute_bn(model, run.processes.world_size)  # rank 0's statistics, which are the checkpoint's, for all
        means = evaluate(model, loader, run.processes, run.plan.amp_dtype, run.stop.poll)
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
    path = Path(args.resume or args.finetune or Path(args.output_dir, "best.pth"))
    if not path.exists():
        raise UserError(f"--eval: nothing to evaluate at {path}; name a checkpoint with --resume FILE")
    checkpoint = read_checkpoint(path)
    args = parse_arguments(argv, saved=checkpoint.get("args") or {})
    dataset, num_classes = build_split(args, "val", processes)
    model = build_model(args, num_classes, processes.device)
    for note in load_weights(model, checkpoint, args.checkpoint_key, keep_head=True):
        logger.info(f"{path}: {note}")
    dtype, _ = choose_amp(args.amp, processes.device)
    means = evaluate(model, build_eval_loader(args, processes, dataset), processes, dtype)
    logger.info(describe(means))
    return 0


if __name__ == "__main__":
    sys.exit(main())
