"""Builds the parts of a run from the arguments: plan, loaders, optimiser, wrapped network; and logs the banner."""

from pathlib import Path

import torch
from timm.optim import create_optimizer_v2
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from arguments import accumulation, data_set_defaults
from datasets import build_loader
from engine import Plan, Run
from readers import sets_of
from samplers import EvalSampler, TrainSampler
from schedules import DRLOC_WARMUP_EPOCHS
from tasks import Task, load_task
from utils import Processes, StopSignal, UserError, logger


def build_eval_loader(args, processes: Processes, dataset):
    """A loader of this rank's share of the validation images, in batches of twice the training's size."""
    sampler = EvalSampler(len(dataset), processes.rank, processes.world_size)
    return build_loader(dataset, sampler, 2 * args.batch_size, args.num_workers, processes.device.type == "cuda")


def build_plan(args, processes: Processes, train_set) -> Plan:
    """Compute what follows from arguments, data and processes.

    Raises:
        UserError: the total batch is not divisible among the processes, or larger than the training set.
    """
    num_images = len(train_set)
    if num_images < args.total_batch:
        raise UserError(
            f"{num_images} training images are fewer than one --total-batch of {args.total_batch}; "
            f"choose one of at most {num_images}"
        )
    dtype, reason = choose_amp(args.amp, processes.device)
    return Plan(
        output_dir=Path(args.output_dir),
        seed=args.seed,
        total_batch=args.total_batch,
        accumulation=accumulation(args, processes.world_size),
        updates_per_epoch=num_images // args.total_batch,
        epochs=args.epochs + args.cooldown_epochs,
        num_images=num_images,
        classes=list(getattr(train_set, "classes", ())),
        amp_dtype=dtype,
        amp_reason=reason,
        sar_loss=args.sar_loss,
        print_every=args.print_every,
        eval_every=args.eval_every,
        save_every=args.save_every,
        log_attention=args.log_attention,
    )


def choose_amp(choice: str, device: torch.device) -> tuple[torch.dtype | None, str]:
    """The data type of the forward pass (None: float32), and the reason for it."""
    if choice == "off":
        return None, "--amp off"
    if choice != "auto":
        if device.type == "mps":
            raise UserError(f"--amp {choice}: on an Apple GPU this program computes in float32; leave --amp out")
        if choice == "fp16" and device.type != "cuda":
            raise UserError("--amp fp16 needs a GPU; use auto, bf16 or off")
        return {"bf16": torch.bfloat16, "fp16": torch.float16}[choice], f"--amp {choice}"
    if device.type != "cuda":
        return None, f"no mixed precision by default on {device.type}"
    major, minor = torch.cuda.get_device_capability(device)
    if major >= 8:
        return torch.bfloat16, f"this GPU (sm_{major}{minor}) has bf16"
    return torch.float16, f"this GPU (sm_{major}{minor}) has no bf16; with gradient scaling"


def build_optimizer(args, task: Task) -> torch.optim.Optimizer:
    """timm's optimiser ``--opt`` for the task's parameter groups, fused where torch has a fused kernel.

    Raises:
        UserError: timm has no such optimiser, or it does not take these options.
    """
    options = {"eps": args.opt_eps} | ({"betas": tuple(args.opt_betas)} if args.opt_betas else {})
    if args.opt in ("adam", "adamw", "sgd", "momentum"):
        options["fused"] = True
    if args.opt in ("sgd", "momentum"):
        del options["eps"]
    try:
        return create_optimizer_v2(task.parameter_groups(args), args.opt, lr=task.learning_rate.peak, **options)
    except (ValueError, TypeError, AssertionError) as error:
        raise UserError(f"--opt {args.opt}: {error}") from None


def wrap(task: Task, plan: Plan, processes: Processes, compiled: bool) -> nn.Module:
    """The task as the training step calls it: in DistributedDataParallel for several processes, and compiled.

    Every parameter gets a gradient in every micro-batch, so the graph is static and has no unused parameters.
    DistributedDataParallel can use that only if every backward pass reduces gradients, and if torch.compile does not
    split the graph.
    """
    network: nn.Module = task
    if processes.world_size > 1:
        ids = [processes.device.index] if processes.device.type == "cuda" else None
        network = DistributedDataParallel(
            task,
            device_ids=ids,
            gradient_as_bucket_view=True,
            static_graph=plan.accumulation == 1 and not compiled,
        )
    if compiled:
        (task.compiled_part or network).compile()
    return network


def build_run(args, plan: Plan, processes: Processes, stop: StopSignal, train_set) -> Run:
    """Build the parts of a training run. The task comes first, as it draws the weights from the seeded generator."""
    device = processes.device
    task = load_task(args.task)(args, train_set, device)
    sampler = TrainSampler(
        plan.num_images,
        args.batch_size,
        plan.accumulation,
        processes.rank,
        processes.world_size,
        plan.seed,
        views=task.repeats,
    )
    return Run(
        arguments=vars(args),
        plan=plan,
        processes=processes,
        task=task,
        network=wrap(task, plan, processes, args.compile),
        optimizer=build_optimizer(args, task),
        scaler=torch.amp.GradScaler(device.type, enabled=plan.amp_dtype == torch.float16),
        loader=build_loader(train_set, sampler, args.batch_size, args.num_workers, device.type == "cuda"),
        sampler=sampler,
        stop=stop,
    )


def _describe_loss(args, task: Task) -> str:
    parts = [task.main_loss]
    if args.sar_weight > 0:
        similarity = "" if args.sar_similarity == "dot" else f" of {args.sar_similarity} similarity"
        parts.append(f"{args.sar_weight:g} ({args.sar_schedule}) x {args.sar_loss.replace('-', ' ')}{similarity}")
    if args.drloc_weight > 0:
        parts.append(f"{args.drloc_weight:g} (at its peak) x dense relative localisation")
    return " + ".join(parts)


def log_banner(args, run: Run) -> None:
    """Log the settings of the run, derived values included, and warn of those that have no full effect."""
    # 1. derived values in words
    task, plan, processes = run.task, run.plan, run.processes
    parameters, peak = sum(p.numel() for p in task.model.parameters()), task.learning_rate.peak
    dtype = str(plan.amp_dtype or torch.float32).removeprefix("torch.")
    batch = f"{args.batch_size} per process x {processes.world_size} x {plan.accumulation} accumulated"
    lr = f"{peak:g}" if peak == args.lr else f"{args.lr:g} x {plan.total_batch}/{task.reference_batch} = {peak:g}"
    # 2. one line each
    lines = {
        "model": f"{args.model}, {parameters:,} parameters, last block {args.last_block}",
        "data": f"{args.data_set} ({sets_of(args.task)[args.data_set].about}): {plan.num_images:,} training images",
        "input": f"{args.input_size} px in patches of {args.patch_size}",
        "loss": _describe_loss(args, task),
        "batch": f"{batch} = {plan.total_batch}; {plan.updates_per_epoch} updates per epoch",
        "length": f"{plan.epochs} epochs",
        "lr": f"{lr}, {args.sched} with {args.warmup_epochs} epochs of warm-up",
        "precision": f"{dtype} ({plan.amp_reason})",
        "device": f"{processes.device}, {torch.get_num_threads()} threads",
        "output": args.output_dir,
    }
    lines |= task.notes()
    defaults = data_set_defaults(args, plan.num_images, processes.world_size)
    if defaults:
        size = f" of {plan.num_images:,} images" * (sets_of(args.task)[args.data_set].count is not None)
        values = ", ".join(f"{name} {value}" for name, value in defaults.items())
        lines["defaults"] = f"of {args.data_set}{size}: {values}"
    for name, text in lines.items():
        logger.info(f"{name:>14}  {text}")
    # 3. settings that have no full effect
    warn_of_settings(args, task, plan)


def warn_of_settings(args, task: Task, plan: Plan) -> None:
    """Warn of settings that cannot have their full effect in a run of this length."""
    peak, updates = task.learning_rate.peak, plan.epochs * plan.updates_per_epoch
    if args.warmup_epochs >= plan.epochs:
        logger.warning(
            f"--warmup-epochs {args.warmup_epochs} is not less than the {plan.epochs} epochs of the run: "
            f"lr does not reach its peak, {peak:g}"
        )
    if args.val_split == 0:
        logger.warning("--val-split 0: no validation images, so nothing is evaluated, and there is no best.pth")
    kept = getattr(args, "model_ema_decay", 0) ** updates
    if task.averaged is not None and kept > 0.5 and not getattr(args, "model_ema_warmup", False):
        logger.warning(
            f"--model-ema-decay {args.model_ema_decay:g}: after all {updates:,} updates the average "
            f"still holds {100 * kept:.0f} % of the initial weights; lower it, or give --model-ema-warmup or "
            "--no-model-ema"
        )
    if args.drloc_weight and plan.epochs <= DRLOC_WARMUP_EPOCHS:
        logger.warning(
            f"--drloc-weight {args.drloc_weight:g} is reached at epoch {DRLOC_WARMUP_EPOCHS} only; "
            f"this run has {plan.epochs} epochs"
        )
