"""The main loop: train, evaluate and save, epoch by epoch; or evaluate a single checkpoint."""

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import torch
from timm.utils import distribute_bn

from analysis.attention import similarity_maps
from analysis.images import choose_samples
from arguments import default_arguments, is_given, parse_arguments
from augmentation import normalise
from batches import prepare
from build import build_eval_loader, build_plan, build_run, choose_amp, log_banner
from checkpoints import NoImages, load_trained, named, save, start_or_resume
from datasets import cache_splits, save_subset
from engine import NonFiniteLoss, Run, evaluate, train_one_epoch
from export import write_weights
from fetch import is_name, short_name
from holdout import keep
from models import MODELS
from owner import owned
from records import Records, epoch_record
from samplers import Draw
from tasks import Task, load_task
from tasks.scores import Scores
from tasks.settings import holdout
from utils import Processes, RunError, StopSignal, UserError, logger, prepare_output_dir
from weights import is_own, read_checkpoint, select_weights

PANEL_IMAGES = 4  # images in TensorBoard's panels of attention and of predictions
EVALUATED_WITH = (
    "task model model_kwargs input_size patch_size last_block sar_similarity sar_query "
    "data_set data_path crop_pct eval_interpolation skip_unreadable".split()
)
"""The arguments that an evaluation depends on, for eval.json; some tasks lack some."""


def train(args, processes: Processes) -> int:
    """Train to the last epoch or until a signal; returns the exit code."""
    # 1. data and plan: their errors come before a model is built
    task = load_task(args.task)
    train_set = task.data(args, "train", processes)
    val_set = None if args.val_split == 0 else task.data(args, "val", processes)
    plan = build_plan(args, processes, train_set)
    with ExitStack() as until_the_end:
        owner = None
        if processes.is_main:
            prepare_output_dir(plan.output_dir)
            owner = until_the_end.enter_context(owned(plan.output_dir))
        stop = until_the_end.enter_context(StopSignal(processes))
        # 2. build the run, and start or resume it
        run = build_run(args, plan, processes, stop, train_set)
        run.owner = owner
        log_banner(args, run)
        start_or_resume(run, args.resume, args.finetune, args.checkpoint_key)
        if run.epoch == plan.epochs:
            logger.info(f"already trained for {plan.epochs} epochs; {describe_best(run)}")
            return 0
        if processes.is_main:
            save_subset(train_set, args.sampling_ratio, args.sampling_seed, plan.output_dir / "subset.json")
            if chosen := holdout(args):
                keep(args.data_path, chosen, plan.output_dir)
        if args.cache_images:
            cache_splits([split for split in (train_set, val_set) if split is not None], processes)
        val_loader = None if val_set is None else build_eval_loader(args, processes, val_set)
        # 3. train, evaluate and save, epoch by epoch
        finished = True
        with Records(run, 0 if val_set is None else len(val_set)) as records, add_position_to_errors(run):
            while finished and run.epoch < plan.epochs:
                finished = train_one_epoch(run, records.step, records.update) and finish_epoch(run, val_loader, records)
            if not finished:
                save(run, "checkpoint.pth")
        # 4. report, and end all processes together
        if finished:
            logger.info(f"done; {describe_best(run)}")
        else:
            logger.info(f"saved at epoch {run.epoch}, update {run.step}; the same command resumes the run")
        processes.barrier()
        return 0 if finished else stop.exit_code


@contextmanager
def add_position_to_errors(run: Run) -> Iterator[None]:
    """Add the epoch and the update to an exception that passes through."""
    try:
        yield
    except Exception as error:
        error.add_note(f"at epoch {run.epoch}, update {run.step}")
        raise


def describe_best(run: Run) -> str:
    """The best evaluation of the run in words, for the log."""
    if not run.best:
        return "nothing was evaluated"
    metric = run.task.metric
    place = f"epoch {run.best['epoch']}, weights: {run.best['weights']}"
    return f"best {metric} {run.best[metric]:.3f} ({place}) in {run.plan.output_dir / 'best.pth'}"


def finish_epoch(run: Run, val_loader, records: Records) -> bool:
    """Evaluate and save at the end of an epoch; False if a signal interrupted the evaluation.

    Without a loader of validation images nothing is evaluated.

    Files are written in the order best.pth, log.txt, checkpoint.pth. A run that is killed between two of them repeats
    the epoch from the older checkpoint and writes the same files again.
    """
    # 1. evaluate
    plan, done = run.plan, run.epoch + 1
    last = done == plan.epochs
    results = {}
    if val_loader is not None and (last or done % plan.eval_every == 0):
        with saved_on_error(run):
            results = evaluate_run(run, val_loader)
        if not results:
            return False
    # 2. record the epoch, and move on to the next one
    improved = update_best(run, results)
    record = epoch_record(run, results)
    run.epoch, run.step, run.totals = done, 0, {}
    # 3. write the files, in this order
    if improved:
        save(run, "best.pth")
    records.epoch(record, results)
    if last or done % plan.save_every == 0:
        save(run, "checkpoint.pth")
    # 4. draw panels
    if run.processes.is_main and val_loader is not None:
        if results:
            for number, picture in enumerate(draw_predictions(run, val_loader.dataset), 1):
                records.picture(f"predictions/{number}", picture)
        if plan.log_attention and (last or done % plan.log_attention == 0):
            for number, figure in enumerate(draw_attention(run, val_loader.dataset), 1):
                records.figure(f"attention/{number}", figure)
    return True


@contextmanager
def saved_on_error(run: Run) -> Iterator[None]:
    """Save the trained epoch if its evaluation fails, as on a broken image: the same command goes on with it."""
    try:
        yield
    except NonFiniteLoss:
        raise
    except Exception:
        save(run, "checkpoint.pth")
        logger.info(f"epoch {run.epoch} is saved before its evaluation, which failed; the same command repeats it")
        raise


def evaluate_run(run: Run, loader) -> dict[str, dict]:
    """Evaluate every model that the task names; returns their results by name, empty if a signal interrupted.

    Raises:
        NonFiniteLoss: a result is not finite; the weights are not saved.
    """
    results = {}
    for name, model in run.task.evaluated().items():
        if run.processes.world_size > 1:
            distribute_bn(
                model, run.processes.world_size
            )  # all ranks take rank 0's statistics, which the checkpoint has
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
    """Update ``run.best`` if the reported weights have improved; returns whether they have."""
    task = run.task
    name = "test" if task.reported == task.weight_names[0] else f"test_{task.reported}"
    if not results or results[name][task.metric] <= run.best.get(task.metric, -math.inf):
        return False
    best = results[name]
    run.best = {task.metric: best[task.metric], "epoch": run.epoch, "weights": task.reported, "results": best}
    return True


def draw_attention(run: Run, dataset) -> list:
    """Figures of each head's attention on the same few validation images, which are of different classes."""
    from analysis.panels import attention_panel  # imports Matplotlib, which takes a second

    dataset = getattr(dataset, "parts", [dataset])[-1]  # of a k-NN evaluation, the images after its bank
    samples = choose_samples(dataset, PANEL_IMAGES)
    images = normalise(torch.stack([image for image, _ in samples]))
    similarity = similarity_maps(run.task.model.eval(), images.to(run.processes.device))
    names = [dataset.classes[label] for _, label in samples]
    return [attention_panel(*panel) for panel in zip(images, similarity, names, strict=True)]


@torch.inference_mode()
def draw_predictions(run: Run, dataset) -> list:
    """Small pictures of truth and prediction of the same few validation images; none for a task without `Task.truth`.

    Nothing is drawn from the global generators, so the training is the same with and without them.
    """
    task, pictures = run.task.eval(), []
    if type(task).truth is Task.truth:
        return []
    for index in np.linspace(0, len(dataset) - 1, num=min(PANEL_IMAGES, len(dataset)), dtype=int).tolist():
        item = dataset[Draw(index, 0, index)]
        truth = task.truth(item)
        from analysis.pictures import draw_panel  # imports Matplotlib, which takes a second

        predicted = task.predict(prepare(item, run.processes.device))
        pictures.append(draw_panel(item, {"truth": truth, "predicted": predicted}, run.plan.classes))
    return pictures


def evaluate_only(argv, args, processes: Processes) -> int:
    """Evaluate or export a checkpoint; task, model and sizes that are not given are those of its run."""
    # 1. the checkpoint, and the images unless it is exported alone and names its classes
    path = args.resume or args.finetune or str(Path(args.output_dir, "best.pth"))
    if not (is_name(path) or Path(path).exists()):
        what = "export" if args.export else "evaluate"
        raise UserError(f"nothing to {what} at {path}; name a checkpoint with --resume FILE or --finetune FILE")
    checkpoint = read_checkpoint(path)
    args = parse_arguments(argv, saved=checkpoint.get("args") or {})
    if is_name(path) and not is_given("--output-dir", argv):  # a folder of its own, and not the default one of a run
        args.output_dir = str(Path("output", f"{short_name(path).replace('/', '_')}_{args.data_set}"))
    alone = args.export and not is_given("--eval", argv) and not default_arguments(args.task)["eval"]
    own = alone and is_own(checkpoint)
    classes = checkpoint["data"]["classes"] if own else ()
    dataset = NoImages(classes) if own else evaluated_images(args, checkpoint, path, processes)
    task = load_trained(args, dataset, checkpoint, path, processes.device)
    # 2. export it
    if args.export and processes.is_main:
        export(task.exported, args, dataset.classes)
    if alone:
        processes.barrier()
        return 0
    # 3. evaluate
    dtype, _ = choose_amp(args.amp, processes.device)
    loader = build_eval_loader(args, processes, dataset)
    evaluator = task.evaluator()
    results = evaluate(evaluator, task.model, loader, processes, dtype) or {}
    bad = [name for name, value in results.items() if not math.isfinite(value)]
    # 4. report, and end all processes together
    if evaluator.scores is not None and len(evaluator.scores) and processes.is_main and not bad:
        elsewhere = is_name(path) or is_given("--output-dir", argv)
        folder = Path(args.output_dir) if elsewhere else Path(path).parent
        weights, precision = select_weights(checkpoint, args.checkpoint_key)[1], str(dtype or torch.float32)
        summary = {"checkpoint": path, "weights": weights, "precision": precision, "results": results}
        write_files(folder / "eval", args, summary, evaluator.scores, dataset)
    processes.barrier()
    logger.info(task.describe(results))
    if bad:
        raise NonFiniteLoss(f"{path}: {', '.join(bad)} is not finite; try --amp off")
    return 0


def evaluated_images(args, checkpoint, path: str, processes: Processes):
    """The validation images, labelled as the classes of the checkpoint.

    Raises:
        UserError: the data set has nothing to evaluate with, or classes that the checkpoint lacks.
    """
    task_class = load_task(args.task)
    dataset = task_class.data(args, "val", processes)
    if dataset is None:
        raise UserError(f"--eval: --data-set {args.data_set} has no classes to evaluate with; name another set")
    if is_own(checkpoint) and checkpoint["args"].get("task", "classify") == args.task:
        classes = (checkpoint.get("data") or {}).get("classes")
        with named(path):
            for note in task_class.relabel(dataset, classes) if classes else []:
                logger.info(f"{path}: {note}")
    return dataset


def export(model: torch.nn.Module, args, classes: Sequence[str]) -> None:
    """Write ``--export``, and log who can read it."""
    how = write_weights(model, args.export, args, classes)
    logger.info(f"{args.export}: written; {how}")
    if args.last_block != "standard":
        logger.warning(
            f"{args.export}: its last block is {args.last_block!r}, which other programs' ViTs lack; "
            f"import {MODELS[args.model].module} before timm builds it"
        )


def write_files(folder: Path, args, summary: dict, scores: Scores, dataset) -> None:
    """Write the files of `analysis.evaluation`, and log the calibration error; what cannot be written is a warning.

    Args:
        folder: of the files.
        args: of the evaluation; ``eval.json`` gets those it depends on, `EVALUATED_WITH`.
        summary: what else is in ``eval.json``; its ``results`` get the ``calibration_error``.
        scores: of at least one image.
        dataset: the evaluated images.
    """
    from analysis.evaluation import calibration_error, write_evaluation  # imports Matplotlib, which takes a second

    error = calibration_error(scores.confidence, scores.predicted == scores.true)
    summary = summary | {
        "results": summary["results"] | {"calibration_error": error},
        "arguments": {name: value for name, value in vars(args).items() if name in EVALUATED_WITH},
    }
    logger.info(f"expected calibration error {error:.2f} %")
    try:
        write_evaluation(folder, summary, scores, dataset)
    except (UserError, RunError) as failure:
        logger.warning(f"{folder} lacks files of this evaluation: {failure}")
    else:
        logger.info(f"confusions, calibration and the worst images: {folder}")
