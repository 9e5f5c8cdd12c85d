"""The main loop: train epoch after epoch, evaluate, save, go on; or evaluate alone."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from timm.utils import distribute_bn
from tqdm.contrib.logging import logging_redirect_tqdm

from analysis.attention import similarity_maps
from analysis.images import choose_samples
from arguments import parse_arguments
from build import banner, build_eval_loader, build_plan, build_run, choose_amp
from checkpoints import save, start_or_resume
from datasets import cache_splits, save_subset
from engine import NonFiniteLoss, Run, evaluate, train_one_epoch
from records import Records, epoch_record
from tasks import load_task
from utils import (
    Processes,
    StopSignal,
    UserError,
    logger,
    prepare_output_dir,
)
from weights import load_weights, read_checkpoint

PANEL_IMAGES = 4  # in a panel of attention maps


def train(args, processes: Processes) -> int:
    """Train from where the run stands to the end, or to a signal; returns the exit code."""
    # 1. data and plan: what is wrong with them is known before anything is built
    task = load_task(args.task)
    train_set, val_set = (task.data(args, split, processes) for split in ("train", "val"))
    plan = build_plan(args, processes, train_set)
    if processes.is_main:
        prepare_output_dir(plan.output_dir)
    with StopSignal(processes) as stop, logging_redirect_tqdm([logger]):
        # 2. the parts of the run, set to where it begins
        run = build_run(args, plan, processes, stop, train_set)
        banner(args, run)
        start_or_resume(run, args.resume, args.finetune, args.checkpoint_key)
        if run.epoch == plan.epochs:
            logger.info(f"already trained for {plan.epochs} epochs; {best_so_far(run)}")
            return 0
        if processes.is_main:
            save_subset(train_set, args.sampling_ratio, args.sampling_seed, plan.output_dir / "subset.json")
        if args.cache_images:
            cache_splits([train_set, val_set], processes)
        val_loader = build_eval_loader(args, processes, val_set)
        # 3. epoch after epoch
        finished = True
        with Records(run) as records, place_in_errors(run):
            while finished and run.epoch < plan.epochs:
                finished = train_one_epoch(run, records.step) and finish_epoch(run, val_loader, records)
            if not finished:
                save(run, "checkpoint.pth")
        # 4. the end, for all processes together
        if finished:
            logger.info(f"done; {best_so_far(run)}")
        else:
            logger.info(f"saved at epoch {run.epoch}, step {run.step}; the same command goes on from there")
        processes.leave_together()
        return 0 if finished else stop.exit_code


@contextmanager
def place_in_errors(run: Run) -> Iterator[None]:
    """Add to an error the epoch and the step at which it came."""
    try:
        yield
    except Exception as error:
        error.add_note(f"at epoch {run.epoch}, step {run.step}")
        raise


def best_so_far(run: Run) -> str:
    """The best evaluation in words."""
    if not run.best:
        return "nothing was evaluated"
    metric = run.task.metric
    place = f"epoch {run.best['epoch']}, weights: {run.best['weights']}"
    return f"best {metric} {run.best[metric]:.3f} ({place}) in {run.plan.output_dir / 'best.pth'}"


def finish_epoch(run: Run, val_loader, records: Records) -> bool:
    """Evaluate after the epoch's last update, and save; False where a signal ended the evaluation.

    Files are written in the order best.pth, log.txt, checkpoint.pth: a run killed between two of them does
    the epoch again from the older checkpoint and writes the same once more.
    """
    plan, done = run.plan, run.epoch + 1
    last = done == plan.epochs
    results = {}
    if last or done % plan.eval_every == 0:
        results = evaluate_run(run, val_loader)
        if not results:
            return False
    improved = update_best(run, results)
    record = epoch_record(run, results)
    run.epoch, run.step, run.totals = done, 0, {}
    if improved:
        save(run, "best.pth")
    records.epoch(record, results)
    if last or done % plan.save_every == 0:
        save(run, "checkpoint.pth")
    if run.processes.is_main and plan.log_attention and (last or done % plan.log_attention == 0):
        records.figure("attention", draw_attention(run, val_loader.dataset))
    return True


def evaluate_run(run: Run, loader) -> dict[str, dict]:
    """The results of each of the task's evaluated models, by its name; empty where a signal interrupted.

    Raises:
        NonFiniteLoss: the weights give a result that is not finite, so they are not saved.
    """
    results = {}
    for name, model in run.task.evaluated().items():
        if run.processes.world_size > 1:
            distribute_bn(model, run.processes.world_size)  # rank 0's statistics, which are the checkpoint's, for all
        evaluator = run.task.evaluator()
        means = evaluate(evaluator, model, loader, run.processes, run.plan.amp_dtype, run.stop.poll)
        if means is None:
            return {}
        for result, value in means.items():
            if not math.isfinite(value):
                raise NonFiniteLoss(f"the {name} {result} is {value} after epoch {run.epoch}; not saved")
        results[name] = means
    return results


def update_best(run: Run, results: dict) -> bool:
    """Remember the best result of the reported weights; whether this is it."""
    task = run.task
    name = "test" if task.reported == task.weight_names[0] else f"test_{task.reported}"
    if not results or results[name][task.metric] <= run.best.get(task.metric, -math.inf):
        return False
    run.best = {task.metric: results[name][task.metric], "epoch": run.epoch, "weights": task.reported}
    return True


def draw_attention(run: Run, dataset):
    """Each head's attention on a few validation images, always the same, of different classes: a figure."""
    from analysis.panels import attention_panel  # Matplotlib takes a second to import, and most runs never draw

    samples = choose_samples(dataset, PANEL_IMAGES)
    images = torch.stack([image for image, _ in samples])
    similarity = similarity_maps(run.task.model.eval(), images.to(run.processes.device))
    return attention_panel(images, similarity, titles=[dataset.classes[label] for _, label in samples])


def evaluate_only(argv, args, processes: Processes) -> int:
    """Evaluate one file; what its run was told and is not given here (task, model, sizes) is taken from it."""
    path = Path(args.resume or args.finetune or Path(args.output_dir, "best.pth"))
    if not path.exists():
        raise UserError(f"--eval: nothing to evaluate at {path}; name a checkpoint with --resume FILE")
    checkpoint = read_checkpoint(path)
    args = parse_arguments(argv, saved=checkpoint.get("args") or {})
    task_class = load_task(args.task)
    dataset = task_class.data(args, "val", processes)
    task = task_class(args, dataset, processes.device)
    for note in load_weights(task.model, checkpoint, args.checkpoint_key, keep_head=True):
        logger.info(f"{path}: {note}")
    dtype, _ = choose_amp(args.amp, processes.device)
    loader = build_eval_loader(args, processes, dataset)
    results = evaluate(task.evaluator(), task.model, loader, processes, dtype)
    logger.info(task.describe(results or {}))
    return 0
