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

import timm
import torch
from timm.data import Mixup
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.tensorboard import SummaryWriter
from tqdm.contrib.logging import logging_redirect_tqdm

from arguments import brought_defaults, differences, parse_arguments
from datasets import build_dataset, build_loader, build_transform
from engine import NonFiniteLoss, Plan, Run, evaluate, train_one_epoch
from samplers import EvalSampler, TrainSampler
from utils import (
    EpochLog,
    Processes,
    RunError,
    StopSignal,
    UserError,
    end_processes,
    environment,
    logger,
    prepare_output_dir,
    start_logging,
    start_processes,
    write_atomically,
    write_json,
)
from weights import load_weights, read_checkpoint


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


# ------------------------------------------------------------------------------------------------ building


def build_model(args, num_classes: int, device: torch.device) -> nn.Module:
    """The model that the arguments describe, on ``device``."""
    sizes = {"img_size": args.input_size, "patch_size": args.patch_size} | args.model_kwargs
    torch.manual_seed(args.seed)
    try:
        model = timm.create_model(
            args.model,
            num_classes=num_classes,
            last_block=args.last_block,
            similarity=args.sar_similarity,
            proj_drop_rate=args.drop,
            drop_path_rate=args.drop_path,
            **sizes,
        )
    except (TypeError, ValueError, AssertionError) as error:
        raise UserError(f"--model {args.model} with {sizes}: {error}") from None
    if args.grad_checkpointing:
        model.set_grad_checkpointing()
    return model.to(device)


def build_plan(args, processes: Processes, num_images: int) -> Plan:
    """Work out what follows from arguments, data and processes.

    Raises:
        UserError: a total batch that these processes cannot make up, or that the data cannot fill.
    """
    at_once = args.batch_size * processes.world_size
    if args.total_batch % at_once:
        fitting = [
            size
            for size in range(2, args.total_batch // processes.world_size + 1, 2)
            if args.total_batch % (size * processes.world_size) == 0
        ]
        raise UserError(
            f"--batch-size {args.batch_size} x {processes.world_size} processes does not divide "
            f"--total-batch {args.total_batch}; batch sizes that do: "
            f"{', '.join(map(str, fitting[-6:])) or 'none'}; or give --total-batch {at_once}"
        )
    if num_images < args.total_batch:
        raise UserError(
            f"{num_images} training images are fewer than one --total-batch of {args.total_batch}; "
            f"choose one of at most {num_images}"
        )
    dtype, reason = choose_amp(args.amp, processes.device)
    return Plan(
        total_batch=args.total_batch,
        accumulation=args.total_batch // at_once,
        updates_per_epoch=num_images // args.total_batch,
        epochs=args.epochs + args.cooldown_epochs,
        lr=args.lr if args.unscale_lr else args.lr * args.total_batch / 512,
        amp_dtype=dtype,
        amp_reason=reason,
    )


def choose_amp(choice: str, device: torch.device) -> tuple[torch.dtype | None, str]:
    """The data type of the forward pass (None: float32), and why."""
    if choice == "off":
        return None, "--amp off"
    if choice != "auto":
        if choice == "fp16" and device.type != "cuda":
            raise UserError("--amp fp16 needs a GPU; use auto, bf16 or off")
        return {"bf16": torch.bfloat16, "fp16": torch.float16}[choice], f"--amp {choice}"
    if device.type != "cuda":
        return None, f"no mixed precision by default on {device.type}"
    major, minor = torch.cuda.get_device_capability(device)
    if major >= 8:
        return torch.bfloat16, f"this GPU (sm_{major}{minor}) has bf16"
    return torch.float16, f"this GPU (sm_{major}{minor}) has no bf16; with gradient scaling"


def build_mixup(args, num_classes: int) -> Mixup | None:
    """timm's Mixup and CutMix as the arguments say, or None where both are off."""
    if not (args.mixup or args.cutmix):
        return None
    return Mixup(
        mixup_alpha=args.mixup,
        cutmix_alpha=args.cutmix,
        prob=args.mixup_prob,
        switch_prob=args.mixup_switch_prob,
        mode=args.mixup_mode,
        label_smoothing=args.smoothing,
        num_classes=num_classes,
    )


def build_optimizer(args, model: nn.Module, lr: float) -> torch.optim.Optimizer:
    """timm's optimiser of that name, fused where torch has a fused one."""
    options = {"eps": args.opt_eps} | ({"betas": tuple(args.opt_betas)} if args.opt_betas else {})
    if args.opt in ("adam", "adamw", "sgd"):
        options["fused"] = True
    if args.opt == "sgd":
        del options["eps"]
    try:
        return create_optimizer_v2(model, args.opt, lr=lr, weight_decay=args.weight_decay, **options)
    except (ValueError, TypeError, AssertionError) as error:
        raise UserError(f"--opt {args.opt}: {error}") from None


def build_run(args, plan: Plan, processes: Processes, stop: StopSignal, train_set, num_classes: int) -> Run:
    """Put the parts of a training run together."""
    device = processes.device
    model = build_model(args, num_classes, device)
    network = torch.compile(model) if args.compile else model
    if processes.world_size > 1:
        ids = [device.index] if device.type == "cuda" else None
        network = DistributedDataParallel(network, device_ids=ids, gradient_as_bucket_view=True)
    optimizer = build_optimizer(args, model, plan.lr)
    scheduler, _ = create_scheduler_v2(
        optimizer,
        sched=args.sched,
        num_epochs=args.epochs,
        warmup_epochs=args.warmup_epochs,
        warmup_lr=args.warmup_lr,
        min_lr=args.min_lr,
        cooldown_epochs=args.cooldown_epochs,
        decay_epochs=args.decay_epochs,
        decay_rate=args.decay_rate,
        step_on_epochs=not args.sched_on_updates,
        updates_per_epoch=plan.updates_per_epoch,
    )
    mixup = build_mixup(args, num_classes)
    sampler = TrainSampler(
        len(train_set), args.batch_size, plan.accumulation, processes.rank, processes.world_size, args.seed
    )
    return Run(
        args=args,
        plan=plan,
        processes=processes,
        model=model,
        network=network,
        ema=ModelEmaV3(model, decay=args.model_ema_decay) if args.model_ema else None,
        optimizer=optimizer,
        scheduler=scheduler,
        scaler=torch.amp.GradScaler(device.type, enabled=plan.amp_dtype == torch.float16),
        # Mixup's soft targets are smoothed already
        criterion=nn.CrossEntropyLoss(label_smoothing=0.0 if mixup else args.smoothing),
        mixup=mixup,
        loader=build_loader(train_set, sampler, args.batch_size, args.num_workers, device.type == "cuda"),
        stop=stop,
    )


def build_eval_loader(args, processes: Processes, dataset):
    """This rank's share of a validation set; larger batches, as nothing is kept for a backward pass."""
    sampler = EvalSampler(len(dataset), processes.rank, processes.world_size)
    return build_loader(dataset, sampler, 2 * args.batch_size, args.num_workers, processes.device.type == "cuda")


def build_split(args, split: str):
    """One split of the data set with its transform: ``(dataset, num_classes)``."""
    transform = build_transform(split == "train", args)
    return build_dataset(
        args.data_set,
        split,
        args.data_path,
        transform,
        seed=args.seed,
        skip_unreadable=args.skip_unreadable,
    )


# --------------------------------------------------------------------------------------------- checkpoints


def snapshot(run: Run) -> dict:
    """Everything a run needs to go on, as tensors and plain values (no random state: there is none)."""
    return {
        "model": run.model.state_dict(),
        "ema": run.ema.module.state_dict() if run.ema else None,
        "optimizer": run.optimizer.state_dict(),
        "scheduler": run.scheduler.state_dict(),
        "scaler": run.scaler.state_dict(),
        "epoch": run.epoch,
        "step": run.step,
        "best": run.best,
        "totals": run.totals,
        "args": vars(run.args),
    }


def save(run: Run, *names: str) -> None:
    """Write the run to files of these names in its output folder, in this order."""
    if not run.processes.is_main:
        return
    content = snapshot(run)
    for name in names:
        write_atomically(Path(run.args.output_dir, name), lambda file: torch.save(content, file))


def restore(run: Run, checkpoint: dict, source: Path) -> None:
    """Set the run to where the checkpoint was written.

    Raises:
        UserError: the checkpoint belongs to a run with other mathematics, or to none of this program.
    """
    missing = [key for key in ("model", "optimizer", "epoch", "step", "args") if key not in checkpoint]
    if missing:
        raise UserError(
            f"{source} has no {', '.join(missing)}: not a checkpoint of this program; "
            "to start from its weights use --finetune"
        )
    different = differences(run.args, checkpoint["args"])
    if different:
        raise UserError(
            f"{source} was written with other arguments; give those, or another --output-dir ("
            + "; ".join(different)
            + ")"
        )
    run.model.load_state_dict(checkpoint["model"])
    if run.ema is not None:
        run.ema.module.load_state_dict(checkpoint["ema"])
    run.optimizer.load_state_dict(checkpoint["optimizer"])
    run.scheduler.load_state_dict(checkpoint["scheduler"])
    run.scaler.load_state_dict(checkpoint["scaler"])
    run.epoch, run.step = checkpoint["epoch"], checkpoint["step"]
    run.best, run.totals = checkpoint["best"], checkpoint["totals"]


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


# ------------------------------------------------------------------------------------------------- the run


def banner(run: Run, num_images: int) -> None:
    """Say what is about to happen, derived values included."""
    args, plan, processes = run.args, run.plan, run.processes
    parameters = sum(p.numel() for p in run.model.parameters())
    dtype = str(plan.amp_dtype or torch.float32).removeprefix("torch.")
    batch = f"{args.batch_size} a process x {processes.world_size} x {plan.accumulation} accumulated"
    lr = f"{plan.lr:g}" if args.unscale_lr else f"{args.lr:g} x {plan.total_batch}/512 = {plan.lr:g}"
    lines = {
        "model": f"{args.model}, {parameters:,} parameters, last block {args.last_block}",
        "data": f"{args.data_set}, {num_images:,} images, {args.input_size} px, patches of {args.patch_size}",
        "loss": f"cross-entropy + lambda x spatial entropy, lambda {args.sar_weight:g} {args.sar_schedule}",
        "batch": f"{batch} = {plan.total_batch}; {plan.updates_per_epoch} updates an epoch",
        "length": f"{plan.epochs} epochs",
        "lr": f"{lr}, {args.sched} with {args.warmup_epochs} epochs of warm-up",
        "precision": f"{dtype} ({plan.amp_reason})",
        "device": f"{processes.device}, {torch.get_num_threads()} threads",
        "output": args.output_dir,
    }
    brought = brought_defaults(args)
    if brought:
        lines[f"{args.data_set} brings"] = ", ".join(f"{name} {value}" for name, value in brought.items())
    for name, text in lines.items():
        logger.info(f"{name:>14}  {text}")


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


def one_epoch(run: Run, val_loader, records: "Records") -> bool:
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


def epoch_record(run: Run, results: dict) -> dict:
    """The epoch's line of log.txt, under DeiT's names where DeiT has the value."""
    totals = dict(run.totals)
    updates, seconds, data_time = (totals.pop(name) for name in ("updates", "seconds", "data_time"))
    unreadable = totals.pop("unreadable")
    micro_steps = updates * run.plan.accumulation
    return {
        "epoch": run.epoch,
        **{f"train_{name}": total / micro_steps for name, total in totals.items()},
        "train_unreadable": unreadable,
        **results,
        "reported": run.args.report,
        "n_parameters": sum(p.numel() for p in run.model.parameters() if p.requires_grad),
        "images_per_second": run.plan.total_batch * updates / seconds,
        "data_time": data_time / updates,
        "step_time": seconds / updates,
    }


class Records:
    """Where a run tells how it goes: log.txt, TensorBoard, and the terminal. Silent on ranks other than 0."""

    def __init__(self, run: Run):
        self.run, self.bar, self.log, self.board = run, None, None, None
        if not run.processes.is_main:
            return
        output = Path(run.args.output_dir)
        write_json(output / "args.json", vars(run.args))
        write_json(output / "environment.json", environment())
        self.log = EpochLog(output / "log.txt", run.epoch)
        self.board = SummaryWriter(str(output), purge_step=self._global_step())

    def _global_step(self) -> int:
        return self.run.epoch * self.run.plan.updates_per_epoch + self.run.step

    def step(self, means: dict) -> None:
        """Tell the means since the last logging step."""
        if not self.run.processes.is_main:
            return
        for name, value in means.items():
            self.board.add_scalar(f"train/{name}", value, self._global_step())
        position = f"epoch {self.run.epoch} [{self.run.step}/{self.run.plan.updates_per_epoch}]"
        logger.info(f"{position}  " + "  ".join(f"{name} {value:.4g}" for name, value in means.items()))

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

    def close(self) -> None:
        """Write what is still in buffers."""
        if self.board is not None:
            self.board.close()


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
